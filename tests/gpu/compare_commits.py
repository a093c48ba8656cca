"""Time `moe_forward` of two checkouts by turns on one GPU, to see whether a refactoring changed its speed.

    python3 tests/gpu/compare_commits.py OLD_ROOT NEW_ROOT [--model qwen3-30b-a3b] [--tokens 1,64,4096] [--json FILE]

Each checkout runs in a worker process of its own, which imports moe_dispatch from that root and has an empty cache
directory, so that the shipped tables choose. Both make the same weights and inputs, and capture one CUDA graph of eight
calls with distinct inputs. Samples are taken by turns, each after a rest of half its duration, and the ratio is the
median of the ratios of neighbouring samples. A checkout from before backends/, policies/ and benchmarks/ were linked
into moe_dispatch/ works too.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

# E, topk, K, N of the layers that are compared.
MODELS: Final = {
    "deepseek-v3": (256, 8, 7168, 2048),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
}
DTYPES: Final = ("bf16", "fp8")
INPUTS: Final = 8
SAMPLE_SECONDS: Final = 4e-3
CLOCK_HZ: Final = 2e9  # highest SM clock, for the rests
NOISE: Final = 0.01  # ratios within this distance of 1 are reported as equal


def compare(old: Path, new: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every point on both checkouts, and print one line per point."""
    deadline = time.monotonic() + options.budget
    workers = [Worker(root) for root in (old, new)]
    rows: list[dict[str, Any]] = []
    print(f"{'layer':28}{'M':>6}{'old µs':>11}{'new µs':>11}{'new/old':>9}  backends, outputs")
    for model in options.model or MODELS:
        for dtype in options.dtype or DTYPES:
            for worker in workers:
                worker.ask(do="layer", shape=MODELS[model], dtype=dtype)
            for M in options.tokens:
                if time.monotonic() > deadline:
                    print("stopped: the budget is spent")
                    return rows
                row = {"model": model, "dtype": dtype, "M": M} | _point(workers, M, options.rounds)
                rows.append(row)
                verdict = "" if abs(row["ratio"] - 1) <= NOISE else "  <-- differs"
                print(
                    f"{model + ' ' + dtype:28}{M:>6}{row['old_us']:>11.2f}{row['new_us']:>11.2f}{row['ratio']:>9.4f}"
                    f"  {row['backends']}, {row['outputs']}{verdict}",
                    flush=True,
                )
    return rows


def _point(workers: "Sequence[Worker]", M: int, rounds: int) -> dict[str, Any]:
    prepared = [worker.ask(do="point", M=M) for worker in workers]
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for index in (0, 1) if turn % 2 else (1, 0):
            times[index].append(workers[index].ask(do="sample")["us"])
    ratios = [new / old for old, new in zip(*times, strict=True)]
    backends = list(dict.fromkeys(answer["backend"] for answer in prepared))
    same = prepared[0]["digest"] == prepared[1]["digest"]
    return {
        "old_us": statistics.median(times[0]),
        "new_us": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "backends": " -> ".join(backends),
        "outputs": "equal bits" if same else "other bits",
    }


class Worker:
    """A process that runs one checkout.

    Args:
        root: Root of the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._cache = tempfile.TemporaryDirectory()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MOE_DISPATCH_")}
        paths = [str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=inherited | {"MOE_DISPATCH_CACHE_DIR": self._cache.name, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.root} ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Layer:
    """One layer of the checkout that this worker process imports.

    Args:
        shape: E, topk, K, N.
        dtype: ``"bf16"`` or ``"fp8"``.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        import torch

        import moe_dispatch

        self._E, self._topk, self._K, N = shape
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int) -> Any:
            out = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            for expert in out:
                expert.copy_(torch.randn(size[1:], generator=generator, device="cuda") * size[-1] ** -0.5)
            return out

        wrap: Any = moe_dispatch.ExpertWeights.quantize if dtype == "fp8" else moe_dispatch.ExpertWeights
        self._experts = wrap(draw(self._E, 2 * N, self._K), draw(self._E, self._K, N))
        self._graph: Any = None
        self._calls: list[tuple[Any, ...]] = []
        self._repeats = 1

    def prepare(self, M: int) -> dict[str, Any]:
        """Capture the graph of a token count; answers the backend that ran and a digest of the outputs."""
        import torch

        import moe_dispatch

        generator = torch.Generator("cuda").manual_seed(M)
        self._calls = []
        for _ in range(INPUTS):
            hidden = torch.randn(M, self._K, generator=generator, device="cuda").bfloat16()
            weights, ids = torch.rand(M, self._E, generator=generator, device="cuda").topk(self._topk, dim=1)
            self._calls.append((hidden, self._experts, weights / weights.sum(dim=1, keepdim=True), ids.int()))
        self._graph = torch.cuda.CUDAGraph()
        digest = hashlib.sha256()
        with torch.no_grad():
            moe_dispatch.warm_up(self._experts, self._topk, [M])
            before = moe_dispatch.stats()
            for call in self._calls:
                digest.update(moe_dispatch.moe_forward(*call).view(torch.int16).cpu().numpy().tobytes())
            with torch.cuda.graph(self._graph):
                for call in self._calls:
                    moe_dispatch.moe_forward(*call)
        ran = {
            name: counts["ran"] - before.get(name, {"ran": 0})["ran"] for name, counts in moe_dispatch.stats().items()
        }
        self._repeats = 1
        for _ in range(3):
            us = self.sample()
        self._repeats = max(1, min(1000, round(SAMPLE_SECONDS * 1e6 / (us * INPUTS))))
        return {"digest": digest.hexdigest(), "backend": max(ran, key=lambda name: ran[name], default="?")}

    def sample(self) -> float:
        """Time of one call in µs."""
        import torch

        cuda: Any = torch.cuda  # its events and `_sleep` have no annotations
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        # While the device rests, the host enqueues the replays, so that no launch gap is timed.
        cuda._sleep(math.ceil(CLOCK_HZ * max(2e-4, SAMPLE_SECONDS / 2)))
        start.record()
        for _ in range(self._repeats):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self._repeats / INPUTS * 1e3


def serve(root: Path) -> None:
    """Answer the requests on standard input, one JSON object a line, until it ends."""
    # Whatever a library prints must not be read as an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import moe_dispatch

    if not Path(moe_dispatch.__file__).is_relative_to(root):
        raise SystemExit(f"moe_dispatch is imported from {moe_dispatch.__file__}, not from {root}")
    if not (root / "moe_dispatch" / "backends").exists():
        moe_dispatch.__path__.append(str(root))  # a checkout without links has moe_dispatch.backends at its root
    import torch

    layer: Layer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "layer":
            layer = None
            torch.cuda.empty_cache()
            layer = Layer(request["shape"], request["dtype"])
        elif layer is None:
            raise SystemExit("the first request must describe a layer")
        elif request["do"] == "point":
            answer = layer.prepare(request["M"])
        else:
            answer = {"us": layer.sample()}
        print(json.dumps(answer), file=answers, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two checkouts; 1 if a ratio is outside of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="root of the checkout to compare with")
    parser.add_argument("new", type=Path, nargs="?", help="root of the changed checkout")
    parser.add_argument("--model", action="append", choices=MODELS, help="only these; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only these; repeatable")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 64, 4096],
        help="token counts, separated by commas",
    )
    parser.add_argument("--rounds", type=int, default=30, help="samples of each checkout at each point")
    parser.add_argument("--budget", type=float, default=500.0, help="start no point after this many seconds")
    parser.add_argument("--json", type=Path, help="file to write the rows to, as JSON Lines")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker)
        return 0
    if not (options.old and options.new):
        parser.error("two roots are needed: OLD_ROOT NEW_ROOT")
    rows = compare(options.old, options.new, options)
    if options.json:
        options.json.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows)) if rows else math.nan
    print(f"{len(rows)} points, new/old: geometric mean {mean:.4f}")
    return 1 if any(abs(row["ratio"] - 1) > NOISE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
