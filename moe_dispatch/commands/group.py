"""How every command of this package reports errors."""

from typing import Any, Final

import typer
from typer.core import TyperGroup

from moe_dispatch.commands.console import ERR, drop_unusable_sizes, plain, prepare_streams
from moe_dispatch.errors import MoEDispatchError

USAGE_ERROR: Final = 2


class CommandGroup(TyperGroup):
    """Prints a `MoEDispatchError` as one red message, with exit status 2; any other exception is a bug and surfaces."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run a command line; see `click.Command.main`."""
        drop_unusable_sizes()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; see `click.Group.invoke`."""
        prepare_streams()
        try:
            return super().invoke(ctx)
        except MoEDispatchError as error:
            ERR.print(f"[bold red]error:[/bold red] [red]{plain(error)}[/red]", soft_wrap=True)
            raise typer.Exit(USAGE_ERROR) from error
