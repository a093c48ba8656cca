"""Bad input is refused before anything is launched, with a message that says what was given and what is allowed."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dispatch import (
    ExpertWeights,
    InvalidInputError,
    MoEProblem,
    UnknownNameError,
    explain,
    moe_forward,
    stats,
    warm_up,
)
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.numerics import FP8
from moe_dispatch.workloads import ROUTINGS, workload
from tests.core.test_dispatcher import barred

M, K, N, E, TOPK = 5, 64, 48, 4, 2
UP, DOWN, SLOTS = (E, 2 * N, K), (E, K, N), (M, TOPK)  # shapes


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(UP).to(dtype), torch.randn(DOWN).to(dtype)


def fp8_weights() -> dict[str, Any]:
    gate_up, down = weights(FP8)
    return {"gate_up": gate_up, "down": down, "gate_up_scale": torch.ones(E, 1, 1), "down_scale": torch.ones(E, 1, 1)}


def experts(**changes: Any) -> ExpertWeights:
    gate_up, down = weights()
    arguments = {"gate_up": gate_up, "down": down} | changes
    return ExpertWeights(**arguments)


def quantized(**changes: Any) -> ExpertWeights:
    return ExpertWeights(**(fp8_weights() | changes))


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "hidden_states": torch.randn(M, K),
        "experts": experts(),
        "topk_weights": torch.rand(SLOTS),
        "topk_ids": torch.randint(0, E, SLOTS, dtype=torch.int32),
    } | changes
    return moe_forward(**arguments)


def fake(**changes: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {
            "hidden_states": torch.randn(M, K),
            "topk_weights": torch.rand(SLOTS),
            "topk_ids": torch.zeros(SLOTS).int(),
        } | changes
        return call(**{name: mode.from_tensor(tensor) for name, tensor in arguments.items()})


def changed(change: Callable[[torch.Tensor], object], layer: ExpertWeights | None = None) -> ExpertWeights:
    """A layer whose gate_up was changed after it was wrapped."""
    layer = layer or experts()
    change(layer.gate_up)
    return layer


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    tensor.data = data


def problem() -> MoEProblem:
    return MoEProblem(M=1, K=8, N=8, E=2, topk=1, dtype="fp32", act_dtype="fp32", device="cpu", capability=None)


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)], layout=layout)


def masked(tensor: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.masked.masked_tensor(tensor, tensor > 0)
    return out


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """As offloading and FSDP leave a parameter between its uses."""
    tensor.untyped_storage().resize_(0)
    return tensor


def distributed(*shape: int) -> torch.Tensor:
    """A DTensor, over a group of one process, which `fresh_process` takes down after the test."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=cast("Any", dist).HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return distribute_tensor(torch.randn(*(shape or UP)), mesh, [Replicate()])


# Tensors that no kernel can read, as they are made of an ordinary one's shape, and the word for them.
FORMS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "sparse": (lambda *shape: torch.ones(shape).to_sparse(), "sparse"),
    "compressed": (lambda *shape: torch.randn(shape).to_sparse_csr(), "csr"),
    "mkldnn": (lambda *shape: torch.randn(shape).to_mkldnn(), "mkldnn"),
    "nested": (lambda *_: nested(), "nested"),
    "jagged": (lambda *_: nested(torch.jagged), "nested"),
    "distributed": (distributed, ".to_local()"),
    "masked": (lambda *shape: masked(torch.randn(shape)), "MaskedTensor"),
}

# Something wrong, and the words that the message must have: what was given, what is allowed or to be done.
Bad = tuple[Callable[[], object], tuple[str, ...]]

WEIGHTS: dict[str, Bad] = {
    "no tensor": (lambda: experts(gate_up=[1, 2]), ("gate_up", "torch.Tensor", "list")),
    "two dimensions": (lambda: experts(gate_up=torch.randn(2 * N, K)), ("gate_up", "[96, 64]")),
    "no experts": (lambda: experts(gate_up=torch.randn(0, 2 * N, K)), ("gate_up", "none of them 0")),
    "integer weights": (lambda: experts(gate_up=torch.ones(UP, dtype=torch.int8)), ("int8", "bfloat16")),
    "double weights": (lambda: experts(gate_up=torch.randn(UP).double()), ("float64", "float32")),
    "meta device": (lambda: experts(gate_up=torch.empty(UP, device="meta")), ("meta", "load the weights")),
    "transposed checkpoint": (
        lambda: experts(gate_up=torch.randn(E, K, 2 * N)),
        ("belong together", "transposed=True"),
    ),
    "transposed view": (
        lambda: experts(gate_up=torch.randn(E, K, 2 * N).transpose(1, 2)),
        ("contiguous", "strides", ".contiguous()", "transposed=True"),
    ),
    "moved to a dtype": (lambda: quantized().to(torch.bfloat16), ("device", "got torch.bfloat16", "quantize")),  # type: ignore[arg-type]
    "contiguous, said to be transposed": (
        lambda: ExpertWeights(torch.randn(UP), torch.randn(DOWN), transposed=True),
        ("transposed=True", "strides"),
    ),
    "transposed by a number": (
        lambda: ExpertWeights(torch.randn(UP), torch.randn(DOWN), transposed=1),  # type: ignore[arg-type]
        ("transposed", "True or False"),
    ),
    "sliced view": (lambda: experts(down=torch.randn(E, K, 2 * N)[..., :N]), ("down", "contiguous")),
    "other number of experts": (lambda: experts(down=torch.randn(E + 1, K, N)), ("[5, 64, 48]", "belong together")),
    "other hidden size": (lambda: experts(down=torch.randn(E, K + 1, N)), ("[4, 65, 48]",)),
    "other intermediate size": (lambda: experts(down=torch.randn(E, K, N + 1)), ("[4, 64, 49]", "2N")),
    "gated rows for an ungated activation": (lambda: experts(activation="relu2"), ("relu2", "[E, N, K]")),
    "mixed dtypes": (lambda: experts(down=torch.randn(DOWN).bfloat16()), ("down", "bfloat16", "share a dtype")),
    "unknown activation": (lambda: experts(activation="tanh"), ("tanh", "silu", "relu2")),
    "interleaved without a gate": (
        lambda: experts(gate_up=torch.randn(E, N, K), activation="relu2", interleaved=True),
        ("interleaved", "gate"),
    ),
    "one bias": (lambda: experts(down_bias=torch.zeros(E, K)), ("only down_bias", "both")),
    "bias of another shape": (
        lambda: experts(gate_up_bias=torch.zeros(E, N), down_bias=torch.zeros(E, K)),
        ("gate_up_bias", "[4, 96]"),
    ),
    "integer bias": (
        lambda: experts(gate_up_bias=torch.zeros(E, 2 * N).int(), down_bias=torch.zeros(E, K)),
        ("int32", "float32"),
    ),
    "uninitialized weights": (lambda: experts(down=torch.nn.UninitializedParameter()), ("down", "uninitialized")),
    "freed weights": (lambda: experts(down=freed(torch.randn(DOWN))), ("down", "freed")),
    "freed bias": (
        lambda: experts(gate_up_bias=torch.zeros(E, 2 * N), down_bias=freed(torch.zeros(E, K))),
        ("down_bias", "freed"),
    ),
    "strided bias": (
        lambda: experts(gate_up_bias=torch.zeros(2 * N, E).T, down_bias=torch.zeros(E, K)),
        ("gate_up_bias", "contiguous"),
    ),
}
SCALES: dict[str, Bad] = {
    "fp8 without scales": (lambda: quantized(gate_up_scale=None), ("gate_up_scale", "[4, 1, 1]", "quantize")),
    "fp8 with one scale": (lambda: quantized(down_scale=None), ("down_scale",)),
    "scales without fp8": (lambda: experts(gate_up_scale=torch.ones(E, 1, 1)), ("float8_e4m3fn", "drop them")),
    "scale of another shape": (lambda: quantized(gate_up_scale=torch.ones(E, 2, 1)), ("[4, 1, 1]", "[4, 2, 1]")),
    "half scale": (lambda: quantized(down_scale=torch.ones(E, 1, 1).half()), ("down_scale", "float16", "float32")),
    "scale that is a number": (lambda: quantized(down_scale=1.0), ("down_scale", "float")),
    "scale elsewhere": (lambda: quantized(down_scale=torch.ones(E, 1, 1, device="meta")), ("meta", "move")),
    "fp8 with a gradient": (lambda: quantized(gate_up=torch.randn(UP).to(FP8).requires_grad_()), ("gradient", "BF16")),
    "quantising twice": (
        lambda: ExpertWeights.quantize(fp8_weights()["gate_up"], fp8_weights()["down"]),
        ("already", "scales"),
    ),
}
CALLS: dict[str, Bad] = {
    "hidden_states is no tensor": (lambda: call(hidden_states=[1.0]), ("hidden_states", "list")),
    "experts is a tensor": (lambda: call(experts=weights()[0]), ("ExpertWeights", "Tensor")),
    "batch and sequence": (lambda: call(hidden_states=torch.randn(1, M, K)), ("two-dimensional", "flatten")),
    "flat ids": (lambda: call(topk_ids=torch.zeros(M * TOPK, dtype=torch.int32)), ("topk_ids", "two-dimensional")),
    "other hidden size": (lambda: call(hidden_states=torch.randn(M, K + 1)), ("K=64", "[5, 65]")),
    "more tokens than routed": (lambda: call(hidden_states=torch.randn(M + 1, K)), ("M=6", "5")),
    "weights and ids disagree": (lambda: call(topk_weights=torch.rand(M, TOPK + 1)), ("[5, 3]", "[5, 2]")),
    "no experts per token": (
        lambda: call(topk_weights=torch.rand(M, 0), topk_ids=torch.zeros(M, 0, dtype=torch.int32)),
        ("topk=0",),
    ),
    "swapped weights and ids": (
        lambda: call(topk_weights=torch.zeros(SLOTS, dtype=torch.int32), topk_ids=torch.rand(SLOTS)),
        ("swapped",),
    ),
    "float ids": (lambda: call(topk_ids=torch.rand(SLOTS)), ("topk_ids", "int32", "float32")),
    "short ids": (lambda: call(topk_ids=torch.zeros(SLOTS, dtype=torch.int16)), ("int16", "int64")),
    "integer weights": (lambda: call(topk_weights=torch.ones(SLOTS, dtype=torch.int64)), ("int64", "float32")),
    "double weights": (lambda: call(topk_weights=torch.rand(SLOTS).double()), ("float64", "float32")),
    "half tokens, single weights": (lambda: call(hidden_states=torch.randn(M, K).half()), ("float16", "fp32")),
    "double tokens": (lambda: call(hidden_states=torch.randn(M, K).double()), ("float64",)),
    "ids elsewhere": (
        lambda: call(topk_ids=torch.zeros(SLOTS, dtype=torch.int32, device="meta")),
        ("topk_ids", "meta", "move"),
    ),
    "a list for backend": (lambda: call(backend=["reference"]), ("backend", "list")),
    "a number for backend": (lambda: call(backend=5), ("backend", "int")),
    "fake tokens of another hidden size": (lambda: fake(hidden_states=torch.randn(M, K + 1)), ("K=64", "[5, 65]")),
    "fake ids of another number": (lambda: fake(topk_ids=torch.zeros(M + 1, TOPK).int()), ("[5, 2]", "[6, 2]")),
    "weights that were freed": (lambda: call(experts=changed(freed)), ("changed since", "freed")),
    "weights that were moved": (
        lambda: call(experts=changed(lambda t: cast("Any", torch.utils).swap_tensors(t, t.to("meta")))),
        ("meta",),
    ),
    "weights of another dtype now": (lambda: call(experts=changed(lambda t: set_data(t, t.half()))), ("float16",)),
    "weights of another shape now": (
        lambda: call(experts=changed(lambda t: set_data(t, torch.randn(E + 1, 2 * N, K)))),
        ("[5, 96, 64]",),
    ),
    "weights that want a gradient now": (
        lambda: call(experts=changed(lambda t: t.requires_grad_(), quantized())),
        ("changed since", "gradient"),
    ),
    "integer tokens for fp8": (
        lambda: call(experts=quantized(), hidden_states=torch.ones(M, K, dtype=torch.int32)),
        ("int32", "bfloat16"),
    ),
}


def described(**changes: Any) -> MoEProblem:
    return MoEProblem(**{"M": 1, "K": 1, "N": 1, "E": 1, "topk": 1, **changes})


def prepare(*arguments: Any, **options: Any) -> None:
    warm_up(experts(), *arguments, **options)


DESCRIPTIONS: dict[str, Bad] = {
    "negative M": (lambda: described(M=-1), ("M=-1",)),
    "no topk": (lambda: described(topk=0), ("topk=0",)),
    "topk that is None": (lambda: described(topk=None), ("topk=None", "integer")),
    "M that is a float": (lambda: described(M=1.5), ("M=1.5", "integer")),
    "E that is a text": (lambda: described(E="8"), ("E='8'", "integer")),
    "a list for a dtype": (lambda: described(dtype=["bf16"]), ("dtype",)),
    "unknown device": (lambda: described(device="tpu"), ("tpu", "cuda")),
    "capability that is a float": (lambda: described(capability=9.0), ("(9, 0)",)),
    "a list for an activation": (lambda: experts(activation=["silu"]), ("silu", "relu2")),
    "warm_up of negative tokens": (lambda: prepare(2, [-1]), ("tokens", "-1")),
    "warm_up of a number": (lambda: prepare(2, 1.5), ("tokens", "1.5")),
    "warm_up of texts": (lambda: prepare(2, ["a"]), ("tokens", "'a'")),
    "warm_up without topk": (lambda: prepare(None, [1]), ("topk", "None")),
    "warm_up of more experts than there are": (lambda: prepare(9, [1]), ("topk=9", "E=4")),
    "warm_up in no dtype": (lambda: prepare(2, [1], "fp32"), ("act_dtype", "'fp32'")),
    "warm_up in integers": (lambda: prepare(2, [], torch.int32, up_to=4), ("act_dtype", "int32")),
    "warm_up of a list for backend": (lambda: prepare(2, [], up_to=4, backend=["reference"]), ("backend", "list")),
    "warm_up up to nothing": (lambda: prepare(2, [], up_to=""), ("up_to", "''")),
    "a list for interleaved": (lambda: experts(interleaved=[]), ("interleaved", "list")),
    "a list for bias": (lambda: described(bias=[]), ("bias", "[]")),
    "warm_up of a tensor": (lambda: warm_up(weights()[0], 2, [1]), ("ExpertWeights", "Tensor")),  # type: ignore[arg-type]
    "warm_up in another dtype": (lambda: prepare(2, [1], torch.float64), ("float64",)),
    "explain on a number": (lambda: explain(problem(), machine=5), ("Machine", "int")),  # type: ignore[arg-type]
    "explain of nothing": (explain, ("MoEProblem", "0 arguments")),
    "unknown dtype": (lambda: described(dtype="int4"), ("int4", "fp8")),
    "fp8 tokens": (lambda: described(act_dtype="fp8"), ("act_dtype",)),
    "mixed problem": (lambda: described(dtype="fp16"), ("share a dtype",)),
    "unknown mode": (lambda: described(mode="lazy"), ("lazy", "graph")),
    "more experts per token than there are": (lambda: workload("4,8,64,64"), ("topk ≤ E", "4,8,64,64")),
    "routing beyond E": (lambda: ROUTINGS["uniform"].sample(2, 2, 3, "cpu"), ("topk=3", "E=2")),
    "explain of three tensors": (lambda: explain(1, 2, 3), ("MoEProblem", "3 arguments")),
}


def call_with(name: str, make: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return call(**{name: make(*shape)})


def experts_with(make: Callable[..., torch.Tensor]) -> ExpertWeights:
    return experts(down=make(*DOWN))


CALLS |= {
    f"{form} {name}": (partial(call_with, name, make, shape), (name, word))
    for form, (make, word) in FORMS.items()
    for name, shape in (("hidden_states", (M, K)), ("topk_weights", SLOTS), ("topk_ids", SLOTS))
}
WEIGHTS |= {f"{form} down": (partial(experts_with, make), ("down", word)) for form, (make, word) in FORMS.items()}
CASES = WEIGHTS | SCALES | CALLS | DESCRIPTIONS


@pytest.mark.parametrize(("make", "words"), CASES.values(), ids=CASES)
def test_it_is_refused_before_anything_runs(make: Callable[[], object], words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        make()
    for word in words:
        assert word in str(refusal.value)
    assert not stats()
    assert not barred()


def test_it_is_refused_after_good_calls_too() -> None:
    """A kind of call that is known is not checked again, so it must not be taken for one."""
    for _ in range(2):
        call()
        call(experts=quantized())
    before = stats()
    for name, (make, words) in CALLS.items():
        with pytest.raises(InvalidInputError) as refusal:
            make()
        assert all(word in str(refusal.value) for word in words), f"{name}: {refusal.value}"
        assert stats() == before, name
    assert not barred()


def test_a_long_name_is_not_repeated_whole() -> None:
    for run, says in (
        (lambda name: call(backend=name), "no backend is called 'xxx.*; known: .*reference"),
        (get_dispatcher, r"device must be cpu, cuda or cuda:N, got 'xxx.*…x+'"),
    ):
        with pytest.raises((UnknownNameError, InvalidInputError), match=says) as refusal:
            run("x" * 70_000)
        assert len(str(refusal.value)) < 1000
