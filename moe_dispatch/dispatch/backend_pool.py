"""The backends of one machine: made once, asked why they cannot run, and probed before they are trusted."""

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.errors import DeviceLostError
from moe_dispatch.dispatch.first_calls import FIRST_CALLS, wait_for_earlier_work
from moe_dispatch.dispatch.probe import probe
from moe_dispatch.dispatch.quarantine import Quarantine, QuarantineEntry
from moe_dispatch.guard import foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, MadeBackends
from moe_dispatch.system import failures


@dataclass(frozen=True)
class BackendStatus:
    """A registered backend on this machine.

    Attributes:
        available: Whether it imports and its libraries are installed.
        reasons: Why it is not available, each with its remedy.
        versions: Version by library, for the libraries that its measurements depend on.
    """

    name: str
    available: bool
    reasons: tuple[str, ...]
    versions: dict[str, str]
    install_hint: str


# The answers about the last problem, as policy and planner ask the same of it: the problem,
# the backends that gave no reason against it, and by backend what alone bars it, a failure of an earlier process.
_Answers = tuple[MoEProblem | None, set[str], dict[str, QuarantineEntry]]


class _Latest(threading.local):
    """The answers of each thread."""

    def __init__(self) -> None:
        self.answers: _Answers = (None, set(), {})


class BackendPool(MadeBackends):
    """Backends by name.

    No lock is held while a backend's code runs, which may itself call `moe_forward`, here or from a thread of its own.
    Threads that come first at the same time may make or probe a backend twice; the first result is kept.

    A policy's choice may have neither a name in `disabled` nor one in `barred`, whose reasons are given. The quarantine
    is consulted, and told of a probe that loses the CUDA context.
    """

    def __init__(
        self, machine: Machine, disabled: frozenset[str], quarantine: Quarantine, barred: Mapping[str, str]
    ) -> None:
        super().__init__(machine)
        self._disabled, self._quarantine, self._barred = disabled, quarantine, barred
        self._probe_failures: dict[tuple[str, MoEProblem], str] = {}
        self._latest = _Latest()

    def reasons_against(self, name: str, problem: MoEProblem, *, chosen_by_name: bool = False) -> tuple[str, ...]:
        """Every reason, known without running anything, against giving `problem` to a backend.

        Where the caller names the backend (`chosen_by_name`), only what is impossible counts.
        """
        made = self._made.get(name) or self.made(name)
        reasons = list(made.reasons)
        if made.backend is not None:
            answered, supported, recorded = self._latest.answers
            if answered is not problem:
                _, supported, recorded = self._latest.answers = (problem, set(), {})
            if name not in supported:
                reasons += made.backend.unsupported_reasons(problem)
                if len(reasons) == len(made.reasons):
                    supported.add(name)
            if not chosen_by_name:
                if name in self._disabled:
                    reasons.append("disabled by MOE_DISPATCH_DISABLE")
                if name in self._barred:
                    reasons.append(self._barred[name])
                if cause := self._quarantine.cause(name, problem):
                    if not reasons and (entry := self._quarantine.recorded(name, problem)):
                        recorded[name] = entry
                    reasons.append(f"quarantined for such problems: {cause}")
        return tuple(reasons)

    def still_able(self, name: str, problem: MoEProblem) -> bool:
        """Whether a backend can run a problem, given that it was chosen for another token count of the same kind."""
        backend = self._made[name].backend
        assert backend is not None  # noqa: S101 - it was chosen
        able = not backend.unsupported_reasons(problem) and not self._quarantine.cause(name, problem)
        return able and not backend.fault

    def recorded(self, problem: MoEProblem) -> Iterable[QuarantineEntry]:
        """Failures of earlier processes that alone kept backends from the problem that was asked about last."""
        answered, _, recorded = self._latest.answers
        return recorded.values() if answered is problem else ()

    def probe_failure(self, name: str, problem: MoEProblem, device: torch.device) -> str:
        """Why a backend's results cannot be trusted, found by its probe; empty if they can. Probes once per dtype.

        While a CUDA graph is captured nothing can be probed, and a backend not probed before is not trusted.

        Raises:
            DeviceLostError: The CUDA context is gone.
            BaseException: Memory ran out, which says nothing of the backend; see `failures.out_of_memory`.
        """
        backend = self.backend(name)
        if not backend.needs_probe:
            return ""
        probed = _probed(problem)
        verdict = self._probe_failures.get((name, probed))
        if verdict is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "not probed yet, which a graph capture does not allow; call it once before capturing"
            wait_for_earlier_work(device)
            try:
                verdict = self._probe(backend, problem, probed, device)
            except foreign_errors() as error:
                if failures.lost_device(error):
                    self._quarantine.bar(name, probed, failures.summary(error), fatal=True)
                    raise DeviceLostError([name], error) from error
                if failures.out_of_memory(error):
                    raise
                # Says nothing of the backend: torch is in a state in which no layer can be made, such as inside of
                # torch.func.vmap. The next kind of call probes again.
                return f"it could not be probed: {failures.summary(error)}"
            verdict = self._probe_failures.setdefault((name, probed), verdict)
        return verdict

    def broken(self, name: str) -> str:
        """What is known to be wrong with a backend's code, which cannot be made or failed to answer; else empty."""
        made = self._made.get(name)
        if made is None:
            return ""
        return "; ".join(made.reasons) if made.backend is None else made.backend.fault

    def statuses(self) -> tuple[BackendStatus, ...]:
        """Every registered backend."""
        return tuple(self._status(name) for name in BACKENDS.names())

    def _probe(self, backend: Backend, problem: MoEProblem, probed: MoEProblem, device: torch.device) -> str:
        if cause := self._quarantine.cause(backend.name, probed):
            return f"its probe is quarantined: {cause}"
        with FIRST_CALLS.running(backend.name), self._quarantine.first_run(backend.name, probed):
            return probe(backend, problem, device)

    def _status(self, name: str) -> BackendStatus:
        made = self.made(name)
        backend = made.backend
        if backend is None:
            return BackendStatus(name, available=False, reasons=made.reasons, versions={}, install_hint="")
        return BackendStatus(name, not made.reasons, made.reasons, backend.measured_versions(), backend.install_hint)


def _probed(problem: MoEProblem) -> MoEProblem:
    """What a probe's verdict holds for: dtypes, activation and biases, whatever the shape."""
    return dataclasses.replace(problem, M=1, K=128, N=128, E=1, topk=1, mode="eager", needs_grad=False)
