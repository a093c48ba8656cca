"""Where the tensors of a checkpoint are read from, and which share of the experts a process reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from moe_dispatch.errors import InvalidInputError

Key = tuple[str, str]  # which projection, and what of it


class TensorSource(Protocol):
    """Tensors that can be looked at, and read in part, by name."""

    origin: str

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def read(self, name: str, *index: slice) -> Tensor:
        """A tensor, or the part of it that the slices select."""


class LoadedTensors:
    """Tensors in memory as a `TensorSource`."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self._tensors, self.origin = tensors, origin

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, *index: slice) -> Tensor:
        """See `TensorSource.read`."""
        return self._tensors[name][index] if index else self._tensors[name]


@dataclass(frozen=True)
class Part:
    """What one process of tensor parallelism holds of every expert: a share of the N columns of its intermediate.

    The outputs of all processes add up to the layer's, so the down projection's bias belongs to the first alone.

    Raises:
        InvalidInputError: The rank is not in 0…size-1.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not (type(self.rank) is type(self.size) is int and 0 <= self.rank < self.size):
            raise InvalidInputError(f"tp must be (rank, size) with 0 ≤ rank < size, got ({self.rank}, {self.size})")

    @classmethod
    def named(cls, tp: object) -> Self:
        """The part that a caller names by rank and size.

        Raises:
            InvalidInputError: It is no such pair.
        """
        if not isinstance(tp, tuple | list) or len(tp) != 2:
            raise InvalidInputError(f"tp must be (rank, size) with 0 ≤ rank < size, got {tp!r}")
        return cls(*tp)

    def of(self, N: int, *, block: int, origin: str) -> slice:
        """This process's columns of an intermediate of N, in which so many columns share a scale.

        Raises:
            InvalidInputError: N cannot be divided so, or not at the boundaries of blocks of scales.
        """
        step = block * self.size if self.size > 1 else 1
        if N % step:
            each = f" × {block}, the columns of a block of scales" if block > 1 else ""
            raise InvalidInputError(
                f"{origin}: N={N} cannot be divided among {self.size} processes: it must be a multiple of {self.size}"
                f"{each}; use another size"
            )
        n = N // self.size
        return slice(self.rank * n, (self.rank + 1) * n)
