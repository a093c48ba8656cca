"""The command `moe-dispatch`."""

from typing import Annotated

import typer

from moe_dispatch.commands.bench import bench
from moe_dispatch.commands.calibrate import calibrate
from moe_dispatch.commands.demo import demo
from moe_dispatch.commands.doctor import doctor
from moe_dispatch.commands.explain import explain
from moe_dispatch.commands.fit import fit
from moe_dispatch.commands.group import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
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
