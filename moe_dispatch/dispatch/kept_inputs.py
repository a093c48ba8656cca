"""The tensors of a call during the first run of a backend: what it writes to them is undone."""

from typing import Final

import torch
from torch import Tensor

from moe_dispatch.backend import Inputs

# Copies of more than this are not made: memory may be short, and a first run at as many tokens takes long.
MAX_BYTES: Final = 64 << 20


class KeptInputs:
    """Copies of hidden_states, topk_weights and topk_ids, to compare with and to restore. Weights are not copied.

    A backend may fail after it has written to them, and another one computes the call then. They are contiguous.
    """

    def __init__(self, inputs: Inputs) -> None:
        hidden_states, _, topk_weights, topk_ids = inputs
        self._tensors = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids}
        self._copies: dict[str, Tensor] = {}
        if sum(tensor.nbytes for tensor in self._tensors.values()) <= MAX_BYTES:
            self._copies = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._layouts = {name: (tensor.shape, tensor.stride()) for name, tensor in self._tensors.items()}

    def restore(self) -> str:
        """Undo what was written; waits for the device.

        Returns:
            The names of the tensors that had been written to; empty if none had been.
        """
        written = []
        with torch.inference_mode():  # in which tensors of either kind may be written to
            for name, copy in self._copies.items():
                tensor = self._tensors[name]
                if (tensor.shape, tensor.stride()) != self._layouts[name]:
                    tensor.data = copy
                elif not _equal(tensor, copy):
                    tensor.copy_(copy)
                else:
                    continue
                written.append(name)
        return " and ".join(written)


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two tensors have the same elements, NaN being equal to itself."""
    return bool(((tensor == copy) | (tensor.isnan() & copy.isnan())).all())
