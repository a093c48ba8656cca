"""The command `moe-dispatch`."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from moe_dispatch.commands.bench import bench
from moe_dispatch.commands.calibrate import calibrate
from moe_dispatch.commands.console import ERR
from moe_dispatch.commands.demo import demo
from moe_dispatch.commands.doctor import doctor
from moe_dispatch.commands.explain import explain
from moe_dispatch.commands.fit import fit
from moe_dispatch.errors import MoEDispatchError

USAGE_ERROR = 2


class _Commands(TyperGroup):
    """Prints errors of ours as one red message instead of a traceback; foreign ones are bugs and surface."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoEDispatchError as error:
            ERR.print(f"[bold red]error:[/bold red] [red]{escape(str(error))}[/red]", soft_wrap=True)
            raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    help="Run Mixture-of-Experts layers on the fastest backend that this machine allows, and see why it was chosen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        typer.echo(f"moe-dispatch {importlib.metadata.version('moe-dispatch')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the command itself."""


for _command in (demo, doctor, explain, calibrate, fit, bench):
    app.command()(_command)
