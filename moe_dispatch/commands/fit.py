"""`moe-dispatch fit`: learn from what was measured."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from moe_dispatch.commands.console import OUT, heading, table
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine


def fit(
    rows: Annotated[
        list[Path] | None, typer.Argument(help="Rows of `bench`; this machine's calibration if none.")
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(help="Machine that the rows come from, as JSON; this one if none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where it is written; this machine's own model if none.")] = None,
) -> None:
    """Fit the learned policy, and print what it learned and how well."""
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.fit import fit_model, observations, save_model
    from moe_dispatch.policies.learned import model_path
    from moe_dispatch.policies.neighbours import FEATURES
    from moe_dispatch.policies.schema import read_calibration

    where = Machine.load(machine) if machine else Machine.inspect()
    if rows:
        from moe_dispatch.benchmarks.regret import bench_observations
        from moe_dispatch.benchmarks.rows import load

        seen = bench_observations(load(rows), where)
    else:
        try:
            seen = observations(read_calibration(calibration_path(where), where))
        except FileNotFoundError as error:
            raise InvalidInputError(
                "this machine has no calibration to learn from; run `moe-dispatch calibrate`, or give rows of `bench`"
            ) from error
    model = fit_model(seen, where)
    path = out or model_path(where)
    save_model(model, path)
    heading(f"learned from {len(seen)} measurements")
    shown = table("dtype", "mode", "layers", "points", "mean loss", "worst", *FEATURES, numbers=("points", *FEATURES))
    for group in model.groups:
        lost = [f"{value:.1%}" for value in group.regret] if group.regret else ["–", "–"]
        scales = ["–" if scale is None else f"{scale:g}" for scale in group.scales]
        shown.add_row(group.dtype, group.mode, str(group.layers), str(len(group.points)), *lost, *scales)
    OUT.print(shown)
    OUT.print("Losses are those of each layer's choices when they are made from the other layers alone. The last four")
    OUT.print("columns say how many octaves apart in each a measured layer still counts; a dash: it does not matter.")
    OUT.print(f"written to {escape(str(path))}")
