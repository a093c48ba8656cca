"""A break in a compiled graph. A module of its own, because the decorator imports all of torch's compiler."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call_uncompiled(function: Callable[..., Result], *arguments: object, **named: Any) -> Result:
    """Call a function at a break in the graph, neither it nor what it calls being traced."""
    return function(*arguments, **named)
