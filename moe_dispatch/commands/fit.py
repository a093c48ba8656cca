"""`moe-dispatch fit`: fit the learned policy to measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_dispatch.commands.console import OUT, heading, line, plain, print_json, table
from moe_dispatch.commands.options import AsJson, MachineName
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_dispatch.machine import Machine
    from moe_dispatch.policies.learned.fit import Observation
    from moe_dispatch.policies.learned.policy import ModelFile


def fit(
    rows: Annotated[
        list[Path] | None, typer.Argument(help="Rows of `bench`; this machine's calibration by default.")
    ] = None,
    machine: MachineName = None,
    out: Annotated[Path | None, typer.Option(help="File to write; this machine's own model by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit the learned policy, and print its cost models and what its choices lose."""
    from moe_dispatch.benchmarks.reports.regret import bench_observations
    from moe_dispatch.benchmarks.row_files import load
    from moe_dispatch.machine import Machine
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.learned.fit import fit_model, observations, save_model
    from moe_dispatch.policies.learned.policy import model_path
    from moe_dispatch.policies.measurements.schema import read_calibration

    measured_on = Machine.load(machine) if machine else Machine.inspect()
    if rows:
        observed = bench_observations(load(rows), measured_on)
    else:
        try:
            observed = observations(read_calibration(calibration_path(measured_on), measured_on))
        except FileNotFoundError as error:
            raise InvalidInputError(
                "this machine has no calibration to learn from; run `moe-dispatch calibrate`, or give rows of `bench`"
            ) from error
    model = fit_model(observed, measured_on)
    path = out or model_path(measured_on)
    save_model(model, path)
    if as_json:
        losses, why = _losses(observed, measured_on)
        report = {"path": str(path), "model": model.model_dump(mode="json"), "losses": losses, "unknown": why}
        print_json(report)
        return
    _show_cost_models(model)
    _show_losses(*_losses(observed, measured_on))
    line(f"written to {plain(path)}")


def _show_cost_models(model: "ModelFile") -> None:
    from moe_dispatch.policies.learned.cost_model import TERMS

    for dtype, mode in sorted({(one.dtype, one.mode) for one in model.cost_models}):
        cost_models = [one for one in model.cost_models if (one.dtype, one.mode) == (dtype, mode)]
        heading(f"{dtype}, {mode}: how often each backend does each part of the work")
        rows = table("backend", *TERMS, numbers=TERMS)
        for one in cost_models:
            rows.add_row(
                plain(one.backend), *(f"{value:.3g}" if (value := one.coefficients[term]) else "–" for term in TERMS)
            )
        OUT.print(rows)
        errors = (f"{one.backend} {one.error:.1%} at {one.points} points" for one in cost_models)
        line(f"median errors: {', '.join(errors)}")
    OUT.print()
    OUT.print("launch: 1 µs. search: 10 ns per expert. weights: read at 4.3 TB/s.")
    OUT.print("roofline: √(weights² + products²), products being those of all rows at 700 TFLOP/s, in FP8 at 1300.")
    OUT.print("tokens: M rows of K columns, moved at 4.3 TB/s.")


def _losses(observed: "Sequence[Observation]", machine: "Machine") -> tuple[list[dict[str, Any]], str]:
    """What each policy's choices lose against the fastest, by dtype and mode; and why that is unknown, if it is."""
    from moe_dispatch.benchmarks.reports.regret import judge, summary

    try:
        judged = judge(observed, machine)
    except InvalidInputError as error:
        return [], str(error)
    kinds = sorted({(row.problem.dtype, row.problem.mode) for row in observed})
    return [
        {"dtype": dtype, "mode": mode, "policy": policy}
        | summary(one for problem, one in judged[policy].items() if (problem.dtype, problem.mode) == (dtype, mode))
        for dtype, mode in kinds
        for policy in ("learned", "rules")
    ], ""


def _show_losses(losses: "Sequence[dict[str, Any]]", why: str) -> None:
    heading("loss against the fastest of everything measured")
    if why:
        line(f"unknown: {plain(why)}")
        return
    numbers = ("mean", "p95", "worst", "points")
    rows = table("dtype", "mode", "policy", *numbers, numbers=numbers)
    for loss in losses:
        fractions = ("–" if loss[key] is None else f"{loss[key]:.1%}" for key in ("mean", "p95", "worst"))
        rows.add_row(loss["dtype"], loss["mode"], loss["policy"], *fractions, str(loss["points"]))
    OUT.print(rows)
    line("For each layer the learned policy was fitted without that layer's model.")
