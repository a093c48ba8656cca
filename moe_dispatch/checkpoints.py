"""Expert weights of checkpoints as `ExpertWeights` wants them: stacked, gate and up concatenated, sliced for TP.

Checkpoints store the experts of a layer in one of two ways, and both are read:

- one by one, ``experts.7.gate_proj.weight`` ``[N, K]``, ``up_proj`` and ``down_proj`` ``[K, N]``; Mixtral's names for
  them are w1, w3 and w2. Experts without a gate have up and down alone.
- fused, ``experts.gate_up_proj`` and ``experts.down_proj``, as transformers 5 keeps them: ``[E, 2N, K]`` and
  ``[E, K, N]``, or transposed, ``[E, K, 2N]`` and ``[E, N, K]`` (gpt-oss in BF16). MXFP4 has ``…_blocks`` and
  ``…_scales`` in their place (gpt-oss as published; `moe_dispatch.checkpoint_mxfp4`).

FP8 has multipliers beside each weight, and their shape says which of its elements share one: a block of 128×128, a row
(``[rows, 1]``: llm-compressor's channels), or the whole tensor (a scalar), which then becomes one for each row.
DeepSeek calls a block's ``weight_scale_inv``, the inverse of what the weight was multiplied with before rounding: it is
the multiplier that gives the weight back, as others' ``weight_scale`` is, and is taken as it is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.checkpoint_mxfp4 import stack_mxfp4
from moe_dispatch.checkpoint_scales import fused_row_scales, in_fp32, row_scales
from moe_dispatch.checkpoint_sources import Key, LoadedTensors, Part, TensorSource
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import QUANT_BLOCK, scale_shape
from moe_dispatch.tensor_memory import tensor_fault

# What a projection is called, and what is stored of it.
PROJECTIONS: Final = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
}  # fmt: skip
KINDS: Final = {"weight": "weight", "weight_scale_inv": "scale", "weight_scale": "scale", "bias": "bias"}
FUSED: Final = {
    "gate_up_proj": ("gate_up", "weight"), "gate_up_proj_scale_inv": ("gate_up", "scale"),
    "gate_up_proj_scale": ("gate_up", "scale"), "gate_up_proj.weight_scale": ("gate_up", "scale"),
    "gate_up_proj_bias": ("gate_up", "bias"), "down_proj": ("down", "weight"),
    "down_proj_scale_inv": ("down", "scale"), "down_proj_scale": ("down", "scale"),
    "down_proj.weight_scale": ("down", "scale"), "down_proj_bias": ("down", "bias"),
    "gate_up_proj_blocks": ("gate_up", "blocks"), "gate_up_proj_scales": ("gate_up", "exponents"),
    "down_proj_blocks": ("down", "blocks"), "down_proj_scales": ("down", "exponents"),
}  # fmt: skip
# Formats that are known and not read, by a part of a tensor's name that tells them.
_OTHER_FORMATS: Final = {
    "_packed": "4-bit integers or NVFP4 (compressed-tensors)",
    "qweight": "4-bit integers (GPTQ, AWQ)",
    "input_scale": "FP8 with static activation scales",
    "activation_scale": "FP8 with static activation scales",
}  # fmt: skip
_LISTED: Final = 12  # names in a message


def stack_experts(
    experts: Sequence[Mapping[str, Tensor]], tp: tuple[int, int] = (0, 1), device: torch.device | str | None = None
) -> dict[str, Any]:
    """Separate experts as the tensors of `ExpertWeights`; see `ExpertWeights.from_experts`."""
    tensors = {f"{e}.{name}": tensor for e, expert in enumerate(experts) for name, tensor in expert.items()}
    for name, tensor in tensors.items():
        if fault := tensor_fault(f"tensor {name}", tensor):
            raise InvalidInputError(fault)
    source = LoadedTensors(tensors, f"the list of {len(experts)} experts")
    names = expert_names(tensors, "", source.origin)
    return stack(source, {e: names.get(e, {}) for e in range(len(experts))}, Part.named(tp), device=device)


def expert_names(names: Iterable[str], prefix: str, origin: str) -> dict[int, dict[Key, str]]:
    """Tensors of the experts of a layer by expert, projection and kind; under -1 those that hold all experts.

    Args:
        names: Full names of tensors; those that do not start with the prefix are left out.
        prefix: What precedes an expert's number, or a fused tensor's name: ``"model.layers.3.mlp.experts."``.
        origin: Where the tensors are from, for messages.

    Raises:
        InvalidInputError: A name is none of the known ones; all such names are listed.
    """
    experts: dict[int, dict[Key, str]] = {}
    unknown = []
    for name in names:
        if not name.startswith(prefix):
            continue
        rest = name[len(prefix) :]
        # Five digits, for all experts up to the largest number are looked for.
        match = re.fullmatch(r"(\d{1,5})\.(\w+)\.(\w+)", rest)
        if match and match[2] in PROJECTIONS and match[3] in KINDS:
            experts.setdefault(int(match[1]), {})[PROJECTIONS[match[2]], KINDS[match[3]]] = name
        elif rest.removesuffix(".weight") in FUSED:
            experts.setdefault(-1, {})[FUSED[rest.removesuffix(".weight")]] = name
        else:
            unknown.append(name)
    if unknown:
        formats = {text for part, text in _OTHER_FORMATS.items() for name in unknown if part in name}
        known = f"that is {' or '.join(sorted(formats))}, which is not read; " if formats else ""
        raise InvalidInputError(
            f"{origin} has experts' tensors of unknown names: {listed(unknown)}; {known}known are EXPERT.NAME.KIND "
            f"with a name of {', '.join(PROJECTIONS)} and a kind of {', '.join(KINDS)}, and {', '.join(FUSED)}"
        )
    return experts


def stack(
    source: TensorSource,
    experts: Mapping[int, Mapping[Key, str]],
    part: Part,
    *,
    interleaved: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The tensors of `ExpertWeights` by the names of its arguments, each read once and copied into place.

    Args:
        source: Where the tensors are.
        experts: Their names, as `expert_names` gives them.
        part: Which share of every expert.
        interleaved: Whether gate and up rows of fused tensors alternate.
        device: Where to put them; where they are, if None.

    Raises:
        InvalidInputError: Tensors are missing, shapes or dtypes do not fit together, or rows that are to alternate are
            not fused; the message names them.
    """
    if -1 in experts:
        if len(experts) > 1:
            single = listed(name for e, names in experts.items() if e >= 0 for name in names.values())
            raise InvalidInputError(
                f"{source.origin} has fused experts ({listed(experts[-1].values())}) and single ones ({single}) in one "
                "layer; keep one kind"
            )
        fused = stack_mxfp4 if any(kind == "blocks" for _, kind in experts[-1]) else _stack_fused
        stacked = fused(source, experts[-1], part, interleaved=interleaved, device=device)
        return _with_bias_once(stacked, part)
    if interleaved:
        raise InvalidInputError(
            f"{source.origin} has gate and up of each expert in tensors of their own, whose rows do not alternate as "
            "interleaved=True says; leave it out"
        )
    _require_alike(source, experts)
    return _stack_single(source, [experts[e] for e in range(len(experts))], part, device)


def listed(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more


def _require_alike(source: TensorSource, experts: Mapping[int, Mapping[Key, str]]) -> None:
    """Refuse experts that are missing, or lack what others have."""
    count = max(experts, default=-1) + 1
    keys = {key for names in experts.values() for key in names}
    keys |= {("up", "weight"), ("down", "weight")}
    missing = [
        f"expert {e}: {projection} {kind}"
        for e in range(count)
        for projection, kind in sorted(keys)
        if (projection, kind) not in experts.get(e, {})
    ]
    if not count:
        raise InvalidInputError(f"{source.origin} holds no experts")
    if missing:
        there = listed(name for names in experts.values() for name in names.values())
        raise InvalidInputError(f"{source.origin} lacks {listed(missing)}; there is {there}")


def _stack_single(
    source: TensorSource, experts: Sequence[Mapping[Key, str]], part: Part, device: torch.device | str | None
) -> dict[str, Tensor]:
    first = experts[0]
    parts = ("gate", "up") if ("gate", "weight") in first else ("up",)
    N, K = _matrix(source, first["up", "weight"])
    _require_scales(source, first, fp8=source.read(first["up", "weight"], slice(0, 1)).dtype == FP8)
    blocks = ("up", "scale") in first and source.shape(first["up", "scale"]) == scale_shape("fp8", N, K)
    if blocks and len(parts) == 2 and N % QUANT_BLOCK:
        raise InvalidInputError(
            f"{source.origin}: with N={N} rows of gate and up, which is no multiple of {QUANT_BLOCK}, a block of "
            "scales of gate and up together would cover rows of both; load BF16 weights and use ExpertWeights.quantize"
        )
    columns = part.of(N, block=QUANT_BLOCK if blocks else 1, origin=source.origin)
    whole = slice(None)
    stacked: dict[str, Tensor] = {}
    for target, projections in (("gate_up", parts), ("down", ("down",))):
        for kind in ("weight", "scale", "bias"):
            if (projections[0], kind) not in first:
                continue
            names = [[expert[projection, kind] for projection in projections] for expert in experts]
            if kind == "scale" and not blocks:
                length, share = (N, columns) if target == "gate_up" else (K, whole)
                read = [
                    [row_scales(source.read(name), length, f"{source.origin}: {name}")[share] for name in each]
                    for each in names
                ]
                scales = torch.stack([torch.cat(each) for each in read])
                stacked[_argument(target, kind)] = scales.to(device or scales.device)
                continue
            share = _in_blocks(columns) if kind == "scale" else columns
            rows = share if target == "gate_up" else whole
            index = (rows,) if kind == "bias" else (rows, whole if target == "gate_up" else share)
            shape = {"weight": (N, K), "scale": scale_shape("fp8", N, K), "bias": (N,)}[kind]
            if target == "down":
                shape = (K,) if kind == "bias" else shape[::-1]
            stacked[_argument(target, kind)] = _filled(source, names, shape, index, kind, device)
    return _with_bias_once(stacked, part)


def _stack_fused(
    source: TensorSource,
    names: Mapping[Key, str],
    part: Part,
    *,
    interleaved: bool,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    if missing := [f"{projection} weight" for projection in ("gate_up", "down") if (projection, "weight") not in names]:
        raise InvalidInputError(f"{source.origin} lacks {listed(missing)}; there is {listed(names.values())}")
    gate_up, down = source.shape(names["gate_up", "weight"]), source.shape(names["down", "weight"])
    transposed = _transposed(source, gate_up, down)
    E, N = down[0], down[1 if transposed else 2]
    dtype = source.read(names["down", "weight"], slice(0, 1), slice(0, 1)).dtype
    _require_scales(source, names, fp8=dtype == FP8)
    scaled = source.shape(names["gate_up", "scale"])[1:] if ("gate_up", "scale") in names else ()
    blocks = scaled == scale_shape("fp8", *gate_up[1:])
    columns = part.of(N, block=QUANT_BLOCK if blocks else 1, origin=source.origin)
    stacked = {}
    for (target, kind), name in names.items():
        by_row = kind == "scale" and not blocks
        what = f"{source.origin}: {name}"
        share, length = (_in_blocks(columns), _blocks(N)) if kind == "scale" and blocks else (columns, N)
        axis = 1 if target == "gate_up" or kind == "bias" else 2
        if transposed and kind != "bias":
            axis = 3 - axis
        if part.size == 1 or (target == "down" and (kind == "bias" or by_row)):
            spans = [slice(None)]
        elif target == "down":
            spans = [share]
        elif interleaved:
            spans = [slice(2 * share.start, 2 * share.stop)]
        else:
            spans = [share, slice(share.start + length, share.stop + length)]
        if by_row:
            rows = (gate_up if target == "gate_up" else down)[2 if transposed else 1]
            scales = fused_row_scales(source.read(name), E, rows, spans, what)
            stacked[_argument(target, kind)] = scales.to(device or scales.device)
            continue
        weight = gate_up if target == "gate_up" else down
        each = scale_shape("fp8", *weight[1:]) if kind == "scale" else weight[1:]
        shape = (E, weight[2 if transposed else 1]) if kind == "bias" else (E, *each)
        if source.shape(name) != shape:
            raise InvalidInputError(
                f"{what} must be {list(shape)} to go with the others, got {list(source.shape(name))}"
            )
        pieces = [source.read(name, *(slice(None),) * axis, span) for span in spans]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
        if transposed and kind != "bias":
            tensor = tensor.transpose(1, 2)
        tensor = in_fp32(tensor, what) if kind == "scale" else tensor
        stacked[_argument(target, kind)] = tensor.to(device or tensor.device).contiguous()
    return stacked


def _transposed(source: TensorSource, gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether fused weights are ``[E, in, out]``; no shapes fit both orders."""
    if len(gate_up) == len(down) == 3:
        if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return False
        if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
            return True
    raise InvalidInputError(
        f"{source.origin} has gate_up_proj {list(gate_up)} and down_proj {list(down)}, which do not belong together: "
        "they must be [E, 2N, K] and [E, K, N], or [E, K, 2N] and [E, N, K]"
    )


def _filled(
    source: TensorSource,
    names: Sequence[Sequence[str]],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    kind: str,
    device: torch.device | str | None,
) -> Tensor:
    """Of each expert, the parts of its tensors one below the other. One tensor at a time is in memory beside them."""
    stacked: Tensor | None = None
    for e, of_expert in enumerate(names):
        for place, name in enumerate(of_expert):
            if source.shape(name) != shape:
                raise InvalidInputError(
                    f"{source.origin}: {name} must be {list(shape)} to go with the others, "
                    f"got {list(source.shape(name))}"
                )
            piece = source.read(name, *index)
            if kind == "scale":
                piece = in_fp32(piece, f"{source.origin}: {name}")
            rows = piece.shape[0]
            if stacked is None:
                whole = (len(names), rows * len(of_expert), *piece.shape[1:])
                stacked = torch.empty(whole, dtype=piece.dtype, device=device or piece.device)
            if kind == "weight" and piece.dtype != stacked.dtype:
                raise InvalidInputError(f"{source.origin}: {name} is {piece.dtype} and others are {stacked.dtype}")
            stacked[e, place * rows : (place + 1) * rows].copy_(piece)
    assert stacked is not None  # noqa: S101 - `stack` has refused a layer without experts
    return stacked


def _require_scales(source: TensorSource, names: Mapping[Key, str], *, fp8: bool) -> None:
    scales = [name for (_, kind), name in names.items() if kind == "scale"]
    weights = [name for (_, kind), name in names.items() if kind == "weight"]
    if fp8 and len(scales) != len(weights):
        raise InvalidInputError(
            f"{source.origin} has float8_e4m3fn weights and lacks scales of some: there is {listed(names.values())}; "
            "each weight needs a weight_scale_inv or a weight_scale beside it"
        )
    if scales and not fp8:
        raise InvalidInputError(f"{source.origin} has {listed(scales)} beside weights that are not float8_e4m3fn")


def _matrix(source: TensorSource, name: str) -> tuple[int, int]:
    shape = source.shape(name)
    if len(shape) != 2:
        raise InvalidInputError(f"{source.origin}: {name} must be a matrix, got shape {list(shape)}")
    return shape[0], shape[1]


def _with_bias_once(stacked: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    if part.rank and "down_bias" in stacked:
        stacked["down_bias"] = torch.zeros_like(stacked["down_bias"])
    return stacked


def _argument(target: str, kind: str) -> str:
    return target if kind == "weight" else f"{target}_{kind}"


def _blocks(length: int) -> int:
    return -(-length // QUANT_BLOCK)


def _in_blocks(columns: slice) -> slice:
    return slice(columns.start // QUANT_BLOCK, _blocks(columns.stop))
