"""The router kernels against their torch twins, and the twins against what is written down by hand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_dispatch.backends.stages import router_logits as router_logits_module
from moe_dispatch.backends.stages import select_experts as select_experts_module
from moe_dispatch.backends.stages.router_logits import router_logits, router_logits_torch
from moe_dispatch.backends.stages.select_experts import MAX_EXPERTS, MAX_TOPK, select_experts
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.routers import Router, select_experts_torch
from tests.support.triton_compile import Launch, compile_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("default")
PDL = (False, True) if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0) else (False,)
Choose = Callable[[Tensor, Router], tuple[Tensor, Tensor]]
DEEPSEEK_V3 = Router(8, "sigmoid", scale=2.5, groups=8, topk_groups=4, correction_bias=True)


@dataclass(frozen=True)
class Case:
    why: str
    E: int
    router: Router

    def __str__(self) -> str:
        return self.why


CASES = (
    Case("Mixtral", 8, Router(2)),
    Case("Qwen2-MoE, 60 experts, not renormalised", 60, Router(4, renormalize=False)),
    Case("Qwen3-MoE", 128, Router(8)),
    Case("DeepSeek-V3", 256, DEEPSEEK_V3),
    Case("Kimi-K2, one group", 384, Router(8, "sigmoid", scale=2.827, correction_bias=True)),
    Case("groups that are no power of two", 30, Router(3, "sigmoid", groups=3, topk_groups=2, renormalize=False)),
    Case("as many as fit", MAX_EXPERTS, Router(MAX_TOPK)),
    Case("one expert", 1, Router(1)),
)


def logits_of(M: int, E: int) -> Tensor:
    return torch.randn(M, E, generator=torch.Generator().manual_seed(E)).to(DEVICE)


def bias_of(case: Case) -> Tensor | None:
    if not case.router.correction_bias:
        return None
    return 0.3 * torch.randn(case.E, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@ON_GPU
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("M", [1, 7, 300] if DEVICE == "cuda" else [5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_chooses_as_torch_does(case: Case, M: int) -> None:
    logits, bias = logits_of(M, case.E), bias_of(case)
    expected_weights, expected_ids = select_experts_torch(logits, case.router, bias)
    for pdl in PDL:
        weights, ids = select_experts(logits, case.router, bias, pdl=pdl)
        # On a GPU scores that differ in their last bit may change places; their weights are then equal.
        assert (ids == expected_ids).float().mean() > 0.999
        rtol, atol = (1e-5, 1e-6) if DEVICE == "cuda" else (2e-6, 1e-7)
        torch.testing.assert_close(weights, expected_weights, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_takes_half_precision_logits(dtype: torch.dtype) -> None:
    logits = logits_of(3, 64).to(dtype)
    weights, ids = select_experts(logits, Router(4))
    expected_weights, expected_ids = select_experts_torch(logits, Router(4))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("choose", [select_experts, select_experts_torch], ids=["kernel", "torch"])
def test_equal_scores_go_to_the_lowest_index(choose: Choose) -> None:
    logits = torch.zeros(1, 17, device=DEVICE)
    logits[0, 11] = 1.0
    logits[0, 3] = -0.0
    assert choose(logits, Router(4))[1].tolist() == [[11, 0, 1, 2]]
    grouped = Router(3, "sigmoid", groups=4, topk_groups=2)
    assert choose(torch.zeros(1, 16, device=DEVICE), grouped)[1].tolist() == [[0, 1, 2]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("choose", [select_experts, select_experts_torch], ids=["kernel", "torch"])
@pytest.mark.parametrize(
    "router", [Router(4), Router(4, "sigmoid", groups=4, topk_groups=2)], ids=["softmax", "groups"]
)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_ids_are_distinct_experts_whatever_the_logits(choose: Choose, router: Router, fill: float) -> None:
    logits = torch.full((2, 12), fill, device=DEVICE)
    logits[1, 3:] = torch.arange(9.0)
    logits[1, :2] = -torch.inf
    _, ids = choose(logits, router)
    assert [len({*row, *range(12)}) for row in ids.tolist()] == [12, 12]
    assert [len(set(row)) for row in ids.tolist()] == [4, 4]


def test_a_nan_is_chosen_first_and_shows_in_the_weights() -> None:
    logits = torch.tensor([[5.0, -torch.nan, 1.0, 0.0]], device=DEVICE)
    for weights, ids in (select_experts(logits, Router(2)), select_experts_torch(logits, Router(2))):
        assert ids.tolist() == [[1, 0]]
        assert weights.isnan().all()


def test_groups_are_ranked_by_their_two_best() -> None:
    # Scores of group 0: one large; of group 1: two middling, which sum to more.
    logits = torch.tensor([[4.0, -9.0, -9.0, 1.0, 1.5, -9.0]], device=DEVICE)
    router = Router(1, "sigmoid", groups=2, topk_groups=1, renormalize=False)
    for weights, ids in (select_experts(logits, router), select_experts_torch(logits, router)):
        assert ids.tolist() == [[4]]
        torch.testing.assert_close(weights, torch.tensor([[1.5]], device=DEVICE).sigmoid())


def test_the_correction_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], device=DEVICE)
    router = Router(1, "sigmoid", renormalize=False, scale=2.0, correction_bias=True)
    bias = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    for weights, ids in (select_experts(logits, router, bias), select_experts_torch(logits, router, bias)):
        assert ids.tolist() == [[2]]
        assert weights.tolist() == [[1.0]]  # 2 · sigmoid(0)


def test_renormalised_softmax_is_the_softmax_of_the_chosen_logits_though_their_probabilities_underflow() -> None:
    logits = torch.tensor([[300.0, 1.0, 0.0, -1.0]], device=DEVICE)
    weights, _ = select_experts_torch(logits, Router(2))
    assert weights.tolist() == [[1.0, 0.0]]
    assert select_experts_torch(logits, Router(3))[1].tolist() == [[0, 1, 2]]
    assert select_experts(logits, Router(3))[1].tolist() == [[0, 1, 2]]


def test_the_twin_is_differentiable() -> None:
    logits = logits_of(2, 12).double().cpu().requires_grad_()
    weights, ids = select_experts_torch(logits, Router(3, renormalize=False, scale=1.5))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    (expected,) = torch.autograd.grad(1.5 * logits.softmax(1).gather(1, ids.long())[:, 0].sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    weights, ids = select_experts_torch(logits, Router(3, "sigmoid", groups=3, topk_groups=2))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert {(int(m), int(e)) for m, e in gradient.nonzero()} == {
        (m, e) for m, row in enumerate(ids.tolist()) for e in row
    }  # through the sum, to all chosen


@pytest.mark.parametrize("router", [Router(MAX_TOPK + 1), Router(2)], ids=["topk", "E"])
def test_what_is_too_large_for_the_kernel_is_left_to_torch(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_experts_module, "MAX_EXPERTS", 32)
    E = 32 if router.topk > 2 else 33
    logits = logits_of(2, E)
    assert torch.equal(select_experts(logits, router)[1], select_experts_torch(logits, router)[1])


def test_no_tokens_give_no_choice() -> None:
    weights, ids = select_experts(torch.empty(0, 8, device=DEVICE), Router(2))
    assert weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 0}, "topk must be an integer of at least 1, got 0"),
        ({"topk": 1, "scoring": "tanh"}, "softmax or sigmoid, got 'tanh'"),
        ({"topk": 1, "scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"topk": 1, "groups": 2}, "need sigmoid scores"),
        ({"topk": 1, "correction_bias": True}, "need sigmoid scores"),
        ({"topk": 1, "scoring": "sigmoid", "groups": 2, "topk_groups": 3}, "at most groups=2, got 3"),
    ],
)
def test_a_router_refuses_what_it_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Router(**arguments)  # type: ignore[arg-type]


def test_a_router_refuses_experts_that_it_cannot_choose_from() -> None:
    grouped = Router(5, "sigmoid", groups=4, topk_groups=2)
    with pytest.raises(InvalidInputError, match="E=9 experts must divide into groups=4"):
        grouped.check(9)
    with pytest.raises(InvalidInputError, match="topk=5 experts cannot be chosen of 4 eligible"):
        grouped.check(8)
    grouped.check(12)


@ON_GPU
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("M", "K", "E"), [(3, 200, 5), *([(1, 7168, 256), (8, 2048, 128), (9, 2880, 128)] if DEVICE == "cuda" else [])]
)
def test_logits_are_sums_in_fp32(M: int, K: int, E: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, K, generator=generator).to(DEVICE, dtype) for rows in (M, E))
    weight /= (K / 200) ** 0.5
    bias = torch.arange(float(E), device=DEVICE).to(dtype) if biased else None
    tolerance = 1e-4 if DEVICE == "cuda" else 1e-5
    for pdl in PDL:
        logits = router_logits(hidden, weight, bias, pdl=pdl)
        assert logits.dtype == torch.float32
        expected = router_logits_torch(hidden, weight, bias)
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("M", [0, 4])
def test_logits_of_other_token_counts(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_logits_module, "MAX_TOKENS", 3)
    hidden, weight = torch.ones(M, 16, device=DEVICE), torch.ones(2, 16, device=DEVICE)
    assert torch.equal(router_logits(hidden, weight), torch.full((M, 2), 16.0, device=DEVICE))


def launch_router(capability: int) -> Iterator[Launch]:
    pdl = capability >= 90
    hidden, weight = torch.empty(2, 7168, dtype=torch.bfloat16), torch.empty(256, 7168, dtype=torch.bfloat16)
    yield Launch(partial(router_logits, hidden, weight, pdl=pdl), {"pdl": pdl})
    yield Launch(partial(select_experts, torch.empty(2, 256), DEEPSEEK_V3, torch.empty(256), pdl=pdl), {"pdl": pdl})


def test_the_kernels_compile_for_devices_without_spills() -> None:
    kernels = compile_launches(launch_router, 80, 90, 100)
    assert [built.capability for built in kernels] == [80, 80, 90, 90, 100, 100]
    for built in kernels:
        assert built.stack == 0, built
        assert built.pdl == built.note["pdl"], built
        assert built.wide_loads or built.name != "_moe_router_logits_kernel", built
