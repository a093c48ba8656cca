"""The weights of one MoE layer, checked once when they are wrapped and again when they lie at another address."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor, nn

from moe_dispatch.activations import UNGATED, Activation, canonical
from moe_dispatch.checkpoints import stack_experts
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.layer_spec import LayerSpec, shared_spec
from moe_dispatch.mxfp4 import quantize_mxfp4
from moe_dispatch.numerics import FP8, quantize_blocks, quantize_channels
from moe_dispatch.problem import FP8_DTYPES, MX_BLOCK, QUANTIZED_DTYPES, DType, Mode, MoEProblem
from moe_dispatch.tensor_memory import address
from moe_dispatch.weight_checks import (
    DTYPE_NAMES,
    check_alike,
    check_bias,
    check_weight,
    checked_scales,
    columns_of,
    scales_of_rows,
)

# The names of a layer's tensors, and a function that gives all of them, or None for one that a layer lacks.
TENSORS: Final = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
tensors_of: Final[Callable[["ExpertWeights"], tuple[Tensor | None, ...]]] = operator.attrgetter(*TENSORS)
_ADDRESS: Final = Tensor.data_ptr
_QUANTIZE: Final = {"block": quantize_blocks, "channel": quantize_channels, "mxfp4": quantize_mxfp4}


class ExpertWeights:
    """The expert weights of one MoE layer, in the layout that every backend shares.

    The tensors are referenced, never copied. Each is checked here once: shape, dtype, device, contiguity. Their values
    may change, in place or by ``tensor.data = …`` with memory of the same dtype, shape and device. After any other
    change a call refuses the layer, and it needs a new ExpertWeights.

    Args:
        gate_up: ``[E, 2N, K]``, gate rows first (alternating if ``interleaved``); ``[E, N, K]`` for an ungated
            activation. BF16, FP16, FP32, or e4m3 with scales. MXFP4 is uint8 ``[E, 2N, K/2]`` with scales: two E2M1
            codes in a byte, that of the even column in its low half (`moe_dispatch.mxfp4`).
        down: ``[E, K, N]``, same dtype; uint8 ``[E, K, N/2]`` in MXFP4.
        gate_up_scale: With e4m3 and MXFP4 weights only. MXFP4 has exponents in uint8 or float8_e8m0fnu, ``[E, 2N,
            K/32]``. FP8 has fp32 multipliers: block FP8 has ``[E, ⌈2N/128⌉, ⌈K/128⌉]``, per-channel
            FP8 one for each row, ``[E, 2N]`` or ``[E, 2N, 1]``. Per-tensor scales, ``[E]``, ``[E, 1]`` or ``[E, 2]``
            (of gate and of up), become those of rows by a copy, and BF16 and UE8M0 (float8_e8m0fnu) ones fp32;
            neither copy follows later changes of the values.
        down_scale: Likewise ``[E, K, N/32]`` in MXFP4; in FP8 ``[E, ⌈K/128⌉, ⌈N/128⌉]``; or ``[E, K]``, ``[E, K,
            1]``, ``[E]``, ``[E, 1]``.
        gate_up_bias: ``[E, 2N]`` (``[E, N]`` ungated), in the same order as gate_up's rows.
        down_bias: ``[E, K]``. Both biases or neither.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up rows alternate.
        transposed: Whether gate_up and down are views, by ``.transpose(1, 2)``, of contiguous ``[E, K, 2N]`` and
            ``[E, N, K]``. They are read in place: by our own kernels but triton_vector, torch_grouped and reference.
            Not for FP8 and MXFP4.
        routed_experts: Experts among which the router chooses, where these are a part of them and the other ids of a
            call are of experts elsewhere; None where they are all. It changes the expected load and so the choice of
            the backend, never the result.

    Raises:
        InvalidInputError: Anything above does not hold; the message names the tensor, what it is and what it must be.
    """

    __slots__ = (
        "E", "K", "N", "__weakref__", "_checked", "_further", "_further_addresses", "activation", "device", "down",
        "down_address", "down_bias", "down_scale", "dtype", "gate_up", "gate_up_address", "gate_up_bias",
        "gate_up_scale", "interleaved", "routed_experts", "spec", "transposed",
    )  # fmt: skip

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        *,
        gate_up_scale: Tensor | None = None,
        down_scale: Tensor | None = None,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = "silu",
        interleaved: bool = False,
        transposed: bool = False,
        routed_experts: int | None = None,
    ) -> None:
        activation = canonical(activation)
        gated = activation not in UNGATED
        for name, value in (("interleaved", interleaved), ("transposed", transposed)):
            if not isinstance(value, bool):
                raise InvalidInputError(f"{name} must be True or False, got {type(value).__name__}")
        if interleaved and not gated:
            raise InvalidInputError(f"interleaved rows need a gate, and activation {activation!r} has none")
        check_weight("gate_up", gate_up, transposed=transposed)
        check_weight("down", down, transposed=transposed)
        # Under torch.jit.trace sizes are tensors.
        E, rows, K, N = map(int, (*gate_up.shape[:2], columns_of("gate_up", gate_up), columns_of("down", down)))
        if tuple(down.shape[:2]) != (E, K) or rows != (2 * N if gated else N):
            raise InvalidInputError(
                f"gate_up {list(gate_up.shape)} and down {list(down.shape)} do not belong together: activation "
                f"{activation!r} takes gate_up [E, {'2N' if gated else 'N'}, K] and down [E, K, N], in MXFP4 with K/2 "
                "and N/2 bytes in a row; a transposed checkpoint needs .transpose(1, 2).contiguous() once at load, or "
                ".transpose(1, 2) with transposed=True, which reads it in place (not FP8 and MXFP4)"
            )
        check_alike("down", down, gate_up)
        self.dtype: DType = DTYPE_NAMES[gate_up.dtype]
        if self.quantized:
            if transposed:
                raise InvalidInputError("quantised weights cannot be read transposed; call .contiguous() once at load")
            if gate_up.requires_grad or down.requires_grad:
                raise InvalidInputError("quantised weights cannot require a gradient; train in BF16 and quantize after")
            self.dtype, gate_up_scale, down_scale = checked_scales(
                gate_up, down, gate_up_scale, down_scale, 2 if gated else 1
            )
            if self.dtype == "fp8_channel":
                gate_up_scale = scales_of_rows(gate_up_scale, rows, interleaved=interleaved)
                down_scale = scales_of_rows(down_scale, K)
        elif gate_up_scale is not None or down_scale is not None:
            raise InvalidInputError(
                f"scales belong to float8_e4m3fn and MXFP4 weights, and these are {gate_up.dtype}; drop them"
            )
        if (gate_up_bias is None) != (down_bias is None):
            present = "gate_up_bias" if down_bias is None else "down_bias"
            raise InvalidInputError(f"only {present} was given; give both biases (zeros serve) or neither")
        check_bias("gate_up_bias", gate_up_bias, (E, rows), gate_up.device)
        check_bias("down_bias", down_bias, (E, K), gate_up.device)

        if routed_experts is not None and (type(routed_experts) is not int or routed_experts < E):
            raise InvalidInputError(
                f"routed_experts must be None or an integer of at least the {E} experts here, got {routed_experts!r}"
            )

        self.gate_up, self.down = gate_up, down
        self.gate_up_scale, self.down_scale = gate_up_scale, down_scale
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        self.activation: Activation = activation
        self.interleaved, self.transposed = interleaved, transposed
        self.routed_experts = routed_experts
        self.E, self.K, self.N = E, K, N
        self.device = gate_up.device
        facts = (
            E, K, N, self.dtype, activation, gate_up_bias is not None, interleaved, transposed, str(self.device),
            routed_experts,
        )  # fmt: skip
        tracing = torch.compiler.is_compiling()
        self.spec: Final = LayerSpec(facts) if tracing else shared_spec(facts)
        # By the addresses a call sees that tensors lie elsewhere than when they were checked.
        self.gate_up_address, self.down_address = (None, None) if tracing else (address(gate_up), address(down))
        further = [] if tracing else [name for name, _ in self.tensors()][2:]  # scales or biases, or both
        self._further = operator.attrgetter(*further) if further else None
        self._further_addresses = tuple(map(address, self._further(self))) if self._further else ()
        self._checked = None if tracing else self._facts()

    @property
    def moved(self) -> bool:
        """Whether a tensor lies elsewhere than when it was checked."""
        elsewhere = self.gate_up.data_ptr() != self.gate_up_address or self.down.data_ptr() != self.down_address
        further = self._further
        return elsewhere or (further is not None and tuple(map(_ADDRESS, further(self))) != self._further_addresses)

    def check_unchanged(self) -> None:
        """Refuse the layer if its tensors are no longer what they were when they were wrapped.

        Raises:
            InvalidInputError: A tensor was freed, moved to another device, or changed in dtype or shape.
        """
        with contextlib.suppress(AttributeError, RuntimeError):  # no tensor, or one without strides
            if self._checked == self._facts():
                return
        try:
            now = self.among(self.routed_experts)
            if now.spec is not self.spec:
                raise InvalidInputError(f"they are {now} now")
        except InvalidInputError as error:
            raise InvalidInputError(
                f"the weights changed since they were wrapped as {self}: {error}. Wrap them again after a change of "
                "device, dtype or shape"
            ) from error
        self.gate_up_address, self.down_address = now.gate_up_address, now.down_address
        self._further_addresses = now._further_addresses
        self._checked = self._facts()

    def _facts(self) -> list[tuple[object, ...]]:
        """All that the checks ask of the tensors: the same facts need no second check."""
        return [
            (name, type(each), each.dtype, each.shape, each.stride(), each.device, each.requires_grad, address(each))
            for name, each in self.tensors()
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The layer's tensors by name, those that are given."""
        for name, tensor in zip(TENSORS, tensors_of(self), strict=True):
            if tensor is not None:
                yield name, tensor

    @classmethod
    def quantize(
        cls,
        gate_up: Tensor,
        down: Tensor,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = "silu",
        interleaved: bool = False,
        form: Literal["block", "channel", "mxfp4"] = "block",
    ) -> Self:
        """Quantise BF16, FP16 or FP32 weights to MXFP4 or FP8, by default to DeepSeek's block FP8.

        In FP8 each 128×128 block (blocks at the edge cover what is left), or each row, gets the fp32 scale amax/448.
        One of zeros gets a tiny scale and stays exactly zero; a NaN or infinite element becomes NaN and spoils no
        other. MXFP4 is made as `moe_dispatch.mxfp4.quantize_mxfp4` says, of K and N that are multiples of 32.

        Args:
            gate_up: ``[E, 2N, K]`` or ungated ``[E, N, K]``.
            down: ``[E, K, N]``.
            gate_up_bias: As for `ExpertWeights`.
            down_bias: As for `ExpertWeights`.
            activation: As for `ExpertWeights`.
            interleaved: As for `ExpertWeights`.
            form: ``"block"``, ``"channel"`` for a scale per row, llm-compressor's, or ``"mxfp4"``.
        """
        if form not in _QUANTIZE:
            raise InvalidInputError(f"form must be one of {', '.join(map(repr, _QUANTIZE))}, got {form!r}")
        for name, tensor in (("gate_up", gate_up), ("down", down)):
            check_weight(name, tensor)
            if not tensor.is_floating_point() or tensor.dtype == FP8:
                raise InvalidInputError(f"{name} is {tensor.dtype} already; give its scales to ExpertWeights instead")
            if form == "mxfp4" and tensor.shape[2] % MX_BLOCK:
                raise InvalidInputError(
                    f"MXFP4 has one scale for every {MX_BLOCK} columns, and {name} has {tensor.shape[2]}; keep BF16"
                )
        gate_up_codes, gate_up_scale = _QUANTIZE[form](gate_up.detach())
        down_codes, down_scale = _QUANTIZE[form](down.detach())
        return cls(
            gate_up_codes,
            down_codes,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=activation,
            interleaved=interleaved,
        )

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[Mapping[str, Tensor] | nn.Module],
        *,
        tp: tuple[int, int] = (0, 1),
        activation: Activation = "silu",
        device: torch.device | str | None = None,
    ) -> Self:
        """Stack experts that are separate; each tensor is copied once.

        Args:
            experts: In their order, each as a module or as tensors by name: ``gate_proj.weight`` ``[N, K]``,
                ``up_proj.weight`` and ``down_proj.weight`` ``[K, N]`` (or w1, w3, w2), ``….weight_scale_inv``
                or ``….weight_scale``, ``….bias``.
            tp: Rank and size of tensor parallelism: the process's share of each expert's N columns.
            activation: As for `ExpertWeights`.
            device: Where to put them; where they are, if None.

        Raises:
            InvalidInputError: Names are missing or unknown, or shapes do not fit; the message lists what is there.
        """
        if not isinstance(experts, Iterable):
            what = f"got {type(experts).__name__}; fused tensors go into ExpertWeights(gate_up, down)"
            raise InvalidInputError(f"experts must be a sequence, one module or tensors by name for each, {what}")
        tensors = [expert.state_dict() if isinstance(expert, nn.Module) else expert for expert in experts]
        for each in tensors:
            if not isinstance(each, Mapping):
                raise InvalidInputError(f"each expert must be a module or tensors by name, got {type(each).__name__}")
        return cls(**stack_experts(tensors, tp, device), activation=activation)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        layer: int,
        *,
        tp: tuple[int, int] = (0, 1),
        activation: Activation | None = None,
        interleaved: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read the experts of one layer from a checkpoint, one by one or fused; no more than is needed is read.

        Args:
            path: Folder of a model, index, or safetensors file.
            layer: The layer's number in the names of the tensors.
            tp: As for `from_experts`.
            activation: As for `ExpertWeights`; None for that of the config.json beside the weights.
            interleaved: As for `ExpertWeights`, of experts that are fused; likewise.
            device: Where to put the weights; the host's memory if None.

        Raises:
            InvalidInputError: The checkpoint does not have such experts; the message lists what is there.
            ImportError: safetensors is not installed.
        """
        from moe_dispatch.checkpoint_files import read_experts

        return cls(**read_experts(path, layer, tp=tp, activation=activation, interleaved=interleaved, device=device))

    def to(self, device: torch.device | str) -> Self:
        """The same layer on a device: itself where it is there already.

        Raises:
            InvalidInputError: A dtype was given, which would also convert codes and scales.
        """
        if isinstance(device, torch.dtype):
            raise InvalidInputError(
                f"the weights can move to a device, got {device}; wrap converted ones, or see ExpertWeights.quantize"
            )
        tensors = {name: tensor.to(device) for name, tensor in self.tensors()}
        return self if tensors["gate_up"] is self.gate_up else self._with(tensors, self.routed_experts)

    def among(self, routed_experts: int | None) -> Self:
        """The same tensors as a part of so many experts; see `routed_experts` of `ExpertWeights`."""
        return self._with(dict(self.tensors()), routed_experts)

    def _with(self, tensors: Mapping[str, Any], routed_experts: int | None) -> Self:
        return type(self)(
            **tensors, activation=self.activation, interleaved=self.interleaved, transposed=self.transposed,
            routed_experts=routed_experts,
        )  # fmt: skip

    def problem(
        self,
        M: int,
        topk: int,
        act_dtype: torch.dtype,
        capability: tuple[int, int] | None,
        mode: Mode = "eager",
        *,
        needs_grad: bool = False,
    ) -> MoEProblem:
        """The problem that a call with M tokens poses to this layer on a device of this capability."""
        kind = topk, act_dtype, capability, mode, needs_grad
        if (one_token := self.spec.problems.get(kind)) is None:
            one_token = self.spec.problems[kind] = MoEProblem(
                M=1, K=self.K, N=self.N, E=self.E, topk=topk, dtype=self.dtype, act_dtype=DTYPE_NAMES[act_dtype],
                activation=self.activation, bias=self.gate_up_bias is not None, interleaved=self.interleaved,
                transposed=self.transposed, device=self.device.type, capability=capability, mode=mode,
                needs_grad=needs_grad, routed_experts=self.routed_experts,
            )  # fmt: skip
        return one_token.with_tokens(M)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted for any of the weights, as of now."""
        return (
            self.gate_up.requires_grad
            or self.down.requires_grad
            or (self.gate_up_bias is not None and self.gate_up_bias.requires_grad)
            or (self.down_bias is not None and self.down_bias.requires_grad)
        )

    @property
    def fp8(self) -> bool:
        """Whether the weights are FP8 in any form."""
        return self.dtype in FP8_DTYPES

    @property
    def usual_act_dtype(self) -> torch.dtype:
        """The dtype of hidden_states where a caller names none: the weights', BF16 where those are quantised."""
        return torch.bfloat16 if self.quantized else self.gate_up.dtype

    @property
    def quantized(self) -> bool:
        """Whether the weights are codes with multipliers: FP8 or MXFP4."""
        return self.dtype in QUANTIZED_DTYPES

    @property
    def gated(self) -> bool:
        """Whether gate_up holds gate and up rows."""
        return self.activation not in UNGATED

    def __repr__(self) -> str:
        extras = [f"activation={self.activation!r}"]
        if self.gate_up_bias is not None:
            extras.append("bias=True")
        if self.interleaved:
            extras.append("interleaved=True")
        if self.transposed:
            extras.append("transposed=True")
        if self.routed_experts is not None:
            extras.append(f"routed_experts={self.routed_experts}")
        shape = f"E={self.E}, K={self.K}, N={self.N}, dtype={self.dtype!r}, device='{self.device}'"
        return f"ExpertWeights({shape}, {', '.join(extras)})"
