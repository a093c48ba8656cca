"""A model's recorded forward, and forward and backward, under every experts implementation of transformers, by turns.

    python -m moe_dispatch.benchmarks.record.gradients --out gradients.jsonl

Decoder layers of Qwen3-30B-A3B, or of gpt-oss-20b, whose experts are stored transposed (``--model gpt-oss-20b``), with
random BF16 weights. Every implementation is measured before the first one is measured again. A row is one measurement:
median and fastest milliseconds, and the peak of allocated memory above the model's own weights. First come the errors
of one layer's gradients against fp32. Needs transformers and a GPU.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.benchmarks.record.verdicts import verdicts
from moe_dispatch.integrations.transformers import register
from moe_dispatch.machine import Machine

IMPLEMENTATIONS: Final = ("eager", "grouped_mm", "batched_mm", "moe_dispatch")
TOKENS: Final = (1024, 4096)
MODELS: Final[dict[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 6144, "norm_topk_prob": True, "vocab_size": 1024, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "sliding_window": 128, "vocab_size": 1024, "max_position_embeddings": 131072,
    },
}  # fmt: skip
_ERROR_TOKENS: Final = 256
_SAMPLES: Final = 7
_SAMPLE_SECONDS: Final = 3.0  # no further sample of a measurement after this

Row = dict[str, Any]


def build(name: str, layers: int, device: str, **changes: Any) -> Any:
    """Some layers of a model, with weights that keep activations near 1."""
    import transformers

    config = transformers.AutoConfig.for_model(**{**MODELS[name], **changes}, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            columns = 1 if getattr(module, "is_transposed", False) else 2  # of an expert's matrix, which it sums over
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    parameter.normal_(std=parameter.shape[columns] ** -0.5)
    return model


def errors(model: Any, device: str) -> Iterator[Row]:
    """Of one experts module: ‖gradient − truth‖ / ‖truth‖, where the truth is transformers' own loop in fp32."""
    experts, topk = model.layers[0].mlp.experts, model.config.num_experts_per_tok
    generator = torch.Generator(device).manual_seed(1)
    K, E = model.config.hidden_size, experts.gate_up_proj.shape[0]
    hidden = torch.randn(_ERROR_TOKENS, K, generator=generator, device=device).bfloat16()
    logits = torch.randn(_ERROR_TOKENS, E, generator=generator, device=device)
    weights, ids = logits.softmax(dim=-1).topk(topk)
    gradient = torch.randn(_ERROR_TOKENS, K, generator=generator, device=device).bfloat16()

    def gradients(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {
            "hidden_states": hidden.to(dtype).requires_grad_(),
            "topk_weights": weights.to(dtype).requires_grad_(),
            "gate_up": module.gate_up_proj,
            "down": module.down_proj,
        }
        out = module(leaves["hidden_states"], ids, leaves["topk_weights"])
        made = torch.autograd.grad(out, list(leaves.values()), gradient.to(dtype))
        return dict(zip(leaves, made, strict=True))

    model.set_experts_implementation("eager")
    truth = gradients(copy.deepcopy(experts).float(), torch.float32)
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        made = gradients(experts, torch.bfloat16)
        measured = {key: float((made[key].float() - true).norm() / true.norm()) for key, true in truth.items()}
        yield {"what": "error", "implementation": name, "tokens": _ERROR_TOKENS, "errors": measured}
        del made


def steps(model: Any, tokens: int, device: str) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""
    inputs = torch.randn(1, tokens, model.config.hidden_size, device=device, dtype=torch.bfloat16)

    def forward() -> None:
        model(inputs_embeds=inputs, use_cache=False)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.float().square().mean().backward()

    return {"recorded forward": forward, "forward and backward": forward_and_backward}


def measure(step: Callable[[], object], device: str) -> Row:
    """Milliseconds and peak memory of a step; a reason in their place where memory does not suffice."""
    cuda = device == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else (lambda: None)
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        step()
        synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        samples: list[float] = []
        begin = time.monotonic()
        while len(samples) < _SAMPLES and (not samples or time.monotonic() - begin < _SAMPLE_SECONDS):
            start = time.perf_counter()
            step()
            synchronize()
            samples.append(1e3 * (time.perf_counter() - start))
    except torch.OutOfMemoryError:
        return {"reason": "out of memory"}
    row: Row = {"ms": statistics.median(samples), "ms_fastest": min(samples), "samples": len(samples)}
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def rows(model: Any, device: str, rounds: int, tokens: tuple[int, ...], deadline: float) -> Iterator[Row]:
    """Errors, then every measurement of a round before the next round; nothing begins after the deadline."""
    yield from errors(model, device)
    hopeless: set[tuple[str, int, str]] = set()  # out of memory in an earlier round
    for turn in range(rounds):
        for count in tokens:
            for what, step in steps(model, count, device).items():
                for name in IMPLEMENTATIONS if turn % 2 == 0 else reversed(IMPLEMENTATIONS):
                    case = (name, count, what)
                    if case in hopeless or time.monotonic() > deadline:
                        continue
                    model.set_experts_implementation(name)
                    model.zero_grad(set_to_none=True)
                    if device == "cuda":
                        torch.cuda.empty_cache()
                    row = measure(step, device)
                    if "reason" in row:
                        hopeless.add(case)
                    yield {"what": what, "implementation": name, "tokens": count, "turn": turn, **row}


def parser_of(description: str, out: str, seconds: float) -> argparse.ArgumentParser:
    """The options that records of transformers' implementations share, with these defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=seconds, help="what has not begun by then is left out")
    return parser


def write(made: Iterable[Row], arguments: argparse.Namespace) -> None:
    """Print rows and write them as they come, then say what they say of ours."""
    facts = {"model": arguments.model, "layers": arguments.layers}
    print(*verdicts(json_lines.write(arguments.out, made, Machine.inspect("cuda"), **facts)), sep="\n")


def main() -> None:
    """Measure, print, and write."""
    parser = parser_of(__doc__, "gradients.jsonl", 120.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    register()
    model = build(arguments.model, arguments.layers, "cuda")
    write(rows(model, "cuda", arguments.rounds, tuple(arguments.tokens), deadline), arguments)


if __name__ == "__main__":
    main()
