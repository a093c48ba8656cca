"""State dicts of transformers' MoE blocks, of both its layouts, under the names and in the layout of `MoELayer`."""

import re
from typing import Any, Final

from torch import Tensor

from moe_dispatch.checkpoint_sources import LoadedTensors, Part
from moe_dispatch.checkpoints import FUSED, expert_names, stack
from moe_dispatch.modules.stacked_experts import NAMES

# What a submodule is called elsewhere.
_RENAMED: Final = {"router": "gate", "shared_expert": "shared_experts"}
_OWN: Final = frozenset(NAMES.values())
_SINGLE: Final = re.compile(r"(?:\d+\.)?(?:gate_proj|up_proj|down_proj|w[123])\.\w+")


def translate(state_dict: dict[str, Any], prefix: str, *, interleaved: bool) -> None:
    """Rename, stack and transpose the tensors of a layer, in place; what is unknown stays as it is.

    Args:
        state_dict: Of a model or a layer.
        prefix: What precedes the layer's names in it.
        interleaved: Whether gate and up rows of the layer's routed experts alternate.

    Raises:
        InvalidInputError: They do, and the state dict has gate and up of each expert apart.
    """
    for name in [name for name in state_dict if name.startswith(prefix)]:
        module, dot, rest = name[len(prefix) :].partition(".")
        if dot and module in _RENAMED:
            state_dict[f"{prefix}{_RENAMED[module]}.{rest}"] = state_dict.pop(name)
    for module in ("experts", "shared_experts"):
        _restack(state_dict, f"{prefix}{module}.", interleaved=interleaved and module == "experts")


def _restack(state_dict: dict[str, Any], prefix: str, *, interleaved: bool) -> None:
    """Experts one by one, transposed, or under other names, as `StackedExperts` has them."""
    own = [name for name in state_dict if name.startswith(prefix)]
    rests = [name[len(prefix) :] for name in own]
    single = bool(own) and all(_SINGLE.fullmatch(rest) for rest in rests)
    renamed = all(rest.removesuffix(".weight") in FUSED for rest in rests) and not _OWN.issuperset(rests)
    if not single and not renamed and not _transposed(state_dict, prefix):
        return
    # The linear layers of shared experts have no number: they are those of one expert.
    tensors: dict[str, Tensor] = {
        re.sub(r"^(?=[a-z]\w*\.)", "0.", name[len(prefix) :]) if single else name[len(prefix) :]: state_dict.pop(name)
        for name in own
    }
    source = LoadedTensors(tensors, f"the state dict's {prefix[:-1]}")
    stacked = stack(source, expert_names(tensors, "", source.origin), Part(), interleaved=interleaved)
    state_dict.update({f"{prefix}{NAMES[name]}": tensor for name, tensor in stacked.items()})


def _transposed(state_dict: dict[str, Any], prefix: str) -> bool:
    gate_up, down = (state_dict.get(f"{prefix}{name}") for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.dim() != 3 or down.dim() != 3:
        return False
    return gate_up.shape[2] == 2 * down.shape[1] and gate_up.shape[1] == down.shape[2]
