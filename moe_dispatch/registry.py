"""Names of backends and policies, and where each is found. Nothing is imported before it is used."""

import importlib
import importlib.metadata
import threading
from typing import Final, Generic, TypeVar

from moe_dispatch import failures
from moe_dispatch.backend import Backend
from moe_dispatch.errors import BackendUnavailableError, UnknownNameError
from moe_dispatch.machine import Machine
from moe_dispatch.policy import Policy

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
        """Add or replace an entry: a class, or "module:Class" to be imported on first use."""
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
            BackendUnavailableError: Its module does not import or holds no such class; the cause is chained.
        """
        self._scan()
        target = self._specs.get(name)
        if target is None:
            raise UnknownNameError(self._kind, name, self.names())
        if isinstance(target, type):
            return target
        try:
            loaded = self._import(target)
        except Exception as error:
            reason = f"{target} does not import: {type(error).__name__}: {error}"
            raise BackendUnavailableError(name, [reason]) from error
        with self._lock:
            self._specs[name] = loaded
        return loaded

    def _import(self, target: str) -> type[T]:
        module, _, attribute = target.partition(":")
        loaded = getattr(importlib.import_module(module), attribute)
        if not (isinstance(loaded, type) and issubclass(loaded, self._base)):
            raise TypeError(f"{target} is not a subclass of {self._base.__name__}")
        return loaded

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
        "learned": "moe_dispatch.policies.learned:LearnedPolicy",
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
    """Make a backend known under a name: a class, or "module:Class" to be imported on first use."""
    BACKENDS.register(name, target)
