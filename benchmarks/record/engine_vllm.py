"""vLLM's engine with and without the plugin, end to end, by turns: tokens per second of decode and prefill.

    python -m moe_dispatch.benchmarks.record.engine_vllm --dtype bf16 --layers 40 --out engine.jsonl

Two engines with dummy weights stay alive in two processes on one GPU, one with ``MOE_DISPATCH_VLLM=1``. Each workload
is measured on both before the next one, and all of them twice. Needs vLLM and a GPU that holds both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

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
BATCHES: Final = (1, 8, 32, 128, 256)
SHORT, LONG = 16, 80  # generated tokens; the difference is decode alone
PREFILL: Final = (8, 2048)
CAPTURED: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def serve(arguments: argparse.Namespace) -> None:
    """One engine: answers workloads on standard input with seconds on the descriptor `--answer`."""
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp())
    config = MODEL | {"num_hidden_layers": arguments.layers}
    if arguments.dtype == "fp8":
        config["quantization_config"] = FP8
    (folder / "config.json").write_text(json.dumps(config))
    engine = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, attention_backend="TRITON_ATTN",
        gpu_memory_utilization=arguments.memory, max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=8192,
        enable_prefix_caching=False, seed=0, disable_log_stats=True,
        compilation_config={"cudagraph_capture_sizes": list(CAPTURED)},
    )  # fmt: skip
    compiled = _count_compilations()
    answer = os.fdopen(arguments.answer, "w")
    print(json.dumps({"started_s": round(time.monotonic() - begin, 1)}), file=answer, flush=True)
    round_number = 0

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, list[list[int]]]:
        nonlocal round_number
        round_number += 1
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * row + 31 * round_number) % 150000 + 10 for i in range(prompt)]}
            for row in range(batch)
        ]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, [list(out.outputs[0].token_ids) for out in outputs]

    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "decode":
            run(request["batch"], 32, SHORT)
            short, long = (min(run(request["batch"], 32, n)[0] for _ in range(2)) for n in (SHORT, LONG))
            result: dict[str, Any] = {"seconds": (long - short) / (LONG - SHORT)}  # of one decode step
        elif request["what"] == "prefill":
            run(*PREFILL, 1)
            result = {"seconds": min(run(*PREFILL, 1)[0] for _ in range(3))}
        else:
            round_number = 1000
            result = {"tokens": run(4, 32, 24)[1]}
        result["compiled"] = len(compiled)
        result["compiled_names"] = sorted(set(compiled))[:8]
        print(json.dumps(result), file=answer, flush=True)


def _count_compilations() -> list[str]:
    """Grows by a kernel's name with every compilation by Triton from now on."""
    import triton

    names: list[str] = []
    triton.knobs.compilation.listener = lambda src, **_: names.append(str(getattr(src, "name", src)))
    return names


class Engine:
    """An engine in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, *, plugin: bool) -> None:
        self.plugin = plugin
        read, write = os.pipe()
        environment = os.environ | {"MOE_DISPATCH_VLLM": str(int(plugin)), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.log = open(f"{arguments.logs}/engine-{'on' if plugin else 'off'}.log", "w")  # noqa: SIM115 - as long as the engine
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_dispatch.benchmarks.record.engine_vllm", "--serve", "--answer", str(write),
             "--dtype", arguments.dtype, "--layers", str(arguments.layers), "--memory", str(arguments.memory)],
            stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT, text=True, pass_fds=(write,),
            env=environment,
        )  # fmt: skip
        os.close(write)
        self._answers = os.fdopen(read)
        self.started_s = self.receive()["started_s"]

    def receive(self) -> dict[str, Any]:
        """The next answer."""
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"the engine {'with' if self.plugin else 'without'} the plugin ended; see {self.log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Run a workload."""
        assert self._process.stdin is not None  # noqa: S101
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self.receive()


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--memory", type=float, default=0.46, help="share of the GPU for each engine")
    parser.add_argument("--out", type=Path, default=Path("engine.jsonl"))
    parser.add_argument("--logs", default=".")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=400.0, help="seconds; what is not measured by then is left out")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    begin = time.monotonic()
    engines = [Engine(arguments, plugin=plugin) for plugin in (False, True)]
    rows: list[dict[str, Any]] = [{"start_s": {str(engine.plugin): engine.started_s for engine in engines}}]
    print(rows[0], flush=True)
    tokens = [engine.ask(what="tokens")["tokens"] for engine in engines]
    same = sum(a == b for one, other in zip(*tokens, strict=True) for a, b in zip(one, other, strict=True))
    rows.append({"greedy_tokens_equal": same, "of": sum(map(len, tokens[0]))})
    print(rows[-1], flush=True)
    workloads = [("decode", batch) for batch in BATCHES] + [("prefill", 0)]
    for _ in range(arguments.rounds):
        for what, batch in workloads:
            if time.monotonic() - begin > arguments.budget:
                break
            off, on = (engine.ask(what=what, batch=batch) for engine in engines)
            row = {
                "what": what, "batch": batch, "off_ms": 1e3 * off["seconds"], "on_ms": 1e3 * on["seconds"],
                "speedup": off["seconds"] / on["seconds"], "compiled_on": on["compiled"], "names": on["compiled_names"],
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    arguments.out.write_text("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    main()
