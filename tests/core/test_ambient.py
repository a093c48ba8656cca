"""Cold calls (a probe, a warm-up, an explanation) under whatever state a program has set torch to."""

import ast
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from moe_dispatch import ExpertWeights, explain, moe_forward, warm_up
from moe_dispatch.backend import Backend
from moe_dispatch.dispatch import dispatcher as dispatcher_module
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.layer_spec import _SPECS
from moe_dispatch.machine import Machine
from moe_dispatch.measure.verify import relative_error
from moe_dispatch.policies.learned.fit import fit_cost_model
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts
from tests.core.test_dispatcher import expected, make_call, ran
from tests.support import ambient
from tests.support.fakes import Honest, ranked
from tests.support.stub_kernels import LAYER

pytestmark = pytest.mark.usefixtures("fixed_policy", "no_grad")
H200 = Machine.load("h200")


class Probed(Honest):
    name = "probed"
    needs_probe = True


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with ambient.default_dtype(request.param):
        yield request.param


AMBIENT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT.keys())
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
@pytest.mark.parametrize("backend", [Probed, "torch_grouped"])
def test_cold_calls(
    backend: type[Backend] | str, dtype: DType, ambient: Callable[[], AbstractContextManager[object]]
) -> None:
    layer = Workload("tiny", E=4, topk=2, K=128, N=128)
    hidden = torch.randn(5, 128, dtype=torch.bfloat16 if dtype == "fp8" else torch.float32)
    weights, ids = ROUTINGS["uniform"].sample(5, 4, 2, "cpu")
    experts = make_experts(layer, dtype, "cpu")
    with ranked(backend):
        with ambient():
            chosen = explain(hidden, experts, weights, ids).chosen
            warm_up(experts, 2, [1, 5])
            out = moe_forward(hidden, experts, weights, ids)
            halved = torch.is_autocast_enabled("cpu") and dtype == "fp32"
        assert chosen is not None
        assert ran() == {chosen.choice.backend: 3}
        if (backend, dtype) != ("torch_grouped", "fp8"):  # which does not take it
            assert chosen.choice.backend == getattr(backend, "name", backend)
        right = moe_forward(hidden, experts, weights, ids, backend="reference")
        if halved:  # see test_autocast.py
            assert 1e-4 < relative_error(right, out) < 1e-2
        else:
            assert torch.allclose(out, right, atol=1e-4)


@pytest.mark.usefixtures("default_dtype")
def test_a_fit_of_the_learned_policy_is_the_same_everywhere() -> None:
    times = {LAYER.problem(1 << power, "fp32", H200): 10.0 + 2**power for power in range(8)}
    with torch.device("meta"):
        under_defaults = fit_cost_model(times)
    torch.set_default_dtype(torch.float32)
    assert under_defaults == fit_cost_model(times)


def test_warm_up_draws_nothing_from_the_programs_generator() -> None:
    experts = make_call(3)[1]
    with ranked(Probed):
        before = torch.get_rng_state()
        warm_up(experts, 2, [1, 3])
        moe_forward(*make_call(3))
        assert torch.equal(torch.get_rng_state(), before)


def test_kinds_of_layers_are_forgotten_with_them() -> None:
    gc.collect()
    before = len(_SPECS)
    for K in range(8, 40, 8):
        ExpertWeights(torch.randn(2, 16, K), torch.randn(2, K, 8))
    gc.collect()
    assert len(_SPECS) == before


def test_alike_layers_share_their_plans() -> None:
    first, second = make_call(3)[1], make_call(4)[1]
    assert first.spec is second.spec


def test_a_full_plan_cache_drops_the_oldest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_PLANS", 3)
    with ranked(Honest):
        for M in range(1, 6):
            call = make_call(M)
            moe_forward(*call)
        plans = get_dispatcher("cpu")._plans
        assert [plan.problem.M for plan in plans.values()] == [3, 4, 5]
        assert ran() == {"honest": 5}, "what was counted is not forgotten"
        assert torch.equal(moe_forward(*make_call(1)), expected(make_call(1)))


# Torch functions that make a tensor of the default device, and those of them that make one of the default dtype.
FLOATING = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
MAKING = FLOATING | {"arange", "as_tensor", "randint", "randperm"}


def made_by_default(source: str) -> Iterator[str]:
    """Calls that make a tensor without its dtype or device."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        library, _, function = ast.unparse(node.func).rpartition(".")
        named = {keyword.arg for keyword in node.keywords}  # None stands for `**options`
        needed = {"device", "dtype"} if function in FLOATING else {"device"}
        if library == "torch" and function in MAKING and None not in named and not needed <= named:
            yield ast.unparse(node)


def test_every_tensor_is_made_with_its_dtype_and_device() -> None:
    """A program's defaults (`torch.set_default_dtype`, `torch.set_default_device`) reach no tensor of ours."""
    package = Path(dispatcher_module.__file__).parents[1]
    rooms = (package, package / "backends", package / "policies")  # rglob follows no links
    sources = {path: path.read_text(encoding="utf-8") for room in rooms for path in room.rglob("*.py")}
    assert not {path.name: calls for path, source in sources.items() if (calls := list(made_by_default(source)))}
    assert list(made_by_default("torch.zeros(3, device=x) + torch.arange(3, device=x)")) == ["torch.zeros(3, device=x)"]
