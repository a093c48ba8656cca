"""The rows that the scoreboard asks for, in one process: what calibration chose of ours, beside the baselines.

    python -m moe_dispatch.benchmarks.acceptance --out bench.jsonl [--budget SECONDS]

Few tokens and many first, every model and dtype at each token count, and with it what else the scoreboard wants to know
there: eager calls at M=1, skewed routing from 1024 tokens on. A run that is cut short has evidence for every region.
Baselines that compile for long come last, on the same weights. Called again, it goes on.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks.baselines import BASELINES, Baseline
from moe_dispatch.benchmarks.reports.scoreboard import MODELS, SKEWED, TOKENS
from moe_dispatch.benchmarks.rows import timed_keys
from moe_dispatch.benchmarks.sweep import Plan, Provenance, Sweep, available_backends
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.workloads import ROUTINGS, WORKLOADS

if TYPE_CHECKING:
    from moe_dispatch.problem import Mode

# The reference is the naive loop, and vLLM runs as a baseline.
BACKENDS: Final = ("triton_splitk", "triton_persistent", "gluon_hopper", "deep_gemm", "torch_grouped")
FIRST_PEERS: Final = ("vllm",)
LAST_PEERS: Final = ("vllm_deep_gemm", "vllm_triton_kernels")
SKEWED_FROM: Final = 1024
POINT_S: Final = 0.1
_BEGIN: Final = time.monotonic()


def plans(
    backends: Sequence[Backend], baselines: Sequence[Baseline], models: Sequence[str], budget_s: float | None
) -> Iterator[Plan]:
    """What is run, in order."""
    named: dict[str, Any] = {
        "workloads": tuple(WORKLOADS[name] for name in models), "dtypes": ("fp8", "bf16"), "configs": "chosen",
        "point_s": POINT_S, "budget_s": budget_s,
    }  # fmt: skip
    uniform, both = (ROUTINGS["uniform"],), (ROUTINGS["uniform"], ROUTINGS[SKEWED])
    first, last = (
        tuple(baseline for baseline in baselines if baseline.name in names) for names in (FIRST_PEERS, LAST_PEERS)
    )
    for M in coarse_to_fine(TOKENS):
        modes: tuple[Mode, ...] = ("graph", "eager") if M == 1 else ("graph",)
        routings = both if M >= SKEWED_FROM else uniform
        yield Plan(**named, tokens=(M,), routings=routings, modes=modes, backends=tuple(backends), baselines=first)
    for baseline in last:
        yield Plan(**named, tokens=TOKENS, routings=uniform, modes=("graph",), backends=(), baselines=(baseline,))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and say where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows are added to what is there")
    parser.add_argument("--budget", type=float, help="start no further point after so many seconds")
    parser.add_argument("--model", action="append", choices=MODELS, help="all of the scoreboard's if none is named")
    given: Any = parser.parse_args(arguments)
    dispatcher = get_dispatcher()
    machine = dispatcher.machine
    notes: list[str] = []
    backends = available_backends(BACKENDS, dispatcher.machine, notes.append)
    baselines = [BASELINES[name](machine) for name in (*FIRST_PEERS, *LAST_PEERS)]
    provenance, done = Provenance.here(machine), timed_keys(given.out)
    # Start-up is part of the budget.
    left_s = None if given.budget is None else given.budget - (time.monotonic() - _BEGIN)
    first, *further = plans(backends, baselines, given.model or MODELS, left_s)
    device = torch.device(machine.device)
    sweep = Sweep(first, given.out, device, provenance, done, advance=_say, notes=notes)
    try:
        sweep.run(*further)
    except KeyboardInterrupt:
        print("interrupted")
    print(f"{len(sweep.written)} rows;", ", ".join(f"{what} {seconds:.0f} s" for what, seconds in sweep.spent.items()))
    for row in sweep.written:
        if row.us is None:
            print(f"no time: {row.workload} {row.dtype} M={row.M} {row.mode} {row.routing} {row.backend}: {row.reason}")
    for note in notes:
        print(f"no row: {note}")


def _say(what: str | None) -> None:
    if what:
        print(f"{time.monotonic() - _BEGIN:4.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
