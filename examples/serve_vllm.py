"""An MoE model served by vLLM, its expert layers run by moe_dispatch.

    python examples/serve_vllm.py Qwen/Qwen3-30B-A3B --prompt "The capital of France is"
    python examples/serve_vllm.py --dummy      # no download: a small model with random weights

A server needs no script: ``MOE_DISPATCH_VLLM=1 vllm serve Qwen/Qwen3-30B-A3B``. This one uses vLLM's offline class in
one process, so that it can say afterwards which backends ran.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# Both are read when vLLM starts an engine.
os.environ.setdefault("MOE_DISPATCH_VLLM", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# Qwen3's architecture, small enough to start in a minute.
SMALL_MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 512,
    "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 512, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def start_small_model(**changes: int) -> Any:
    """An engine with random weights that takes 2 GiB of the GPU, for prompts of token ids.

    Args:
        **changes: Values of the model's config in place of those above.
    """
    from vllm import LLM

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SMALL_MODEL | changes))
    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, attention_backend="TRITON_ATTN", seed=0,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, max_model_len=512, max_num_seqs=16,
        max_num_batched_tokens=512, enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
    )  # fmt: skip


def main() -> None:
    """Generate, and say which backends ran."""
    parser = argparse.ArgumentParser(description="Generate with vLLM, its expert layers run by moe_dispatch.")
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-30B-A3B")
    parser.add_argument("--dummy", action="store_true", help="a small model with random weights in its place")
    parser.add_argument("--prompt", default="The capital of France is")
    arguments = parser.parse_args()

    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        parser.error(f"vLLM cannot be imported ({error}); it needs a GPU: pip install '.[vllm]' in this repository")

    if arguments.dummy:
        sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
        (output,) = start_small_model().generate([{"prompt_token_ids": [3, 5, 7, 11]}], sampling)
        print("tokens:", list(output.outputs[0].token_ids))
    else:
        (output,) = LLM(model=arguments.model).generate([arguments.prompt], SamplingParams(max_tokens=64))
        print(arguments.prompt + output.outputs[0].text)

    from moe_dispatch import stats

    print("calls outside of CUDA graphs, by backend:", {name: count["ran"] for name, count in stats().items()})


if __name__ == "__main__":
    main()
