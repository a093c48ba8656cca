"""The kernels for Hopper compile without a GPU and fit, and are offered only where they can run."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from moe_dispatch.backends.gluon_hopper.products import _row_blocks, hopper_configs, hopper_suits
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.backends.stages.route import Routing
from moe_dispatch.backends.triton_persistent.backend import TritonPersistentBackend
from moe_dispatch.machine import Machine
from moe_dispatch.problem import Activation, DType, MoEProblem
from moe_dispatch.workloads import WORKLOADS, Workload, make_experts, torch_dtype
from tests.support.triton_compile import SHARED_MEMORY, Launch, compile_launches, described, unwritten_layer

HOPPER = described(90)
QWEN = WORKLOADS["qwen3-30b-a3b"]


def launch_products(capability: int, dtype: DType, activation: Activation) -> Iterator[Launch]:
    machine = described(capability)
    backend = TritonPersistentBackend(machine)
    uneven = Workload("uneven", 8, 2, 576, 200, activation)
    # FP16 differs from BF16 in one type.
    for layer in (uneven,) if dtype == "fp16" else (Workload("even", 8, 2, 512, 256, activation), uneven):
        problem = layer.problem(4096, dtype, machine)
        for config in hopper_configs(problem, machine):  # none for the uneven layer in FP8
            yield Launch(partial(backend.run, *unwritten_layer(problem), config))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "activation"), [("bf16", "silu"), ("fp16", "swiglu_oai"), ("fp8", "silu")])
def test_both_products_compile_and_fit(dtype: DType, activation: Activation) -> None:
    kernels = compile_launches(launch_products, 90, dtype=dtype, activation=activation)
    products = [built for built in kernels if built.name in {"_moe_hopper_kernel", "_moe_hopper_fp8_kernel"}]
    assert {built.constants["ACTIVATION"] for built in products} == {activation, None}
    for built in products:
        # In FP8 what is needed once a tile gives way to sums, outside the loops that multiply.
        assert not built.spilling, built
        assert built.stack <= (136 if dtype == "fp8" else 0), built
        assert built.shared <= SHARED_MEMORY[90], built
        assert built.wgmma, built
        assert built.tma, built
        assert built.pdl, built
        # Rows of hidden_states are gathered, unless they have been when they were quantised; h is in order.
        assert built.wide_copies == (dtype != "fp8" and built.constants["ACTIVATION"] is not None), built


@pytest.mark.parametrize(
    ("problem", "machine"),
    [
        pytest.param(QWEN.problem(4096, "bf16", described(80)), described(80), id="sm_80"),
        pytest.param(QWEN.problem(4096, "bf16", described(100)), described(100), id="sm_100"),
        pytest.param(QWEN.problem(4096, "bf16", HOPPER), HOPPER.model_copy(update={"triton": "3.5"}), id="triton 3.5"),
        pytest.param(QWEN.problem(4096, "bf16", HOPPER), HOPPER.model_copy(update={"triton": ""}), id="no triton"),
        pytest.param(Workload("", 8, 2, 384, 256).problem(4096, "fp8", HOPPER), HOPPER, id="K % 256 in fp8"),
        pytest.param(Workload("", 8, 2, 256, 192).problem(4096, "fp8", HOPPER), HOPPER, id="N % 128 in fp8"),
        pytest.param(WORKLOADS["gpt-oss-120b"].problem(4096, "bf16", HOPPER), HOPPER, id="bias and alternating rows"),
        pytest.param(Workload("", 8, 2, 256, 256, "relu2").problem(4096, "bf16", HOPPER), HOPPER, id="no gate"),
        pytest.param(Workload("", 8, 2, 264, 256).problem(4096, "bf16", HOPPER), HOPPER, id="K % 64"),
        pytest.param(Workload("", 8, 2, 256, 252).problem(4096, "bf16", HOPPER), HOPPER, id="N % 8"),
    ],
)
def test_not_offered_where_they_cannot_run(problem: MoEProblem, machine: Machine) -> None:
    assert not hopper_configs(problem, machine)
    if machine.triton:
        assert all(config.engine == "triton" for config in TritonPersistentBackend(machine).configs(problem))


def test_they_are_the_default_for_many_rows_per_expert_and_a_candidate_below() -> None:
    backend = TritonPersistentBackend(HOPPER)
    engines = {M: [config.engine for config in backend.configs(QWEN.problem(M, "bf16", HOPPER))] for M in (16, 4096)}
    assert engines[4096][0] == "gluon"
    assert engines[16][0] == "triton"
    assert "gluon" in engines[16]
    assert hopper_suits(QWEN.problem(4096, "bf16", HOPPER))


@pytest.mark.gpu
def test_blocks_hold_every_row_once_and_experts_with_a_tall_one_come_first() -> None:
    if Machine.inspect("cuda").capability != (9, 0):
        pytest.skip("needs sm_90")
    counts = torch.tensor([5, 0, 143, 128, 271, 300], device="cuda", dtype=torch.int32)
    ends = counts.cumsum(0).int()
    slots = torch.arange(int(ends[-1]), device="cuda", dtype=torch.int32)
    blocks, totals = _row_blocks(Routing(slots, slots, ends - counts, ends), 8, fp8=False)
    listed = blocks[: int(totals[0]), :3].tolist()
    assert totals[1:].tolist() == [0, 0]
    assert [e for e, *_ in listed] == [2, 4, 4, 0, 3, 5, 5, 5]
    assert [end - row for _, row, end in listed] == [143, 128, 143, 5, 128, 128, 128, 44]
    assert sorted(row for _, first, end in listed for row in range(first, end)) == slots.tolist()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "K", "N"), [("bf16", 192, 256), ("fp16", 192, 200), ("fp8", 256, 384)])
def test_blocks_of_every_height(dtype: DType, K: int, N: int) -> None:
    """One expert for each count of rows around the heights of tiles, one without rows, and slots that nobody takes."""
    machine = Machine.inspect("cuda")
    counts = [1, 31, 33, 64, 65, 95, 96, 97, 127, 128, 129, 144, 145, 160, 161, 192, 257, 272, 288, 289, 0, 700]
    layer = Workload("heights", len(counts), 1, K, N)
    if not (configs := hopper_configs(layer.problem(sum(counts), dtype, machine), machine)):
        pytest.skip("needs sm_90")
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([ids, torch.tensor([-1, len(counts), -1])])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].int().cuda()[:, None]
    generator = torch.Generator("cuda").manual_seed(0)
    act_dtype: DType = "bf16" if dtype == "fp8" else dtype
    experts = make_experts(layer, dtype, "cuda", generator, act_dtype=act_dtype)
    x = torch.randn(len(ids), layer.K, generator=generator, device="cuda").to(torch_dtype(act_dtype))
    weights = torch.rand(len(ids), 1, generator=generator, device="cuda")
    truth = ReferenceBackend(machine).run(x.float(), experts, weights, ids, ReferenceConfig(compute_fp32=True))
    backend = TritonPersistentBackend(machine)
    for config in configs:
        out = backend.run(x, experts, weights, ids, config)
        error = (out.float() - truth).norm(dim=1).max() / truth.norm(dim=1).mean()
        assert error <= 5 * backend.tolerance[dtype], float(error)
        assert torch.equal(out, backend.run(x, experts, weights, ids, config)), "does not repeat bit for bit"
    # The same where rows do not start on 16 bytes: other kernels, with the same configuration.
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    out = backend.run(shifted, experts, weights, ids, configs[0])
    assert (out.float() - truth).norm() / truth.norm() <= backend.tolerance[dtype]
