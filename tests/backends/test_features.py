"""What a device offers is looked up by device class: a greater compute capability is no superset of a smaller one."""

import itertools
from typing import cast

import pytest

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.gluon_hopper import tiles as hopper_tiles
from moe_dispatch.backends.triton_common.features import TensorCores, features, stage_reasons
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig
from moe_dispatch.backends.triton_splitk.config import SplitKConfig
from moe_dispatch.backends.triton_splitk.config import shared_memory_bytes as splitk_memory
from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
from moe_dispatch.backends.triton_vector.config import shared_memory_bytes as vector_memory
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DTYPES, MoEProblem
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import WORKLOADS

OURS = ("triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper")
NEEDS_STAGES = (*OURS, "torch_grouped", "deep_gemm")


def machine(capability: tuple[int, int], **changes: object) -> Machine:
    plain = Machine(
        device="cuda", name="described", capability=capability, sms=100, memory_bytes=80 << 30, torch="2.11.0+cu130",
        cuda="13.0", triton="3.6.0", libraries={"deep_gemm": "2.5.0", "vllm": "0.20.2"},
    )  # fmt: skip
    return plain.model_copy(update=changes)


@pytest.mark.parametrize(
    ("capability", "tensor_cores", "tma", "fp8", "pdl", "kibibytes"),
    [
        ((8, 0), "mma", False, False, False, 163),
        ((8, 6), "mma", False, False, False, 99),
        ((8, 7), "mma", False, False, False, 163),
        ((8, 9), "mma", False, True, False, 99),
        ((9, 0), "wgmma", True, True, True, 227),
        ((10, 0), "tcgen05", True, True, True, 227),
        ((10, 3), "tcgen05", True, True, True, 227),
        ((12, 0), "mma", True, True, True, 99),
        ((12, 1), "mma", True, True, True, 99),
        # Capabilities that are not known, from before and after those that are.
        ((8, 8), "mma", False, False, False, 99),
        ((11, 0), "mma", False, True, False, 99),
        ((13, 0), "mma", False, True, False, 99),
    ],
)
def test_features_by_device_class(
    capability: tuple[int, int], tensor_cores: TensorCores, tma: bool, fp8: bool, pdl: bool, kibibytes: int
) -> None:
    able = features(machine(capability))
    assert (able.tensor_cores, able.tma, able.fp8, able.pdl) == (tensor_cores, tma, fp8, pdl)
    assert able.shared_memory == kibibytes << 10
    assert able.wgmma == (tensor_cores != "mma")
    assert features(machine(capability, shared_memory_per_block=65536)).shared_memory == 65536


@pytest.mark.parametrize("name", NEEDS_STAGES)
@pytest.mark.parametrize("capability", [(9, 4), (9, 0), (11, 0)])
def test_rocm_is_a_reason_whatever_its_capability_looks_like(name: str, capability: tuple[int, int]) -> None:
    amd = machine(capability, name="AMD Instinct", cuda="", torch="2.11.0+rocm7.0")
    problem = WORKLOADS["qwen3-30b-a3b"].problem(64, "bf16", amd)
    reasons = BACKENDS.load(name)(amd).unsupported_reasons(problem)
    assert any("ROCm" in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", NEEDS_STAGES)
def test_a_gpu_without_triton_is_a_reason(name: str) -> None:
    without = machine((9, 0), triton="")
    problem = WORKLOADS["qwen3-30b-a3b"].problem(64, "bf16", without)
    reasons = BACKENDS.load(name)(without).unsupported_reasons(problem)
    assert sum("triton is not installed" in reason for reason in reasons) == 1, reasons


def test_stages_on_a_cpu_need_nothing() -> None:
    cpu = Machine(device="cpu", name="a cpu", sms=4, memory_bytes=1 << 34, torch="2.13.0+cpu")
    assert stage_reasons(cpu) == ()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
@pytest.mark.parametrize("kibibytes", [0, 64, 48, 32, 8], ids=lambda size: f"{size} KiB" if size else "its own")
def test_every_device_has_configurations_that_fit_or_a_reason(
    name: str, capability: tuple[int, int], kibibytes: int
) -> None:
    """Of the shared memory that such a device has, and of less, as a device to come may have."""
    device = machine(capability, shared_memory_per_block=kibibytes << 10)
    backend = BACKENDS.load(name)(device)
    for workload, M, dtype in itertools.product(("qwen3-30b-a3b", "gpt-oss-120b"), (1, 64, 4096), DTYPES):
        problem = WORKLOADS[workload].problem(M, dtype, device)
        if reasons := backend.unsupported_reasons(problem):
            assert all(reasons)
            continue
        configs = backend.configs(problem)
        assert configs[0] == backend.default_config(problem)
        for config in configs:
            assert shared_memory(problem, config, device) <= features(device).shared_memory, config


def shared_memory(problem: MoEProblem, config: BackendConfig, device: Machine) -> int:
    """The bound that a compile test holds the kernels of this configuration to."""
    if isinstance(config, TritonPersistentConfig):
        return config.ctas_per_sm * config.shared_memory(problem, wgmma=features(device).wgmma)
    if isinstance(config, SplitKConfig):
        return splitk_memory(problem, config)
    if isinstance(config, TritonVectorConfig):
        return vector_memory(config)
    return hopper_tiles.SHARED_MEMORY[problem.dtype]


@pytest.mark.parametrize(("M", "name"), [(1, "triton_splitk"), (64, "triton_splitk"), (4096, "triton_persistent")])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6)], ids=str)
def test_fp8_weights_do_not_need_products_of_e4m3(capability: tuple[int, int], M: int, name: str) -> None:
    device = machine(capability)
    problem = WORKLOADS["qwen3-30b-a3b"].problem(M, "fp8", device)
    chosen = Dispatcher(device, live=False).planner.explain(problem).chosen
    assert chosen is not None
    assert chosen.choice.backend == name
    assert not BACKENDS.load(name)(device).quantizes_activations(problem)


@pytest.mark.parametrize("name", ["triton_splitk", "triton_vector", "triton_persistent"])
def test_too_little_shared_memory_is_a_reason_with_limit_and_value(name: str) -> None:
    small = machine((12, 0), shared_memory_per_block=2048)
    reasons = BACKENDS.load(name)(small).unsupported_reasons(WORKLOADS["qwen3-30b-a3b"].problem(8, "fp16", small))
    assert len(reasons) == 1
    assert "of shared memory for a block, got 2048" in reasons[0]


def test_a_device_with_48_kibibytes_takes_narrower_tiles() -> None:
    small = machine((8, 6), shared_memory_per_block=48 << 10)
    layer, backend = WORKLOADS["qwen3-30b-a3b"], BACKENDS.load("triton_splitk")
    configs = [backend(device).default_config(layer.problem(64, "fp16", device)) for device in (machine((8, 6)), small)]
    assert all(isinstance(config, SplitKConfig) for config in configs)
    usual, narrow = cast("list[SplitKConfig]", configs)
    assert narrow.block_n < usual.block_n
