"""What `moe-dispatch doctor` finds out, as data."""

import dataclasses
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from moe_dispatch.commands.calibrated_layers import CalibratedLayer, calibrated_layers
from moe_dispatch.commands.layer import dispatched
from moe_dispatch.dispatch.backend_pool import BackendStatus
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.dispatch.quarantine import Quarantine, QuarantineEntry
from moe_dispatch.errors import MoEDispatchError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.measure import sample_layer, verify
from moe_dispatch.policies.calibrated import calibration_paths
from moe_dispatch.policies.measurements.schema import read_calibration
from moe_dispatch.problem import DTYPES, DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import VARIABLES, cache_dir, set_variables, settings
from moe_dispatch.system.files import check_writable
from moe_dispatch.system.libraries import LibraryStatus, library_statuses
from moe_dispatch.system.version import installed_version
from moe_dispatch.workloads import Workload

# Small, and aligned so that no backend refuses it for its shape.
PROBE: Final = Workload("probe", E=4, topk=2, K=256, N=128)
PROBE_TOKENS: Final = 8
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia")  # where it is loaded; a container with GPUs has it, too


@dataclass(frozen=True)
class BackendReport:
    """A backend on this machine.

    Attributes:
        dtypes: Weight dtypes that it runs here; empty if it runs none.
        reasons: Why it runs none.
        probe: By dtype, what running a tiny layer showed, beginning with ``ok`` if it is right; empty without a probe.
    """

    name: str
    dtypes: tuple[DType, ...]
    reasons: tuple[str, ...]
    versions: dict[str, str]
    install_hint: str
    probe: dict[DType, str]

    @property
    def broken(self) -> bool:
        """Whether a probe failed."""
        return any(not verdict.startswith("ok") for verdict in self.probe.values())


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `moe-dispatch doctor` shows.

    Attributes:
        machine: The machine, or the one that MOE_DISPATCH_MACHINE describes.
        libraries: Every library with releases known to work.
        calibrated: Layers that this machine's calibrations cover, its own first.
        quarantine: Entries that hold under today's versions.
        lifted: Number of entries that --reset lifted; None without it.
        policy_notes: What the policies have to say, what the environment names in vain, and a torch without CUDA.
        cache_dir: Folder of calibrations and the quarantine.
        problems: What is wrong, each with its remedy; the command fails if there are any.
    """

    version: str
    machine: Machine
    backends: tuple[BackendReport, ...]
    libraries: tuple[LibraryStatus, ...]
    calibrated: tuple[CalibratedLayer, ...]
    quarantine: tuple[QuarantineEntry, ...]
    lifted: int | None
    policy_notes: tuple[str, ...]
    environment: dict[str, str]
    cache_dir: str
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON data; ``"machine"`` serves ``--machine``."""
        return dataclasses.asdict(self) | {
            "machine": self.machine.model_dump(mode="json"),
            "fingerprint": self.machine.fingerprint,
            "quarantine": [entry.model_dump(mode="json") for entry in self.quarantine],
        }


def examine(device: str | None, *, reset: bool, probe: bool) -> DoctorReport:
    """Examine this machine.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; the current GPU, else the CPU, if None.
        reset: Lift the quarantine first.
        probe: Run a tiny layer on every backend.

    Raises:
        InvalidInputError: There is no such device, or a variable has no valid value.
        MoEDispatchError: The quarantine cannot be lifted.
    """
    dispatcher = get_dispatcher(device)
    machine = dispatcher.machine
    lifted = _lift(dispatcher.quarantine) if reset else None
    backends = tuple(_report(dispatcher, status, probe=probe) for status in dispatcher.planner.statuses())
    entries = dispatcher.quarantine.entries()
    problems = [*_environment_problems(backends), *_cache_problems()]
    problems += [
        f"backend {report.name!r} failed its probe: {verdict}"
        for report in backends
        for verdict in report.probe.values()
        if not verdict.startswith("ok")
    ]
    if fatal := sum(entry.fatal for entry in entries):
        what = "a failure that ended a process bars a backend" if fatal == 1 else "failures that ended processes"
        bars = what if fatal == 1 else f"{fatal} {what} bar backends"
        problems.append(f"{bars}: see the quarantine; `moe-dispatch doctor --reset` lifts it")
    calibrated: list[CalibratedLayer] = []
    absent: list[str] = []
    for index, path in enumerate(calibration_paths(machine)):
        try:
            calibrated += calibrated_layers(read_calibration(path, machine))
        except FileNotFoundError:
            if index:  # the first is this machine's own, which need not have been measured
                absent.append(f"MOE_DISPATCH_CALIBRATION_PATH: there is no {path}")
        except (PolicyFileError, OSError) as error:
            problems.append(f"a calibration is not used: {error}")
    return DoctorReport(
        version=installed_version(),
        machine=machine,
        backends=backends,
        libraries=tuple(library_statuses(machine.libraries, machine.torch, machine.triton)),
        calibrated=tuple(calibrated),
        quarantine=entries,
        lifted=lifted,
        policy_notes=(*dispatcher.planner.notes(), *absent, *_unread_variables(), *_cpu_build()),
        environment=set_variables(),
        cache_dir=str(cache_dir()),
        problems=tuple(problems),
    )


def _lift(quarantine: Quarantine) -> int:
    try:
        return quarantine.reset()
    except OSError as error:
        raise MoEDispatchError(
            f"the quarantine cannot be lifted: {error}; make {cache_dir()} writable, or set MOE_DISPATCH_CACHE_DIR to "
            "another folder"
        ) from error


def _environment_problems(backends: tuple[BackendReport, ...]) -> Iterator[str]:
    """What MOE_DISPATCH_BACKEND would make every call raise."""
    name = settings().backend
    if not name:
        return
    consequence = "so every call that names no backend raises. Unset it, or mend the backend"
    if name not in BACKENDS.names():
        yield f"MOE_DISPATCH_BACKEND names {name!r}, which is no backend, {consequence}"
    for report in backends:
        if report.name == name and not report.dtypes:
            yield f"MOE_DISPATCH_BACKEND names {name!r}, which runs nothing here, {consequence}: {report.reasons[0]}"


def _unread_variables() -> Iterator[str]:
    """Variables with this package's prefix that it does not read: a name with a typing error changes nothing."""
    for name in sorted(os.environ):
        if name.startswith("MOE_DISPATCH_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            yield f"{name[:80]} is no variable of moe_dispatch" + (f"; did you mean {near[0]}?" if near else "")


def _cpu_build() -> Iterator[str]:
    """A torch for the CPU alone where there is a GPU: backends say that they need one, and not why they have none."""
    if os.path.exists(NVIDIA_DRIVER) and not torch.version.cuda and not torch.version.hip:
        release = torch.__version__.partition("+")[0]
        yield (
            f"NVIDIA's driver is loaded, and torch {torch.__version__} is built without CUDA: pip install "
            f"--force-reinstall --index-url https://pypi.org/simple 'torch=={release}'"
        )


def _cache_problems() -> Iterator[str]:
    folder = cache_dir()
    try:
        check_writable(folder / "doctor")
    except OSError as error:
        yield (
            f"{str(folder)[:300]} cannot be written ({error.strerror or error}), so neither calibrations nor crashes "
            "of backends are remembered. Make it writable, or set MOE_DISPATCH_CACHE_DIR to another folder"
        )


def _report(dispatcher: Dispatcher, status: BackendStatus, *, probe: bool) -> BackendReport:
    name = status.name
    reasons = list(status.reasons)
    dtypes: list[DType] = []
    if status.available:
        refusals: dict[str, None] = {}
        for dtype in DTYPES:
            problem = PROBE.problem(PROBE_TOKENS, dtype, dispatcher.machine)
            against = dispatcher.planner.backend(name).unsupported_reasons(problem)
            if against:
                refusals.update(dict.fromkeys(against))
            else:
                dtypes.append(dtype)
        if not dtypes:
            # A dtype that it never takes says nothing about the machine; the remaining reasons do.
            reasons += [text for text in refusals if not text.startswith("takes ")] or list(refusals)
    probed: dict[DType, str] = {dtype: _probe(name, dtype, dispatcher) for dtype in dtypes} if probe else {}
    return BackendReport(name, tuple(dtypes), tuple(reasons), status.versions, status.install_hint, probed)


def _probe(name: str, dtype: DType, dispatcher: Dispatcher) -> str:
    """Run a tiny layer and compare it with fp32; a sentence that begins with ``ok`` if it is right."""
    machine = dispatcher.machine
    problem, backend = PROBE.problem(PROBE_TOKENS, dtype, machine), dispatcher.planner.backend(name)
    quantizes = backend.quantizes_activations(problem)
    sample = sample_layer(problem, torch.device(machine.device), quantize_activations=quantizes)
    tolerance = backend.tolerance.get(dtype, 0.0)
    try:
        verdict = verify(dispatched(sample.experts, name), sample.inputs, sample.truths, tolerance=tolerance)
    except MoEDispatchError as failure:
        return f"failed: {failure}"
    if not verdict.ok:
        return f"WRONG: {verdict.reason}"
    return f"ok, error {verdict.error:.1e} (tolerance {tolerance:.0e})"
