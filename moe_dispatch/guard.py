"""The wrapper around every backend: whatever its code raises or answers becomes a reason that names the backend.

A backend may be another package's code. One that raises when it is asked, answers nonsense or calls `sys.exit` costs
that backend and nothing else: not the call, not `explain`, not `doctor`.
"""

import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from moe_dispatch.backend import Backend, BackendConfig, Requirements
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system import failures

_DECLARED: Final[Mapping[str, type]] = {
    "name": str,
    "requirements": Requirements,
    "config_type": type,
    "tolerance": Mapping,
    "install_hint": str,
    "needs_probe": bool,
    "stores_to_peers": bool,
    "starts_before_arrival": bool,
}

Answer = TypeVar("Answer")


def foreign_errors() -> tuple[type[BaseException], ...]:
    """What to catch of foreign code, for an except clause, which calls this when something was raised.

    That is everything: `sys.exit` in a library may not end the program that uses it, nor may the panic of an extension
    in Rust, which is no `Exception`. Ctrl-C must, and so must what a signal handler of the program raises, which comes
    out of whatever code the signal interrupted. `GeneratorExit` tells a generator of ours that it is not needed.
    """
    error = sys.exception()
    ours = isinstance(error, KeyboardInterrupt | GeneratorExit) or _of_signal_handler(error)
    return () if ours else (BaseException,)


def _of_signal_handler(error: BaseException | None) -> bool:
    """Whether a signal handler raised: a function that was given the frame below its own, which it interrupted.

    What it raised in one of several tasks, or Ctrl-C there, comes out in a group.
    """
    if isinstance(error, BaseExceptionGroup) and (
        error.subgroup(KeyboardInterrupt) or any(map(_of_signal_handler, error.exceptions))
    ):
        return True
    for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
        names, positional, _, values = inspect.getargvalues(frame)
        rest = values.get(positional or "")
        given = [*map(values.get, names), *(rest if isinstance(rest, tuple) else ())]
        if frame.f_back is not None and any(each is frame.f_back for each in given):
            return True
    return False


class GuardedBackend(Backend):
    """A backend whose every question gets an answer of the promised type.

    `run`, `run_into` and their fast paths are the backend's own methods: the dispatcher recovers from what they raise
    and checks what they return.

    Attributes:
        fault: What its latest failure to answer was; empty if it always answered.

    Raises:
        TypeError: The backend declares an attribute of the wrong type.
    """

    run: Any = None  # no method of this class: `__init__` gives each instance its backend's own

    def __init__(self, backend: Backend, machine: Machine) -> None:
        super().__init__(machine)
        self._backend = backend
        self.fault = ""
        declared = {name: getattr(backend, name) for name in _DECLARED}
        for name, kind in _DECLARED.items():
            if not isinstance(declared[name], kind):
                raise TypeError(f"it declares {name} = {reprlib.repr(declared[name])}, which is no {kind.__name__}")
        if not issubclass(declared["config_type"], BackendConfig):
            raise TypeError(f"its config_type {declared['config_type'].__name__} is no subclass of BackendConfig")
        # Class attributes of a backend; here each instance has those of the backend behind it.
        vars(self).update(
            declared,
            run=backend.run,
            run_into=backend.run_into,
            fast_path=backend.fast_path,
            fast_path_into=backend.fast_path_into,
        )

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Backend.unavailable_reasons`. Versions that cannot be told are a reason as well."""
        reasons, fault = self._ask(_reasons, self._backend.unavailable_reasons)
        _, unversioned = self._ask(_versions, self._backend.measured_versions)
        return (*(reasons or ()), *filter(None, (fault, unversioned)))

    def unsupported_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """See `Backend.unsupported_reasons`. A failure to answer is a reason as well."""
        method = self._backend.unsupported_reasons
        try:
            answer = method(problem)
        except foreign_errors() as error:
            return (self._faulty(method, "raised", error),)
        if type(answer) is tuple and not answer:  # as nearly always, and asked for every new token count
            return answer
        reasons, fault = self._read(_reasons, method, answer)
        return (fault,) if reasons is None else reasons

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """See `Backend.configs`.

        Raises:
            BackendUnavailableError: The backend raised, or answered something else than its configurations.
        """
        return self._demand(self._configs, self._backend.configs, problem)

    def default_config(self, problem: MoEProblem) -> BackendConfig:
        """See `Backend.default_config`.

        Raises:
            BackendUnavailableError: The backend raised, or answered something else than a configuration of its own.
        """
        return self._demand(self._config, self._backend.default_config, problem)

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """See `Backend.workspace_bytes`, whose own estimate stands in for a failure to answer."""
        size, _ = self._ask(_size, self._backend.workspace_bytes, problem, config)
        return super().workspace_bytes(problem, config) if size is None else size

    def deterministic(self, config: BackendConfig) -> bool:
        """See `Backend.deterministic`. A failure to answer promises nothing."""
        promised, _ = self._ask(bool, self._backend.deterministic, config)
        return bool(promised)

    def quantizes_activations(self, problem: MoEProblem) -> bool:
        """See `Backend.quantizes_activations`, whose own answer stands in for a failure to answer."""
        quantizes, _ = self._ask(bool, self._backend.quantizes_activations, problem)
        return super().quantizes_activations(problem) if quantizes is None else quantizes

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """See `Backend.takes_quantized_rows`. A failure to answer promises nothing."""
        takes, _ = self._ask(bool, self._backend.takes_quantized_rows, problem)
        return bool(takes)

    def reads_whole_layer(self, problem: MoEProblem) -> bool:
        """See `Backend.reads_whole_layer`. After a failure to answer it may."""
        reads, _ = self._ask(bool, self._backend.reads_whole_layer, problem)
        return reads is not False

    def measured_versions(self) -> dict[str, str]:
        """See `Backend.measured_versions`. Empty after a failure to answer, which `unavailable_reasons` tells."""
        versions, _ = self._ask(_versions, self._backend.measured_versions)
        return versions or {}

    def _ask(
        self, read: Callable[[Any], Answer], method: Callable[..., object], *arguments: object
    ) -> tuple[Answer | None, str]:
        """The method's answer as `read` understands it; or None, and what is wrong."""
        try:
            answer = method(*arguments)
        except foreign_errors() as error:
            return None, self._faulty(method, "raised", error)
        return self._read(read, method, answer)

    def _read(
        self, read: Callable[[Any], Answer], method: Callable[..., object], answer: object
    ) -> tuple[Answer | None, str]:
        """The answer of a method as `read` understands it; or None, and what is wrong."""
        try:
            return read(answer), ""
        except foreign_errors() as error:
            return None, self._faulty(method, f"answered {reprlib.repr(answer)}:", error)

    def _faulty(self, method: Callable[..., object], what: str, error: BaseException) -> str:
        self.fault = f"{self.name}.{getattr(method, '__name__', 'method')} {what} {failures.summary(error)}"
        return self.fault

    def _demand(self, read: Callable[[Any], Answer], method: Callable[..., object], *arguments: object) -> Answer:
        answer, fault = self._ask(read, method, *arguments)
        if answer is None:
            raise BackendUnavailableError(self.name, [fault])
        return answer

    def _configs(self, answer: Any) -> tuple[BackendConfig, ...]:
        configs = tuple(self._config(config) for config in answer)
        if not configs:
            raise ValueError("at least the default configuration is expected")
        return configs

    def _config(self, answer: Any) -> BackendConfig:
        if not isinstance(answer, self.config_type):
            raise TypeError(f"a {self.config_type.__name__} is expected")
        hash((answer, *vars(answer).values()))  # raises where a field cannot be: plans are kept by configuration
        return answer


def _reasons(answer: Any) -> tuple[str, ...]:
    reasons = tuple(answer)
    if isinstance(answer, str) or (reasons and not all(isinstance(reason, str) for reason in reasons)):
        raise TypeError("a tuple of strings is expected")
    return reasons


def _versions(answer: Any) -> dict[str, str]:
    versions = dict(answer)
    if not all(isinstance(text, str) for pair in versions.items() for text in pair):
        raise TypeError("a dictionary of strings is expected")
    return versions


def _size(answer: Any) -> int:
    if not 0 <= answer < math.inf:
        raise ValueError("a number of bytes is expected")
    return int(answer)
