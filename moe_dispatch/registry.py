"""The names of backends and policies, and the modules that hold them. Nothing is imported before it is used."""

import importlib
import importlib.metadata
import logging
import threading
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast

from moe_dispatch.backend import Backend, Requirements
from moe_dispatch.errors import BackendUnavailableError, InvalidInputError, UnknownNameError
from moe_dispatch.guard import GuardedBackend, foreign_errors
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Policy
from moe_dispatch.problem import MoEProblem
from moe_dispatch.system import failures

ENTRY_POINT_GROUP: Final = "moe_dispatch.backends"
LAST_RESORT: Final = "reference"  # The backend that runs anywhere and every valid call.

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> class, or "module:Class" that becomes one on first use.

    Args:
        kind: What it holds, for messages: ``"backend"``.
        base: The class that every entry must derive from.
        built_in: This package's own entries, as "module:Class".
        group: Entry-point group in which other packages announce their classes; empty for none.
    """

    def __init__(self, kind: str, base: type[T], built_in: dict[str, str], group: str = "") -> None:
        self._kind, self._base, self._group = kind, base, group
        self._specs: dict[str, str | type[T]] = dict(built_in)
        self._lock = threading.RLock()
        self._scanned = not group

    def names(self) -> tuple[str, ...]:
        """Every registered name: this package's own, then the others in order of registration."""
        self._scan()
        return tuple(self._specs)

    def register(self, name: str, target: str | type[T]) -> None:
        """Add or replace an entry: a class, or "module:Class" to be imported on first use.

        Raises:
            InvalidInputError: The class cannot be what the name promises. A "module:Class" is only checked by `load`.
        """
        if not isinstance(target, str) and (fault := self._fault(name, target)):
            raise InvalidInputError(fault)
        with self._lock:
            self._scan()
            self._specs[name] = target

    def unregister(self, name: str) -> None:
        """Remove an entry."""
        with self._lock:
            self._specs.pop(name, None)

    def load(self, name: str) -> type[T]:
        """The class behind a name.

        Raises:
            UnknownNameError: Nothing is registered under it.
            BackendUnavailableError: Its module does not import, the cause being chained, or holds no class that could
                be what the name promises.
        """
        self._scan()
        target = self._specs.get(name)
        if target is None:
            raise UnknownNameError(self._kind, name, self.names())
        if isinstance(target, type):
            return target
        module, _, attribute = target.partition(":")
        if not attribute:
            raise BackendUnavailableError(name, [f"{target!r} names no class; write it as module:Class"])
        try:
            loaded: Any = importlib.import_module(module)
            for part in attribute.split("."):
                loaded = getattr(loaded, part)
        except foreign_errors() as error:
            reason = f"{target} does not import: {failures.summary(error)}"
            raise BackendUnavailableError(name, [reason]) from error
        if fault := self._fault(name, loaded):
            raise BackendUnavailableError(name, [fault])
        with self._lock:
            self._specs[name] = loaded
        return cast("type[T]", loaded)

    def module(self, name: str) -> str:
        """The module that `load` would import for a name; empty if it imports none."""
        self._scan()
        target = self._specs.get(name, "")
        return target.partition(":")[0] if isinstance(target, str) else ""

    def renew_lock(self) -> None:
        """Replace the lock in a forked child, where a thread of the parent may have held it."""
        self._lock = threading.RLock()

    def _fault(self, name: str, target: object) -> str:
        """What is wrong with giving a class this name; empty if nothing is."""
        if not (isinstance(target, type) and issubclass(target, self._base)):
            return f"{_spelt(target)} is registered as {name!r} and is not a subclass of {self._base.__name__}"
        own = getattr(target, "name", None)
        if own != name:
            # Choices use the registered name, probes and learned models the class's own.
            calls = f"calls itself {own!r}; register it under that name, or" if own else "has no name;"
            return f"{_spelt(target)} is registered as {name!r} and {calls} declare name = {name!r} in the class"
        if issubclass(target, Backend) and not isinstance(getattr(target, "requirements", None), Requirements):
            return (
                f"{_spelt(target)} does not say what it takes; declare requirements = Requirements(dtypes=…, …) in "
                "the class"
            )
        return ""

    def _scan(self) -> None:
        if self._scanned:
            return
        with self._lock:
            if self._scanned:
                return
            # An installed package cannot replace a built-in backend; `register` can, deliberately.
            for name, target in _entry_points(self._group):
                self._specs.setdefault(name, target)
            self._scanned = True


BACKENDS: Final = Registry(
    "backend",
    Backend,  # type: ignore[type-abstract]  # the registry holds subclasses and never instantiates the base
    {
        "reference": "moe_dispatch.backends.reference:ReferenceBackend",
        "torch_grouped": "moe_dispatch.backends.torch_grouped:TorchGroupedBackend",
        "triton_persistent": "moe_dispatch.backends.triton_persistent.backend:TritonPersistentBackend",
        "gluon_hopper": "moe_dispatch.backends.gluon_hopper.backend:GluonHopperBackend",
        "triton_splitk": "moe_dispatch.backends.triton_splitk.backend:TritonSplitKBackend",
        "triton_vector": "moe_dispatch.backends.triton_vector.backend:TritonVectorBackend",
        "vllm_fused_moe": "moe_dispatch.backends.vllm_fused_moe:VllmFusedMoEBackend",
        "deep_gemm": "moe_dispatch.backends.deep_gemm:DeepGemmBackend",
    },
    group=ENTRY_POINT_GROUP,
)

POLICIES: Final = Registry(
    "policy",
    Policy,  # type: ignore[type-abstract]
    {
        "calibrated": "moe_dispatch.policies.calibrated:CalibratedPolicy",
        "learned": "moe_dispatch.policies.learned.policy:LearnedPolicy",
        "shipped": "moe_dispatch.policies.shipped:ShippedPolicy",
        "rules": "moe_dispatch.policies.rules:RulesPolicy",
    },
)


@dataclass(frozen=True)
class MadeBackend:
    """What became of making a backend for a machine: the backend, or the reasons why it cannot run anything there.

    Attributes:
        backend: The backend, in its wrapper; None where the name is unknown, or its module or constructor raised.
        reasons: Why it runs nothing on this machine, each with its remedy; empty if it can run.
        registered: Whether a backend is known by this name.
        cause: What its module or constructor raised.
    """

    name: str
    backend: GuardedBackend | None = None
    reasons: tuple[str, ...] = ()
    registered: bool = True
    cause: BaseException | None = None

    def require(self, variable: str = "") -> GuardedBackend:
        """The backend, if it can run.

        Args:
            variable: The environment variable that names it, if one does.

        Raises:
            UnknownNameError: Nothing is registered under the name.
            BackendUnavailableError: It does not import, its constructor raises, or its libraries are missing.
        """
        if not self.registered:
            raise UnknownNameError("backend", self.name, BACKENDS.names(), variable)
        if self.backend is None or self.reasons:
            raise BackendUnavailableError(self.name, self.reasons, variable) from self.cause
        return self.backend


class MadeBackends:
    """The backends of a machine, each made on its first use and kept.

    Threads that come first at the same time may make a backend twice; the first one is kept.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._made: dict[str, MadeBackend] = {}

    def made(self, name: str) -> MadeBackend:
        """The backend behind a name, or why it runs nothing here."""
        made = self._made.get(name)
        if made is None:
            made = make_backend(name, self._machine)
            if made.registered:  # an unknown name may be registered later
                made = self._made.setdefault(name, made)
        return made

    def backend(self, name: str) -> GuardedBackend:
        """The backend behind a name, if it can run; see `MadeBackend.require` for what is raised otherwise."""
        made = self._made.get(name)
        if made is None or made.reasons or made.backend is None:
            return self.made(name).require()
        return made.backend

    def reasons_against(self, name: str, problem: MoEProblem) -> tuple[str, ...]:
        """Every reason, known without running anything, against giving a problem to a backend."""
        made = self.made(name)
        return made.reasons + (made.backend.unsupported_reasons(problem) if made.backend else ())

    def able(self, name: str, problem: MoEProblem) -> Backend | None:
        """See `UsableBackends.able`."""
        return None if self.reasons_against(name, problem) else self.made(name).backend

    def without_library(self, name: str, problem: MoEProblem) -> Backend | None:
        """See `UsableBackends.without_library`."""
        missing = self.made(name).reasons
        return self.made(name).backend if missing and self.reasons_against(name, problem) == missing else None


def make_backend(name: str, machine: Machine) -> MadeBackend:
    """Make the backend behind a name for a machine, or say why not; nothing that its code raises is passed on."""
    try:
        backend = GuardedBackend(BACKENDS.load(name)(machine), machine)
    except UnknownNameError as error:
        return MadeBackend(name, reasons=(str(error),), registered=False)
    except BackendUnavailableError as error:
        return MadeBackend(name, reasons=error.reasons, cause=error.__cause__)
    except foreign_errors() as error:
        return MadeBackend(name, reasons=(f"cannot be made: {failures.summary(error)}",), cause=error)
    return MadeBackend(name, backend, backend.unavailable_reasons())


def register_backend(name: str, target: str | type[Backend]) -> None:
    """Make a backend known under its name: a class, or "module:Class" to be imported on first use.

    Raises:
        InvalidInputError: It is no subclass of `Backend`, calls itself by another name, or declares no requirements.
            A "module:Class" is checked on first use, and is unavailable for that reason then.
    """
    BACKENDS.register(name, target)


def _entry_points(group: str) -> list[tuple[str, str]]:
    """Names and targets that installed packages announce; one with damaged metadata costs that package alone."""
    try:
        return [(entry.name, _target(entry)) for entry in importlib.metadata.entry_points(group=group)]
    except Exception as error:  # noqa: BLE001 - metadata of some installed package
        logger.info("an installed package has damaged metadata: %s", failures.summary(error))
    announced: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            entries = list(distribution.entry_points)
        except Exception as error:  # noqa: BLE001 - the damaged one
            where = distribution.locate_file("")
            logger.warning("a package in %s is passed over, whose entry points are damaged: %s", where, error)
            continue
        for entry in entries:
            if entry.group == group:
                announced.setdefault(entry.name, _target(entry))
    return list(announced.items())


def _target(entry: importlib.metadata.EntryPoint) -> str:
    """Module and class of an entry point, without the extras that may follow; its text where that is neither."""
    match = entry.pattern.match(entry.value)
    return f"{match['module']}:{match['attr']}" if match and match["attr"] else entry.value


def _spelt(target: object) -> str:
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, type) else repr(target)
