"""vLLM's experts contract, answered by `moe_forward`. Imports vLLM: loaded by `layers` only.

The contract is `FusedMoEExpertsModular`: abstract methods and the arguments of `apply`, which are the same in vLLM
0.20.2 to 0.33; `check_contract` refuses a vLLM with another one. The surrounding method and kernel classes changed in
every release and are not touched.
"""

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.quantization.utils import quant_utils

from moe_dispatch.activations import UNGATED
from moe_dispatch.api import moe_forward
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.engine_warm_up import prepare
from moe_dispatch.integrations.engine_weights import addresses, wrap
from moe_dispatch.integrations.vllm.gates import VLLM_ACTIVATIONS, gate_of
from moe_dispatch.integrations.vllm.takeover import TAKEOVER

if TYPE_CHECKING:
    from moe_dispatch.backend import Inputs

# Weights that our experts are for; here, since a name that is gone must be missed before an engine builds its layers.
_FP8_WEIGHTS: Final = (
    quant_utils.kFp8Static128BlockSym, quant_utils.kFp8StaticChannelSym, quant_utils.kFp8StaticTensorSym,
)  # fmt: skip


class LayerInPlaceOfSum(mk.TopKWeightAndReduce):  # type: ignore[misc]  # vLLM is untyped here
    """Computes the layer where vLLM has the rows of a token's experts weighted and summed.

    vLLM calls `FusedMoEExpertsModular.apply` with a workspace, and then this with the workspace and the layer's output.
    Experts that have summed already are copied from the one to the other, up to vLLM 0.26 always. The last kernel of a
    backend writes the output itself, so that copy is saved: 2 to 3 µs of a layer at decode.

    Attributes:
        call: hidden_states, experts, topk_weights and topk_ids of the call that `apply` is to compute; None where vLLM
            had no tokens, and so never called the experts, or where they have computed it.
        is_called: Whether vLLM has done so after each call of the experts.
    """

    def __init__(self) -> None:
        self.call: Inputs | None = None
        self.is_called = True

    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,  # unused: those of `call` are the same
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """Compute the layer into `output` `[M, K]`, or into fresh memory."""
        call, self.call = self.call, None
        if call is None:
            return fused_expert_output if output is None else output.copy_(fused_expert_output)
        if output is None or output.is_contiguous():
            return moe_forward(*call, out=output)
        return output.copy_(moe_forward(*call))


class MoeDispatchExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]  # vLLM is untyped here
    """The experts of one layer."""

    def __init__(self, moe_config: Any, quant_config: Any, **options: Any) -> None:
        super().__init__(moe_config, quant_config, **options)
        self._sum = LayerInPlaceOfSum()
        self._batches = TAKEOVER.batches  # of this layer's engine, whose model is being loaded
        self._experts: ExpertWeights | None = None
        self._addresses: tuple[int, ...] = ()
        activation, _ = gate_of(moe_config)
        rows = moe_config.intermediate_size_per_partition * (1 if activation in UNGATED else 2)
        self._scales = (
            _of_rows("w1", self.w1_scale, rows, moe_config),
            _of_rows("w2", self.w2_scale, moe_config.hidden_dim, moe_config),
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Backends quantise activations themselves, fused with what comes before."""
        return True

    @staticmethod
    def activation_format() -> Any:
        """Tokens by rows, `[M, K]`."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # on a device without kernels the reference runs

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in VLLM_ACTIVATIONS

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        if weight_key is None:
            return activation_key is None
        return weight_key in _FP8_WEIGHTS and activation_key is not None and not activation_key.scale.static

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_ep and moe_parallel_config.dp_size == 1

    def supports_expert_map(self) -> bool:
        """Abstract up to vLLM 0.22."""
        return False

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        """The sum over a token's experts, with which the whole layer is computed; see `LayerInPlaceOfSum`."""
        return self._sum

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces of vLLM's, and the output `[M, K]`."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: Tensor,  # of no use to the sum, which is given another one
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,  # unused: that of the layer's config counts
        global_num_experts: int,
        expert_map: Tensor | None,  # expert parallelism is refused
        a1q_scale: Tensor | None,  # inputs arrive unquantised
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Prepare for `LayerInPlaceOfSum.apply`, which follows in the same call of vLLM's kernel.

        A vLLM that does not let it follow would return memory that was never written. The first call of a layer, which
        profiles memory and whose output is not read, shows that, and from the second on the layer is computed here.
        """
        experts = self._weights(w1, w2)
        prepare(TAKEOVER, self._batches, experts, topk_ids.shape[1], hidden_states.dtype, into_out=True)
        if apply_router_weight_on_input:  # vLLM multiplied hidden_states before it called
            topk_weights = torch.ones_like(topk_weights)
        if self._sum.call is not None and self._sum.is_called:
            self._sum.is_called = False
            TAKEOVER.logger.warning("vLLM did not sum over experts; from now on a layer is copied to its output")
        if self._sum.is_called:
            self._sum.call = hidden_states, experts, topk_weights, topk_ids
        else:
            self._sum.call = None
            output.copy_(moe_forward(hidden_states, experts, topk_weights, topk_ids))

    def _weights(self, w1: Tensor, w2: Tensor) -> ExpertWeights:
        """The layer's weights, wrapped anew where a reload has moved any of them."""
        tensors = (w1, w2, *self._scales, self.w1_bias, self.w2_bias)
        now = addresses(tensors)
        if self._experts is None or now != self._addresses:
            activation, interleaved = gate_of(self.moe_config)
            self._experts = wrap(tensors, activation, interleaved=interleaved)
            self._addresses = now
        return self._experts


# What vLLM asks of experts, by the class that declares it.
_CONTRACT: Final = (
    (MoeDispatchExperts, mk.FusedMoEExpertsModular, (
        "apply", "workspace_shapes", "finalize_weight_and_reduce_impl", "expects_unquantized_inputs",
        "activation_format", "w1_scale", "w2_scale", "w1_bias", "w2_bias",
    )),
    (LayerInPlaceOfSum, mk.TopKWeightAndReduce, ("apply",)),
)  # fmt: skip


def check_contract() -> None:
    """Compare our classes with what this vLLM declares for them.

    So a change of vLLM is found where the engine can still run its own layers, and not by a call that ends its start.

    Raises:
        TypeError: vLLM wants a method that is not here, has given one other arguments, or no longer has one.
    """
    faults = []
    for ours, theirs, names in _CONTRACT:
        faults += [f"{theirs.__name__} wants {name}" for name in sorted(ours.__abstractmethods__)]
        faults += [f"{theirs.__name__} has no {name}" for name in names if not hasattr(theirs, name)]
        for name in filter(lambda name: callable(getattr(theirs, name, None)), names):
            given, taken = (tuple(inspect.signature(getattr(cls, name)).parameters) for cls in (theirs, ours))
            if given != taken:
                other = [f"no {word}" for word in taken if word not in given]
                other += [word for word in given if word not in taken]
                faults.append(f"{theirs.__name__}.{name} takes {', '.join(other) or 'arguments in another order'}")
    if faults:
        raise TypeError(f"its contract for experts is another one: {'; '.join(faults)}")


def _of_rows(name: str, scale: Tensor | None, rows: int, moe_config: Any) -> Tensor | None:
    """A weight's scales; those of tensors, ``[E]``, as ``[E, rows]``, which is the form that kernels read.

    vLLM makes a new experts object when it reloads weights, and graphs that were captured before go on reading what the
    old one had. So the rows lie with the layer's config, which stays, and a reload writes to the same memory.
    """
    if scale is None or scale.dim() != 1:
        return scale
    kept: dict[str, Tensor] = vars(moe_config).setdefault("_moe_dispatch_scales", {})
    expanded = scale.detach().unsqueeze(1).expand(-1, rows)
    if name in kept and kept[name].device == scale.device:
        return kept[name].copy_(expanded)
    kept[name] = expanded.contiguous()
    return kept[name]
