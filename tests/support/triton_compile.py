"""Compiles what a launcher launches for a device that is not here: memory, registers and instructions of each kernel.

The launchers are the real ones. They get tensors without memory, and Triton gets a driver that answers for the device.
It happens in another process: in Triton's interpreter, where the suite runs without a GPU, there is no compiler.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem
from moe_dispatch.workloads import torch_dtype

# Opt-in bytes of shared memory per block (CUDA programming guide, table of technical specifications).
SHARED_MEMORY: Final = {
    80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376,
}  # fmt: skip
# What `make test` compiles one default of each backend for: every device, FP8 where that differs most. All defaults of
# all dtypes are compiled by the matrix's cells `defaults-torch…`, which select the marker `matrix`.
SAMPLED: Final[tuple[tuple[int, DType], ...]] = (
    (80, "bf16"), (86, "bf16"), (89, "fp8"), (90, "bf16"), (90, "fp8"), (100, "fp8"), (103, "bf16"), (120, "fp8"),
    (121, "bf16"),
)  # fmt: skip
_SMS: Final = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188, 121: 48}


@dataclass(frozen=True)
class Launch:
    """A call that launches kernels, and a note of the test that comes back with each of them."""

    run: Callable[[], object]
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """A compiled kernel of a launch: its constants, what it takes of a device, and which instructions it has.

    Attributes:
        note: The note of its `Launch`.
        constants: Values of its constexprs by name, and its number of warps.
        shared: Bytes of shared memory.
        stack: Bytes of stack of a thread: spilled registers.
        spilling: Whether it spills within a loop of asynchronous products.
        wgmma: Whether it has asynchronous products of a warp group.
        serialised: Whether each of those is waited for, because ptxas did not see that its registers are left alone.
        tma: Whether it loads or stores through a tensor descriptor.
        fp8: Whether it has e4m3, in a product or a conversion.
        pdl: Whether it waits for the kernel before it (programmatic dependent launch).
        wide_copies: Whether it has asynchronous copies of 16 bytes.
        wide_loads: Whether it has loads of 16 bytes into registers.
        byte_loads: Whether it has loads of single bytes.
        wide_stores: Whether it has stores of 16 bytes from registers.
        evicts_first: Whether what a load or a store has touched leaves the L2 cache before other lines.
        quotients: Whether it has approximate quotients of fp32, each of which checks its operands' ranges.
        system_scope: How many operations order memory for other devices.
    """

    name: str
    capability: int
    note: dict[str, Any]
    constants: dict[str, Any]
    shared: int
    registers: int
    stack: int
    spilling: bool
    wgmma: bool
    serialised: bool
    tma: bool
    fp8: bool
    pdl: bool
    wide_copies: bool
    wide_loads: bool
    byte_loads: bool
    wide_stores: bool
    evicts_first: bool
    quotients: bool
    system_scope: int


def devices(*, fp16: bool = False, fp8_forms: bool = False, mxfp4: bool = False) -> list[Any]:
    """Parameters ``capability, dtype, every`` of a compile test: the sample, and under the marker `matrix` all of them.

    Args:
        fp16: Whether the backend takes it. It chooses as BF16 does and differs in one type: one device suffices.
        fp8_forms: Whether it takes per-channel FP8, and FP8 on devices without products of e4m3.
        mxfp4: Whether it takes MXFP4.
    """
    sample = (*SAMPLED, (80, "fp8"), (80, "fp8_channel"), (90, "fp8_channel")) if fp8_forms else SAMPLED
    sample = (*sample, (90, "mxfp4")) if mxfp4 else sample
    sampled = [pytest.param(capability, dtype, False, id=f"sm_{capability}-{dtype}") for capability, dtype in sample]
    dtypes: tuple[DType, ...] = ("bf16", "fp8", "fp8_channel") if fp8_forms else ("bf16", "fp8")
    dtypes = (*dtypes, "mxfp4") if mxfp4 else dtypes
    every: list[tuple[int, DType]] = [(capability, dtype) for capability in SHARED_MEMORY for dtype in dtypes]
    every += [(90, "fp16")] if fp16 else []
    return sampled + [
        pytest.param(capability, dtype, True, id=f"every-sm_{capability}-{dtype}", marks=pytest.mark.matrix)
        for capability, dtype in every
        if dtype != "fp8" or capability >= 89 or fp8_forms
    ]


def described(capability: int) -> Machine:
    """A machine of one of the compute capabilities in SHARED_MEMORY."""
    return Machine(
        device="cuda", name="compiled for", capability=divmod(capability, 10), sms=_SMS[capability],
        memory_bytes=80 << 30, shared_memory_per_block=SHARED_MEMORY[capability], torch="2.11", cuda="13.0",
        triton="3.6",
    )  # fmt: skip


def unwritten_layer(problem: MoEProblem) -> tuple[Tensor, ExpertWeights, Tensor, Tensor]:
    """Hidden states, weights, topk_weights and topk_ids of a problem, for a launch."""
    empty = torch.empty
    dtype, plain = torch_dtype(problem.dtype), torch_dtype(problem.act_dtype)
    M, E, rows, K, N = problem.M, problem.E, problem.gate_up_rows, problem.K, problem.N
    optional: dict[str, Any] = {}
    packed = 2 if problem.dtype == "mxfp4" else 1  # weights in an element
    if problem.quantized:
        gate_up, down = problem.scale_shapes
        scales = torch.uint8 if problem.dtype == "mxfp4" else torch.float32
        optional |= {"gate_up_scale": empty(E, *gate_up, dtype=scales), "down_scale": empty(E, *down, dtype=scales)}
    if problem.bias:
        optional |= {"gate_up_bias": empty(E, rows, dtype=plain), "down_bias": empty(E, K, dtype=plain)}
    weights = [empty(E, R, C // packed, dtype=dtype) for R, C in ((rows, K), (K, N))]
    if problem.transposed:
        weights = [empty(E, C, R, dtype=dtype).mT for R, C in ((rows, K), (K, N))]
    experts = ExpertWeights(
        *weights, **optional, activation=problem.activation, interleaved=problem.interleaved,
        transposed=problem.transposed,
    )  # fmt: skip
    ids = empty(M, problem.topk, dtype=torch.int32)
    return empty(M, K, dtype=plain), experts, empty(M, problem.topk), ids


def compile_launches(launches: Callable[..., Iterable[Launch]], *capabilities: int, **arguments: Any) -> list[Built]:
    """Compile all that `launches(capability, **arguments)` launches, for each capability.

    `launches` is a function of a module, and is called in the other process.

    Raises:
        AssertionError: A kernel does not compile; the message is the compiler's.
    """
    pytest.importorskip("triton")
    work = {"module": launches.__module__, "name": launches.__qualname__, "capabilities": capabilities}
    answer = _compiler().ask(json.dumps(work | {"arguments": arguments}))
    if "failed" in answer:
        raise AssertionError(f"a kernel does not compile:\n{answer['failed'][-4000:]}")
    return [Built(**built) for built in answer["built"]]


class _Compiler:
    """The process that compiles. It serves all requests of this one: importing PyTorch and Triton takes seconds."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"], env=environment, stderr=self._said,
            cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self._process.communicate)  # closes its input, at which it ends

    def ask(self, work: str) -> dict[str, Any]:
        """Its answer to a request, a line of JSON; if it dies, its standard error as a failure."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(work + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return cast("dict[str, Any]", json.loads(line))
        _compiler.cache_clear()  # the next request starts another process
        self._said.seek(0)
        return {"failed": f"{self._said.read().decode(errors='replace')}\nexit status {self._process.wait()}"}


@functools.cache
def _compiler() -> _Compiler:
    return _Compiler()


def serve() -> None:
    """The process that compiles: requests come in as lines of JSON, answers go out, until its input is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing that is printed is taken for an answer
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"built": [dataclasses.asdict(each) for each in _build(json.loads(line))]}
        except Exception:  # noqa: BLE001 - the other side raises it
            answer = {"failed": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _build(request: dict[str, Any]) -> list[Built]:
    built: list[Built] = []
    launches = getattr(importlib.import_module(request["module"]), request["name"])
    for capability in request["capabilities"]:
        with compiling(capability, built):
            for launch in launches(capability, **request["arguments"]):
                before = len(built)
                launch.run()
                built[before:] = [dataclasses.replace(each, note=launch.note) for each in built[before:]]
    return built


@contextlib.contextmanager
def compiling(capability: int, built: list[Built]) -> Iterator[None]:
    """Append to `built` what would be launched, compiled for a device, instead of launching it.

    Tensors made here have no memory and say that they are on a GPU.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Absent:
        """The driver of a GPU that is not there: what Triton asks before it compiles."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        # Any number that no other target has: it names the cache of what was compiled.
        get_current_device = staticmethod(lambda: capability)
        get_current_stream = staticmethod(lambda _device=None: 0)

    run = JITFunction.run
    seen: dict[str, Built] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            constants = {name: value for name, value in options.items() if name.isupper() or name == "num_warps"}
            seen[kernel.hash] = _describe(kernel, capability, constants)
        built.append(seen[kernel.hash])
        return kernel

    triton.runtime.driver.set_active(Absent())
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        # A torch with CUDA would ask the driver, which a machine without a GPU lacks.
        mock.patch("moe_dispatch.backends.triton_common.internals.current_device", return_value=0),
        mock.patch.object(FakeTensor, "is_cuda", new=True),
        # Triton specialises on the alignment of addresses.
        mock.patch.object(FakeTensor, "data_ptr", return_value=0),
        FakeTensorMode(),
    ):
        yield


def _describe(kernel: Any, capability: int, constants: dict[str, Any]) -> Built:
    if fault := misplaced_reduction(kernel.asm["ttgir"]):
        raise AssertionError(f"{kernel.metadata.name}: {fault}")
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage, wgmma = _resources(cubin), "wgmma.mma_async" in ptx
    code = _tool("nvdisasm", cubin, "--print-code") if wgmma else ""
    return Built(
        name=kernel.metadata.name, capability=capability, note={}, constants=constants,
        shared=kernel.metadata.shared, registers=usage["REG"], stack=usage["STACK"], wgmma=wgmma,
        spilling=_spilling(code), serialised=wgmma and _serialised(code),
        tma="cp.async.bulk.tensor" in ptx, fp8="e4m3" in ptx, pdl="griddepcontrol.wait" in ptx,
        wide_copies="cp.async.cg.shared.global" in ptx,
        wide_loads=re.search(r"ld\.global\S*\.v(4\.b32|2\.b64)", ptx) is not None,
        byte_loads=re.search(r"ld\.global\S*\.[bu]8\b", ptx) is not None,
        wide_stores=re.search(r"st\.global\S*\.v(4\.b32|2\.b64)", ptx) is not None,
        evicts_first="L2::evict_first" in ptx, quotients="div.full.f32" in ptx,
        system_scope=len(re.findall(r"\b(?:atom|ld|red|st)\.\S*\bsys\b", ptx)),
    )  # fmt: skip


def misplaced_reduction(ttgir: str) -> str:
    """A reduction that Triton 3.6 computes wrongly, in words; empty if there is none.

    It takes the lanes, and the warps, that share an axis for consecutive ones. They are in blocked layouts; in the
    linear layouts of reshaped tensors they need not be, and then shares are added to other results (mended by pull
    request 9219 of triton-lang/triton).
    """
    linear = {
        name: [json.loads(lanes), json.loads(warps)]
        for name, lanes, warps in re.findall(
            r"^#(\w+) = #ttg\.linear<\{.*?lane = (\[.*?\]), warp = (\[.*?\]), block", ttgir, re.MULTILINE
        )
    }
    reductions = re.findall(r'"tt\.reduce".*?axis = (\d+).*?\}\) : \(tensor<(.*?) ->', ttgir, re.DOTALL)
    for axis, operand in ((int(number), text) for number, text in reductions):
        layout = re.search(r"#(?!ttg\b)(\w+)", operand)
        if layout is None or layout[1] not in linear:
            continue
        sliced = [int(dim) for dim in re.findall(r"dim = (\d+)", operand[: layout.start()])]
        for bases in linear[layout[1]]:
            kept = bases
            for dim in reversed(sliced):
                kept = [basis[:dim] + basis[dim + 1 :] for basis in kept]
            # Bits that move along no axis are left out; of the others, those of this axis are written as x.
            shares = "".join("x" if basis[axis] else "-" for basis in kept if any(basis))
            if "-" in shares.strip("-"):
                return f"axis {axis} of tensor<{operand} is shared by lanes or warps that are not consecutive"
    return ""


def _resources(cubin: bytes) -> dict[str, int]:
    text = _tool("cuobjdump", cubin, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def _serialised(code: str) -> bool:
    return code.count("WARPGROUP.DEPBAR") >= len(re.findall(r"\b[HIQ]GMMA\b", code))


def _spilling(code: str) -> bool:
    lines = code.splitlines()
    labels = {line.rstrip(":"): place for place, line in enumerate(lines) if re.fullmatch(r"\.L_\w+:", line)}
    targets = ((place, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) for place, line in enumerate(lines))
    loops = [(labels[jump[1]], place) for place, jump in targets if jump and labels[jump[1]] < place]
    for place, line in enumerate(lines):
        if re.search(r"\b[HIQ]GMMA\b", line):
            around = [(last - first, first, last) for first, last in loops if first < place < last]
            # Code after a failed wait lies at the kernel's end and jumps back: the shortest loop is the real one.
            _, first, last = min(around, default=(0, place, place))
            if re.search(r"\b(STL|LDL)\b", "".join(lines[first:last])):
                return True
    return False


def _tool(name: str, cubin: bytes, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), *options, file.name], check=True, capture_output=True, text=True).stdout
