"""Backends and policies of other packages that misbehave: the layer is computed, and each fault is a reason."""

import contextlib
import functools
import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dispatch import DeviceLostError, MoEDispatchError, explain, moe_forward, register_backend, warm_up
from moe_dispatch.backend import Backend
from moe_dispatch.commands.doctor_report import examine
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers
from moe_dispatch.registry import BACKENDS, ENTRY_POINT_GROUP, POLICIES, Registry
from tests.attack.harness import answer_or_refusal, attack, watched
from tests.attack.misbehaviour import (
    CHOICES,
    ERRORS,
    NAME,
    answering,
    make_backend_class,
    make_policy_class,
    members,
    raising,
)
from tests.attack.oracle import assert_right, truth
from tests.attack.strategies import SCALARS, SMALL_CALL, Call, make_call
from tests.support.fakes import Honest, ranked, registered

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")
AREA = "backends"


def assert_computed(call: Call, **options: Any) -> None:
    """The answer is right, and the call's tensors are what they were; or the device is lost, as the backend says."""
    before = [tensor.clone() for tensor in (call.hidden_states, call.topk_weights, call.topk_ids)]
    result = answer_or_refusal(AREA, lambda: moe_forward(*call.arguments, **options))
    if isinstance(result, MoEDispatchError):
        assert options.get("backend") or isinstance(result, DeviceLostError), f"a valid call was refused: {result}"
        return
    assert_right(result, truth(before[0], call.layer, before[1], before[2]), "fp32")


def assert_explained(call: Call) -> None:
    explanation = explain(*call.arguments)
    assert explanation.chosen is not None
    assert str(explanation)


def assert_all_goes_on(call: Call) -> None:
    """Calls without a name, often enough for a fast path; then by name; explanations, warm-up and doctor."""
    for _ in range(4):
        assert_computed(call)
    out = torch.empty_like(call.hidden_states)
    assert_computed(call, out=out)
    assert_computed(call, backend=NAME)
    assert_explained(call)
    get_dispatcher("cpu").planner.statuses()
    answer_or_refusal(AREA, lambda: warm_up(call.experts, 2, [2]))
    assert not [entry for entry in get_dispatcher("cpu").quarantine.entries() if entry.backend == "reference"]


@attack(1500)
@given(parts=st.lists(members, min_size=1, max_size=2), successor=st.booleans(), report=st.integers(0, 20))
def test_a_backend_that_misbehaves(parts: list[dict[str, Any]], *, successor: bool, report: int) -> None:
    reset_dispatchers()
    call = make_call(SMALL_CALL)
    hostile = make_backend_class(parts)
    with watched(AREA):
        refusal = answer_or_refusal(AREA, lambda: register_backend(NAME, hostile))
        BACKENDS.unregister(NAME)
        if isinstance(refusal, MoEDispatchError):
            return
        BACKENDS.register(NAME, hostile)
        try:
            with ranked(NAME, *([Honest] if successor else [])):
                assert_all_goes_on(call)
                if report == 0:
                    examine("cpu", reset=False, probe=True)
        finally:
            BACKENDS.unregister(NAME)


SOURCES = st.sampled_from([
    "raise RuntimeError('no toolkit')", "import sys; sys.exit(3)", "raise SystemExit", "1 +", "import no_such_module_x",
    "from . import x", "assert False", "raise KeyError", "class Hostile: pass", "Hostile = None", "Hostile = 5", "",
    "def __getattr__(name): raise ValueError(name)", "\x00", "import ctypes; ctypes.CDLL('no_such_library.so')",
    "from moe_dispatch import Backend as Hostile", "import hostile_module.inner",
    "raise ExceptionGroup('x', [OSError()])",
    "class Hostile(__import__('moe_dispatch').Backend): pass",
    "raise MemoryError", "from hostile_module import Hostile", "x = 1/0", "# coding: no-such-codec",
])  # fmt: skip
TARGETS = st.sampled_from(
    ["hostile_module:Hostile", "hostile_module", "hostile_module:", ":Hostile", "", ":", "a b:c", "hostile_module:a.b",
     "..:x",
     "hostile_module:Hostile:x", "\0:x", "x" * 500 + ":y"]
)  # fmt: skip


@contextlib.contextmanager
def importable(source: str) -> Iterator[Path]:
    """A module ``hostile_module`` for a while."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hostile_module.py").write_text(source)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield Path(folder)
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "hostile_module"]:
                del sys.modules[name]


@attack(400)
@given(source=SOURCES, target=TARGETS | st.just("hostile_module:Hostile"))
def test_a_module_that_does_not_import(source: str, target: str) -> None:
    reset_dispatchers()
    call = make_call(SMALL_CALL)
    with importable(source), watched(AREA):
        if isinstance(answer_or_refusal(AREA, lambda: register_backend(NAME, target)), MoEDispatchError):
            return
        try:
            with ranked(NAME, Honest):
                assert_all_goes_on(call)
        finally:
            BACKENDS.unregister(NAME)


ENTRY_POINTS = st.sampled_from([
    "[{group}]\nhostile = hostile_module:Hostile\n", "[{group}]\nhostile = \n", "[{group}]\n= x:y\n", "[{group}",
    "\xff",
    "[{group}]\nhostile = hostile_module:Hostile [extra]\n", "[{group}]\nreference = hostile_module:Hostile\n",
    "[{group}]\nhostile hostile_module\n", "[{group}]\nhostile = a\nhostile = b\n", "[{group}]\nhostile = !!:??\n", "",
    "[{group}]\n\x1b[31m = hostile_module:Hostile\n", "no section\n", "[{group}]\n" + "x" * 3000 + " = a:b\n",
])  # fmt: skip


@attack(300)
@given(
    entry_points=ENTRY_POINTS,
    source=SOURCES,
    metadata=st.sampled_from(["Metadata-Version: 2.1\nName: hostile\n", "", "\xff"]),
)
def test_an_installed_package_with_entry_points(entry_points: str, source: str, metadata: str) -> None:
    """Its metadata may be damaged as well; this package's own backends keep their names."""
    with importable(source) as folder, watched(AREA):
        info = folder / "hostile-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata, encoding="latin-1")
        (info / "entry_points.txt").write_text(entry_points.format(group=ENTRY_POINT_GROUP), encoding="latin-1")
        registry = Registry(
            "backend",
            Backend,  # type: ignore[type-abstract]
            {"reference": "moe_dispatch.backends.reference:ReferenceBackend"},
            group=ENTRY_POINT_GROUP,
        )
        names = registry.names()
        assert names[0] == "reference"
        for name in names:
            loaded = answer_or_refusal(AREA, functools.partial(registry.load, name))
            assert isinstance(loaded, type | MoEDispatchError)
        assert registry.load("reference").name == "reference"


@attack(700)
@given(
    rank=ERRORS.map(raising) | SCALARS.map(answering) | st.lists(CHOICES, max_size=3).map(tuple).map(answering),
    notes=st.just(answering(())) | ERRORS.map(raising) | SCALARS.map(answering),
)
def test_a_policy_that_misbehaves(rank: Any, notes: Any) -> None:
    reset_dispatchers()
    call = make_call(SMALL_CALL)
    POLICIES.register("fixed", make_policy_class(rank, notes))
    try:
        with watched(AREA), registered(Honest):
            for _ in range(2):
                assert_computed(call)
            assert_computed(call, backend="honest")
            assert_explained(call)
            answer_or_refusal(AREA, lambda: warm_up(call.experts, 2, [2]))
    finally:
        POLICIES.unregister("fixed")
