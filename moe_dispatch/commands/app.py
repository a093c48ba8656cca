"""The commands of `moe-dispatch`, put together."""

from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from moe_dispatch.commands.bench import bench
from moe_dispatch.commands.calibrate import calibrate
from moe_dispatch.commands.console import ERR, accept_any_encoding, plain
from moe_dispatch.commands.demo import demo
from moe_dispatch.commands.doctor import doctor
from moe_dispatch.commands.explain import explain
from moe_dispatch.commands.fit import fit
from moe_dispatch.errors import MoEDispatchError

USAGE_ERROR: Final = 2
CONTEXT: Final = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Prints errors of this package as one red message; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        accept_any_encoding()
        try:
            return super().invoke(ctx)
        except MoEDispatchError as error:
            ERR.print(f"[bold red]error:[/bold red] [red]{plain(error)}[/red]", soft_wrap=True)
            raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    help="Run Mixture-of-Experts layers on the fastest backend that this machine allows, and see why it was chosen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)


def _version(wanted: bool) -> None:
    if wanted:
        from moe_dispatch.system.version import installed_version

        typer.echo(f"moe-dispatch {installed_version()}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the command itself."""


for _command in (demo, doctor, explain, calibrate, fit, bench):
    app.command(context_settings=CONTEXT)(_command)
