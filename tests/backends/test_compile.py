"""The persistent kernels and the shared stages compile, without a GPU, for every device that runs them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moe_dispatch.backends.triton_common.features import features
from moe_dispatch.backends.triton_persistent.backend import TritonPersistentBackend
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig, persistent_configs
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import WORKLOADS
from tests.support.triton_compile import SHARED_MEMORY, Launch, compile_launches, described, devices, unwritten_layer

FEW_SPILLS = 64  # bytes of a thread
# On sm_100, for which no tile was chosen by measuring, FP8 takes 136 under Triton 3.9, 112 under 3.8 and 72 under 3.7.
UNTUNED_SPILLS = 136
TOKENS = tuple(1 << power for power in range(15))


def _defaults(machine: Machine, dtype: DType) -> list[tuple[MoEProblem, TritonPersistentConfig]]:
    """One problem for each default that the named workloads can meet; E and topk hardly change what is compiled."""
    distinct: dict[tuple[object, ...], tuple[MoEProblem, TritonPersistentConfig]] = {}
    for workload in WORKLOADS.values():
        for M in TOKENS:
            problem = workload.problem(M, dtype, machine)
            config = persistent_configs(problem, features(machine))[0]
            uneven = bool(problem.K % config.block_k or problem.N % 128)
            flat = (
                problem.K // config.block_k <= config.flatten_steps,
                problem.N // config.block_k <= config.flatten_steps,
            )
            distinct.setdefault((config, problem.activation, uneven, flat), (problem, config))
    return list(distinct.values())


def launch_defaults(capability: int, dtype: DType, *, every: bool) -> Iterator[Launch]:
    backend = TritonPersistentBackend(described(capability))
    able = features(backend.machine)
    for problem, config in _defaults(backend.machine, dtype)[: None if every else 1]:
        bound = config.shared_memory(problem, wgmma=able.wgmma)
        note = {"bound": bound, "tma": config.tma, "pdl": config.pdl}
        yield Launch(partial(backend.run, *unwritten_layer(problem), config), note)
        if dtype == "bf16":
            by_columns = replace(problem, transposed=True, interleaved=problem.gated)
            yield Launch(partial(backend.run, *unwritten_layer(by_columns), config), note)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("capability", "dtype", "every"), devices(fp16=True, fp8_forms=True, mxfp4=True))
def test_defaults_compile_and_fit(capability: int, dtype: DType, every: bool) -> None:
    kernels = compile_launches(launch_defaults, capability, dtype=dtype, every=every)
    for built in kernels:
        assert built.shared <= SHARED_MEMORY[capability], built
        assert built.pdl == built.note["pdl"], built
        assert capability > 80 or not built.fp8, built
    products = [built for built in kernels if built.name == "_moe_product_kernel"]
    assert products
    for built in products:
        assert built.shared <= built.note["bound"], built
        assert built.stack <= (UNTUNED_SPILLS if capability in (100, 103) else FEW_SPILLS), built
        assert built.tma == built.note["tma"], built
        assert built.wgmma == (capability == 90), built
        # With MXFP4 the operand in registers is waited for.
        assert not built.serialised or dtype == "mxfp4", built


def launch_stages(capability: int) -> Iterator[Launch]:
    """What the defaults above leave out: other layouts of rows, other dtypes, and the stages of other backends."""
    from moe_dispatch.backends.stages.activate import activate, activate_quantize
    from moe_dispatch.backends.stages.combine import combine
    from moe_dispatch.backends.stages.quantize import gather, gather_quantize, quantize_rows
    from moe_dispatch.backends.stages.route import FEW_SLOTS, route

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    E, topk, K, N = 256, 8, 7168, 2048
    pdl = capability >= 90
    layouts: list[dict[str, Any]] = [{"alignment": 1}, {"alignment": 128}, {"capacity": 256}]
    for M in (64, FEW_SLOTS // topk, FEW_SLOTS):
        for layout in layouts:
            yield Launch(partial(route, empty(M, topk, dtype=torch.int64), E, **layout, pdl=pdl))
    x, weights, ids = empty(64, K), empty(64, topk, dtype=torch.float32), empty(64, topk, dtype=torch.int64)
    routing = route(ids, E)
    rows = routing.slot_of_row.shape[0]
    yield Launch(partial(gather, x, routing, topk, pdl=pdl))
    yield Launch(partial(activate, empty(rows, 2 * N), routing, "silu", bias=empty(E, 2 * N), topk_ids=ids, pdl=pdl))
    for bias in (None, empty(E, K)):
        y, out = empty(rows, K), empty(64, K)
        yield Launch(partial(combine, y, routing.row_of_slot, weights, out, down_bias=bias, topk_ids=ids, pdl=pdl))
    if features(described(capability)).fp8:
        quantizes = {"fp8": True}
        yield Launch(partial(quantize_rows, empty(64, 14336), per_token=True, pdl=pdl), quantizes)
        for major in (False, True):
            yield Launch(partial(gather_quantize, x, routing, topk, column_major_scales=major, pdl=pdl), quantizes)
            inner = empty(rows, 2 * N)
            run = partial(activate_quantize, inner, routing, "silu", column_major_scales=major, pdl=pdl)
            yield Launch(run, quantizes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_stages_compile_without_spills(capability: int) -> None:
    kernels = compile_launches(launch_stages, capability)
    assert {built.name for built in kernels} >= {
        "_moe_route_kernel", "_moe_route_count_kernel", "_moe_route_place_kernel", "_moe_gather_kernel",
        "_moe_activate_kernel", "_moe_combine_kernel",
    }  # fmt: skip
    for built in kernels:
        assert built.stack == 0, built
        assert built.shared <= SHARED_MEMORY[89], built
        assert built.fp8 == built.note.get("fp8", False), built
        assert built.evicts_first == (built.name == "_moe_combine_kernel"), built
