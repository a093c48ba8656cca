"""`calibrate`: measures every eligible backend and configuration on this machine and keeps the result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine, present_device
from moe_dispatch.measure.energy import energy_meter
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.calibration.report import CalibrationReport, Progress
from moe_dispatch.policies.calibration.request import (
    DEFAULT_ROUTINGS,
    DEFAULT_TIMEOUT_S,
    DEFAULT_TOKENS,
    CalibrationRequest,
    possible_modes,
    wrong_modes,
)
from moe_dispatch.policies.calibration.run import CalibrationRun
from moe_dispatch.policies.measurements.schema import LayerShape
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import Workload, workload

__all__ = ["DEFAULT_ROUTINGS", "DEFAULT_TOKENS", "CalibrationReport", "Progress", "calibrate"]

QUICK_TOKENS: Final = (1, 16, 256, 4096)
QUICK_CONFIGS: Final = 3


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
    timeout_s: float = DEFAULT_TIMEOUT_S,
    energy_s: float = 0.0,
    directory: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CalibrationReport:
    """Measure layers on this machine and merge the result into its calibration file.

    The process that calls this chooses by the new file from then on: if the machine's own file has changed, its
    dispatchers are reset, and with them plans, counts and the quarantine of this process.

    Args:
        models: Workloads: names, ``E,topk,K,N``, paths of a config.json, or `Workload` objects.
        dtypes: Dtypes of the weights.
        tokens: Token counts; 1 to 16384 in powers of two if None.
        budget_s: Stop after this many seconds; what was measured is kept. None for no limit.
        quick: Measure few token counts and few configurations.
        most_configs: Largest number of configurations per backend, the likeliest first; all that it offers if None.
        resume: Leave out the points that were measured with today's versions.
        device: Where to measure; the current CUDA device if None, else the CPU.
        backends: Names of the backends that take part; all registered ones if None.
        routings: Names of routing distributions; the winner is the best over all of them.
        modes: Graph, eager or both; every mode that the device has if None.
        compile_only: Only compile what would be measured, so that a later calibration need not.
        timeout_s: Seconds after which a candidate counts as hung.
        energy_s: Seconds for which the energy of each finalist of a point is measured too; 0 not to measure it.
        directory: Folder in place of the cache directory.
        on_progress: Called before each point.

    Raises:
        InvalidInputError: An argument is out of its range, the device is not here or has no energy counter for
            `energy_s`, or `MOE_DISPATCH_MACHINE` describes a machine of another kind.
        UnknownNameError: A backend or a model of this name is not known.
        PolicyFileError: The result cannot be written.
    """
    # Checked here and not by every worker process: a description of another machine must not be measured.
    present = present_device(device)
    machine = Machine.inspect(present)
    possible = possible_modes(machine)
    chosen = tuple(mode for mode in possible if modes is None or mode in modes)
    if not chosen:
        raise wrong_modes(modes or (), possible)
    if quick:
        most_configs = min(most_configs or QUICK_CONFIGS, QUICK_CONFIGS)
    request = CalibrationRequest(
        machine=machine,
        device=present,
        layers=tuple(
            LayerShape.of((workload(model) if isinstance(model, str) else model).problem(1, dtype, machine))
            for model in models
            for dtype in dtypes
        ),
        tokens=tuple(sorted(set(tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS)))),
        modes=chosen,
        routings=tuple(routings),
        backends=None if backends is None else tuple(backends),
        most_configs=most_configs,
        refine=not quick,
        resume=resume,
        compile_only=compile_only,
        budget_s=budget_s,
        timeout_s=timeout_s,
        energy_s=energy_s,
        directory=directory,
    )
    if energy_s and isinstance(reason := energy_meter(present), str):
        raise InvalidInputError(f"{reason}; leave out --energy (energy_s=0) to measure times alone")
    run = CalibrationRun(request, on_progress)
    try:
        return run.measure()
    finally:
        # Points are saved one by one, so an error at a later one leaves new choices to be read, too.
        if run.report.measured and request.path == calibration_path(machine):
            reset_dispatchers()
