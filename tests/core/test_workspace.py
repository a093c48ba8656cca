"""A choice that takes too much memory is left out with its figures, whatever ranks it and wherever it was measured."""

from collections.abc import Mapping

import pytest
import torch

from moe_dispatch import BackendConfig, MoEProblem, NoBackendError, explain, moe_forward
from moe_dispatch.dispatch.backend_pool import BackendPool
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.calibration.candidates import CandidateSource
from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.measurements.merge import save
from moe_dispatch.policies.measurements.schema import Candidate, LayerShape, Measurement
from moe_dispatch.policies.measurements.versions import relevant_versions
from moe_dispatch.problem import DType, Mode
from moe_dispatch.registry import make_backend
from moe_dispatch.settings import Settings
from moe_dispatch.workloads import make_experts, workload
from moe_dispatch.workspace import BACKEND_SHARE, CONFIG_SHARE, excess
from tests.core.test_dispatcher import Call, is_right, ran
from tests.support.described import CPU
from tests.support.fakes import Honest, ranked, registered
from tests.support.stub_kernels import LAYER

H200 = Machine.load("h200")
DEEPSEEK = workload("deepseek-v3")
DECODE = (1, 4, 16, 64)  # token counts
MASKED: Mapping[str, str] = {"layout": "masked"}


def calibrate_decode(dtype: DType, mode: Mode, power: float = 1.0) -> None:
    """Write an H200's calibration of decode alone, in which DeepGEMM's masked layout wins at every token count.

    Times grow with this power of the token count.
    """
    layer = LayerShape.of(DEEPSEEK.problem(1, dtype, H200))
    rows: list[Measurement] = []
    for M in DECODE:
        problem = DEEPSEEK.problem(M, dtype, H200, mode)
        for place, name in enumerate(("deep_gemm", "gluon_hopper", "triton_persistent", "vllm_fused_moe")):
            backend = make_backend(name, H200).require()
            config = MASKED if name == "deep_gemm" else backend.default_config(problem).model_dump(mode="json")
            candidate = Candidate(backend=name, config=dict(config), versions=relevant_versions(backend))
            us = 100.0 * M**power + place
            rows.append(Measurement(layer, M, mode, candidate, us={"uniform": (us, us, us)}, score=us))
    save(calibration_path(H200), rows, H200)


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign backends pass for right on the described machine, on which no probe can run."""
    monkeypatch.setattr(BackendPool, "probe_failure", lambda *_: "")


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("dtype", "takes", "offers"), [("bf16", "22.0", "1.4"), ("fp8", "16.1", "1.0")])
def test_a_masked_layout_that_won_at_decode_is_not_carried_to_prefill(
    dtype: DType, takes: str, offers: str, mode: Mode
) -> None:
    M = 4096
    calibrate_decode(dtype, mode)
    planner = Dispatcher(H200, Settings(), live=False).planner
    problem = DEEPSEEK.problem(M, dtype, H200, mode)
    explanation = planner.explain(problem)
    first = explanation.candidates[0]
    assert (first.choice.backend, first.choice.config, first.choice.policy) == ("deep_gemm", MASKED, "calibrated")
    (reason,) = first.against
    assert reason == (
        f"takes {takes} GiB of workspace at M={M}: more than 1/32 of the device's memory (4.4 GiB), and than any "
        f"configuration that it offers there ({offers} GiB)"
    )
    assert reason in str(explanation)
    chosen = explanation.chosen
    assert chosen is not None
    experts = make_experts(LAYER, "fp32", "cpu")  # asked for their device only
    plan = planner.plan(problem, experts)
    assert (plan.choice.backend, plan.choice.config) == (chosen.choice.backend, chosen.choice.config)
    assert plan.choice.backend != "deep_gemm"
    assert plan.backend.workspace_bytes(problem, plan.config) < H200.memory_bytes * CONFIG_SHARE
    others = [(each.choice.backend, dict(each.choice.config or {})) for each in planner.eligible(problem, experts)]
    assert ("deep_gemm", MASKED) not in others, "nor is it a fallback"
    # By name it runs in another layout, and at decode as it was measured.
    assert planner.plan(problem, experts, "deep_gemm").config.label == "layout=psum"
    assert planner.plan(problem.with_tokens(64), experts).config.label == "layout=masked"


def test_a_calibration_of_decode_leaves_prefill_to_the_shipped_table_while_weights_bound_it() -> None:
    calibrate_decode("bf16", "eager", power=0.5)
    planner = Dispatcher(H200, Settings(), live=False).planner
    policies = [planner.explain(DEEPSEEK.problem(M, "bf16", H200)).candidates[0].choice.policy for M in (256, 4096)]
    assert policies == ["calibrated", "shipped"]


def test_another_calibration_does_not_measure_what_would_not_be_chosen() -> None:
    calibrate_decode("bf16", "eager")
    layer, skipped = LayerShape.of(DEEPSEEK.problem(1, "bf16", H200)), list[str]()
    request = CalibrationRequest(machine=H200, device=torch.device("cpu"), layers=(layer,), tokens=(64, 4096))
    dispatcher = Dispatcher(H200, Settings(), live=False)
    backends = {"deep_gemm": make_backend("deep_gemm", H200).require()}
    source = CandidateSource(request, backends, dispatcher.quarantine, skipped)
    layouts = {M: [each.config["layout"] for each in source.candidates(layer, M, "eager")] for M in (64, 4096)}
    assert layouts == {64: ["masked", "psum"], 4096: ["psum"]}
    assert len(skipped) == 1
    assert "M=4096: deep_gemm with layout=masked takes 22.0 GiB" in skipped[0]


@pytest.mark.parametrize(("gibibytes", "fits"), [(141, True), (80, False)])
def test_a_table_of_a_device_with_more_memory_is_read_with_that_of_this_one(gibibytes: int, fits: bool) -> None:
    """The shipped table of the H200 has the masked layout at 1024 tokens of deepseek-v3 in FP8: 4 GiB."""
    machine = H200.model_copy(update={"name": "NVIDIA H100 80GB HBM3", "memory_bytes": gibibytes << 30})
    explanation = Dispatcher(machine, Settings(), live=False).planner.explain(DEEPSEEK.problem(1024, "fp8", machine))
    masked = [each for each in explanation.candidates if each.choice.config == MASKED]
    assert len(masked) == 1
    assert bool(masked[0].against) is not fits


@pytest.mark.usefixtures("unprobed")
def test_what_is_chosen_is_what_is_explained_at_every_token_count() -> None:
    """Also where a plan comes from a neighbour's, or fits at some token counts of its power of two only."""
    machine = H200.model_copy(update={"memory_bytes": 60 << 30})
    refused = set[int]()
    dtypes: tuple[DType, ...] = "bf16", "fp8"
    for dtype in dtypes:
        planner = Dispatcher(machine, Settings(policies=("shipped",)), live=False).planner
        experts = make_experts(LAYER, "fp32", "cpu")
        for M in (1000, 520, 700, 513, 1024, 900, 64, 33, 4000, 2049, 1 << 21):
            problem = DEEPSEEK.problem(M, dtype, machine)
            explanation = planner.explain(problem)
            assert explanation.chosen is not None
            assert planner.plan(problem, experts).choice == explanation.chosen.choice
            refused |= {M for each in explanation.candidates if "takes" in "".join(each.against)}
    assert len(refused) > 1


class Hoarding(Honest):
    """Takes the same memory for every call: a copy of all weights, as it were."""

    name = "hoarding"
    share = 1.5 * BACKEND_SHARE

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        return int(self.share * self.machine.memory_bytes) + problem.rows_bytes


@pytest.mark.usefixtures("fixed_policy", "no_grad")
def test_a_backend_that_takes_much_is_left_out_and_runs_by_name(call: Call) -> None:
    with ranked(Hoarding, Honest):
        assert is_right(call)  # against the reference, which so ran, too
        assert ran() == {"honest": 1, "reference": 1}
        (reason,) = explain(*call).candidates[0].against
        assert "more than 1/8 of the device's memory" in reason
        assert "than 2 times the rows of all slots (0.0 GiB)" in reason
        moe_forward(*call, backend="hoarding")
        assert ran() == {"honest": 1, "reference": 1, "hoarding": 1}


def test_where_nothing_else_could_run_its_figures_are_in_the_error() -> None:
    with ranked(Hoarding):
        settings = Settings(policies=("fixed",), disabled=frozenset({"reference"}))
        planner = Dispatcher(CPU, settings, live=False).planner
        with pytest.raises(NoBackendError, match=r"(?s)hoarding.*takes 3\.0 GiB of workspace at M=1:"):
            planner.plan(LAYER.problem(1, "fp32", CPU), make_experts(LAYER, "fp32", "cpu"))


@pytest.mark.parametrize(
    ("share", "memory", "M", "fits"),
    [
        (1.5 * BACKEND_SHARE, 16 << 30, 1, False),
        (0.9 * BACKEND_SHARE, 16 << 30, 1, True),
        (1.5 * BACKEND_SHARE, 16 << 30, 1 << 27, True),  # a call whose rows take as much
        (1.5 * BACKEND_SHARE, 0, 1, True),  # a machine whose memory is not known
    ],
    ids=["too much", "a share", "many rows", "unknown"],
)
def test_the_share_of_the_device_and_the_rows_of_the_call_count(
    share: float, memory: int, M: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hoarding, "share", share)
    with registered(Hoarding):
        backend = make_backend("hoarding", CPU.model_copy(update={"memory_bytes": memory})).require()
        assert (not excess(backend, LAYER.problem(M, "fp32", CPU), BackendConfig())) is fits
