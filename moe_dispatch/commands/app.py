"""The commands of `moe-dispatch`, put together."""

from typing import Annotated, Final

import typer

from moe_dispatch.commands.bench import bench
from moe_dispatch.commands.calibrate import calibrate
from moe_dispatch.commands.calibration import calibration
from moe_dispatch.commands.demo import demo
from moe_dispatch.commands.doctor import doctor
from moe_dispatch.commands.explain import explain
from moe_dispatch.commands.fit import fit
from moe_dispatch.commands.group import CommandGroup

CONTEXT: Final = {"help_option_names": ["-h", "--help"]}


app = typer.Typer(
    cls=CommandGroup,
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
app.add_typer(calibration, name="calibration", context_settings=CONTEXT)
