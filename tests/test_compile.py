"""The persistent kernels and the shared stages compile, without a GPU, for every device that runs them."""

from dataclasses import dataclass
from typing import Any

import pytest

from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig, persistent_configs
from moe_dispatch.backends.triton_support import features
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import WORKLOADS

from .triton_compile import SHARED_MEMORY, Build, compile_kernels

KERNEL = "moe_dispatch.backends.triton_persistent.kernel"
STAGES = "moe_dispatch.backends.stages"
ELEMENTS: dict[DType, str] = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8e4nv"}
TOKENS = tuple(1 << power for power in range(15))


@dataclass(frozen=True)
class Device:
    capability: int
    dtype: DType

    def __str__(self) -> str:
        return f"sm_{self.capability}-{self.dtype}"

    @property
    def machine(self) -> Machine:
        return Machine(
            device="cuda", name="compiled for", capability=divmod(self.capability, 10), sms=132, memory_bytes=80 << 30,
            shared_memory_per_block=SHARED_MEMORY[self.capability], torch="2.11", triton="3.6",
        )  # fmt: skip


DEVICES = [
    Device(80, "bf16"),
    Device(89, "fp8"),
    Device(89, "bf16"),
    Device(90, "bf16"),
    Device(90, "fp16"),
    Device(90, "fp8"),
    Device(100, "bf16"),
    Device(100, "fp8"),
]


def _add_optional(pointers: dict[str, str], constants: dict[str, Any], optional: dict[str, str]) -> None:
    """A pointer that is absent is the constant None."""
    for name, element in optional.items():
        if element:
            pointers[name] = element
        else:
            constants[name] = None


def _gate_up(problem: MoEProblem, config: TritonPersistentConfig, capability: int) -> Build:
    fp8 = problem.dtype == "fp8"
    element = ELEMENTS[problem.dtype]
    tma = config.tma and not problem.interleaved
    pointers = {"x_ptr": f"*{element}", "h_ptr": f"*{element}"}
    pointers |= dict.fromkeys(("slot_of_row_ptr", "starts_ptr", "ends_ptr"), "*i32") | dict.fromkeys("NKE", "i32")
    pointers["w"] = f"tensordesc<{element}[{config.block_n},{config.block_k}]>" if tma else f"*{element}"
    constants: dict[str, Any] = {
        "TOPK": problem.topk, "ACTIVATION": problem.activation, "GATED": problem.gated,
        "INTERLEAVED": problem.interleaved, "FP8": fp8, "TMA": tma, "SWAP": config.swap,
        "SCALAR_SCALE": problem.N % 128 == 0 and not problem.interleaved, "EVEN_K": problem.K % config.block_k == 0,
        "BLOCK_M": config.block_m, "TAIL_M": config.tail_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "ORDER": config.order, "GROUP_M": config.group_m, "E_POW2": 1 << (problem.E - 1).bit_length(),
        "PDL": config.pdl,
    }  # fmt: skip
    optional = dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "h_scale_ptr"), "*fp32" if fp8 else "")
    _add_optional(pointers, constants, optional | {"bias_ptr": "*bf16" if problem.bias else ""})
    return Build(
        f"{KERNEL}:_moe_gate_up_kernel", capability, pointers, constants, config.num_warps, config.num_stages
    )  # fmt: skip


def _down(problem: MoEProblem, config: TritonPersistentConfig, capability: int) -> Build:
    fp8 = problem.dtype == "fp8"
    element = ELEMENTS[problem.dtype]
    pointers = {"h_ptr": f"*{element}", "y_ptr": "*fp16" if problem.act_dtype == "fp16" else "*bf16"}
    pointers |= dict.fromkeys(("starts_ptr", "ends_ptr"), "*i32") | dict.fromkeys("NKE", "i32")
    block = f"[{config.down_block_n},{config.down_block_k}]"
    pointers["w"] = f"tensordesc<{element}{block}>" if config.tma else f"*{element}"
    constants: dict[str, Any] = {
        "FP8": fp8, "SCALAR_SCALE": config.down_block_n <= 128, "EVEN_N": problem.N % config.down_block_k == 0,
        "TMA": config.tma, "SWAP": config.swap, "BLOCK_M": config.block_m, "TAIL_M": config.tail_m,
        "BLOCK_N": config.down_block_n, "BLOCK_K": config.down_block_k, "ORDER": config.order,
        "GROUP_M": config.group_m, "E_POW2": 1 << (problem.E - 1).bit_length(), "PDL": config.pdl,
    }  # fmt: skip
    optional = dict.fromkeys(("h_scale_ptr", "w_scale_ptr"), "*fp32" if fp8 else "")
    _add_optional(pointers, constants, optional | {"bias_ptr": "*bf16" if problem.bias else ""})
    return Build(f"{KERNEL}:_moe_down_kernel", capability, pointers, constants, config.num_warps, config.num_stages)


def _defaults(device: Device) -> dict[str, tuple[MoEProblem, TritonPersistentConfig]]:
    """One problem for each default that the named workloads can meet; E and topk hardly change what is compiled."""
    found: dict[str, tuple[MoEProblem, TritonPersistentConfig]] = {}
    for workload in WORKLOADS.values():
        for M in TOKENS:
            problem = workload.problem(M, device.dtype, device.machine)
            config = persistent_configs(problem, features(device.machine))[0]
            uneven = problem.K % config.block_k or problem.N % 128
            found.setdefault(f"{config.label},{problem.activation},{bool(uneven)}", (problem, config))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_default_compiles_and_fits(device: Device) -> None:
    found = _defaults(device)
    builds = [build(*pair, device.capability) for pair in found.values() for build in (_gate_up, _down)]
    for build, built in zip(builds, compile_kernels(builds), strict=True):
        assert built.shared <= SHARED_MEMORY[device.capability], build
        assert built.tma == build.constants["TMA"], build
        if device.capability == 90:
            assert built.wgmma, build
        if device.capability == 80:
            assert not built.fp8, build
        assert built.registers <= 255, build


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_what_is_worth_measuring_is_estimated_to_fit(device: Device, workload: Any) -> None:
    able = features(device.machine)
    for M in TOKENS:
        problem = workload.problem(M, device.dtype, device.machine)
        configs = persistent_configs(problem, able)
        assert 1 <= len(configs) <= 24
        assert len({config.label for config in configs}) == len(configs)
        for config in configs:
            needed = config.shared_memory(1 if device.dtype == "fp8" else 2, gated=problem.gated, wgmma=able.wgmma)
            assert needed * config.ctas_per_sm <= able.shared_memory
            assert able.tma or not config.tma


def _stage_builds() -> list[Build]:
    i32, bf16, fp32, fp8 = "*i32", "*bf16", "*fp32", "*fp8e4nv"
    routed = {"slot_of_row_ptr": i32, "row_of_slot_ptr": i32, "starts_ptr": i32, "ends_ptr": i32}
    counts = {"slots": "i32", "rows": "i32", "E": "i32"}
    builds = []
    for alignment, capacity in ((1, 0), (128, 0), (1, 256)):
        layout = {"ALIGNMENT": alignment, "CAPACITY": capacity, "E_POW2": 256, "PDL": True}
        builds += [
            Build(
                f"{STAGES}.route_kernel:_moe_route_kernel", 90, {"ids_ptr": "*i64"} | routed | counts,
                layout | {"BLOCK": 1024},
            ),
            Build(
                f"{STAGES}.route_kernel:_moe_route_place_kernel", 90,
                {"ids_ptr": i32, "counts_ptr": i32, "slots": "i32", "E": "i32"} | routed,
                layout | {"BLOCK": 512, "CHUNK": 16}, num_warps=8,
            ),
        ]  # fmt: skip
    builds += [
        Build(
            f"{STAGES}.route_kernel:_moe_route_count_kernel", 80,
            {"ids_ptr": i32, "counts_ptr": i32, "slot_of_row_ptr": i32} | counts,
            {"E_POW2": 256, "BLOCK": 512, "PDL": False},
        ),
        Build(
            f"{STAGES}.quantize_kernel:_moe_quantize_rows_kernel", 89,
            {"x_ptr": bf16, "slot_of_row_ptr": i32, "codes_ptr": fp8, "scale_ptr": fp32}
            | dict.fromkeys(("rows", "columns", "topk", "stride_scale_row", "stride_scale_group"), "i32"),
            {"GATHER": True, "BLOCK_R": 8, "GROUPS": 4, "PDL": False},
        ),
        Build(
            f"{STAGES}.quantize_kernel:_moe_gather_kernel", 80,
            {"x_ptr": bf16, "slot_of_row_ptr": i32, "out_ptr": bf16, "rows": "i32", "columns": "i32", "topk": "i32"},
            {"BLOCK_R": 4, "BLOCK_C": 1024, "PDL": False},
        ),
        Build(
            f"{STAGES}.activate_kernel:_moe_activate_kernel", 90,
            {"gate_up_ptr": bf16, "slot_of_row_ptr": i32, "out_ptr": fp8, "scale_ptr": fp32}
            | dict.fromkeys(("rows", "N", "gate_up_rows", "stride_scale_row", "stride_scale_group"), "i32"),
            {
                "bias_ptr": None, "ids_ptr": None, "ACTIVATION": "silu", "INTERLEAVED": False, "QUANTIZE": True,
                "BLOCK_R": 8, "GROUPS": 2, "PDL": True,
            },
        ),
        Build(
            f"{STAGES}.combine_kernel:_moe_combine_kernel", 80,
            {"y_ptr": bf16, "row_of_slot_ptr": i32, "weights_ptr": fp32, "out_ptr": bf16, "K": "i32"},
            {"bias_ptr": None, "ids_ptr": None, "TOPK": 8, "BLOCK_K": 1024, "PDL": False},
        ),
    ]  # fmt: skip
    return builds


@pytest.mark.slow
def test_stages_compile_without_spills() -> None:
    builds = _stage_builds()
    for build, built in zip(builds, compile_kernels(builds), strict=True):
        assert built.stack == 0, (build.kernel, built)
        assert built.shared <= SHARED_MEMORY[89], (build.kernel, built)
