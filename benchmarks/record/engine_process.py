"""One vLLM engine with dummy weights in a process of its own, which answers workloads; see `engine_vllm`.

Requests are lines of JSON on standard input, answers lines of JSON on a descriptor that the parent opened: what vLLM
logs goes to standard output.
"""

import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Literal

from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.machine import Machine

# Qwen3-30B-A3B, whose expert layers are [E=128, topk=8, K=2048, N=768].
MODEL: Final[dict[str, Any]] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48, "vocab_size": 151936, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "attention_bias": False, "router_aux_loss_coef": 0.001, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FP8: Final = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
# What weights a model has: drawn here, or vLLM's dummy weights, see `_draw_weights`.
Weights = Literal["random", "vllm"]
PREFILL: Final = (8, 2048)  # prompts, tokens of each
CAPTURED: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT: Final = 32  # tokens before a decode
WARM_STEPS, STEPS = 16, 96  # decode steps after a prefill: not timed, and timed


def serve(
    dtype: Literal["bf16", "fp8"],
    layers: int,
    memory: float,
    kv_gib: float,
    answer: int,
    weights: Weights,
    *,
    greedy: bool,
) -> None:
    """Start an engine and answer requests until standard input ends.

    Args:
        dtype: ``"bf16"`` or ``"fp8"``.
        layers: How many of the model's 48 layers there are.
        memory: The share of the GPU that the engine may take.
        kv_gib: GiB of KV cache. It is not left to the engine's memory profile, which another engine that starts on the
            same GPU at the same time would distort.
        answer: The descriptor to write answers to.
        weights: What weights the model has.
        greedy: Whether tokens that are timed are the likeliest instead of drawn.
    """
    begin = time.monotonic()
    from vllm import LLM

    folder = Path(tempfile.mkdtemp())
    config = MODEL | {"num_hidden_layers": layers}
    if dtype == "fp8":
        config["quantization_config"] = FP8
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, attention_backend="TRITON_ATTN",
        gpu_memory_utilization=memory, kv_cache_memory_bytes=int(kv_gib * (1 << 30)), max_model_len=4096,
        max_num_seqs=256, max_num_batched_tokens=8192, enable_prefix_caching=False, seed=0, disable_log_stats=True,
        compilation_config={"cudagraph_capture_sizes": list(CAPTURED)},
    )  # fmt: skip
    if weights == "random":
        llm.apply_model(_draw_weights)
    engine = _Engine(llm, dtype, greedy=greedy)
    with os.fdopen(answer, "w") as answers:
        started = {
            "started_s": round(time.monotonic() - begin, 1),
            "origin": json_lines.origin(Machine.inspect("cuda")),
        }
        print(json.dumps(started), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(engine.answer(request.pop("what"), **request)), file=answers, flush=True)


def _draw_weights(model: Any) -> None:
    """Replace vLLM's dummy weights in place by random ones that spread tokens over all experts.

    vLLM draws each weight from the same seed and between -1e-3 and 1e-3. Layers are then alike, and FP8 scales that
    should be positive are not: results that are not numbers send all tokens to the same few experts.
    """
    import torch

    with torch.no_grad():
        for seed, (name, weight) in enumerate(model.named_parameters()):
            generator = torch.Generator(weight.device).manual_seed(seed)
            if "scale" in name:
                weight.fill_(2.0**-6)  # about 1/sqrt(K), where codes have unit variance
            elif "norm" in name:
                weight.fill_(1.0)
            elif weight.dtype == torch.float8_e4m3fn:
                for part in weight:  # one expert, or one row, at a time: the draw takes four times the memory
                    part.copy_(torch.randn(part.shape, generator=generator, device=weight.device))
            elif weight.is_floating_point():
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


class _Engine:
    """Runs workloads, each on prompts that no earlier one had."""

    def __init__(self, llm: Any, dtype: Literal["bf16", "fp8"], *, greedy: bool) -> None:
        self._llm, self._dtype, self._greedy = llm, dtype, greedy
        self._round = 0
        self._compiled = _count_compilations()

    def answer(self, what: str, **request: int) -> dict[str, Any]:
        workloads: dict[str, Any] = {
            "decode": self._decode, "prefill": self._prefill, "tokens": self._tokens, "plans": self._plans,
        }  # fmt: skip
        result: dict[str, Any] = workloads[what](**request)
        return result | {"compiled": len(self._compiled), "compiled_names": sorted(set(self._compiled))[:8]}

    def _decode(self, batch: int) -> dict[str, Any]:
        """Seconds of one decode step, each timed by itself: a host that stumbles once does not move the median."""
        self._run(batch, PROMPT, _sampling(WARM_STEPS, greedy=self._greedy))
        engine = self._llm.llm_engine
        for row, prompt in enumerate(self._prompts(batch, PROMPT)):
            sampling = _sampling(WARM_STEPS + STEPS, greedy=self._greedy)
            engine.add_request(f"{self._round}-{row}", prompt, sampling)
        seconds: list[float] = []
        last_tokens: set[int] = set()
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            outputs = engine.step()
            seconds.append(time.perf_counter() - begin)
            last_tokens |= {output.outputs[0].token_ids[-1] for output in outputs if output.finished}
        first, median, third = statistics.quantiles(seconds[-STEPS - 1 : -1], n=4)
        return {"seconds": median, "quartiles": [first, third], "last_tokens": len(last_tokens)}

    def _prefill(self) -> dict[str, Any]:
        sampling = _sampling(1)
        self._run(*PREFILL, sampling)
        return {"seconds": min(self._run(*PREFILL, sampling)[0] for _ in range(3))}

    def _tokens(self) -> dict[str, Any]:
        self._round = 1000  # the same prompts in every engine
        outputs = [output.outputs[0] for output in self._run(4, PROMPT, _sampling(24, greedy=True, logprobs=1))[1]]
        return {
            "tokens": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
                for output in outputs
            ],
        }

    def _plans(self) -> dict[str, Any]:
        """What runs at each captured batch, where the plugin is on."""
        if not _plugin_is_on():
            return {"plans": {}}
        from moe_dispatch import MoEProblem, explain

        layer = MoEProblem(1, K=2048, N=768, E=128, topk=8, dtype=self._dtype, mode="graph")
        chosen = {M: explain(dataclasses.replace(layer, M=M)).chosen for M in (*CAPTURED, 2048, 8192)}
        return {"plans": {M: dataclasses.asdict(best.choice) for M, best in chosen.items() if best}}

    def _run(self, batch: int, prompt: int, sampling: Any) -> tuple[float, list[Any]]:
        """Seconds and outputs of a generation."""
        prompts = self._prompts(batch, prompt)
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def _prompts(self, batch: int, length: int) -> list[dict[str, list[int]]]:
        self._round += 1
        draw = random.Random(self._round)  # noqa: S311 - the same prompts in every engine
        return [{"prompt_token_ids": [draw.randrange(10, 150000) for _ in range(length)]} for _ in range(batch)]


def _sampling(tokens: int, *, greedy: bool = False, logprobs: int | None = None) -> Any:
    """So many tokens, drawn at random unless `greedy`.

    With vLLM's dummy weights, greedy sequences soon repeat one token each, and a batch hits fewer experts than a
    model's would.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0 if greedy else 1.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
    )


def _plugin_is_on() -> bool:
    from moe_dispatch.integrations.vllm.takeover import TAKEOVER

    return bool(TAKEOVER.taken)


def _count_compilations() -> list[str]:
    """Grows by a kernel's name with every compilation by Triton from now on."""
    import triton

    names: list[str] = []
    triton.knobs.compilation.listener = lambda src, **_: names.append(str(getattr(src, "name", src)))
    return names
