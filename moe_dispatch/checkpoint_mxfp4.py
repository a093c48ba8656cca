"""Fused MXFP4 experts as gpt-oss is published: blocks of 16 bytes, and an exponent for each.

``gate_up_proj_blocks`` is uint8 ``[E, 2N, K/32, 16]`` and ``gate_up_proj_scales`` ``[E, 2N, K/32]``; ``down_proj_…``
are ``[E, K, N/32, 16]`` and ``[E, K, N/32]``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_dispatch.checkpoint_sources import Key, Part, TensorSource
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.problem import MX_BLOCK


def stack_mxfp4(
    source: TensorSource,
    names: Mapping[Key, str],
    part: Part,
    *,
    interleaved: bool,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The tensors of `ExpertWeights` by the names of its arguments; arguments as of `moe_dispatch.checkpoints.stack`.

    Raises:
        InvalidInputError: Blocks or scales are missing, or shapes do not belong together.
    """
    required = [(projection, kind) for projection in ("gate_up", "down") for kind in ("blocks", "exponents")]
    if missing := [f"{projection}_proj's {kind}" for projection, kind in required if (projection, kind) not in names]:
        raise InvalidInputError(
            f"{source.origin} lacks {', '.join(missing)} of MXFP4 experts; there is {', '.join(sorted(names.values()))}"
        )
    exponents = source.shape(names["down", "exponents"])
    if len(exponents) != 3:
        raise InvalidInputError(
            f"{source.origin}: {names['down', 'exponents']} must be [E, K, N/{MX_BLOCK}], got {list(exponents)}"
        )
    E, K, groups = exponents
    N = groups * MX_BLOCK
    columns = part.of(N, block=MX_BLOCK, origin=source.origin)
    rows = [columns, slice(columns.start + N, columns.stop + N)]
    if interleaved:
        rows = [slice(2 * columns.start, 2 * columns.stop)]
    share = (slice(None), slice(columns.start // MX_BLOCK, columns.stop // MX_BLOCK))
    stacked: dict[str, Tensor] = {}
    for (target, kind), name in names.items():
        shape: tuple[int, ...] = (E, 2 * N, K // MX_BLOCK) if target == "gate_up" else (E, K, groups)
        shape = {"blocks": (*shape, MX_BLOCK // 2), "exponents": shape, "bias": shape[:2]}.get(kind, ())
        if source.shape(name) != shape:
            raise InvalidInputError(
                f"{source.origin}: {name} must be {list(shape)} beside MXFP4 experts with N={N} and K={K}, "
                f"got {list(source.shape(name))}"
            )
        if target == "gate_up":
            tensor = torch.cat([source.read(name, slice(None), span) for span in rows], dim=1)
        else:
            tensor = source.read(name) if kind == "bias" else source.read(name, slice(None), *share)
        argument = target + {"blocks": "", "exponents": "_scale", "bias": "_bias"}[kind]
        stacked[argument] = (tensor.flatten(2) if kind == "blocks" else tensor).to(device or tensor.device).contiguous()
    return stacked
