"""Tensors of a module that keep their dtype whatever `Module.to` asks for."""

from collections.abc import Callable

from torch import Tensor

Change = Callable[[Tensor], Tensor]


def keeping_dtype(change: Change, kept: tuple[Tensor | None, ...]) -> Change:
    """What `Module._apply` applies, except that these tensors change their device alone.

    ``module.to(torch.bfloat16)`` converts every floating-point tensor. It would turn e4m3 codes into BF16 values
    without their scales, and round a router's correction bias so that other experts are chosen.

    Args:
        change: The function that `Module.to`, `Module.half` and their kin apply to each tensor.
        kept: The tensors that keep their dtype.
    """

    def changed(tensor: Tensor) -> Tensor:
        if all(tensor is not each for each in kept):
            return change(tensor)
        probe = change(tensor.new_empty(0))
        return change(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

    return changed
