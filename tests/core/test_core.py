"""Quantised weights, described machines, workloads, and the registry."""

import dataclasses
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

from moe_dispatch import (
    BackendUnavailableError,
    ExpertWeights,
    InvalidInputError,
    Machine,
    MoEProblem,
    register_backend,
)
from moe_dispatch.backend import Backend, Requirements
from moe_dispatch.measure import sample_layer
from moe_dispatch.numerics import dequantize_blocks, quantize_blocks
from moe_dispatch.registry import BACKENDS, POLICIES, Registry, make_backend
from moe_dispatch.system.libraries import deep_gemm_package, library_version
from moe_dispatch.workloads import ROUTINGS, Workload
from tests.support.ambient import default_dtype
from tests.support.fakes import ANYTHING, Honest, registered


@pytest.mark.parametrize("shape", [(2, 256, 384), (1, 200, 136), (3, 1, 1)])
def test_each_quantised_block_keeps_its_own_scale(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[2])
    quantized, scale = quantize_blocks(weight)
    assert scale.shape == (shape[0], math.ceil(shape[1] / 128), math.ceil(shape[2] / 128))
    # Half a step of e4m3 is 1/16 of the value or, for the small, half the least step of the block.
    slack = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, : shape[1], : shape[2]] * 2**-10
    error = (dequantize_blocks(quantized, scale) - weight).abs()
    assert (error <= weight.abs() / 16 + slack).all()


def test_a_quantised_block_of_zeros_stays_zero() -> None:
    weight = torch.randn(1, 256, 128)
    weight[:, 128:] = 0
    quantized, scale = quantize_blocks(weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert dequantize_blocks(quantized, scale)[:, 128:].abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_spoils_no_other(bad: float) -> None:
    weight = torch.randn(1, 128, 128)
    weight[0, 3, 5] = bad
    restored = dequantize_blocks(*quantize_blocks(weight))
    assert restored[0, 3, 5].isnan()
    weight[0, 3, 5] = restored[0, 3, 5] = 0
    assert torch.allclose(restored, weight, rtol=1 / 16, atol=1e-2)


def test_quantize_keeps_biases_and_activation() -> None:
    experts = ExpertWeights.quantize(
        torch.randn(2, 128, 64), torch.randn(2, 64, 64), gate_up_bias=torch.zeros(2, 128),
        down_bias=torch.zeros(2, 64), activation="swiglu_oai", interleaved=True,
    )  # fmt: skip
    assert (experts.dtype, experts.activation, experts.interleaved) == ("fp8", "swiglu_oai", True)
    assert "dtype='fp8'" in repr(experts)


def test_a_described_machine_replaces_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_MACHINE", "h200")
    assert Machine.inspect().name == "NVIDIA H200"
    with pytest.raises(InvalidInputError, match=r"describes a cuda machine.*`moe-dispatch explain --machine h200`"):
        Machine.inspect("cpu")


def test_token_counts_of_a_layer_share_what_does_not_depend_on_them() -> None:
    call = MoEProblem(M=1, K=64, N=64, E=4, topk=2)
    eight, nine = call.with_tokens(8), call.with_tokens(9)
    assert eight == dataclasses.replace(call, M=8)
    assert eight.layer is nine.layer
    assert nine.bucket is call.with_tokens(16).bucket
    assert (eight.expected_slots, nine.expected_slots) == (16, 18)
    eights = Requirements({"bf16": (8, 0)}, multiples={"bf16": {"M": 8, "K": 64}})
    assert eights.reasons_against(eight) == []
    assert eights.reasons_against(nine) == ["needs M % 8 == 0 for bf16, got M=9"]
    with pytest.raises(InvalidInputError, match="M must be an integer of at least 0, got M=-1"):
        call.with_tokens(-1)
    eight.layer.met.add(lambda: None)  # a requirement of another package may not be pickled
    assert pickle.loads(pickle.dumps(eight)) == eight  # noqa: S301 - written by this test


def test_a_fingerprint_is_of_the_hardware() -> None:
    machine = Machine.load("h200")
    assert machine.slug == "nvidia_h200"
    assert machine.model_copy(update={"torch": "9", "driver": "1"}).fingerprint == machine.fingerprint
    assert machine.model_copy(update={"sms": 114}).fingerprint != machine.fingerprint


def test_deep_gemm_is_found_in_vllm_without_importing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "vllm" / "third_party" / "deep_gemm"
    copy.mkdir(parents=True)
    for package in (tmp_path / "vllm", copy):
        (package / "__init__.py").write_text("__version__ = '2.5.0'\nraise AssertionError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert deep_gemm_package() == copy
    assert library_version("deep_gemm") == "2.5.0"
    assert "vllm" not in sys.modules


def test_the_skew_of_a_routing_is_what_it_says() -> None:
    """The effective number of experts, 1/Σp², is E/f over many draws."""
    E = 64
    for name, skew in (("uniform", 1.0), ("dirichlet-2", 2.0), ("dirichlet-4", 4.0)):
        squares = 0.0
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            shares = ROUTINGS[name]._log_shares(E, generator).softmax(0)
            squares += float(shares.square().sum()) / 20
        assert 1 / squares == pytest.approx(E / skew, rel=0.25), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_torchs_defaults_change_no_sample(routing: str, dtype: torch.dtype, device: str) -> None:
    layer = Workload("tiny", E=4, topk=2, K=64, N=32, bias=True)
    problem = layer.problem(5, "bf16", Machine.inspect("cpu"))
    expected = sample_layer(problem, "cpu", routing=ROUTINGS[routing])
    with default_dtype(dtype), torch.device(device):
        sample = sample_layer(problem, "cpu", routing=ROUTINGS[routing])
    for inputs, others in zip(sample.inputs, expected.inputs, strict=True):
        assert all(map(torch.equal, vars(inputs).values(), vars(others).values()))
    assert torch.equal(sample.experts.gate_up, expected.experts.gate_up)
    assert sample.truths[0].dtype == torch.float32


def test_one_hot_routing_has_its_expert_in_every_row() -> None:
    weights, ids = ROUTINGS["one-hot"].sample(50, 16, 4, "cpu")
    assert (ids == 0).any(dim=1).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert torch.allclose(weights.sum(1), torch.ones(50))


def test_zipf_routing_is_the_reciprocal_of_the_rank() -> None:
    shares = ROUTINGS["zipf"]._log_shares(64, torch.Generator().manual_seed(0)).exp()
    assert torch.allclose(shares.sort(descending=True).values * torch.arange(1, 65), torch.ones(64))


@pytest.mark.parametrize(("topk", "alive"), [(2, 8), (12, 12)])
def test_dead_experts_get_no_token_and_leave_enough(topk: int, alive: int) -> None:
    _, ids = ROUTINGS["half-dead"].sample(200, 16, topk, "cpu")
    assert len(set(ids.flatten().tolist())) == alive
    assert all(len(set(row)) == topk for row in ids.tolist())


def test_another_package_announces_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_package.py").write_text(
        "from tests.support.fakes import Honest\nclass Theirs(Honest):\n    name = 'theirs'\n"
        "class backends:\n    class Inner(Honest):\n        name = 'inner'\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moe_dispatch.backends]\ntheirs = their_package:Theirs\nreference = their_package:Theirs\n"
        "absent = no_such_module:Backend\ninner = their_package:backends.Inner [gpu]\nmodule = their_package\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("backend", Backend, {"reference": "ours:Reference"}, group="moe_dispatch.backends")  # type: ignore[type-abstract]
    assert registry.names()[0] == "reference"
    assert {"theirs", "absent"} <= set(registry.names())
    assert "their_package" not in sys.modules
    assert registry.load("theirs").name == "theirs"
    assert registry._specs["reference"] == "ours:Reference", "installing a package replaces none of ours"
    assert registry.load("inner").name == "inner", "a class may lie in another one, and extras may follow it"
    with pytest.raises(BackendUnavailableError, match="'their_package' names no class; write it as module:Class"):
        registry.load("module")


def test_built_in_classes_carry_their_names() -> None:
    for name in BACKENDS.names():
        assert BACKENDS.load(name).name == name
    for name in POLICIES.names():
        assert POLICIES.load(name).name == name


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (
            {"name": "theirs", "requirements": ANYTHING},
            r"as 'mine' and calls itself 'theirs'; register it under that name, or declare name = 'mine'",
        ),
        ({"requirements": ANYTHING}, r"registered as 'mine' and has no name; declare name = 'mine'"),
        ({"name": "mine"}, r"does not say what it takes; declare requirements = Requirements\("),
        ({"name": "mine", "requirements": {"dtypes": "all"}}, r"declare requirements = Requirements\("),
    ],
    ids=["another name", "no name", "no requirements", "requirements of another kind"],
)
def test_a_class_that_does_not_declare_itself_is_refused(
    declared: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = type("Mine", (Backend,), {"run": Honest.run, **declared})
    with pytest.raises(InvalidInputError, match=says):
        register_backend("mine", mine)
    assert "mine" not in BACKENDS.names()
    # Of a class that is imported on first use it can be said no earlier.
    monkeypatch.setattr("tests.support.fakes.Mine", mine, raising=False)
    with registered(mine="tests.support.fakes:Mine"), pytest.raises(BackendUnavailableError, match=says):
        make_backend("mine", Machine.inspect("cpu")).require()


def test_what_is_no_backend_is_not_loaded() -> None:
    registry = Registry("backend", Backend, {"wrong": "json:JSONDecoder"})  # type: ignore[type-abstract]
    with pytest.raises(Exception, match="is not a subclass of Backend"):
        registry.load("wrong")
