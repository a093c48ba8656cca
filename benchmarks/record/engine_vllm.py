"""vLLM's engine with and without the plugin, end to end, by turns: milliseconds of a decode step and of a prefill.

    python -m moe_dispatch.benchmarks.record.engine_vllm --dtype bf16 --layers 40 --out engine.jsonl

Two engines start side by side and stay alive in two processes on one GPU, one with ``MOE_DISPATCH_VLLM=1``. Each
workload is measured on both before the next one, and all of them as often as ``--rounds`` says. Rows are written as
they come, so a run that is ended leaves what it has. Needs vLLM and a GPU that holds both.
"""

import argparse
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.benchmarks.record.engine_process import serve

BATCHES: Final = (256, 128, 32, 8, 1)


class EngineEndedError(Exception):
    """An engine died, or did not answer in time."""


class Engine:
    """An engine in a process of its own.

    Args:
        arguments: The command's arguments.
        plugin: Whether the plugin is on.
        deadline: When to give up waiting for it, by `time.monotonic`.
    """

    def __init__(self, arguments: argparse.Namespace, *, plugin: bool, deadline: float) -> None:
        self.plugin, self._deadline = plugin, deadline
        read, write = os.pipe()
        name = "on" if plugin else "off"
        environment = os.environ | {"MOE_DISPATCH_VLLM": str(int(plugin))}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function of ours runs on the model
            # Engines that start at the same time must not write to one cache.
            "VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / f"vllm-cache-{name}"),
        }
        # DeepGEMM compiles what the workloads' first runs need; all that it might need takes it minutes.
        environment.setdefault("VLLM_DEEP_GEMM_WARMUP", "skip")
        # From 0.26 on, vLLM does not start with the FlashInfer sampler where FlashInfer is not installed.
        environment.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        self._log = Path(arguments.logs) / f"engine-{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moe_dispatch.benchmarks.record.engine_vllm", "--answer", str(write),
                 "--dtype", arguments.dtype, "--layers", str(arguments.layers), "--memory", str(arguments.memory),
                 "--kv-gib", str(arguments.kv_gib), "--weights", arguments.weights,
                 *(["--greedy"] if arguments.greedy else [])],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, pass_fds=(write,),
                env=environment, start_new_session=True,
            )  # fmt: skip
        os.close(write)
        self._answers = os.fdopen(read)

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            EngineEndedError: There is none.
        """
        left = max(0.0, self._deadline - time.monotonic())
        ready, _, _ = select.select([self._answers], [], [], left)
        line = self._answers.readline() if ready else ""
        if not line:
            what = "ended" if ready else "did not answer in time"
            raise EngineEndedError(
                f"the engine {'with' if self.plugin else 'without'} the plugin {what}; see {self._log}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: str, **request: int) -> dict[str, Any]:
        """Run a workload; see `engine_process`."""
        assert self._process.stdin is not None  # noqa: S101
        print(json.dumps({"what": what, **request}), file=self._process.stdin, flush=True)
        return self.receive()

    def close(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def compare(engines: list[Engine], report: Callable[[dict[str, Any]], None], rounds: int, deadline: float) -> None:
    """Measure every workload on both engines, by turns."""
    off, on = (engine.ask("tokens") for engine in engines)
    report(_agreement(off, on))
    # What gains most comes first, in case time ends.
    workloads = [("prefill", {}), *(("decode", {"batch": batch}) for batch in BATCHES)]
    longest = 0.0
    for _ in range(rounds):
        for what, request in workloads:
            begin = time.monotonic()
            if begin + longest > deadline:
                report({"left_out": "what remained, for lack of time"})
                return
            off, on = (engine.ask(what, **request) for engine in engines)
            longest = max(longest, time.monotonic() - begin)
            report({
                "what": what, "batch": request.get("batch", 0), "off_ms": 1e3 * off["seconds"],
                "on_ms": 1e3 * on["seconds"], "speedup": off["seconds"] / on["seconds"], "compiled_on": on["compiled"],
                "quartiles_ms": [[1e3 * each for each in side.get("quartiles", ())] for side in (off, on)],
                "names": on["compiled_names"], "last_tokens": [side.get("last_tokens") for side in (off, on)],
            })  # fmt: skip


def _agreement(off: dict[str, Any], on: dict[str, Any]) -> dict[str, Any]:
    """How many greedy tokens are equal, and how far log-probabilities differ up to the first token that is not."""
    equal = total = 0
    apart = 0.0
    for tokens, logprobs, others, other_logprobs in zip(
        off["tokens"], off["logprobs"], on["tokens"], on["logprobs"], strict=True
    ):
        same = [token == other for token, other in zip(tokens, others, strict=True)]
        equal, total = equal + sum(same), total + len(same)
        agreed = same.index(False) if False in same else len(same)
        differences = [abs(a - b) for a, b in zip(logprobs[:agreed], other_logprobs[:agreed], strict=True)]
        apart = max([apart, *differences])
    return {"greedy_tokens_equal": equal, "of": total, "logprobs_apart": apart}


def main() -> None:
    """Compare."""
    assert __doc__ is not None  # noqa: S101
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--memory", type=float, default=0.46, help="share of the GPU for each engine")
    parser.add_argument("--kv-gib", type=float, default=8.0, help="GiB of KV cache of each engine")
    parser.add_argument("--weights", choices=["random", "vllm"], default="random", help="vllm: as vLLM draws them")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest tokens instead of drawing them")
    parser.add_argument("--out", type=Path, default=Path("engine.jsonl"))
    parser.add_argument("--logs", default=".")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, start included; the rest is left out")
    parser.add_argument("--answer", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer is not None:
        serve(
            arguments.dtype, arguments.layers, arguments.memory, arguments.kv_gib, arguments.answer, arguments.weights,
            greedy=arguments.greedy,
        )  # fmt: skip
        return
    begin = time.monotonic()
    deadline = begin + arguments.budget
    arguments.out.write_text("")
    report = functools.partial(json_lines.report, arguments.out)
    engines: list[Engine] = []
    try:
        engines += [Engine(arguments, plugin=plugin, deadline=deadline) for plugin in (False, True)]
        started = [engine.receive() for engine in engines]
        what = {"dtype": arguments.dtype, "layers": arguments.layers, "weights": arguments.weights}
        report({"origin": started[0]["origin"], **what, "greedy": arguments.greedy})
        seconds = {str(engine.plugin): start["started_s"] for engine, start in zip(engines, started, strict=True)}
        report({"start_s": seconds})
        plans = engines[1].ask("plans")
        report(plans)
        if not plans["plans"]:
            raise EngineEndedError(
                "the engine with the plugin runs no layer through moe_forward: vLLM finds the plugin by the entry "
                "points of an installed moe_dispatch"
            )
        compare(engines, report, arguments.rounds, deadline)
    except EngineEndedError as error:
        report({"ended": str(error)})
        raise SystemExit(str(error)) from error
    finally:
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    main()
