# ruff: noqa: D102 - the methods of Extent and Buffer are those of numbers and tensors
"""What a run of a backend is given in place of tensors while its launches are written down for any token count.

`Buffer` stands for a tensor, and `Extent` for a number that depends on the token count M. A run may compute with
extents as with numbers, as long as what it computes does not fall when M grows. Where it compares one, the answer is
that of the M that it runs with, and what is written down holds for the M that have the same answer: `TokenRange`.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

import torch

MOST_TOKENS: Final = (1 << 31) - 1


class NotReplayableError(Exception):
    """Why a run cannot be repeated as a replay."""


class TokenRange:
    """The token counts for which every comparison so far has the same answer as for one of them.

    Args:
        M: That one.

    Attributes:
        first: The least of them.
        last: The largest.
    """

    def __init__(self, M: int) -> None:
        self.M, self.first, self.last = M, 1, MOST_TOKENS

    def decide(self, holds: Callable[[int], bool]) -> bool:
        """Whether something holds for M, after the range is narrowed to where the answer is the same.

        Args:
            holds: Whether it holds for a token count; changes its answer once, at most, as that grows.
        """
        answer, counts = holds(self.M), range(self.last + 1)
        differs = bisect.bisect_left(counts, True, self.M, key=lambda M: holds(M) is not answer)
        self.first = bisect.bisect_left(counts, True, self.first, self.M, key=lambda M: holds(M) is answer)
        self.last = differs - 1
        return answer


class Extent:
    """A number of at least 0 that depends on M and does not fall as M grows: ``scale * root(M) + shift``.

    Args:
        tokens: Where comparisons are noted.
        root: A function of the token count; by default that count itself.
        scale: At least 0.
        shift: A number.
    """

    __slots__ = ("_root", "_scale", "_shift", "_tokens")
    __hash__ = None  # type: ignore[assignment] # no key may hold what differs from call to call

    def __init__(self, tokens: TokenRange, root: Callable[[int], int] = int, scale: int = 1, shift: int = 0) -> None:
        self._tokens, self._root, self._scale, self._shift = tokens, root, scale, shift

    def at(self, M: int) -> int:
        """The number for a token count."""
        return self._scale * self._root(M) + self._shift

    @property
    def parts(self) -> tuple[Callable[[int], int], int, int]:
        """Root, scale and shift. Numbers computed from M in the same way have equal roots."""
        return self._root, self._scale, self._shift

    def __add__(self, other: "int | Extent") -> "Extent":
        if isinstance(other, Extent):
            return Extent(self._tokens, lambda M: self.at(M) + other.at(M))
        return Extent(self._tokens, self._root, self._scale, self._shift + other)

    def __sub__(self, other: int) -> "Extent":
        return NotImplemented if isinstance(other, Extent) else self + -other

    def __mul__(self, other: "int | Extent") -> "Extent":
        if isinstance(other, Extent):
            return Extent(self._tokens, lambda M: self.at(M) * other.at(M))
        if other < 0:
            return NotImplemented
        return Extent(self._tokens, self._root, self._scale * other, self._shift * other)

    def __floordiv__(self, other: int) -> "Extent":
        if isinstance(other, Extent):
            return NotImplemented
        return self if other == 1 else Extent(self._tokens, _Floor(*self.parts, other))

    def __truediv__(self, other: int) -> "_Quotient":
        return NotImplemented if isinstance(other, Extent) else _Quotient(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: "int | Extent") -> bool:
        if isinstance(other, Extent) and other._root == self._root:  # so that their difference falls or grows with M
            return self._tokens.decide(lambda M: self.at(M) < other.at(M))
        if not isinstance(other, int):
            raise TypeError(f"a number that depends on M is compared with {type(other).__name__}")
        return self._tokens.decide(lambda M: self.at(M) < other)

    def __le__(self, other: "int | Extent") -> bool:
        return self < other + 1

    def __gt__(self, other: "int | Extent") -> bool:
        return not self <= other

    def __ge__(self, other: "int | Extent") -> bool:
        return not self < other

    def __eq__(self, other: object) -> bool:
        return other is not None and self >= other and self <= other  # type: ignore[operator] # refused by `<`

    def __bool__(self) -> bool:
        return self > 0

    def bit_length(self) -> int:
        """As that of an int."""
        bits = 0
        while self >= 1 << bits:
            bits += 1
        return bits


@dataclass(frozen=True)
class _Floor:
    """A function of the token count: ``(scale * root(M) + shift) // divisor``."""

    root: Callable[[int], int]
    scale: int
    shift: int
    divisor: int

    def __call__(self, M: int) -> int:
        return (self.scale * self.root(M) + self.shift) // self.divisor


class _Quotient(NamedTuple):
    dividend: Extent
    divisor: int

    def __ceil__(self) -> Extent:
        return (self.dividend + (self.divisor - 1)) // self.divisor


@dataclass(frozen=True, eq=False)
class Buffer:
    """What stands for a tensor on the GPU, and knows as much of a tensor's methods as runs ask for.

    Attributes:
        sizes: The bytes of each base of an address (see `replay.Replay`) that is an intermediate; 0 of the others.
        base: The number of the base that its address counts from.
        dtype: As of a tensor.
        shape: As of a tensor; some sizes may be extents.
        strides: As of a tensor; empty if it is contiguous.
        offset: Bytes from the base to the first element.
    """

    sizes: list[int | Extent]
    base: int
    dtype: torch.dtype
    shape: tuple[Any, ...]
    strides: tuple[Any, ...] = ()
    offset: int = 0
    is_cuda = True

    def new_empty(self, *shape: Any, dtype: torch.dtype | None = None) -> "Buffer":
        dtype = dtype or self.dtype
        self.sizes.append(math.prod(shape) * dtype.itemsize)
        return Buffer(self.sizes, len(self.sizes) - 1, dtype, shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> Any:
        return math.prod(self.shape)

    def stride(self, dimension: int | None = None) -> Any:
        strides = self.strides or tuple(math.prod(self.shape[place:]) for place in range(1, len(self.shape) + 1))
        return strides if dimension is None else strides[dimension]

    def view(self, dtype: torch.dtype) -> "Buffer":  # of the same size
        return replace(self, dtype=dtype)

    def t(self) -> "Buffer":
        return replace(self, shape=self.shape[::-1], strides=self.stride()[::-1])

    def __getitem__(self, rows: slice) -> "Buffer":  # clipped as torch does
        count = self.shape[0]
        start, stop = min(rows.start or 0, count), count if rows.stop is None else min(rows.stop, count)
        if rows.step not in (None, 1) or start < 0 or stop < 0:
            raise NotReplayableError("a buffer is cut from its end or in steps")
        return self.narrow(0, start, max(stop - start, 0))

    def narrow(self, _dimension: Literal[0], start: int, length: Any) -> "Buffer":
        offset = self.offset + start * self.stride(0) * self.dtype.itemsize
        if not isinstance(offset, int):
            raise NotReplayableError("a buffer is cut where M decides")
        return replace(self, shape=(length, *self.shape[1:]), strides=self.stride(), offset=offset)
