"""What only a GPU can show of the dispatcher: its cost on the host, and replays."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dispatch import moe_forward
from moe_dispatch.dispatch.dispatcher import FAST_PATH_CALLS
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.testing import Case, Inputs, Precision, make_inputs, relative_error
from moe_dispatch.workloads import ROUTINGS, WORKLOADS, make_experts

pytestmark = pytest.mark.gpu
ALONE = "PYTEST_XDIST_WORKER" not in os.environ  # a host's time means nothing while other workers have its cores
MOST_OVERHEAD_US = 10.0


def host_us(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Host time of two calls in µs: the median of the first, and the median of what the second takes beyond it.

    Each pair is run one right after the other, in turning order and with the device idle: what else the host does
    comes and goes over both.
    """
    base: list[float] = []
    beyond: list[float] = []
    for pair in range(500):
        taken: dict[Callable[[], object], float] = {}
        for call in (first, second) if pair % 2 else (second, first):
            torch.cuda.synchronize()
            begun = time.perf_counter_ns()
            call()
            taken[call] = (time.perf_counter_ns() - begun) / 1e3
        base.append(taken[first])
        beyond.append(taken[second] - taken[first])
    return statistics.median(base), statistics.median(beyond)


@pytest.mark.skipif(not ALONE, reason="other workers share the host: run it without -n")
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_automatic_choice_costs_the_host_little(dtype: str, recording: bool) -> None:
    layer = WORKLOADS["qwen3-30b-a3b"]
    experts = make_experts(layer, dtype, "cuda")  # type: ignore[arg-type]
    weights, ids = ROUTINGS["uniform"].sample(1, layer.E, layer.topk, "cuda")
    hidden = torch.randn(1, layer.K, device="cuda").bfloat16()
    with torch.set_grad_enabled(recording):
        for _ in range(20):
            moe_forward(hidden, experts, weights, ids)
        (plan,) = get_dispatcher(hidden.device)._plans.values()
        played, overhead = host_us(
            lambda: plan.run(hidden, experts, weights, ids, plan.config),
            lambda: moe_forward(hidden, experts, weights, ids),
        )
        direct, difference = host_us(
            lambda: plan.backend.run(hidden, experts, weights, ids, plan.config),
            lambda: moe_forward(hidden, experts, weights, ids),
        )
    print(
        f"{plan.choice.backend} {dtype}, recording {recording}: {direct:.1f} µs called directly, {difference:+.1f} µs "
        f"through moe_forward, which takes {overhead:.1f} µs beyond the {played:.1f} µs of what it calls"
    )
    assert difference <= MOST_OVERHEAD_US
    assert overhead <= MOST_OVERHEAD_US


@pytest.mark.parametrize("precision", [Precision("bf16", "bf16"), Precision("fp8", "bf16")], ids=str)
@pytest.mark.parametrize("name", ["triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper"])
@pytest.mark.parametrize("M", [1, 5, 64, 300])
def test_a_repeated_call_is_a_replay_and_right_on_others(M: int, name: str, precision: Precision) -> None:
    """On other inputs, and of other token counts."""
    from moe_dispatch.backends.triton_common.replay import Replay

    case = Case(M=M, E=32, topk=4, K=512, N=256)
    calls = [make_inputs(case, precision, "cuda", seed) for seed in range(3)]
    dispatcher = get_dispatcher(calls[0].hidden_states.device)
    problem = case.layer.problem(M, precision.dtype, dispatcher.machine)
    if reasons := dispatcher.planner.backend(name).unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    with torch.no_grad():
        for _ in range(FAST_PATH_CALLS):
            moe_forward(*calls[0].arguments, backend=name)
        (plan,) = dispatcher._plans.values()
        replay, backend, config = plan.run, plan.backend, plan.config
        assert isinstance(replay, Replay)

        def ordinary(call: Inputs) -> Tensor:
            out: Tensor = replay.launch(*call.arguments, config, torch.empty_like(call.hidden_states))
            return out

        others = {replay.tokens.first, min(replay.tokens.last, 2 * M + 1)}
        calls += [make_inputs(dataclasses.replace(case, M=other), precision, "cuda") for other in others]
        for call in calls:
            out = torch.empty_like(call.hidden_states)
            assert replay.play(*call.arguments, out)
            assert torch.equal(out, ordinary(call))
            assert relative_error(out, call.expected(backend)) <= backend.tolerance[precision.dtype]
        direct, difference = host_us(lambda: ordinary(calls[0]), lambda: replay(*calls[0].arguments, config))
    print(f"{name} {precision} M={M}: {direct:.1f} µs, as a replay {direct + difference:.1f} µs")
    if ALONE:
        assert difference < -0.4 * direct
