"""What a device offers is looked up by device class: a greater compute capability is no superset of a smaller one."""

import dataclasses
import itertools

import pytest

from moe_dispatch.backend import BackendConfig
from moe_dispatch.backends.gluon_hopper import tiles as hopper_tiles
from moe_dispatch.backends.triton_common.features import TensorCores, features, interpreting, stage_reasons
from moe_dispatch.backends.triton_persistent.config import TritonPersistentConfig
from moe_dispatch.backends.triton_splitk.config import SplitKConfig
from moe_dispatch.backends.triton_splitk.config import shared_memory_bytes as splitk_memory
from moe_dispatch.backends.triton_vector.config import TritonVectorConfig
from moe_dispatch.backends.triton_vector.config import shared_memory_bytes as vector_memory
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DTYPES, MoEProblem
from moe_dispatch.registry import BACKENDS, make_backend
from moe_dispatch.workloads import WORKLOADS, torch_dtype
from tests.support.described import CPU, H200, gpu

OURS = ("triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper")
TOKENS = (1, 4, 16, 64, 512, 4096, 16384)
NEEDS_STAGES = (*OURS, "torch_grouped", "deep_gemm")


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
    able = features(gpu(capability))
    assert (able.tensor_cores, able.tma, able.fp8, able.pdl) == (tensor_cores, tma, fp8, pdl)
    assert able.shared_memory == kibibytes << 10
    assert able.wgmma == (tensor_cores != "mma")
    assert features(gpu(capability, shared_memory_per_block=65536)).shared_memory == 65536


@pytest.mark.parametrize("value", ["1", "true", "On", "yes", "Y", "0", "", "2"])
def test_kernels_are_interpreted_where_triton_interprets_them(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting.__wrapped__() == knobs.runtime.interpret


@pytest.mark.parametrize("name", NEEDS_STAGES)
def test_so_many_experts_of_a_token_that_kernels_compile_for_minutes_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dispatch.backends.triton_common.features.interpreting", lambda: False)  # it refuses BF16
    backend, problem = BACKENDS.load(name)(H200), MoEProblem(M=4, K=2048, N=768, E=512, topk=128)
    assert backend.unsupported_reasons(problem) == ()
    reasons = backend.unsupported_reasons(dataclasses.replace(problem, topk=129))
    unrolled = "unrolls sums over topk: needs topk ≤ 128 for a compilation of seconds, got 129"
    assert reasons == (() if name == "triton_vector" else (unrolled,))


# Capabilities of AMD's devices look like NVIDIA's.
ROCM = {"name": "AMD Instinct", "cuda": "", "torch": "2.11.0+rocm7.0"}


@pytest.mark.parametrize("name", NEEDS_STAGES)
@pytest.mark.parametrize(
    ("capability", "changes", "words"),
    [*(((major, minor), ROCM, "never run on ROCm") for major, minor in ((9, 4), (9, 0), (11, 0))),
     ((9, 0), {"triton": ""}, "triton is not installed: `moe-dispatch doctor` has the command")],
)  # fmt: skip
def test_a_gpu_without_triton_for_cuda_is_a_reason(
    name: str, capability: tuple[int, int], changes: dict[str, object], words: str
) -> None:
    machine = gpu(capability, **changes)
    reasons = BACKENDS.load(name)(machine).unsupported_reasons(WORKLOADS["qwen3-30b-a3b"].problem(64, "bf16", machine))
    assert sum(words in reason for reason in reasons) == 1, reasons


def test_stages_on_a_cpu_need_nothing() -> None:
    assert stage_reasons(CPU) == ()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
@pytest.mark.parametrize("kibibytes", [0, 99, 64, 48, 32, 8], ids=lambda size: f"{size} KiB" if size else "its own")
def test_every_device_has_configurations_that_fit_or_a_reason(
    name: str, capability: tuple[int, int], kibibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shared memory that such a device has, and of less, as a device to come may have."""
    monkeypatch.setattr("moe_dispatch.backends.triton_common.features.interpreting", lambda: False)  # it refuses BF16
    device = gpu(capability, shared_memory_per_block=kibibytes << 10)
    served = set()
    able, backend = features(device), BACKENDS.load(name)(device)
    workloads = ("qwen3-30b-a3b", "gpt-oss-120b") if kibibytes else WORKLOADS
    for workload, M, dtype in itertools.product(workloads, (1, 64, 4096) if kibibytes else TOKENS, DTYPES):
        problem = WORKLOADS[workload].problem(M, dtype, device)
        if reasons := backend.unsupported_reasons(problem):
            assert all(reasons)
            continue
        served.add(dtype)
        configs = backend.configs(problem)
        assert configs[0] == backend.default_config(problem)
        assert len({config.label for config in configs}) == len(configs) <= (16 if name == "triton_splitk" else 24)
        for config in configs:
            assert shared_memory(problem, config, device) <= able.shared_memory, config
            assert backend.workspace_bytes(problem, config) > 0
            assert able.tma or not getattr(config, "tma", False), config
            assert able.pdl or not getattr(config, "pdl", False), config
            if dtype.startswith("fp8") and isinstance(config, SplitKConfig):
                assert config.block_k == 128
            if name == "triton_vector":  # whose one intermediate has the dtype of activations
                kept = M * problem.topk * problem.N * torch_dtype(problem.act_dtype).itemsize
                assert backend.workspace_bytes(problem, config) == kept
    if kibibytes in (0, 99) if name != "gluon_hopper" else not kibibytes and capability == (9, 0):
        assert served >= {"bf16", "fp8"}


def shared_memory(problem: MoEProblem, config: BackendConfig, device: Machine) -> int:
    """The bound that a compile test holds the kernels of this configuration to."""
    if isinstance(config, TritonPersistentConfig):
        return config.ctas_per_sm * config.shared_memory(problem, wgmma=features(device).wgmma)
    if isinstance(config, SplitKConfig):
        return splitk_memory(problem, config)
    if isinstance(config, TritonVectorConfig):
        return vector_memory(config)
    return hopper_tiles.SHARED_MEMORY[problem.dtype]


@pytest.mark.parametrize(
    ("M", "name"), [(1, "triton_vector"), (4, "triton_splitk"), (64, "triton_splitk"), (4096, "triton_persistent")]
)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6)], ids=str)
def test_fp8_weights_do_not_need_products_of_e4m3(capability: tuple[int, int], M: int, name: str) -> None:
    device = gpu(capability)
    problem = WORKLOADS["qwen3-30b-a3b"].problem(M, "fp8", device)
    chosen = Dispatcher(device, live=False).planner.explain(problem).chosen
    assert chosen is not None
    assert chosen.choice.backend == name
    assert not BACKENDS.load(name)(device).quantizes_activations(problem)


@pytest.mark.parametrize("name", ["triton_splitk", "triton_vector", "triton_persistent"])
def test_too_little_shared_memory_is_a_reason_with_limit_and_value(name: str) -> None:
    small = gpu((12, 0), shared_memory_per_block=2048)
    reasons = BACKENDS.load(name)(small).unsupported_reasons(WORKLOADS["qwen3-30b-a3b"].problem(8, "fp16", small))
    assert len(reasons) == 1
    assert "of shared memory for a block, got 2048" in reasons[0]


@pytest.mark.parametrize("name", ["triton_splitk", "triton_vector"])
def test_many_slots_are_declined_with_the_limit(name: str) -> None:
    device, layer = gpu((9, 0)), WORKLOADS["qwen3-30b-a3b"]
    backend = BACKENDS.load(name)(device)
    fits = 4096 // layer.topk
    assert backend.further_reasons(layer.problem(fits, "fp16", device)) == ()
    (reason,) = backend.further_reasons(layer.problem(fits + 1, "fp16", device))
    assert f"M·topk ≤ 4096, got {(fits + 1) * layer.topk}" in reason


@pytest.mark.parametrize("name", BACKENDS.names())
def test_nothing_of_an_absent_library_is_listed(name: str) -> None:
    bare = Machine.load("h200").model_copy(update={"libraries": {}, "triton": ""})
    backend = make_backend(name, bare).backend
    assert backend is not None
    listed = {what for what, version in backend.measured_versions().items() if version}
    assert listed <= {"torch", "moe_dispatch"}
