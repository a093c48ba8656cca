"""The backends of one machine: made once, asked why they cannot, probed before they are trusted."""

import dataclasses
import threading
from dataclasses import dataclass

import torch

from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.errors import DeviceLostError
from moe_dispatch.dispatch.probe import probe
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.system import failures


@dataclass(frozen=True)
class BackendStatus:
    """A registered backend on this machine.

    Attributes:
        name: Registered name.
        available: Whether its libraries are there.
        reasons: Why not, with the remedy.
        versions: Of what its measurements depend on.
        install_hint: How to get it.
    """

    name: str
    available: bool
    reasons: tuple[str, ...]
    versions: dict[str, str]
    install_hint: str


class BackendPool:
    """Backends by name.

    Args:
        machine: Theirs.
        disabled: Names that must not be chosen.
        quarantine: Consulted, and told of what a probe kills.
    """

    def __init__(self, machine: Machine, disabled: frozenset[str], quarantine: Quarantine) -> None:
        self._machine, self._disabled, self._quarantine = machine, disabled, quarantine
        self._made: dict[str, Backend | BackendUnavailableError] = {}
        self._probed: dict[tuple[str, MoEProblem], str] = {}
        self._lock = threading.RLock()

    def backend(self, name: str) -> Backend:
        """The backend behind a name.

        Raises:
            UnknownNameError: Nothing is registered under it.
            BackendUnavailableError: It does not import, or its libraries are missing.
        """
        made = self._make(name)
        if reasons := made.unavailable_reasons():
            raise BackendUnavailableError(name, reasons)
        return made

    def reasons_against(self, name: str, problem: MoEProblem, *, chosen_by_name: bool = False) -> tuple[str, ...]:
        """Everything that is known, without running anything, against giving `problem` to a backend.

        Args:
            name: Registered name.
            problem: What it would get.
            chosen_by_name: The caller insists; then only what is impossible counts.
        """
        try:
            made = self._make(name)
        except BackendUnavailableError as error:
            return error.reasons
        reasons = [*made.unavailable_reasons(), *made.unsupported_reasons(problem)]
        if not chosen_by_name:
            if name in self._disabled:
                reasons.append("disabled by MOE_DISPATCH_DISABLE")
            if cause := self._quarantine.cause(name, problem):
                reasons.append(f"quarantined for such problems: {cause}")
        return tuple(reasons)

    def probe_failure(self, name: str, problem: MoEProblem, device: torch.device) -> str:
        """Why a backend's results cannot be trusted, found by its probe; empty if they can. Runs once per dtype.

        While a CUDA graph is captured nothing can be probed, and a backend not probed before is not trusted.
        """
        made = self._make(name)
        if not made.needs_probe:
            return ""
        kind = _kind(problem)
        if (name, kind) not in self._probed:
            if problem.mode == "graph":
                return "not probed yet, which a graph capture does not allow; call it once before capturing"
            with self._lock:
                if (name, kind) not in self._probed:
                    try:
                        self._probed[name, kind] = self._probe(made, problem, kind, device)
                    except Exception as error:
                        if failures.lost_device(error):
                            self._quarantine.bar(name, kind, failures.summary(error), fatal=True)
                            raise DeviceLostError([name], error) from error
                        if failures.out_of_memory(error):  # of the moment: the next kind of call tries again
                            return f"its probe ran out of memory: {failures.summary(error)}"
                        raise
        return self._probed[name, kind]

    def broken(self, name: str) -> str:
        """Why a registered backend could not even be imported or made; empty if it could."""
        made = self._made.get(name)
        return "; ".join(made.reasons) if isinstance(made, BackendUnavailableError) else ""

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Every registered backend."""
        return tuple(self._status(name) for name in BACKENDS.names())

    def _probe(self, backend: Backend, problem: MoEProblem, kind: MoEProblem, device: torch.device) -> str:
        if cause := self._quarantine.cause(backend.name, kind):
            return f"its probe is quarantined: {cause}"
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an older error is nobody's here
        with self._quarantine.first_run(backend.name, kind):
            return probe(backend, problem, device)

    def _status(self, name: str) -> BackendStatus:
        try:
            made = self._make(name)
        except BackendUnavailableError as error:
            return BackendStatus(name, available=False, reasons=error.reasons, versions={}, install_hint="")
        reasons = made.unavailable_reasons()
        return BackendStatus(name, not reasons, reasons, made.measured_versions(), made.install_hint)

    def _make(self, name: str) -> Backend:
        made = self._made.get(name)
        if made is None:
            with self._lock:
                made = self._made.get(name)
                if made is None:
                    made = self._made[name] = self._try_to_make(name)
        if isinstance(made, BackendUnavailableError):
            raise BackendUnavailableError(name, made.reasons) from made.__cause__
        return made

    def _try_to_make(self, name: str) -> Backend | BackendUnavailableError:
        try:
            return make_backend(name, self._machine)
        except BackendUnavailableError as error:
            return error


def _kind(problem: MoEProblem) -> MoEProblem:
    """What a probe's verdict holds for: dtypes, activation and biases, whatever the shape."""
    return dataclasses.replace(problem, M=1, K=128, N=128, E=1, topk=1, mode="eager", needs_grad=False)
