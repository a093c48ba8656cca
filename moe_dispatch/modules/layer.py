"""A whole MoE layer for a model of one's own: gate, routed experts, shared experts."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dispatch.activations import Activation, canonical
from moe_dispatch.api import warm_up
from moe_dispatch.dispatch.gradients import is_any_recorded
from moe_dispatch.dispatch.internals import is_tracing
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.modules.gate import Gate
from moe_dispatch.modules.side_stream import forked
from moe_dispatch.modules.stacked_experts import StackedExperts
from moe_dispatch.modules.state_names import translate
from moe_dispatch.numerics import FP8
from moe_dispatch.routers import Router

# Up to this many tokens shared experts run on a second stream: beyond, the routed experts fill the device by
# themselves. vLLM draws the same line (VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD).
SIDE_STREAM_TOKENS: Final = 256
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, FP8)


class MoELayer(nn.Module):
    """A Mixture-of-Experts layer: a router chooses experts for each token, `moe_forward` runs them.

    out = Σ_j w_j · expert_j(x) + s · shared(x), where the router gives the experts j and their weights w_j, and s is
    sigmoid(shared_expert_gate(x)) where there is such a gate (Qwen2-MoE), and else 1 (DeepSeek-V3).

    The state dict has transformers' names (``gate.weight``, ``experts.gate_up_proj``, …). `load_state_dict` also takes
    the variants in use: ``router`` for ``gate``, ``shared_expert`` for ``shared_experts``, experts one by one
    (``experts.0.gate_proj.weight``, ``w1``), shared experts as three linear layers, transposed weights (gpt-oss), and
    FP8 weights with scales per block, row or tensor, by any name that `ExpertWeights.from_safetensors` reads.

    ``layer.to(device)`` moves everything. ``layer.to(dtype)`` converts everything but FP8 weights with their
    scales, and the router's correction bias.

    Shared experts run on a second CUDA stream up to SIDE_STREAM_TOKENS tokens, where no gradient is recorded.

    Args:
        K: Hidden size.
        N: Intermediate size of one expert.
        E: Experts.
        router: How experts are chosen; a number stands for ``Router(topk)``, softmax with renormalisation.
        activation: See `MoEProblem`.
        interleaved: Whether gate and up rows of the experts alternate (gpt-oss).
        bias: Whether the experts' projections have biases (gpt-oss).
        shared_N: Intermediate size of all shared experts together; 0 for none.
        shared_gate: Whether the shared experts' output is scaled by a gate of its own (Qwen2-MoE).
        dtype: Dtype of the weights; ``torch.float8_e4m3fn`` makes the experts FP8 and the rest BF16.
        device: Device of the weights.

    Raises:
        InvalidInputError: The numbers or options do not fit together.
    """

    def __init__(
        self,
        K: int,
        N: int,
        E: int,
        router: Router | int,
        *,
        activation: Activation = "silu",
        interleaved: bool = False,
        bias: bool = False,
        shared_N: int = 0,
        shared_gate: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for letter, value, least in (("K", K, 1), ("N", N, 1), ("E", E, 1), ("shared_N", shared_N, 0)):
            if type(value) is not int or value < least:
                raise InvalidInputError(f"{letter} must be an integer of at least {least}, got {value!r}")
        activation = canonical(activation)
        if shared_gate and not shared_N:
            raise InvalidInputError("a gate of shared experts needs shared experts; give shared_N")
        self.K = K
        if dtype is not None and dtype not in _DTYPES:
            raise InvalidInputError(f"dtype must be None or one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        plain = torch.bfloat16 if dtype == FP8 else dtype
        router = Router(router) if isinstance(router, int) else router
        if not isinstance(router, Router):
            raise InvalidInputError(f"router must be a Router or the number of experts, got {type(router).__name__}")
        self.gate = Gate(K, E, router, dtype=plain, device=device)
        kind: dict[str, Any] = {"dtype": dtype, "bias_dtype": plain, "device": device}
        self.experts = StackedExperts(K, N, E, activation=activation, interleaved=interleaved, bias=bias, **kind)
        self.shared_experts = StackedExperts(K, shared_N, 1, activation=activation, **kind) if shared_N else None
        self.shared_expert_gate = nn.Linear(K, 1, bias=False, dtype=plain, device=device) if shared_gate else None
        self.register_load_state_dict_pre_hook(_translate)  # type: ignore[no-untyped-call] # torch does not annotate it

    @classmethod
    def from_config(
        cls,
        config: object,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The layer that a model's config describes, with fresh weights.

        Args:
            config: A config of transformers, its ``to_dict()``, or the path of a config.json or of its folder.
            dtype: As for `MoELayer`.
            device: As for `MoELayer`.

        Raises:
            InvalidInputError: It describes no MoE layer, or the router or shared experts of its family are unknown.
        """
        from moe_dispatch.modules.from_config import layer_arguments

        return cls(**layer_arguments(config), dtype=dtype, device=device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: ``[…, K]``, in the weights' dtype; BF16, FP16 or FP32 with FP8 weights, and under autocast,
                where FP32 weights are cast as `moe_forward` says.

        Returns:
            The same shape and dtype.

        Raises:
            InvalidInputError: It is no tensor, the last dimension is not K, or as for `moe_forward`.
        """
        if not isinstance(hidden_states, Tensor):
            raise InvalidInputError(f"hidden_states must be a torch.Tensor, got {type(hidden_states).__name__}")
        if hidden_states.shape[-1:] != (self.K,):
            raise InvalidInputError(f"hidden_states must be […, K={self.K}], got {list(hidden_states.shape)}")
        flat = hidden_states.reshape(-1, self.K)
        if self.shared_experts is None:
            out = self._routed(flat)
        elif self._on_two_streams(flat):
            shared = torch.empty_like(flat)
            with forked(flat.device) as side:
                with torch.cuda.stream(side):
                    self._shared(flat, self.shared_experts, shared)
                out = self._routed(flat)
            out += shared
        else:
            out = self._routed(flat) + self._shared(flat, self.shared_experts)
        if hidden_states.dim() == 2:
            return out
        # No view, as of a linear layer: a change of one in place would drop the hooks that FSDP2 puts on a result.
        unflattened: Tensor = torch.ops.aten._unsafe_view(out, hidden_states.shape)
        return unflattened

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compile and prove what calls of these token counts run, before a CUDA graph is captured; see `warm_up`.

        Args:
            tokens: Token counts; a captured graph needs its own in here.
        """
        tokens = tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)  # also of what can be read once
        dtype, device = self.gate.weight.dtype, self.gate.weight.device
        warm_up(self.experts.weights(), self.gate.router.topk, tokens, dtype)
        if self.shared_experts is not None:
            for into_out in (False, True):
                warm_up(self.shared_experts.weights(), 1, tokens, dtype, into_out=into_out)
        with torch.no_grad():
            for M in tokens:
                self(torch.zeros(M, self.K, dtype=dtype, device=device))

    def _routed(self, flat: Tensor) -> Tensor:
        topk_weights, topk_ids, _ = self.gate(flat)
        out: Tensor = self.experts(flat, topk_weights, topk_ids)
        return out

    def _shared(self, flat: Tensor, experts: StackedExperts, out: Tensor | None = None) -> Tensor:
        """The shared experts as a layer of one expert, which every token chooses with the weight of its gate."""
        M = flat.shape[0]
        if self.shared_expert_gate is None:
            weights = torch.ones(M, 1, dtype=torch.float32, device=flat.device)
        else:
            # FP8 experts take tokens of any dtype, and their gate is in one of them.
            weights = F.linear(flat, self.shared_expert_gate.weight.to(flat.dtype)).float().sigmoid()
        ids = torch.zeros(M, 1, dtype=torch.int32, device=flat.device)
        result: Tensor = experts(flat, weights, ids, out)
        return result

    def _on_two_streams(self, flat: Tensor) -> bool:
        in_a_trace = torch.compiler.is_compiling() or is_tracing()
        if in_a_trace or not flat.is_cuda or not 0 < flat.shape[0] <= SIDE_STREAM_TOKENS:
            return False
        return not is_any_recorded((flat, *self.parameters()))


def _translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(module, MoELayer)  # noqa: S101 - MoELayer registers it for itself
    translate(state_dict, prefix, interleaved=module.experts.interleaved)
