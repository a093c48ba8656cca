"""Generate with a model of transformers whose expert layers run through `moe_forward`.

    python examples/generate_with_transformers.py Qwen/Qwen3-30B-A3B "The capital of France is"

Without arguments a small Qwen3-MoE with random weights generates tokens, and they are compared with its own.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moe_dispatch import stats
from moe_dispatch.integrations.transformers import register


def main(arguments: list[str]) -> None:
    """Generate, and print which backends ran."""
    if len(arguments) not in (0, 2):
        sys.exit("usage: generate_with_transformers.py [MODEL PROMPT]")
    register()
    if arguments:
        name, prompt = arguments
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16, device_map="auto", experts_implementation="moe_dispatch"
        )
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
    else:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        prompt_ids = torch.arange(4)[None]
        own = model.generate(prompt_ids, max_new_tokens=8, do_sample=False)
        model.set_experts_implementation("moe_dispatch")
        ours = model.generate(prompt_ids, max_new_tokens=8, do_sample=False)
        print(f"tokens {ours[0].tolist()}, equal to the model's own: {torch.equal(own, ours)}")
    print(f"backends that ran: {stats()}")


if __name__ == "__main__":
    main(sys.argv[1:])
