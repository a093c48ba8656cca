"""How every command of this package reports errors."""

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Final

import typer
from typer.core import TyperGroup

from moe_dispatch.commands.console import ERR, drop_unusable_sizes, json_alone, plain, prepare_streams
from moe_dispatch.errors import MoEDispatchError, MoEDispatchWarning

USAGE_ERROR: Final = 2


# The exit status that a shell expects of a program whose reader, such as `head`, has left.
PIPE_CLOSED: Final = 141
# What writing to a file or terminal that takes no more raises.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class CommandGroup(TyperGroup):
    """Prints a `MoEDispatchError` as one red message, with exit status 2; any other exception is a bug and surfaces.

    Output that cannot be written is said with exit status 1; where its reader has left, `PIPE_CLOSED` alone says so.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run a command line; see `click.Command.main`."""
        drop_unusable_sizes()
        prepare_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            # Where a file of ours cannot be written, the error names it, or became a `MoEDispatchError`.
            if error.filename is not None or error.errno not in _FULL:
                raise
            _forget_stdout()
            _print_error(f"the output cannot be written: {error.strerror}")
            sys.exit(1)
        except SystemExit as leaving:
            # Typer and rich both end with 1 then, which here means that something is wrong.
            if isinstance(leaving.__context__, BrokenPipeError):
                leaving.code = PIPE_CLOSED
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run a command; see `click.Group.invoke`."""
        try:
            with json_alone() if "--json" in ctx.args else contextlib.nullcontext(), _warnings_as_messages():
                return super().invoke(ctx)
        except MoEDispatchError as error:
            _print_error(str(error))
            raise typer.Exit(USAGE_ERROR) from error


@contextlib.contextmanager
def _warnings_as_messages() -> Iterator[None]:
    """Print this package's warnings as its errors are: the line of code that led to one is no line of the reader's."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any
    ) -> None:
        if issubclass(category, MoEDispatchWarning):
            ERR.print(f"[bold yellow]warning:[/bold yellow] {plain(message)}", soft_wrap=True)
        else:
            show_others(message, category, filename, lineno, *rest, **named)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _print_error(text: str) -> None:
    ERR.print(f"[bold red]error:[/bold red] [red]{plain(text)}[/red]", soft_wrap=True)


def _forget_stdout() -> None:
    """Let go of what stdout could not take, which the end of the process would try to write again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
