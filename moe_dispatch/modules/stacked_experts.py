"""The experts of an MoE layer as a module: parameters that `moe_forward` runs."""

import math
from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from moe_dispatch.activations import UNGATED, Activation, canonical
from moe_dispatch.api import moe_forward
from moe_dispatch.dispatch.checks import check_layer
from moe_dispatch.dispatch.torch_operator import release
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.modules.kept_dtype import keeping_dtype
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import QUANT_BLOCK
from moe_dispatch.tensor_memory import offloaded

# Names of the parameters, which are those of transformers, by the names of `ExpertWeights`.
NAMES: Final = {
    "gate_up": "gate_up_proj", "down": "down_proj", "gate_up_scale": "gate_up_proj_scale_inv",
    "down_scale": "down_proj_scale_inv", "gate_up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias",
}  # fmt: skip


class StackedExperts(nn.Module):
    """Experts in the layout of `ExpertWeights`, as parameters with the names that transformers gives them.

    FP8 weights (dtype e4m3) and their scales need no gradient and keep their dtype whatever `Module.to` asks for. Their
    scales are of 128×128 blocks at first. `load_state_dict` takes the form that it finds: a scale per block, row or
    tensor, in FP32, BF16 or UE8M0.

    Args:
        K: Hidden size.
        N: Intermediate size of one expert.
        E: Experts.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up rows alternate.
        bias: Whether both projections have a bias.
        dtype: Dtype of the weights.
        bias_dtype: Dtype of the biases; that of the weights if None.
        device: Device of all tensors.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        K: int,
        N: int,
        E: int,
        *,
        activation: Activation = "silu",
        interleaved: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = canonical(activation)
        self.interleaved, self.transposed = interleaved, False
        self._held: ExpertWeights | None = None
        rows = N if self.activation in UNGATED else 2 * N
        shapes: dict[str, tuple[int, ...]] = {"gate_up": (E, rows, K), "down": (E, K, N)}
        fp8 = dtype == FP8
        for name, (_, R, C) in list(shapes.items()) if fp8 else ():
            shapes[f"{name}_scale"] = (E, math.ceil(R / QUANT_BLOCK), math.ceil(C / QUANT_BLOCK))
        if bias:
            shapes |= {"gate_up_bias": (E, rows), "down_bias": (E, K)}
        for name, attribute in NAMES.items():
            if name not in shapes:
                self.register_parameter(attribute, None)
                continue
            of_bias, of_scale = name.endswith("bias"), name.endswith("scale")
            own = torch.float32 if of_scale else (bias_dtype or dtype) if of_bias else dtype
            tensor = torch.empty(shapes[name], dtype=own, device=device)
            self.register_parameter(attribute, nn.Parameter(tensor, requires_grad=of_bias or not fp8))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_adopt_scales)  # type: ignore[no-untyped-call] # torch's

    def reset_parameters(self) -> None:
        """Initialise each expert as two `nn.Linear` would be, and biases to zero; FP8 to zero."""
        for name, attribute in NAMES.items():
            parameter = self._parameters[attribute]
            if parameter is None:
                continue
            if parameter.dtype == FP8 or name.endswith("bias"):
                with torch.no_grad():
                    parameter.zero_()
            elif name.endswith("scale"):
                nn.init.ones_(parameter)
            else:
                nn.init.uniform_(parameter, -1 / math.sqrt(parameter.shape[2]), 1 / math.sqrt(parameter.shape[2]))

    def weights(self) -> ExpertWeights:
        """The parameters as `moe_forward` takes them; the same object as long as they are the same."""
        own = {name: getattr(self, attribute) for name, attribute in NAMES.items()}
        held = self._held
        if held is not None and all(getattr(held, name) is tensor for name, tensor in own.items()):
            return held
        weights = ExpertWeights(
            **own, activation=self.activation, interleaved=self.interleaved, transposed=self.transposed
        )
        if not torch.compiler.is_compiling():
            self._held = weights if self._keeps(own) else None
        return weights

    def _keeps(self, own: dict[str, Tensor | None]) -> bool:
        """Whether the tensors are the module's after a call as well.

        Others must not be held, for they may have memory or a graph of their own: those that an offloading hook brings
        for one call, those that are computed for it (a parametrization, pruning), and those of `functional_call`.
        """
        lasting = (
            tensor is None or (isinstance(tensor, nn.Parameter) and self._parameters.get(NAMES[name]) is tensor)
            for name, tensor in own.items()
        )
        return all(lasting) and not offloaded(self)

    def assign(self, weights: ExpertWeights) -> None:
        """Take tensors in place of the parameters, without a copy.

        Args:
            weights: Experts of any shape and dtype; their activation, order of rows and of storage become the module's.

        Raises:
            InvalidInputError: They are no ExpertWeights.
        """
        check_layer(weights)
        self.release()
        self.activation, self.interleaved = weights.activation, weights.interleaved
        self.transposed = weights.transposed
        tensors = dict(weights.tensors())
        for name, attribute in NAMES.items():
            tensor = tensors.get(name)
            trainable = name.endswith("bias") or (not name.endswith("scale") and not weights.quantized)
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=trainable)
            self.register_parameter(attribute, parameter)

    def forward(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """See `moe_forward`."""
        return moe_forward(hidden_states, self.weights(), topk_weights, topk_ids, out=out)

    def extra_repr(self) -> str:
        """Shapes, dtype and activation."""
        E, K, N = self.down_proj.shape
        N = 2 * N if self.down_proj.dtype == torch.uint8 else N  # two codes of MXFP4 in a byte
        return f"E={E}, K={K}, N={N}, dtype={self.down_proj.dtype}, activation={self.activation!r}"

    def release(self) -> None:
        """Let go of the parameters, which torch may replace or swap by others."""
        self._held = None
        if (gate_up := self._parameters.get(NAMES["gate_up"])) is not None:
            release(gate_up)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()
        kept = [self._parameters[attribute] for name, attribute in NAMES.items() if name.endswith("scale")]
        kept += [each for each in self._parameters.values() if each is not None and each.dtype == FP8]
        super()._apply(keeping_dtype(fn, tuple(kept)), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the object that `weights` keeps: a copy of the module has tensors of its own."""
        return {**self.__dict__, "_held": None}


def _adopt_scales(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Give an FP8 module scales of the state dict's form, and the state dict scales as the module has them.

    Raises:
        InvalidInputError: The state dict's weights are FP8 and the module's are not, or its scales have no known form.
    """
    assert isinstance(module, StackedExperts)  # noqa: S101 - it registers this for itself
    module.release()
    loaded = {name: state_dict.get(prefix + attribute) for name, attribute in NAMES.items()}
    gate_up, down = loaded["gate_up"], loaded["down"]
    if gate_up is not None and gate_up.dtype == torch.uint8 != module.gate_up_proj.dtype:
        raise InvalidInputError(
            f"the state dict's {prefix}{NAMES['gate_up']} is MXFP4, and a layer takes that by layer.experts.assign("
            "ExpertWeights.from_safetensors(…))"
        )
    if gate_up is None or down is None or gate_up.dtype != FP8 or gate_up.is_meta:
        return
    if module.down_proj.dtype != FP8:
        raise InvalidInputError(
            f"the state dict's {prefix}{NAMES['gate_up']} is FP8 and the layer's is {module.down_proj.dtype}, which "
            "would read the codes without their scales; make the layer with dtype=torch.float8_e4m3fn"
        )
    gate_up_scale, down_scale = loaded["gate_up_scale"], loaded["down_scale"]
    if gate_up_scale is None or down_scale is None:
        return  # torch says by name what is missing
    weights = ExpertWeights(
        gate_up, down, gate_up_scale=gate_up_scale.contiguous(), down_scale=down_scale.contiguous(),
        activation=module.activation, interleaved=module.interleaved,
    )  # fmt: skip
    for name in ("gate_up_scale", "down_scale"):
        scale = state_dict[prefix + NAMES[name]] = getattr(weights, name)
        if getattr(module, NAMES[name]).shape != scale.shape:
            fresh = torch.empty_like(scale, device=module.down_proj.device)
            setattr(module, NAMES[name], nn.Parameter(fresh, requires_grad=False))
