"""How every command prints: compact tables that read as well in a log without colours."""

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_dispatch.machine import Machine

OUT: Final = Console(highlight=False, soft_wrap=False)
ERR: Final = Console(highlight=False, stderr=True)
INTERRUPTED: Final = 130  # what a shell expects of a program that Ctrl-C ended


def table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """An unframed table with a rule under its headings.

    Args:
        *columns: Headings.
        numbers: Those of them that are set flush right.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        flush_right = column in numbers
        made.add_column(column, justify="right" if flush_right else "left", no_wrap=flush_right, overflow="fold")
    return made


def heading(text: str) -> None:
    """A bold line with space above."""
    OUT.print()
    OUT.print(f"[bold]{escape(text)}[/bold]")


def machine_line(machine: Machine) -> str:
    """``NVIDIA H200 · sm_90 · 132 SMs · 140 GiB · torch 2.11.0+cu130 · triton 3.6.0``."""
    cuda = machine.capability is not None
    parts = [
        machine.name,
        "sm_{}{}".format(*machine.capability) if machine.capability else "CPU",
        f"{machine.sms} {'SMs' if cuda else 'cores'}",
        f"{machine.memory_bytes / 2**30:.0f} GiB",
        f"torch {machine.torch}",
        f"triton {machine.triton}" if machine.triton else "no triton",
    ]
    return " · ".join(parts)


def microseconds(value: float | None) -> str:
    """Three significant digits, in the unit that reads best; a dash for None."""
    if value is None:
        return "–"
    for limit, scale, unit in ((1e3, 1.0, "µs"), (1e6, 1e3, "ms")):
        if value < limit:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e6:.3g} s"
