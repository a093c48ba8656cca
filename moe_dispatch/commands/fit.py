"""`moe-dispatch fit`: learn from what was measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from moe_dispatch.commands.console import OUT, heading, table
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_dispatch.policies.learned.fit import Observation
    from moe_dispatch.policies.learned.policy import ModelFile


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
    from moe_dispatch.benchmarks.reports.regret import bench_observations
    from moe_dispatch.benchmarks.row_files import load
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.learned.fit import fit_model, observations, save_model
    from moe_dispatch.policies.learned.policy import model_path
    from moe_dispatch.policies.measurements.schema import read_calibration

    where = Machine.load(machine) if machine else Machine.inspect()
    if rows:
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
    _show_laws(model)
    _show_regrets(seen, where)
    OUT.print(f"written to {escape(str(path))}")


def _show_laws(model: "ModelFile") -> None:
    from moe_dispatch.policies.learned.cost_model import TERMS

    for dtype, mode in sorted({(law.dtype, law.mode) for law in model.laws}):
        laws = [law for law in model.laws if (law.dtype, law.mode) == (dtype, mode)]
        heading(f"{dtype}, {mode}: how often each backend does each part of the work")
        shown = table("backend", *TERMS, numbers=TERMS)
        for law in laws:
            shown.add_row(
                law.backend, *(f"{value:.3g}" if (value := law.coefficients[term]) else "–" for term in TERMS)
            )
        OUT.print(shown)
        fitted = (f"{law.backend} {law.error:.1%} at {law.points} points" for law in laws)
        OUT.print(f"median errors: {', '.join(fitted)}")
    OUT.print()
    OUT.print("launch: µs. search: 10 ns an expert. weights: read at 4.3 TB/s. tiles: of 64")
    OUT.print("rows, multiplied at 700 TFLOP/s, FP8 at 1300. overlap: the longer of weights and")
    OUT.print("tiles of 128 rows. slots, tokens: M·topk and M rows moved at 4.3 TB/s.")


def _show_regrets(seen: "Sequence[Observation]", machine: Machine) -> None:
    from moe_dispatch.benchmarks.reports.regret import judge, summary

    heading("what is lost against the best of everything measured")
    try:
        judged = judge(seen, machine)
    except InvalidInputError as error:
        OUT.print(f"not known: {escape(str(error))}")
        return
    numbers = ("mean", "p95", "worst", "points")
    shown = table("dtype", "mode", "policy", *numbers, numbers=numbers)
    for dtype, mode in sorted({(row.problem.dtype, row.problem.mode) for row in seen}):
        for name in ("learned", "rules"):
            mine = (one for problem, one in judged[name].items() if (problem.dtype, problem.mode) == (dtype, mode))
            found = summary(mine)
            losses = (f"{found[key]:.1%}" for key in ("mean", "p95", "worst"))
            shown.add_row(dtype, mode, name, *losses, str(found["points"]))
    OUT.print(shown)
    OUT.print("Each layer's choices are made from the other models' layers alone.")
