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
) -> None:
    """Fit the learned policy, and print what it learned and how well."""
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.cost_model import TERMS
    from moe_dispatch.policies.fit import fit_model, observations, save_model
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
    path = save_model(model, where)
    heading(f"learned from {len(seen)} measurements")
    shown = table("candidate", "dtype", "mode", "rows", "error", *TERMS, numbers=("rows", "error", *TERMS))
    for one in sorted(model.models, key=lambda one: (one.dtype, one.mode, one.backend)):
        options = ", ".join(f"{name}={value}" for name, value in one.config.items())
        name = one.backend + (f" ({options})" if options else "")
        coefficients = [f"{value:.3g}" for value in one.coefficients]
        shown.add_row(escape(name), one.dtype, one.mode, str(one.rows), f"{one.error:.1%}", *coefficients)
    OUT.print(shown)
    OUT.print(f"written to {escape(str(path))}")
