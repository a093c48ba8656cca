"""A rank's part of a layer's weights, and the check that the parts of all ranks belong together."""

import torch
from torch import Tensor

from moe_dispatch.checkpoint_sources import Part
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.parallel.control import Control
from moe_dispatch.parallel.placement import Division
from moe_dispatch.problem import MX_BLOCK, QUANT_BLOCK, DType
from moe_dispatch.workloads import Workload


def experts_of(layer: ExpertWeights, rank: int, ranks: int) -> ExpertWeights:
    """A copy of the experts that one of several ranks holds: consecutive, and as many on each rank, or one more.

    Raises:
        InvalidInputError: There are fewer experts than ranks.
    """
    if ranks > layer.E:
        raise InvalidInputError(f"each rank holds at least one expert, and {ranks} ranks share {layer.E}")
    mine = slice(rank * layer.E // ranks, (rank + 1) * layer.E // ranks)
    tensors = {name: tensor[mine].clone() for name, tensor in layer.tensors()}
    return _layer(layer, tensors)


def share_of_columns(layer: ExpertWeights, rank: int, ranks: int) -> ExpertWeights:
    """A copy of the part of each expert's N columns that one of several ranks holds; as many on each.

    Raises:
        InvalidInputError: N cannot be divided so, or not between columns that share a scale.
    """
    block, columns = _block(layer.dtype), rank_columns(layer, layer.dtype, ranks, rank)
    # Columns of the intermediate for each element of down's rows, and rows for each of gate_up's scales.
    per_element = {"down": 2 if layer.dtype == "mxfp4" else 1, "down_scale": block}
    per_row = {"gate_up_scale": QUANT_BLOCK if layer.dtype == "fp8" else 1}
    rows_alone = {"down_bias"} | ({"down_scale"} if layer.dtype == "fp8_channel" else set())

    def share(name: str, tensor: Tensor) -> Tensor:
        if name in rows_alone or ranks == 1:
            return tensor.clone()
        if name in per_element:
            step = per_element[name]
            part = tensor[:, :, columns.start // step : columns.stop // step]
        else:
            step, parts = per_row.get(name, 1), 2 if layer.gated else 1
            pairs = (layer.N // step, parts) if layer.interleaved else (parts, layer.N // step)
            every = slice(columns.start // step, columns.stop // step)
            halves = tensor.unflatten(1, pairs)
            part = (halves[:, every] if layer.interleaved else halves[:, :, every]).flatten(1, 2)
        if layer.transposed and part.dim() == 3:
            return part.mT.clone(memory_format=torch.contiguous_format).mT
        return part.clone(memory_format=torch.contiguous_format)

    return _layer(layer, {name: share(name, tensor) for name, tensor in layer.tensors()})


def rank_columns(layer: ExpertWeights | Workload, dtype: DType, ranks: int, rank: int = 0) -> slice:
    """The columns of each expert that a rank holds where as many are on each of them.

    Raises:
        InvalidInputError: N cannot be divided so, or not between columns that share a scale.
    """
    name = layer.name if isinstance(layer, Workload) else "the layer"
    return Part(rank, ranks).of(layer.N, block=_block(dtype), origin=name)


def _block(dtype: DType) -> int:
    """Columns of the intermediate that share a scale."""
    return {"fp8": QUANT_BLOCK, "mxfp4": MX_BLOCK}.get(dtype, 1)


def columns_of(layer: ExpertWeights, rank: int) -> ExpertWeights:
    """The part of each expert's columns that a rank was given, with down's bias on rank 0 alone: it is added once."""
    tensors = dict(layer.tensors())
    if rank and layer.down_bias is not None:
        tensors["down_bias"] = torch.zeros_like(layer.down_bias)
    return _layer(layer, tensors)


def placed(
    control: Control, local: ExpertWeights, division: Division, experts: int, device: torch.device
) -> tuple[int, ...]:
    """How many experts each rank holds. Collective.

    Args:
        control: What the ranks tell each other by.
        local: This rank's weights.
        division: What of the layer is divided.
        experts: Experts of the whole layer.
        device: Where this rank's layers are.

    Raises:
        ExpertParallelMismatchError: The parts do not belong together; raised on every rank.
    """
    every = control.gather_objects({
        "held": local.E,
        "on the group's device": local.device == device,
        "facts": {
            "division": division, "experts": experts, "K": local.K, "dtype": local.dtype, "N": local.N,
            "activation": local.activation, "bias": local.gate_up_bias is not None, "interleaved": local.interleaved,
        },
    })  # fmt: skip
    control.compare("the layer", [each["facts"] for each in every])
    astray = [rank for rank, each in zip(control.ranks, every, strict=True) if not each["on the group's device"]]
    if astray:
        raise InvalidInputError(f"the weights are not on the device of ExpertParallel on ranks {astray}; move them")
    held = tuple(each["held"] for each in every)
    if division == "experts" and sum(held) != experts:
        raise InvalidInputError(f"the ranks hold {' + '.join(map(str, held))} experts, and experts={experts}")
    return held


def _layer(layer: ExpertWeights, tensors: dict[str, Tensor]) -> ExpertWeights:
    return ExpertWeights(
        tensors["gate_up"],
        tensors["down"],
        gate_up_scale=tensors.get("gate_up_scale"),
        down_scale=tensors.get("down_scale"),
        gate_up_bias=tensors.get("gate_up_bias"),
        down_bias=tensors.get("down_bias"),
        activation=layer.activation,
        interleaved=layer.interleaved,
        transposed=layer.transposed,
    )
