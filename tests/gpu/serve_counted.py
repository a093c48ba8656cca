"""Serves the example's small model and counts what must not happen while serving; see test_vllm_engine.py.

MOE_DISPATCH_VLLM=1 python -m tests.gpu.serve_counted OUT.json
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the counters are of this process

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def randomise(model: torch.nn.Module) -> None:
    """Weights with which the experts decide the tokens: vLLM's dummy weights are so small that they change nothing."""
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)  # of a norm
        else:
            columns = 1 if "embed" in name or "lm_head" in name else parameter.shape[-1]
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cuda") * columns**-0.5)


def silence_experts(model: torch.nn.Module) -> None:
    """Experts that add nothing: the control for what the tokens depend on."""
    for name, parameter in model.named_parameters():
        if name.endswith("w2_weight"):
            parameter.data.zero_()


def generate(llm: Any) -> list[dict[str, Any]]:
    """Greedy tokens of batches with token counts that were captured and that were not, and how clear each one was."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=2)
    sequences = []
    for batch, prompt in ((1, 4), (5, 13), (16, 31)):
        prompts = [{"prompt_token_ids": [(7 * i + 13 * row) % 500 + 4 for i in range(prompt)]} for row in range(batch)]
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            best = [
                sorted((each.logprob for each in step.values()), reverse=True) for step in output.outputs[0].logprobs
            ]
            sequences.append({
                "tokens": list(output.outputs[0].token_ids), "margins": [first - second for first, second, *_ in best],
            })  # fmt: skip
    return sequences


def counted(llm: Any) -> dict[str, Any]:
    """Generate, and count compilations, probes, first runs and allocations of device memory meanwhile."""
    import triton

    from moe_dispatch.dispatch import backend_pool
    from moe_dispatch.dispatch.dispatcher import Dispatcher

    counts = {"compiled": 0, "probes": 0, "first_runs": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    def compiled(*, src: Any, **_: Any) -> None:
        counts["compiled"] += str(getattr(src, "name", src)).startswith("_moe_")  # vLLM compiles some of its own

    generate(llm)  # what vLLM itself compiles and allocates late
    triton.knobs.compilation.listener = compiled
    Dispatcher.first_run = counting("first_runs", Dispatcher.first_run)  # type: ignore[method-assign]
    backend_pool.probe = counting("probes", backend_pool.probe)  # type: ignore[attr-defined]
    before = torch.cuda.memory_stats()["num_device_alloc"]
    sequences = generate(llm)
    allocations = torch.cuda.memory_stats()["num_device_alloc"] - before
    return {"sequences": sequences, "allocations": allocations, **counts}


def main() -> None:
    begin = time.monotonic()
    from serve_vllm import start_small_model

    from moe_dispatch import stats
    from moe_dispatch.integrations.vllm.takeover import TAKEOVER

    # Every token goes to every expert: where experts are chosen, a rounding error may turn the choice.
    llm = start_small_model(num_experts=8, num_experts_per_tok=8)
    started_s = time.monotonic() - begin
    llm.apply_model(randomise)
    result = counted(llm)
    result |= {"started_s": started_s, "taken": TAKEOVER.taken.total(), "left": dict(TAKEOVER.left), "stats": stats()}
    llm.apply_model(silence_experts)
    result["without_experts"] = generate(llm)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
