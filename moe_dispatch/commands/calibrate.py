"""`moe-dispatch calibrate`: measure this machine once."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moe_dispatch.commands.console import ERR, INTERRUPTED, OUT, heading, line, microseconds, plain, print_json, table
from moe_dispatch.commands.options import (
    AsJson,
    Backends,
    Budget,
    Device,
    Dtypes,
    Models,
    Routings,
    TensorParallel,
    dtypes_of,
    modes_of,
    routing_names,
    seconds_of,
    tokens_of,
)
from moe_dispatch.commands.progress import progress
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_dispatch.policies.calibration.calibrate import CalibrationReport, Progress


# Kinds of requests to the worker, as the summary names them.
_WORK: Final = {
    "start": "start", "layer": "weights", "point": "inputs and fp32 references", "launch": "first runs",
    "check": "checks", "time": "timing",
}  # fmt: skip


def calibrate(
    model: Models = None,
    dtype: Dtypes = None,
    tp: TensorParallel = 1,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Token counts M, comma-separated; powers of two up to 16384 by default.")
    ] = "",
    mode: Annotated[str, typer.Option("--mode", help="graph, eager or both; a CPU has eager alone.")] = "both",
    backend: Backends = None,
    routing: Routings = None,
    device: Device = None,
    budget: Budget = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which a candidate counts as hung.")] = 60.0,
    energy: Annotated[
        float, typer.Option("--energy", help="Also measure each finalist's energy for so many seconds; 0 not to.")
    ] = 0.0,
    max_configs: Annotated[
        int | None,
        typer.Option("--max-configs", min=1, help="Measure at most this many configurations of a backend."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few token counts and configurations.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what today's versions have measured.")] = False,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Only compile what would be measured, for a later run.")
    ] = False,
    parallel: Annotated[
        bool,
        typer.Option(
            "--parallel",
            help="Under torchrun: measure the links between the ranks, and layers spread over them by each exchange.",
        ),
    ] = False,
    division: Annotated[
        list[str] | None,
        typer.Option(
            "--division",
            help="With --parallel: divide each layer by experts (the default) or by columns; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every backend and configuration on this machine, and remember which is fastest for what.

    --model must be given. Without --dtype: bf16. Without --routing: uniform and dirichlet-4.
    """
    from moe_dispatch.policies.calibration.calibrate import DEFAULT_ROUTINGS
    from moe_dispatch.policies.calibration.calibrate import calibrate as measure
    from moe_dispatch.workloads import workload

    if not model:
        raise InvalidInputError("calibrate needs --model, a name or the path of a config.json; it may be repeated")
    layers = [workload(each).sharded(tp) for each in model]
    dtypes = dtypes_of(dtype or ["bf16"])
    counts = tokens_of(tokens) if tokens else None
    modes = None if mode == "both" else modes_of(mode)
    routings = routing_names(routing) if routing else DEFAULT_ROUTINGS
    budget_s = None if budget is None else seconds_of("--budget", budget)
    timeout_s = seconds_of("--timeout", timeout)
    seconds_of("--energy", energy, zero=True)
    if parallel:
        from moe_dispatch.commands.parallel import calibrate_ranks

        if mode != "both" or backend or routing or max_configs or quick or resume or compile_only or energy:
            raise InvalidInputError(
                "--parallel goes with --model, --dtype, --tp, --tokens, --division, --device, --budget, --timeout and "
                "--json alone"
            )
        pairs = [(layer, each) for layer in layers for each in dtypes]
        calibrate_ranks(pairs, counts, device, budget_s, timeout_s, divisions=division or ["experts"], as_json=as_json)
        return
    if division:
        raise InvalidInputError("--division is about layers that are spread over ranks; give --parallel, too")
    with progress() as show:

        def on_progress(progress: "Progress") -> None:
            show(progress.what, progress.done, progress.total, progress.left_s)

        report = measure(
            layers, dtypes, tokens=counts, budget_s=budget_s, quick=quick, resume=resume,
            device=device, backends=backend, timeout_s=timeout_s, most_configs=max_configs,
            on_progress=on_progress, modes=modes, routings=routings, compile_only=compile_only, energy_s=energy,
        )  # fmt: skip
    if as_json:
        print_json(_to_dict(report))
    else:
        _print(report, compile_only=compile_only)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if failure := "" if compile_only else report.failure():
        ERR.print(f"[red]error:[/red] {plain(failure)}", soft_wrap=True)
        raise typer.Exit(1)


def _to_dict(report: "CalibrationReport") -> dict[str, Any]:
    winners = [
        {"layer": layer, "mode": mode, "M": M, "backend": backend, "config": dict(config), "us": us}
        for (layer, mode), by_tokens in report.winners().items()
        for M, ((backend, config), us) in by_tokens.items()
    ]
    disqualified = [
        {
            "layer": str(each.layer), "mode": each.mode, "M": each.M, "backend": each.candidate.backend,
            "config": dict(each.candidate.config), "reason": each.disqualified,
        }
        for each in report.disqualified()
    ]  # fmt: skip
    return {
        "path": str(report.path), "winners": winners, "disqualified": disqualified, "unavailable": report.unavailable,
        "skipped": report.skipped, "interrupted": report.interrupted, "seconds": report.seconds, "spent": report.spent,
    }  # fmt: skip


def _print(report: "CalibrationReport", *, compile_only: bool) -> None:
    joules = {(str(one.layer), one.mode, one.M, one.candidate.identity): one.joules for one in report.measured}
    energy = ("energy per token",) if any(joules.values()) else ()
    for (layer, mode), winners in report.winners().items():
        heading(f"{layer} ({mode})")
        rows = table("M", "fastest", "time", *energy, "configuration", numbers=("M", "time", *energy))
        for M, ((backend, config), us) in winners.items():
            options = ", ".join(f"{name}={value}" for name, value in config)
            each = joules[layer, mode, M, (backend, config)]
            per_token = [f"{1e3 * each / M:.3g} mJ" if each else "–"] * len(energy)
            rows.add_row(str(M), plain(backend), microseconds(us), *per_token, plain(options))
        OUT.print(rows)
    if disqualified := report.disqualified():
        heading("disqualified")
        reasons = {(each.candidate.backend, each.disqualified): (str(each.layer), each.M) for each in disqualified}
        for (backend, why), (layer, M) in reasons.items():
            line(f"{plain(backend)} at M={M} of {plain(layer)}: {plain(why or '')}")
    for name, why in report.unavailable.items():
        line(f"[dim]cannot run: {plain(name)}: {plain(why)}[/dim]")
    for note in report.skipped:
        line(f"[yellow]skipped[/yellow] {plain(note)}")
    points = len({measurement.point for measurement in report.measured})
    spent = ", ".join(
        f"{_WORK.get(what, what)} {seconds:.0f}" for what, seconds in report.spent.items() if seconds > 0.5
    )
    took = f"{report.seconds:.0f} s{f' ({spent})' if spent else ''}"
    OUT.print()
    if compile_only:
        line(f"compiled in {took}")
    elif not report.measured:
        line(f"measured nothing in {took}")
    else:
        state = "stopped, and what was measured is kept" if report.interrupted else "calibrated"
        line(f"{state}: {len(report.measured)} measurements at {points} points in {took}, {plain(report.path)}")
