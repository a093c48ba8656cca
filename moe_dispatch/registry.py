"""Names of backends and policies, and where each is found. Nothing is imported before it is used."""

import importlib
import importlib.metadata
import threading
from typing import Final, Generic, TypeVar

from moe_dispatch.backend import Backend, Requirements
from moe_dispatch.errors import BackendUnavailableError, InvalidInputError, UnknownNameError
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Policy
from moe_dispatch.system import failures

ENTRY_POINT_GROUP: Final = "moe_dispatch.backends"

T = TypeVar("T", bound=Backend | Policy)


class Registry(Generic[T]):
    """Name -> class, or "module:Class" that becomes one on first use.

    Args:
        kind: What it holds, for messages: ``"backend"``.
        base: What every class in it must derive from.
        built_in: The project's own, as "module:Class".
        group: Entry-point group in which other packages announce theirs; empty for none.
    """

    def __init__(self, kind: str, base: type[T], built_in: dict[str, str], group: str = "") -> None:
        self._kind, self._base, self._group = kind, base, group
        self._specs: dict[str, str | type[T]] = dict(built_in)
        self._lock = threading.RLock()
        self._scanned = not group

    def names(self) -> tuple[str, ...]:
        """Every registered name, ours first, in order of registration."""
        self._scan()
        return tuple(self._specs)

    def register(self, name: str, target: str | type[T]) -> None:
        """Add or replace an entry: a class, or "module:Class" to be imported on first use.

        Raises:
            InvalidInputError: The class cannot be what the name promises; of a "module:Class", `load` says so.
        """
        if not isinstance(target, str) and (fault := self._fault(name, target)):
            raise InvalidInputError(fault)
        with self._lock:
            self._scan()
            self._specs[name] = target

    def unregister(self, name: str) -> None:
        """Take an entry out again."""
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
        try:
            module, _, attribute = target.partition(":")
            loaded = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            reason = f"{target} does not import: {type(error).__name__}: {error}"
            raise BackendUnavailableError(name, [reason]) from error
        if fault := self._fault(name, loaded):
            raise BackendUnavailableError(name, [fault])
        found: type[T] = loaded
        with self._lock:
            self._specs[name] = found
        return found

    def _fault(self, name: str, target: object) -> str:
        """What is wrong with giving a class this name; empty if nothing is."""
        if not (isinstance(target, type) and issubclass(target, self._base)):
            return f"{_spelt(target)} is registered as {name!r} and is not a subclass of {self._base.__name__}"
        own = getattr(target, "name", None)
        if own != name:
            # Choices go by the one, probes and learned models by the other.
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
            for entry in importlib.metadata.entry_points(group=self._group):
                # Ours cannot be replaced by installing a package; `register` is the deliberate way.
                self._specs.setdefault(entry.name, entry.value)
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


def make_backend(name: str, machine: Machine) -> Backend:
    """The backend behind a name, for a machine.

    Raises:
        UnknownNameError: Nothing is registered under it.
        BackendUnavailableError: It does not import, or its constructor raises; the cause is chained.
    """
    found = BACKENDS.load(name)
    try:
        return found(machine)
    except Exception as error:
        raise BackendUnavailableError(name, [f"cannot be made: {failures.summary(error)}"]) from error


def register_backend(name: str, target: str | type[Backend]) -> None:
    """Make a backend known under its name: a class, or "module:Class" to be imported on first use.

    Raises:
        InvalidInputError: It is no subclass of `Backend`, calls itself by another name, or declares no requirements.
            A "module:Class" is looked at on first use, and then not available for that reason.
    """
    BACKENDS.register(name, target)


def _spelt(target: object) -> str:
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, type) else repr(target)
