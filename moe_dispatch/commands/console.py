"""How every command prints: compact tables that read as well in a log without colours."""

import codecs
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moe_dispatch.machine import Machine

# `emoji` would replace text such as ":warning:" that comes from files.
OUT: Final = Console(highlight=False, soft_wrap=False, emoji=False)
ERR: Final = Console(highlight=False, emoji=False, stderr=True)
UNLIMITED: Final = 1000  # columns: wider than any table here
INTERRUPTED: Final = 130  # the exit status that a shell expects of a program ended by Ctrl-C

_ASCII: Final = str.maketrans({
    "µ": "u", "×": "x", "·": "-", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "→": "->", "✓": "ok", "✗": "!!",
    "‖": "|", "⌈": "", "⌉": "", "²": "^2", "³": "^3", "─": "-", "━": "-", "│": "|", "•": "*",
})  # fmt: skip


def plain(value: object) -> str:
    """Text from outside for printing: without markup, and with control characters spelt out.

    Names in files and variables may hold rich's markup, terminal escape sequences, or bytes that are not text.
    """
    text = str(value).replace("\t", " ")
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
    return escape(text)


def drop_unusable_sizes() -> None:
    """Drop COLUMNS and LINES from the environment where they are no sizes: rich converts whatever digits they have."""
    for variable in ("COLUMNS", "LINES"):
        if not _is_size(os.environ.get(variable, "")):
            os.environ.pop(variable, None)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 5


def prepare_streams() -> None:
    """Fit the output to where it goes, before a command prints anything.

    What the encoding of stdout and stderr lacks is printed as ASCII instead of raising UnicodeEncodeError. In a pipe or
    a file, lines are as long as they need to be, unless COLUMNS says otherwise: tables can be searched and cut.
    """
    columns = os.environ.get("COLUMNS", "")
    if not OUT.is_terminal:
        OUT.width = int(columns) if _is_size(columns) else UNLIMITED
    codecs.register_error("moe_dispatch.ascii", _spelt_in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a program that replaced the stream may have none
        if reconfigure is not None:
            reconfigure(errors="moe_dispatch.ascii")


def _spelt_in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Keep stdout to `print_json`: what libraries print there when they are imported or run goes to stderr.

    vLLM writes its log to stdout, which would not be JSON then.
    """
    _stdout.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.pop()


_stdout: Final[list[TextIO]] = []  # what stdout was, inside of `json_alone`


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON in ASCII, which every encoding has; numbers that are not finite, which JSON lacks, as null.

    Args:
        value: What JSON can hold, with tuples for lists.
        indent: As of `json.dumps`.
    """
    typer.echo(json.dumps(_finite(value), indent=indent, allow_nan=False), file=_stdout[-1] if _stdout else None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """An unframed table with a rule under its headings.

    Args:
        *columns: Headings.
        numbers: Those of them that are set flush right.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        flush_right = column in numbers
        made.add_column(column, justify="right" if flush_right else "left", no_wrap=flush_right, overflow="fold")
    return made


def heading(text: str) -> None:
    """A bold line with space above."""
    OUT.print()
    OUT.print(f"[bold]{plain(text)}[/bold]")


def line(text: str, style: str | None = None) -> None:
    """One line of markup that is never wrapped: a terminal wraps it, a pipe and `grep` get it whole."""
    OUT.print(text, style=style, soft_wrap=True)


def machine_line(machine: "Machine") -> str:
    """``NVIDIA H200 · sm_90 · 132 SMs · 140 GiB · torch 2.11.0+cu130 · triton 3.6.0``."""
    cuda = machine.capability is not None
    parts = [
        machine.name,
        _architecture(machine),
        f"{machine.sms} {'SMs' if cuda else 'cores'}",
        f"{machine.memory_bytes / 2**30:.0f} GiB",
        f"torch {machine.torch}",
        f"triton {machine.triton}" if machine.triton else "no triton",
    ]
    return " · ".join(parts)


def _architecture(machine: "Machine") -> str:
    if machine.capability is None:
        return "CPU"
    major, minor = machine.capability
    return f"sm_{major}{minor}" if machine.cuda else f"capability {major}.{minor}"  # an AMD GPU has no sm_ number


def microseconds(value: float | None) -> str:
    """Three significant digits, in the unit that reads best; a dash for None."""
    if value is None:
        return "–"
    for limit, scale, unit in ((999.5, 1.0, "µs"), (999.5e3, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if value < limit:
            digits = f"{value / scale:.3g}"
            return f"{digits} {unit}"
    return "–"
