"""The kernels for Hopper compile without a GPU and fit, and are refused with every reason where they cannot run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from moe_dispatch.activations import Activation
from moe_dispatch.backends.gluon_hopper import backend as hopper_backend
from moe_dispatch.backends.gluon_hopper import products
from moe_dispatch.backends.gluon_hopper.backend import FIRST_TRITON, LAST_TRITON, GluonHopperBackend
from moe_dispatch.backends.gluon_hopper.config import GluonHopperConfig
from moe_dispatch.backends.gluon_hopper.tiles import SHARED_MEMORY
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.system.libraries import library_version
from moe_dispatch.workloads import WORKLOADS, Workload, make_experts
from tests.support.triton_compile import Launch, compile_launches, described, unwritten_layer

HOPPER = described(90)
# Bytes of stack of a thread in BF16 and MXFP4, by its epilogue alone, outside the loops that multiply. Under Triton 3.6
# and 3.9 it is gpt-oss's activation of copied rows that takes most.
BF16_STACK = {"3.6": 48, "3.9": 24}.get(library_version("triton")[:3], 0)
MXFP4_STACK = 16
# Bytes of stack of a thread in FP8: values of a tile give way to the sums of the next, outside the loops that multiply.
# Triton 3.6 to 3.8 need 120, 3.9 needs 232.
FP8_STACK = 120 if library_version("triton").startswith(("3.6.", "3.7.", "3.8.")) else 232
QWEN = WORKLOADS["qwen3-30b-a3b"]
pytestmark = pytest.mark.usefixtures("compiling")


def launch_products(capability: int, dtype: DType, activation: Activation) -> Iterator[Launch]:
    machine = described(capability)
    backend = GluonHopperBackend(machine)
    oai = activation == "swiglu_oai"
    shapes = ((512, 256, False, 4096), (576, 200, False, 1), (576, 200, True, 1), (576, 224, False, 1))
    for K, N, transposed, M in shapes:  # one token has the low tiles of MXFP4
        layer = Workload("", 8, 2, K, N, activation, bias=oai, interleaved=oai)
        problem = replace(layer.problem(M, dtype, machine), transposed=transposed)
        if not backend.unsupported_reasons(problem):  # as FP8 is for the uneven layer
            yield Launch(partial(backend.run, *unwritten_layer(problem), GluonHopperConfig()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        ("bf16", "silu"), ("bf16", "swiglu(limit=10)"), ("bf16", "swiglu_oai"), ("fp8", "silu"), ("fp8", "swiglu_oai"),
        ("mxfp4", "swiglu_oai"),
    ],
)  # fmt: skip
def test_both_products_compile_and_fit(dtype: DType, activation: Activation) -> None:
    kernels = compile_launches(launch_products, 90, dtype=dtype, activation=activation)
    kernels = [built for built in kernels if re.fullmatch("_moe_hopper(_fp8|_mxfp4)?_product_kernel", built.name)]
    assert {built.constants["ACTIVATION"] for built in kernels} == {activation, None}
    for built in kernels:
        assert not built.spilling, built
        assert built.stack <= {"bf16": BF16_STACK, "fp8": FP8_STACK, "mxfp4": MXFP4_STACK}[dtype], built
        assert built.shared <= SHARED_MEMORY[dtype], built
        assert built.wgmma, built
        assert not built.serialised, built
        assert built.tma, built
        assert built.pdl, built
        # Rows of hidden_states are gathered, unless they have been when they were quantised; h is in order.
        assert built.wide_copies == (dtype == "bf16" and built.constants["ACTIVATION"] is not None), built


@dataclass(frozen=True)
class Refused:
    """A problem or a machine that the kernels cannot serve, and what each of its reasons must name."""

    words: tuple[tuple[str, ...], ...]
    layer: Workload = QWEN
    dtype: DType = "bf16"
    machine: Machine = HOPPER

    @property
    def problem(self) -> MoEProblem:
        return self.layer.problem(4096, self.dtype, self.machine)


def _with_triton(version: str) -> Machine:
    return HOPPER.model_copy(update={"triton": version})


KNOWN = " to ".join(".".join(map(str, version)) for version in (FIRST_TRITON, LAST_TRITON))
REFUSED = {
    "an older Triton": Refused(((KNOWN, "3.5.1"),), machine=_with_triton("3.5.1")),
    "a newer Triton": Refused(((KNOWN, "3.99.0"),), machine=_with_triton("3.99.0")),
    "a Hopper device with less shared memory": Refused(
        (("230400", "101376"),), machine=HOPPER.model_copy(update={"shared_memory_per_block": 101376})
    ),
    "K in FP8": Refused((("K % 256 == 0", "K=384"),), Workload("", 8, 2, 384, 256), "fp8"),
    "N in FP8": Refused((("N % 128 == 0", "N=192"),), Workload("", 8, 2, 256, 192), "fp8"),
    "K": Refused((("K % 64 == 0", "K=264"),), Workload("", 8, 2, 264, 256)),
    "N": Refused((("N % 8 == 0", "N=252"),), Workload("", 8, 2, 256, 252)),
    "no gate": Refused((("relu2",),), Workload("", 8, 2, 256, 256, "relu2")),
    "gpt-oss in FP8": Refused(
        (("K % 256 == 0", "K=2880"), ("N % 128 == 0", "N=2880")), WORKLOADS["gpt-oss-120b"], "fp8"
    ),
    "everything at once": Refused(
        ((KNOWN, "3.1.0"), ("relu2",), ("K % 64 == 0", "K=100"), ("N % 8 == 0", "N=36")),
        Workload("", 8, 2, 100, 36, "relu2", bias=True), machine=_with_triton("3.1.0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refused_with_every_limit_and_value(refused: Refused) -> None:
    reasons = GluonHopperBackend(refused.machine).unsupported_reasons(refused.problem)
    assert len(reasons) == len(refused.words), reasons
    for words in refused.words:
        assert any(all(word in reason for word in words) for reason in reasons), (words, reasons)


@pytest.mark.parametrize("version", [FIRST_TRITON, LAST_TRITON], ids=str)
def test_every_known_triton_is_taken(version: tuple[int, ...]) -> None:
    machine = _with_triton(".".join(map(str, (*version, 1))))
    backend = GluonHopperBackend(machine)
    dtypes: tuple[DType, ...] = ("bf16", "fp8")
    for dtype in dtypes:
        problem = QWEN.problem(4096, dtype, machine)
        assert backend.unsupported_reasons(problem) == ()
        assert backend.configs(problem) == (GluonHopperConfig(group_m=8),)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("like_gpt_oss", [False, True], ids=["silu", "gpt-oss"])
@pytest.mark.parametrize(
    ("dtype", "K", "N", "transposed"),
    [
        ("bf16", 192, 256, False), ("bf16", 192, 200, False), ("bf16", 192, 200, True), ("fp8", 256, 384, False),
        ("mxfp4", 192, 224, False), ("mxfp4", 160, 224, False),
    ],
)  # fmt: skip
def test_blocks_of_every_height(
    dtype: DType, K: int, N: int, transposed: bool, like_gpt_oss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert for each count of rows around the heights of tiles, one without rows, and slots of no expert."""
    machine = Machine.inspect("cuda")
    counts = [1, 31, 33, 64, 65, 95, 96, 97, 127, 128, 129, 144, 145, 160, 161, 192, 257, 272, 288, 289, 0, 700]
    activation = "swiglu_oai" if like_gpt_oss else "silu"
    layer = Workload("", len(counts), 1, K, N, activation, bias=like_gpt_oss, interleaved=like_gpt_oss)
    backend = GluonHopperBackend(machine)
    if reasons := backend.unsupported_reasons(layer.problem(sum(counts), dtype, machine)):
        pytest.skip("; ".join(reasons))
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([ids, torch.tensor([-1, len(counts), -1])])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].int().cuda()[:, None]
    generator = torch.Generator("cuda").manual_seed(0)
    experts = make_experts(layer, dtype, "cuda", generator, act_dtype="bf16", transposed=transposed)
    x = torch.randn(len(ids), layer.K, generator=generator, device="cuda").bfloat16()
    weights = torch.rand(len(ids), 1, generator=generator, device="cuda")
    truth = ReferenceBackend(machine).run(x.float(), experts, weights, ids, ReferenceConfig(compute_fp32=True))
    for config, low_rows, copy_rows in (
        (GluonHopperConfig(), 0, 1536), (GluonHopperConfig(group_m=1), 1000, 1536), (GluonHopperConfig(), 0, 0)
    ):  # fmt: skip
        monkeypatch.setattr(products, "MXFP4_LOW_ROWS", low_rows)
        monkeypatch.setattr(hopper_backend, "MXFP4_COPY_ROWS", copy_rows)
        out = backend.run(x, experts, weights, ids, config)
        error = (out.float() - truth).norm(dim=1).max() / truth.norm(dim=1).mean()
        assert error <= 5 * backend.tolerance[dtype], float(error)
        assert torch.equal(out, backend.run(x, experts, weights, ids, config)), "does not repeat bit for bit"
        # hidden_states that start on 2 bytes are copied, and the same kernels run.
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
        assert torch.equal(out, backend.run(shifted, experts, weights, ids, config))
