"""What several commands take from the command line, checked in one way."""

from typing import Final

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.problem import DTYPES, DType, Mode

_MODES: Final[tuple[Mode, ...]] = ("graph", "eager")


def tokens_of(text: str) -> list[int]:
    """``--tokens``: token counts in the order in which they are given.

    Raises:
        InvalidInputError: They are none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InvalidInputError(
            f"--tokens must be positive numbers separated by commas, such as 1,64,4096; got {text!r}"
        )
    return [int(part) for part in parts]


def dtype_of(text: str) -> DType:
    """``--dtype``: a weight dtype.

    Raises:
        InvalidInputError: It is none.
    """
    if text not in DTYPES:
        raise InvalidInputError(f"--dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return text


def modes_of(text: str) -> tuple[Mode, ...]:
    """``--mode``: graph, eager or both.

    Raises:
        InvalidInputError: It is none of the three.
    """
    modes = tuple(mode for mode in _MODES if text in (mode, "both"))
    if not modes:
        raise InvalidInputError(f"--mode must be graph, eager or both, got {text!r}")
    return modes
