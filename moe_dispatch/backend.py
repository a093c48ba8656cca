"""What a backend is. To add one, subclass `Backend`, declare what it takes, write `run`, and register it.

A backend in a package of your own needs no change here:

    [project.entry-points."moe_dispatch.backends"]
    my_backend = "my_package.moe:MyBackend"

It is loaded on first use, appears in `moe-dispatch doctor`, and takes part in calibration. The conformance suite
(moe_dispatch/testing.py) runs over whatever is registered.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pydantic
import torch
from torch import Tensor

from moe_dispatch.activations import KINDS, kind
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, MoEProblem

Capability = tuple[int, int]
Inputs = tuple[Tensor, ExpertWeights, Tensor, Tensor]  # hidden_states, experts, topk_weights, topk_ids


class BackendConfig(pydantic.BaseModel):
    """Tile sizes and the like: hashable, checked, JSON. A backend without options uses this class as it is."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    @property
    def label(self) -> str:
        """Short and unique within the backend: ``block_m=64,block_n=128``; ``default`` without fields."""
        return ",".join(f"{name}={value}" for name, value in self.model_dump().items()) or "default"


@dataclass(frozen=True, eq=False)
class Requirements:
    """What a backend takes, as data: tests derive their shapes and skips from it, the README its support matrix.

    Attributes:
        dtypes: Weight dtypes, each with the least CUDA compute capability that it needs.
        act_dtypes: Dtypes of hidden_states.
        activations: Those of `moe_dispatch.activations.KINDS`; ``"swiglu"`` is SwiGLU with parameters.
        cpu: Whether it runs on CPU tensors.
        bias: Whether the projections may add a bias.
        interleaved: Whether gate and up rows may alternate.
        transposed: Whether the experts may be stored by columns; FP8 weights never are, see `ExpertWeights`.
        grad: Whether torch can differentiate its operations one by one, see `MoEProblem.needs_grad`. A call that is
            recorded for a backward does not need it.
        capturable: Whether it may run while a CUDA graph is captured.
        libraries: Keys of `Machine.libraries` that must be installed.
        multiples: Shape letters and the number that each must be a multiple of, per dtype.
        max_capability: The least capability per dtype that is too new; absent where every newer device works.
    """

    dtypes: Mapping[DType, Capability]
    act_dtypes: frozenset[DType] = frozenset({"bf16", "fp16"})
    activations: frozenset[str] = KINDS
    cpu: bool = False
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    grad: bool = False
    capturable: bool = True
    libraries: tuple[str, ...] = ()
    multiples: Mapping[DType, Mapping[str, int]] | None = None
    max_capability: Mapping[DType, Capability] | None = None

    def reasons_against(self, problem: MoEProblem) -> list[str]:
        """Every declared requirement that the problem misses, each with the limit and the value."""
        kind = self, problem.mode, problem.needs_grad
        if kind in problem.layer.met:
            return []
        by_columns = self.transposed and not problem.fp8
        checks = (
            self._device_reason(problem),
            self._dtype_reason(problem),
            self._activation_reason(problem),
            "adds no bias" if problem.bias and not self.bias else "",
            "needs gate rows first, got interleaved rows" if problem.interleaved and not self.interleaved else "",
            "reads weights stored [out, in], got [in, out]" if problem.transposed and not by_columns else "",
            "has no gradient of its own; only 'reference' has one" if problem.needs_grad and not self.grad else "",
            "cannot be captured in a CUDA graph" if problem.mode == "graph" and not self.capturable else "",
        )
        multiples = (self.multiples or {}).get(problem.dtype, {})
        misaligned = [
            f"needs {letter} % {step} == 0 for {problem.dtype}, got {letter}={getattr(problem, letter)}"
            for letter, step in multiples.items()
            if getattr(problem, letter) % step
        ]
        reasons = [reason for reason in checks if reason] + misaligned
        if not reasons and "M" not in multiples:
            problem.layer.met.add(kind)
        return reasons

    def _device_reason(self, problem: MoEProblem) -> str:
        if problem.device == "cpu":
            return "" if self.cpu else "needs a CUDA device, got cpu"
        least = self.dtypes.get(problem.dtype)
        capability = problem.capability or (0, 0)
        if least and capability < least:
            return f"needs compute capability {_dotted(least)} or newer for {problem.dtype}, got {_dotted(capability)}"
        most = (self.max_capability or {}).get(problem.dtype)
        if most and capability >= most:
            return f"needs compute capability below {_dotted(most)} for {problem.dtype}, got {_dotted(capability)}"
        return ""

    def _dtype_reason(self, problem: MoEProblem) -> str:
        if problem.dtype not in self.dtypes:
            return f"takes weights in {', '.join(sorted(self.dtypes))}, got {problem.dtype}"
        if problem.act_dtype not in self.act_dtypes:
            return f"takes hidden_states in {', '.join(sorted(self.act_dtypes))}, got {problem.act_dtype}"
        return ""

    def _activation_reason(self, problem: MoEProblem) -> str:
        if kind(problem.activation) in self.activations:
            return ""
        return f"computes {', '.join(sorted(self.activations))}, got activation {problem.activation}"


class Backend(ABC):
    """One way to compute an MoE layer. Instances are shared by threads and hold no per-call state.

    Class attributes to declare: `name`, `requirements`, `config_type`, `tolerance`, and for foreign libraries
    `install_hint`.
    """

    name: ClassVar[str]
    requirements: ClassVar[Requirements]
    config_type: ClassVar[type[BackendConfig]] = BackendConfig
    # ‖out − ref‖ / ‖ref‖ against the fp32 reference, by weight dtype (by act_dtype where that is coarser).
    tolerance: ClassVar[Mapping[DType, float]] = {
        "bf16": 1e-2,
        "fp16": 2e-3,
        "fp32": 1e-3,
        "fp8": 2e-2,
        "fp8_channel": 2e-2,
        "mxfp4": 1e-2,
    }
    install_hint: ClassVar[str] = ""
    # Whether `run_into` also takes `PeerRows` for `out`, with the same bits as result.
    stores_to_peers: ClassVar[bool] = False
    # Whether `run_into` also takes `TravellingRows` for hidden_states, because it has work that needs no other rank's.
    starts_before_arrival: ClassVar[bool] = False
    # Foreign code is probed before it is trusted: a tiny layer is run and compared with the reference.
    needs_probe: ClassVar[bool] = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def unavailable_reasons(self) -> tuple[str, ...]:
        """Why this backend cannot run anything on this machine; empty if its libraries are there. Imports nothing."""
        return tuple(
            f"{library} is not installed" + (f": {self.install_hint}" if self.install_hint else "")
            for library in self.requirements.libraries
            if not self.machine.libraries.get(library)
        )

    def unsupported_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """All reasons why this backend cannot run `problem`; empty if it can. Pure: no import, no device access."""
        further = self.further_reasons(problem)
        if isinstance(further, str):  # each of its letters would pass for a reason
            raise TypeError(f"further_reasons must return a tuple of texts, got the text {further[:60]!r}")
        return (*self.requirements.reasons_against(problem), *further)

    def further_reasons(self, problem: MoEProblem) -> tuple[str, ...]:
        """Reasons beyond the declared requirements; for subclasses."""
        return ()

    def configs(self, problem: MoEProblem) -> tuple[BackendConfig, ...]:
        """The configurations worth measuring for this problem, the default first; never empty."""
        return _only_defaults(self.config_type)

    def default_config(self, problem: MoEProblem) -> BackendConfig:
        """The configuration that runs where no measurement says otherwise."""
        return self.configs(problem)[0]

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        """Device memory taken beside inputs and output, the most at a time of a run or its fast path, in bytes.

        It does not fall as M grows. A policy's choice that takes too much is left out (`workspace.excess`), and when
        memory runs out, only what takes less is tried.
        """
        return problem.rows_bytes

    def deterministic(self, config: BackendConfig) -> bool:
        """Whether the same inputs give the same bits every time."""
        return True

    def quantizes_activations(self, problem: MoEProblem) -> bool:
        """Whether FP8 weights meet quantised activations here; the reference that the result is judged by does as much.

        Of no consequence for other weights.
        """
        return True

    def takes_quantized_rows(self, problem: MoEProblem) -> bool:
        """Whether `run_into` also takes `QuantizedRows` for hidden_states, with the same bits as result. Pure.

        It is asked about problems of block FP8 against which this backend gave no reason.
        """
        return False

    def reads_whole_layer(self, problem: MoEProblem) -> bool:
        """Whether a run reads the weights of experts that no id names, too, as where it dequantises them all. Pure.

        A calibration does not compile such a run ahead, on weights without memory behind them.
        """
        return False

    def measured_versions(self) -> dict[str, str]:
        """The versions that a measurement of this backend depends on. A change of any of them retires it."""
        return {library: self.machine.libraries.get(library, "") for library in self.requirements.libraries}

    @abstractmethod
    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """Compute the layer.

        What arrives was checked: everything is contiguous and on one device, M ≥ 1, ``topk_weights`` is fp32, and
        this backend gave no reason against the problem. An id outside 0…E-1 adds nothing, whatever its weight, NaN
        included. Nothing here may synchronise with the device or depend on routing values on the host, unless the
        backend is not capturable. The thread's settings of torch, such as whether gradients are recorded and the
        current stream, stay as they are.

        Args:
            hidden_states: ``[M, K]``.
            experts: Checked weights.
            topk_weights: fp32 ``[M, topk]``.
            topk_ids: int32 or int64 ``[M, topk]``.
            config: One of `configs`.

        Returns:
            ``[M, K]`` in hidden_states' dtype, contiguous, fresh memory.
        """

    def run_into(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Tensor,
    ) -> Tensor:
        """Compute the layer into memory of the caller: here by a copy. See `WritingBackend`.

        The arguments are those of `run`, and `out`, which is returned: ``[M, K]`` in hidden_states' dtype and on its
        device, contiguous, uninitialised, sharing no memory with the inputs.
        """
        return out.copy_(self.run(hidden_states, experts, topk_weights, topk_ids, config))

    def fast_path(self, inputs: Inputs, config: BackendConfig) -> "Run | None":
        """What to call from now on in place of `run`, for calls of this very kind; None if there is nothing faster.

        Called after the second run of a kind of call (kind of layer, token count, dtypes, configuration) with its
        inputs. It may run them again and wait for the device.
        """
        return None

    def fast_path_into(self, inputs: Inputs, config: BackendConfig) -> "RunInto | None":
        """The same in place of `run_into`: here what `fast_path` gives, followed by a copy."""
        run = self.fast_path(inputs, config)
        if run is None:
            return None
        return lambda *arguments: arguments[-1].copy_(run(*arguments[:-1]))


class WritingBackend(Backend):
    """A backend whose last kernel writes into memory of the caller: subclasses write `run_into` and inherit `run`."""

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        """See `Backend.run`."""
        out = torch.empty_like(hidden_states)
        return self.run_into(hidden_states, experts, topk_weights, topk_ids, config, out)

    @abstractmethod
    def run_into(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
        out: Tensor,
    ) -> Tensor:
        """See `Backend.run_into`."""


Run = Callable[[Tensor, ExpertWeights, Tensor, Tensor, BackendConfig], Tensor]
RunInto = Callable[[Tensor, ExpertWeights, Tensor, Tensor, BackendConfig, Tensor], Tensor]


@functools.cache
def _only_defaults(config_type: type[BackendConfig]) -> tuple[BackendConfig, ...]:
    return (config_type(),)


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
