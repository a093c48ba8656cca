"""`calibrate`: measures every eligible backend and configuration on this machine and keeps the result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine, present_device
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.calibration.report import CalibrationReport, Progress
from moe_dispatch.policies.calibration.run import CalibrationRun
from moe_dispatch.policies.measurements.schema import Layer
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import ROUTINGS, Workload, workload

__all__ = ["DEFAULT_ROUTINGS", "DEFAULT_TOKENS", "CalibrationReport", "Progress", "calibrate"]

DEFAULT_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS: Final = (1, 16, 256, 4096)
QUICK_CONFIGS: Final = 3
DEFAULT_ROUTINGS: Final = ("uniform", "dirichlet-4")


def calibrate(
    models: Sequence[str | Workload],
    dtypes: Sequence[DType] = ("bf16",),
    *,
    tokens: Sequence[int] | None = None,
    budget_s: float | None = None,
    quick: bool = False,
    most_configs: int | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    backends: Sequence[str] | None = None,
    routings: Sequence[str] = DEFAULT_ROUTINGS,
    modes: Sequence[Mode] | None = None,
    compile_only: bool = False,
    timeout_s: float = 60.0,
    directory: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CalibrationReport:
    """Measure layers on this machine and merge the result into its calibration file.

    What this process runs from then on is chosen by it: with what the machine's own file holds now, the dispatchers
    are reset, and their plans, counts and quarantine of this process begin anew.

    Args:
        models: Workloads by name, ``E,topk,K,N``, path of a config.json, or as they are.
        dtypes: Of the weights.
        tokens: Token counts; 1 to 16384 in powers of two if None.
        budget_s: Stop after this many seconds; what was measured is kept. None for no limit.
        quick: Few token counts and few configurations.
        most_configs: Of each backend, the likeliest first; all that it offers if None.
        resume: Leave out the points that were measured with today's versions.
        device: The current CUDA device if None, else the CPU.
        backends: Only these.
        routings: Names of routing distributions; the winner is the best over all of them.
        modes: Graph, eager, or both, which is what None means where there are graphs.
        compile_only: Only compile what would be measured, so that a later calibration need not.
        timeout_s: After which one candidate counts as hung.
        directory: In place of the cache directory.
        on_progress: Told before each point.

    Raises:
        InvalidInputError: No models, token counts below 1, an unknown routing, or no such device here, be it that
            `MOE_DISPATCH_MACHINE` describes a machine of another kind.
        UnknownNameError: A backend or a model of this name is not known.
        PolicyFileError: The result cannot be written.
    """
    if not models or not dtypes:
        raise InvalidInputError(f"calibrate needs models and dtypes, got {list(models)} and {list(dtypes)}")
    counts = sorted(set(tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS)))
    if counts[0] < 1:
        raise InvalidInputError(f"tokens must be at least 1, got {counts[0]}")
    if unknown := [name for name in routings if name not in ROUTINGS]:
        raise InvalidInputError(f"routings must be among {', '.join(ROUTINGS)}, got {', '.join(unknown)}")
    # Named, it is what the machine must be: a description of another one is refused here, and not by every worker.
    where = present_device(device)
    machine = Machine.inspect(where)
    if quick:
        most_configs = min(most_configs or QUICK_CONFIGS, QUICK_CONFIGS)
    layers = [
        Layer.of(found.problem(1, dtype, machine))
        for found in (workload(model) if isinstance(model, str) else model for model in models)
        for dtype in dtypes
    ]
    possible: tuple[Mode, ...] = ("graph", "eager") if machine.device == "cuda" else ("eager",)
    chosen = tuple(mode for mode in possible if modes is None or mode in modes)
    if not chosen:
        raise InvalidInputError(f"modes must be among {', '.join(possible)} on this machine, got {modes}")
    campaign = CalibrationRun(
        machine, where, backends, tuple(routings), timeout_s, directory, most_configs, refine=not quick
    )
    try:
        return campaign.measure(layers, counts, chosen, budget_s, on_progress, resume=resume, compile_only=compile_only)
    finally:
        # Points are saved one by one: an error at a later one leaves them, too, to be read.
        if campaign.report.measured and campaign.report.path == calibration_path(machine):
            reset_dispatchers()
