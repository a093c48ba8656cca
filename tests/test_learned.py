"""The learned policy, held against a cost law that is known because this file states it."""

import math
import random
from pathlib import Path

import pytest

from moe_dispatch.benchmarks.regret import regrets
from moe_dispatch.errors import InvalidInputError, MoEDispatchWarning
from moe_dispatch.machine import Machine
from moe_dispatch.policies.fit import Observation, fit_model, save_model
from moe_dispatch.policies.learned import LearnedPolicy, model_path
from moe_dispatch.policies.neighbours import SCALES, Point, expected_lags
from moe_dispatch.policies.scales import LeaveOneOut, fit_scales
from moe_dispatch.problem import DType
from moe_dispatch.workloads import WORKLOADS

H200 = Machine.load(Path(__file__).parent / "machines" / "h200.json")
TOKENS = tuple(2**i for i in range(15))
NOISE = 0.02
# µs of launches, TB/s and TFLOP/s: a backend quick to start, and one with the higher rate.
LAW = {"vllm_fused_moe": (20.0, 4.0, 300.0), "deep_gemm": (120.0, 3.5, 1000.0)}


def synthetic(models: tuple[str, ...] = tuple(WORKLOADS), dtype: DType = "fp8") -> list[Observation]:
    """launch + bytes of the hit experts / bandwidth + flops / rate, with 2 % of noise. Nothing here was measured."""
    noise = random.Random(0)  # noqa: S311 - not cryptography
    found = []
    for name in models:
        for M in TOKENS:
            problem = WORKLOADS[name].problem(M, dtype, H200, "graph")
            for backend, (launch, bandwidth, rate) in LAW.items():
                us = launch + problem.expected_experts * problem.expert_bytes / bandwidth / 1e6
                us += problem.flops / rate / 1e6
                config = (("layout", "psum"),) if backend == "deep_gemm" else ()
                found.append(Observation(problem, (backend, config), us * noise.gauss(1, NOISE)))
    return found


def test_alike_is_what_has_the_rows_and_the_size() -> None:
    near = Point((3.0, 8.0, 11.0, 12.0), 0.1, {"a": 0.0, "b": 0.5})
    far = Point((9.0, 13.0, 11.0, 12.0), 0.3, {"a": 0.4, "b": 0.0})
    best, lags = expected_lags([near, far], near.x, SCALES)
    assert best == pytest.approx(0.1, abs=1e-3)
    assert lags["a"] < lags["b"]
    _, lags = expected_lags([near, far], far.x, SCALES)
    assert lags["b"] < lags["a"]
    # Where no feature counts, both points count alike.
    best, lags = expected_lags([near, far], (6.0, 10.5, 11.0, 12.0), (math.inf,) * 4)
    assert best == pytest.approx(0.2)
    assert lags["a"] == pytest.approx(lags["b"], abs=0.1)


def test_who_was_hardly_measured_is_not_trusted() -> None:
    points = [Point((float(i), 8.0, 11.0, 12.0), 0.0, {"a": 0.02}) for i in range(10)]
    points.append(Point((90.0, 8.0, 11.0, 12.0), 0.0, {"a": 0.1, "lucky": 0.0}))
    _, lags = expected_lags(points, points[0].x, SCALES)
    assert lags["a"] < lags["lucky"]


def test_the_fit_finds_the_feature_that_matters() -> None:
    # Who wins depends on the third feature alone; layers are alike in all others.
    ahead, behind = {0: 0.0, 1: 0.3}, {0: 0.3, 1: 0.0}
    groups = {
        name: [Point((float(i), 5.0, N, 7.0), 0.0, ahead if N < 10 else behind) for i in range(5)]
        for name, N in (("p", 8.0), ("q", 8.5), ("r", 12.0), ("s", 12.5))
    }
    scales = fit_scales(groups, start=(0.35, math.inf, math.inf, math.inf))
    assert scales[2] < math.inf
    assert LeaveOneOut(groups).regrets(scales).max() == 0.0


def test_what_is_fitted_is_what_is_chosen() -> None:
    noise = random.Random(1)  # noqa: S311 - not cryptography
    groups = {
        layer: [
            Point(
                tuple(noise.uniform(0, 8) for _ in range(4)),
                0.0,
                {c: lag for c in range(5) if (lag := noise.uniform(-0.2, 1.5)) >= 0.0},
            )
            for _ in range(6)
        ]
        for layer in range(3)
    }
    lost = LeaveOneOut(groups).regrets(SCALES).tolist()
    for layer, asked in groups.items():
        known = [point for other, points in groups.items() if other != layer for point in points]
        for point in asked:
            _, lags = expected_lags(known, point.x, SCALES)
            chosen = min((one for one in lags if one in point.lags), key=lambda one: lags[one])
            assert lost.pop(0) == pytest.approx(math.expm1(point.lags[chosen]))


def test_leaving_one_model_out_it_beats_every_fixed_choice() -> None:
    summary = regrets(synthetic(), H200)
    fixed = ("always_vllm", "always_deep_gemm", "vllm_rule", "vllm_deep_gemm_rule")
    assert set(summary) == {"learned", "rules", "oracle", *fixed}
    assert summary["oracle"] == {"mean": 0.0, "p95": 0.0, "worst": 0.0}
    learned = summary.pop("learned")
    assert learned["mean"] < 0.02
    assert learned["mean"] < min(summary[name]["mean"] for name in fixed)
    assert max(learned["mean"], learned["p95"]) <= learned["worst"]


def test_vllm_by_itself_takes_triton_on_hopper_and_its_deep_gemm_asks_for_the_shape() -> None:
    # One narrow model, N ≤ 512, and one wide one; Triton costs 1 µs and DeepGEMM 2, so that regret 1 is DeepGEMM.
    seen = [
        Observation(WORKLOADS[name].problem(M, "fp8", H200, "graph"), (backend, ()), us)
        for name in ("kimi-k2-tp8", "deepseek-v3")
        for M in (16, 32, 64, 128)
        for backend, us in (("vllm_fused_moe", 1.0), ("deep_gemm", 2.0))
    ]
    summary = regrets(seen, H200)
    assert summary["vllm_rule"]["worst"] == 0.0
    assert summary["vllm_deep_gemm_rule"] == {"mean": 0.125, "p95": 1.0, "worst": 1.0}


def test_one_model_cannot_be_left_out_of_one() -> None:
    with pytest.raises(InvalidInputError, match="two models at least, got 1"):
        regrets(synthetic(("qwen3-235b",)), H200)


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="needs 4 points"):
        fit_model(synthetic()[:6], H200)


def test_a_saved_model_ranks_shapes_that_nobody_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path))
    save_model(fit_model(synthetic(("deepseek-v3", "mixtral-8x7b")), H200), model_path(H200))
    policy = LearnedPolicy(H200)
    layer = WORKLOADS["qwen3-30b-a3b"]
    assert policy.rank(layer.problem(1, "fp8", H200, "graph"))[0].backend == "vllm_fused_moe"
    last = policy.rank(layer.problem(16384, "fp8", H200, "eager"))[0]
    assert last.backend == "deep_gemm"
    assert "on like ones of 2 layers (graph" in last.reason
    assert policy.rank(layer.problem(1, "bf16", H200)) == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "is damaged"), ('{"schema_version": 9, "fingerprint": "x", "sms": 1, "groups": []}', "schema version 9")],
)
def test_a_model_that_cannot_be_trusted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str
) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path))
    path = model_path(H200)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.warns(MoEDispatchWarning, match="learned"):
        policy = LearnedPolicy(H200)
    assert says in policy.notes()[0]
    assert policy.rank(WORKLOADS["deepseek-v3"].problem(1, "fp8", H200)) == ()
