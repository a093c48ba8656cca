"""``python -m moe_dispatch.benchmarks``: measure, and report on what was measured."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from moe_dispatch.commands.bench import bench
from moe_dispatch.commands.console import print_json
from moe_dispatch.commands.group import CommandGroup
from moe_dispatch.commands.options import AsJson, MachineName

Rows = Annotated[list[Path], typer.Argument(help="JSON Lines files of rows, or folders of them.")]

app = typer.Typer(
    name="moe_dispatch.benchmarks",
    cls=CommandGroup,
    help="Measure whole MoE layers and report on the rows. Each result is checked against fp32 before it is timed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("run")(bench)


@app.command()
def score(rows: Rows) -> None:
    """Compare rows with the project's performance targets; exit status 1 if a target fails or is open."""
    from moe_dispatch.benchmarks.reports.scoreboard import scoreboard
    from moe_dispatch.benchmarks.row_files import load
    from moe_dispatch.benchmarks.targets import markdown

    loaded = load(rows)
    results = scoreboard(loaded)
    machine = loaded[0].machine if loaded else "no machine"
    typer.echo(f"{machine}, {len(loaded)} rows\n\n{markdown(results)}")
    if any(result.verdict != "pass" for result in results):
        raise typer.Exit(1)


@app.command()
def regret(
    rows: Rows,
    machine: MachineName = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="Instead: what a choice that does not know the routing loses under each.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Print what each policy's choices lose against the fastest candidate that was measured."""
    from moe_dispatch.benchmarks.reports.regret import bench_observations, by_routing, judge, summary
    from moe_dispatch.benchmarks.row_files import load
    from moe_dispatch.machine import Machine

    if routing:
        summaries = {name: summary(points) for name, points in by_routing(load(rows)).items()}
    else:
        measured_on = Machine.load(machine) if machine else Machine.inspect()
        judged = judge(bench_observations(load(rows), measured_on), measured_on)
        summaries = {policy: summary(points.values()) for policy, points in judged.items()}
    if json_:
        print_json(summaries)
        return
    subject = "routing" if routing else "policy"
    typer.echo(f"{subject:20}{'mean':>9}{'p95':>9}{'worst':>9}{'points':>8}{'unmeasured':>12}")
    for policy, figures in summaries.items():
        fractions = (figures[key] for key in ("mean", "p95", "worst"))
        regrets = "".join(f"{'–':>9}" if each is None else f"{each:>9.2%}" for each in fractions)
        typer.echo(f"{policy:20}{regrets}{figures['points']:>8}{figures['unmeasured']:>12}")


@app.command()
def plot(
    rows: Rows, out: Annotated[Path, typer.Option(help="Folder that the pictures are written to.")] = Path()
) -> None:
    """Draw time and fraction of the roofline against M, and the speed-up over vLLM."""
    from moe_dispatch.benchmarks.reports.plots import draw
    from moe_dispatch.benchmarks.row_files import load

    for path in draw(load(rows), out):
        typer.echo(path)


@app.command("tables")
def tables_command(
    rows: Rows,
    sweep: Annotated[
        list[Path] | None, typer.Option(help="Rows of a sweep: also the fastest backend by layer and M. Repeatable.")
    ] = None,
) -> None:
    """Print the tables of docs/performance.md and README.md, as Markdown, from rows of the suite `scoreboard`."""
    from moe_dispatch.benchmarks.reports.tables import tables
    from moe_dispatch.benchmarks.row_files import load

    made = tables(load(rows), load(sweep or ()))
    typer.echo("\n\n".join(f"## {title}\n\n{table}" for title, table in made.items()))


# A wheel leaves out the package `record`: these commands make the repository's own record.
if importlib.util.find_spec("moe_dispatch.benchmarks.record"):
    from moe_dispatch.benchmarks.record.commands import pack, project, ship

    for command in (pack, ship, project):
        app.command(rich_help_panel="The repository's record")(command)


if __name__ == "__main__":
    app()
