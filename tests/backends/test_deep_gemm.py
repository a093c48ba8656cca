"""The deep_gemm backend: its reasons, its layouts, and its calls held against a stand-in that really multiplies.

The stand-in takes what DeepGEMM takes (its host assertions are repeated here), works tile by tile as its kernels do,
and leaves NaN wherever a tile is stored beyond an expert's rows. It comes with the names and signatures of each release
that is known to work. The real ones run in the conformance suite, on a GPU.
"""

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch.activations import ACTIVATIONS, Activation
from moe_dispatch.backends.deep_gemm import DeepGemmBackend, DeepGemmConfig, library
from moe_dispatch.backends.deep_gemm.layouts import expected_rows, layout_rows, masked_capacity
from moe_dispatch.backends.stages.route import route
from moe_dispatch.errors import BackendUnavailableError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.numerics import dequantize_blocks
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.testing import relative_error, truth
from moe_dispatch.workloads import WORKLOADS
from tests.support.deep_gemm_releases import RELEASES
from tests.support.described import H200, small_layer
from tests.support.packages import forgotten, write_package
from tests.support.refusals import Refusal, on_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 128


# Reasons.


REFUSALS = {
    "cpu": Refusal(on_hopper(device="cpu", capability=None), ("CUDA device",)),
    "sm_80": Refusal(on_hopper(capability=(8, 0)), ("9.0 or newer", "got 8.0")),
    "sm_89 in fp8": Refusal(on_hopper("fp8", capability=(8, 9)), ("9.0 or newer", "got 8.9")),
    "sm_100": Refusal(on_hopper(capability=(10, 0)), ("below 10.0", "got 10.0")),
    "sm_100 in fp8": Refusal(on_hopper("fp8", capability=(10, 0)), ("below 10.0", "power-of-two multipliers")),
    "fp16": Refusal(on_hopper("fp16"), ("got fp16",)),
    "parts of a group": Refusal(on_hopper("fp8", K=192, N=64), ("K % 128 == 0", "K=192", "N % 128 == 0", "N=64")),
    "parts of a bf16 tile": Refusal(on_hopper(K=96, N=32), ("K % 64 == 0", "K=96", "N % 64 == 0", "N=32")),
    "gradient": Refusal(on_hopper(needs_grad=True), ("no gradient",)),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refuses_with_limit_and_value(refusal: Refusal) -> None:
    refusal.check(DeepGemmBackend(H200))


@pytest.mark.parametrize(
    "taken",
    [
        on_hopper(mode="graph"),
        on_hopper(K=192, N=64),
        on_hopper("fp8", mode="graph"),
        on_hopper("fp8", act_dtype="fp16"),
        on_hopper(activation="swiglu_oai", interleaved=True, bias=True),
        on_hopper("fp8", activation="relu2"),
    ],
    ids=str,
)
def test_takes(taken: MoEProblem) -> None:
    assert DeepGemmBackend(H200).unsupported_reasons(taken) == ()


@pytest.mark.parametrize(
    ("deep_gemm", "torch_version", "words"),
    [
        ("", "2.11.0", ("not installed", "sgl-deep-gemm", "nvcc")),
        ("1.0.0 (deep-gemm)", "2.11.0", ("CUDA headers", "uninstall")),
        ("0.1.3 (sgl-deep-gemm)", "2.12.1", ("built for torch 2.11", "no release for torch 2.12")),
        ("2.8.1", "2.11.0+cu130", ()),  # vLLM's copies use torch's stable ABI from here on
        ("9.9.9 (sgl-deep-gemm)", "2.14.0", ()),  # nothing is known against it
    ],
)
def test_unusable_wheels_name_the_right_one(deep_gemm: str, torch_version: str, words: tuple[str, ...]) -> None:
    libraries = {"deep_gemm": deep_gemm} if deep_gemm else {}
    machine = H200.model_copy(update={"torch": torch_version, "libraries": libraries})
    reasons = DeepGemmBackend(machine).unavailable_reasons()
    assert len(reasons) == bool(words), reasons
    assert all(word in reasons[0] for word in words), reasons


# Layouts.


def layouts_for(workload: str, M: int, dtype: DType) -> list[str]:
    problem = WORKLOADS[workload].problem(M, dtype, H200)
    return [config.layout for config in DeepGemmBackend(H200).configs(problem)]


@pytest.mark.parametrize(
    ("workload", "M", "dtype", "default"),
    [
        ("deepseek-v3", 1, "fp8", "masked"),
        ("deepseek-v3", 1024, "fp8", "masked"),
        ("deepseek-v3", 4096, "fp8", "psum"),
        ("mixtral-8x7b", 128, "fp8", "masked"),
        ("mixtral-8x7b", 256, "fp8", "psum"),
        ("qwen3-30b-a3b", 1024, "bf16", "masked"),
        ("qwen3-30b-a3b", 16384, "bf16", "psum"),
    ],
)
def test_default_layout(workload: str, M: int, dtype: DType, default: str) -> None:
    layouts = layouts_for(workload, M, dtype)
    assert layouts[0] == default
    assert len(set(layouts)) == len(layouts)
    assert "psum" in layouts


def test_masked_layout_is_left_out_where_it_would_fill_the_device() -> None:
    assert layouts_for("deepseek-v3", 16384, "fp8") == ["psum"]
    assert set(layouts_for("deepseek-v3", 4, "bf16")) == {"masked", "psum"}


@pytest.mark.parametrize("M", [1, 127, 128, 129, 1000])
def test_masked_capacity_is_whole_tiles_for_every_token(M: int) -> None:
    capacity = masked_capacity(M)
    assert capacity % TILE == 0
    assert 0 <= capacity - M < TILE
    assert layout_rows("masked", M, 8, 7) == 7 * capacity


@pytest.mark.parametrize(("slots", "E", "rows"), [(1, 256, 1), (256, 256, 1), (257, 256, 2), (4096, 8, 512)])
def test_expected_rows(slots: int, E: int, rows: int) -> None:
    assert expected_rows(slots, E) == rows


@pytest.mark.parametrize("seed", range(5))
def test_psum_rows_hold_the_worst_routing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 10, (37, 3), generator=generator)
    ends = route(ids.to(DEVICE), 9, alignment=TILE).ends.tolist()
    start = 0
    for e, end in enumerate(ends):
        assert end - start == int((ids == e).sum())  # an empty expert ends where it starts
        start = math.ceil(end / TILE) * TILE
    M, topk = ids.shape
    assert start <= layout_rows("psum", M, topk, 9)


@pytest.mark.parametrize("layout", ["masked", "psum"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_workspace_covers_the_widest_pair_of_buffers(layout: Any, dtype: DType) -> None:
    problem = on_hopper(dtype, M=64, K=256, N=512)
    rows = layout_rows(layout, problem.M, problem.topk, problem.E)
    second = rows * (512 * (1 if dtype == "fp8" else 2))
    assert DeepGemmBackend(H200).workspace_bytes(problem, DeepGemmConfig(layout=layout)) >= rows * 1024 * 2 + second


# The calls, against a stand-in.


@dataclass
class StandIn:
    """Multiplies as DeepGEMM does on sm_90."""

    alignment: int = TILE
    pdl: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    def bf16_contiguous(
        self, a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor,
        use_psum_layout: bool = False, expected_m_for_psum_layout: int | None = None,
    ) -> None:  # fmt: skip
        assert a.shape[1] % 64 == 0
        assert a.dtype == b.dtype == torch.bfloat16
        self.contiguous(a.float(), b.float(), d, grouped_layout, use_psum_layout, expected_m_for_psum_layout)

    def fp8_contiguous(
        self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, grouped_layout: Tensor,
        disable_ue8m0_cast: bool = False, use_psum_layout: bool = False, expected_m_for_psum_layout: int | None = None,
    ) -> None:  # fmt: skip
        assert disable_ue8m0_cast
        rows, groups = a[1].shape
        # Anything else would be converted on every call.
        assert a[1].stride() == (1, math.ceil(rows / 4) * 4)
        assert (rows, groups) == (a[0].shape[0], math.ceil(a[0].shape[1] / 128))
        wide_a, wide_b = self.widen(*a), self.widen_weight(*b)
        self.contiguous(wide_a, wide_b, d, grouped_layout, use_psum_layout, expected_m_for_psum_layout)

    def bf16_masked(self, a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
        assert a.shape[2] % 64 == 0
        assert a.dtype == b.dtype == torch.bfloat16
        self.masked(a.float(), b.float(), d, masked_m, expected_m)

    def fp8_masked(
        self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, masked_m: Tensor, expected_m: int,
        disable_ue8m0_cast: bool = False,
    ) -> None:  # fmt: skip
        assert disable_ue8m0_cast
        E, rows, K = a[0].shape
        groups = math.ceil(K / 128)
        assert a[1].shape == (E, rows, groups)
        assert a[1].stride() == (groups * rows, 1, rows)
        self.masked(self.widen(*a), self.widen_weight(*b), d, masked_m, expected_m)

    def widen(self, codes: Tensor, scale: Tensor) -> Tensor:
        assert codes.dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float32
        return codes.float() * scale.repeat_interleave(128, dim=-1)[..., : codes.shape[-1]]

    def widen_weight(self, codes: Tensor, scale: Tensor) -> Tensor:
        assert scale.is_contiguous()
        return dequantize_blocks(codes, scale)

    def contiguous(self, a: Tensor, b: Tensor, d: Tensor, layout: Tensor, psum: bool, expected_m: int | None) -> None:
        self.calls.append({"psum": psum, "expected_m": expected_m, "rows": a.shape[0]})
        assert d.dtype == torch.bfloat16
        assert d.shape == (a.shape[0], b.shape[1])
        assert layout.dtype == torch.int32
        assert layout.is_contiguous()
        assert psum
        assert layout.shape == (b.shape[0],)
        start = 0
        for e, end in enumerate(layout.tolist()):
            assert end >= start, "the number of tiles wraps around"
            stop = math.ceil(end / self.alignment) * self.alignment
            d[start:end] = (a[start:end] @ b[e].T).bfloat16()
            d[end:stop] = torch.nan
            start = stop
        assert start <= a.shape[0]

    def masked(self, a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
        self.calls.append({"expected_m": expected_m, "rows": a.shape[0] * a.shape[1]})
        E, capacity, _ = a.shape
        assert capacity % TILE == 0, "a whole tile would be stored over the next expert"
        assert d.dtype == torch.bfloat16
        assert d.shape == (E, capacity, b.shape[1])
        assert masked_m.dtype == torch.int32
        assert masked_m.shape == (E,)
        assert expected_m > 0
        for e, count in enumerate(masked_m.tolist()):
            assert 0 <= count <= capacity
            d[e, :count] = (a[e, :count] @ b[e].T).bfloat16()
            d[e, count : math.ceil(count / TILE) * TILE] = torch.nan

    def set_pdl(self, enable: bool) -> None:
        self.pdl = enable

    def module(self, release: str = "vLLM's 2.8.1") -> types.ModuleType:
        names = ("bf16_contiguous", "bf16_masked", "fp8_contiguous", "fp8_masked", "set_pdl")
        functions = {name: getattr(self, name) for name in names}
        return RELEASES[release].module(functions | {"alignment": lambda: self.alignment})


@pytest.fixture
def no_deep_gemm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide DeepGEMM and vLLM, and name an nvcc in the environment."""
    monkeypatch.setattr(library, "_library", None)
    nvcc = tmp_path / "nvcc"
    nvcc.touch()
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(nvcc))
    monkeypatch.delenv("DG_JIT_USE_NVRTC", raising=False)
    with forgotten("deep_gemm", "vllm"):
        yield


@pytest.fixture
def deep_gemm(no_deep_gemm: None, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in.module())
    return stand_in


def layer(dtype: DType, activation: Activation = "silu", *, bias: bool = False) -> ExpertWeights:
    return small_layer(dtype, activation, bias=bias, E=4, K=256)


def error_of(
    experts: ExpertWeights, weights: Tensor, ids: Tensor, layout: Any, act_dtype: torch.dtype = torch.bfloat16
) -> float:
    hidden = torch.randn(ids.shape[0], experts.K, generator=torch.Generator().manual_seed(2)).to(act_dtype)
    out = DeepGemmBackend(H200).run(hidden, experts, weights, ids, DeepGemmConfig(layout=layout))
    assert out.dtype == hidden.dtype
    assert out.shape == hidden.shape
    return relative_error(out, truth(hidden, experts, weights, ids))


LAYOUTS = pytest.mark.parametrize("layout", ["masked", "psum"])


@pytest.mark.usefixtures("deep_gemm")
def test_the_sum_is_written_to_memory_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, ids = layer("bf16"), torch.tensor([[0, 1], [2, -1], [3, 3]])
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(3))
    inputs = (torch.randn(3, experts.K).bfloat16(), experts, weights, ids, DeepGemmConfig())
    backend = DeepGemmBackend(H200)
    expected = backend.run(*inputs)
    monkeypatch.setattr(DeepGemmBackend, "run", None)  # nothing is computed elsewhere and copied
    out = torch.full_like(inputs[0], torch.nan)
    assert backend.run_into(*inputs, out) is out
    assert torch.equal(out, expected)


@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_hands_the_layer_over_whole(deep_gemm: StandIn, dtype: DType, activation: Activation, layout: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weights, ids = torch.rand(9, 2, generator=generator), torch.randint(0, 4, (9, 2), generator=generator)
    error = error_of(layer(dtype, activation, bias=True), weights, ids, layout)
    assert error <= DeepGemmBackend.tolerance[dtype]
    assert len(deep_gemm.calls) == 2


@LAYOUTS
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_called_as_it_wants(
    no_deep_gemm: None, monkeypatch: pytest.MonkeyPatch, release: str, dtype: DType, layout: str
) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in.module(release))
    experts = layer(dtype)
    if dtype == "bf16":  # as parameters do under no_grad
        experts.gate_up.requires_grad_()
        experts.down.requires_grad_()
    weights, ids = torch.rand(3, 2, generator=torch.Generator().manual_seed(5)), torch.tensor([[0, 1], [2, -1], [1, 3]])
    with torch.no_grad():
        assert error_of(experts, weights, ids, layout) <= DeepGemmBackend.tolerance[dtype]
    assert len(stand_in.calls) == 2
    assert stand_in.pdl


# Ids at the limits of what a layout takes.
ROUTED = {
    "sentinels": torch.tensor([[-1, 2], [4, 0], [99, -7]]),
    "no slot is ours": torch.tensor([[-1, 4], [-1, -1]]),
    "first and last experts are empty": torch.tensor([[1, 2], [2, 1]]),
    "only the last expert": torch.tensor([[3, -1]]),
    "the same expert twice": torch.tensor([[2, 2], [0, 2]]),
    # More slots of one expert than the masked layout has rows for it.
    "every slot to one expert": torch.full((70, 2), 1),
    "more than a tile for one expert": torch.tensor([[1, 3]]).repeat(150, 1),
    "int32": torch.tensor([[0, 3], [1, -1]], dtype=torch.int32),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("ids", ROUTED.values(), ids=ROUTED)
def test_routing_edges(deep_gemm: StandIn, ids: Tensor, dtype: DType, layout: str) -> None:
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.1
    weights[(ids < 0) | (ids >= 4)] = torch.nan
    assert error_of(layer(dtype), weights, ids, layout) <= DeepGemmBackend.tolerance[dtype]


@LAYOUTS
def test_fp16_tokens_stay_fp16(deep_gemm: StandIn, layout: str) -> None:
    weights, ids = torch.rand(3, 2, generator=torch.Generator().manual_seed(5)), torch.tensor([[0, 1], [2, 3], [1, 3]])
    assert error_of(layer("fp8"), weights, ids, layout, torch.float16) <= DeepGemmBackend.tolerance["fp8"]


def test_alignment_is_asked_on_every_call(deep_gemm: StandIn) -> None:
    weights, ids = torch.ones(5, 2), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]])
    rows = []
    for alignment in (128, 64):  # it is process-global, and another library in the process may set it
        deep_gemm.alignment = alignment
        assert error_of(layer("bf16"), weights, ids, "psum") <= 1e-2
        rows.append(deep_gemm.calls[-1]["rows"])
    assert rows[0] > rows[1]


def test_expected_rows_reach_the_library(deep_gemm: StandIn) -> None:
    weights, ids = torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int32)
    for layout in ("psum", "masked"):
        error_of(layer("bf16"), weights, ids, layout)
        assert deep_gemm.calls[-1]["expected_m"] == 3  # ⌈5·2 / 4⌉, whatever the routing


# Loading.

FUNCTIONS = """
def m_grouped_bf16_gemm_nt_contiguous(
    *, a, b, d, grouped_layout, use_psum_layout=False, expected_m_for_psum_layout=None
): ...
def m_grouped_bf16_gemm_nt_masked(*, a, b, d, masked_m, expected_m): ...
def m_grouped_fp8_gemm_nt_contiguous(
    *, a, b, d, grouped_layout, use_psum_layout=False, expected_m_for_psum_layout=None, disable_ue8m0_cast=False
): ...
def m_grouped_fp8_gemm_nt_masked(*, a, b, d, masked_m, expected_m, disable_ue8m0_cast=False): ...
def get_mk_alignment_for_contiguous_layout(): return 128
"""


@dataclass(frozen=True)
class Installed:
    """Packages by name, and what comes of them: the module that is used, or what the error must name."""

    packages: dict[str, str]
    used: str = ""
    words: tuple[str, ...] = ()


NO_TOOLKIT = "cuda_home = None\nassert cuda_home is not None"
INSTALLED = {
    "its own package": Installed({"deep_gemm": FUNCTIONS}, used="deep_gemm"),
    "vllm's copy": Installed({"vllm.third_party.deep_gemm": FUNCTIONS}, used="vllm.third_party.deep_gemm"),
    "both": Installed({"deep_gemm": FUNCTIONS, "vllm.third_party.deep_gemm": FUNCTIONS}, used="deep_gemm"),
    "its own is broken, vllm's copy is not": Installed(
        {"deep_gemm": "raise RuntimeError", "vllm.third_party.deep_gemm": FUNCTIONS}, used="vllm.third_party.deep_gemm"
    ),
    "none": Installed({}, words=("deep_gemm is not installed", "vllm.third_party.deep_gemm is not installed", "nvcc")),
    "no cuda toolkit": Installed({"deep_gemm": NO_TOOLKIT}, words=("AssertionError", "CUDA_HOME")),
    "it ends the process": Installed({"deep_gemm": "raise SystemExit(3)"}, words=("SystemExit: 3",)),
    "another torch's abi": Installed(
        {"deep_gemm": "raise ImportError('undefined symbol: _ZN3c10')"}, words=("undefined symbol", "another torch")
    ),
    "something of its own is missing": Installed(
        {"deep_gemm": "import deep_gemm._C"}, words=("deep_gemm does not import: ModuleNotFoundError",)
    ),
    "without what it depends on": Installed(
        {"deep_gemm": "import tvm_ffi_that_is_not_there"}, words=("tvm_ffi_that_is_not_there", "what it depends on")
    ),
    "functions missing": Installed(
        {"deep_gemm": FUNCTIONS.replace("_fp8_gemm_nt_masked", "_other")},
        words=("too old or too new", "it has no m_grouped_fp8_gemm_nt_masked or m_grouped_fp8_fp4_gemm_nt_masked"),
    ),
    "no psum layout": Installed(
        {"deep_gemm": FUNCTIONS.replace("use_psum_layout=False, ", "")},
        words=("its m_grouped_bf16_gemm_nt_contiguous takes no use_psum_layout",),
    ),
}


@pytest.mark.parametrize("case", INSTALLED.values(), ids=INSTALLED)
def test_loading(no_deep_gemm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Installed) -> None:
    for name, init in case.packages.items():
        write_package(tmp_path, name, init)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if not has_either(path))])
    if case.used:
        assert library.load().module == case.used
        assert library.load() is library.load()
        return
    with pytest.raises(BackendUnavailableError) as caught:
        library.load()
    assert all(word in str(caught.value) for word in case.words), caught.value


def has_either(path: str) -> bool:
    return any(Path(path, name).is_dir() for name in ("deep_gemm", "vllm"))


def test_no_compiler_is_a_reason_before_the_first_product(
    deep_gemm: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DG_JIT_NVCC_COMPILER")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(BackendUnavailableError, match=r"needs nvcc .*toolkit/bin/nvcc"):
        library.load()
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    assert library.load().module == "deep_gemm"


def test_several_kinds_of_gpu_are_a_reason(deep_gemm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132),
        types.SimpleNamespace(name="NVIDIA H20", multi_processor_count=78),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: kinds[index])
    with pytest.raises(BackendUnavailableError, match=r"H20 with 78 SMs, NVIDIA H200 .*CUDA_VISIBLE_DEVICES"):
        library.load()
    kinds[1] = kinds[0]
    assert library.load().module == "deep_gemm"
