"""The command line's options that several commands share: one name, one meaning, one check for each."""

import math
from collections.abc import Iterable
from typing import Annotated, Final

import typer

from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.problem import DTYPES, DType, Mode

MAX_TOKENS: Final = 1 << 24  # More tokens in one call than any model serves; costs are computed tile by tile.
_MODES: Final[tuple[Mode, ...]] = ("graph", "eager")
_DTYPE_HELP: Final = (
    f"Weight dtype: {', '.join(DTYPES)} (fp8 has a scale per 128×128 weights, "
    "fp8_channel per row, mxfp4 per 32 of a row)"
)
_MODEL_HELP: Final = "A named model such as deepseek-v3 or Qwen/Qwen3-30B-A3B, E,topk,K,N, or a path of a config.json"


def _complete_model(incomplete: str) -> list[str]:
    from moe_dispatch.workloads import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete.lower())]


def _complete_dtype(incomplete: str) -> list[str]:
    return [name for name in DTYPES if name.startswith(incomplete)]


def _complete_machine(incomplete: str) -> list[str]:
    from moe_dispatch.machine import shipped_machines

    return [name for name in shipped_machines() if name.startswith(incomplete.lower())]


def _complete_backend(incomplete: str) -> list[str]:
    from moe_dispatch.registry import BACKENDS

    return [name for name in BACKENDS.names() if name.startswith(incomplete)]


def _complete_routing(incomplete: str) -> list[str]:
    from moe_dispatch.workloads import ROUTINGS

    return [name for name in ROUTINGS if name.startswith(incomplete)]


Model = Annotated[str, typer.Option("--model", help=f"{_MODEL_HELP}.", autocompletion=_complete_model)]
Models = Annotated[
    list[str] | None, typer.Option("--model", help=f"{_MODEL_HELP}; repeatable.", autocompletion=_complete_model)
]
TensorParallel = Annotated[
    int, typer.Option("--tp", min=1, help="Tensor parallelism: the layer as each of so many GPUs has it, N/tp columns.")
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"{_DTYPE_HELP}.", autocompletion=_complete_dtype)]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help=f"{_DTYPE_HELP}; repeatable.", autocompletion=_complete_dtype)
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        help="A machine other than the one at hand: a shipped name such as h200, or a JSON file of "
        "`moe-dispatch doctor --json`.",
        autocompletion=_complete_machine,
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Only this backend; repeatable.", autocompletion=_complete_backend),
]
Routings = Annotated[
    list[str] | None,
    typer.Option(
        "--routing",
        help="How tokens spread over experts: uniform, dirichlet-4 (skewed), zipf, half-dead or one-hot; repeatable.",
        autocompletion=_complete_routing,
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; the current GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Budget = Annotated[float | None, typer.Option("--budget", help="Stop after this many seconds.")]


def tokens_of(text: str, option: str = "--tokens") -> list[int]:
    """``--tokens``, or another option of that kind: positive numbers, in the order of the option.

    Raises:
        InvalidInputError: It is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    # isascii: "²" is a decimal digit to Python and no number to int; the length bounds what int has to convert.
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts):
        raise InvalidInputError(
            f"{option} must be positive numbers separated by commas, such as 1,64,4096; got {text[:80]!r}"
        )
    counts = [int(part) for part in parts]
    for M in counts:
        if not 1 <= M <= MAX_TOKENS:
            raise InvalidInputError(f"{option} must be positive numbers up to {MAX_TOKENS}, got {M}")
    return counts


def dtype_of(text: str) -> DType:
    """``--dtype``: a weight dtype, in any case.

    Raises:
        InvalidInputError: It is none.
    """
    for dtype in DTYPES:
        if dtype == text.lower():
            return dtype
    raise InvalidInputError(f"--dtype must be one of {', '.join(DTYPES)}, got {text[:80]!r}")


def dtypes_of(texts: Iterable[str]) -> list[DType]:
    """Several ``--dtype``, each once."""
    return list(dict.fromkeys(map(dtype_of, texts)))


def modes_of(text: str) -> tuple[Mode, ...]:
    """``--mode``: graph, eager or both.

    Raises:
        InvalidInputError: It is none of the three.
    """
    modes = tuple(mode for mode in _MODES if text in (mode, "both"))
    if not modes:
        raise InvalidInputError(f"--mode must be graph, eager or both, got {text[:80]!r}")
    return modes


def mode_of(text: str) -> Mode:
    """``--mode``: graph or eager.

    Raises:
        InvalidInputError: It is neither.
    """
    for mode in _MODES:
        if mode == text:
            return mode
    raise InvalidInputError(f"--mode must be graph or eager, got {text[:80]!r}")


def routing_names(names: Iterable[str]) -> list[str]:
    """``--routing``: names of routing distributions.

    Raises:
        UnknownNameError: One of them is unknown.
    """
    from moe_dispatch.workloads import ROUTINGS

    checked = list(dict.fromkeys(names))
    for name in checked:
        if name not in ROUTINGS:
            raise UnknownNameError("routing distribution", name, tuple(ROUTINGS))
    return checked


def seconds_of(option: str, value: float, *, zero: bool = False) -> float:
    """A finite number of seconds above 0, or at least 0 where zero is allowed.

    Raises:
        InvalidInputError: It is not.
    """
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        allowed = "seconds, at least 0" if zero else "seconds above 0"
        raise InvalidInputError(f"{option} must be a number of {allowed}, got {value}")
    return value
