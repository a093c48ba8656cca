"""A break in a compiled graph. A module of its own, because the decorator imports all of torch's compiler."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_uncompiled(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Call a function at a break in the graph, neither it nor what it calls being traced."""
    return function(*arguments)
