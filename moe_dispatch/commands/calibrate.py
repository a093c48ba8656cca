"""`moe-dispatch calibrate`: measure this machine once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape

from moe_dispatch.commands.console import ERR, INTERRUPTED, OUT, heading, microseconds, table
from moe_dispatch.commands.options import dtype_of, modes_of, tokens_of
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_dispatch.policies.calibration.calibrate import CalibrationReport


# Kinds of requests to the worker, as the summary names them.
_WORK: Final = {
    "start": "start", "layer": "weights", "point": "inputs and fp32 references", "launch": "first runs",
    "check": "checks", "time": "timing",
}  # fmt: skip


def calibrate(
    model: Annotated[list[str] | None, typer.Option(help="Name or E,topk,K,N; several times for several.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="config.json of a Hugging Face model.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32 or fp8; several times for several.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "",
    budget: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only these backends.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a candidate counts as hung.")] = 60.0,
    mode: Annotated[str, typer.Option(help="graph, eager or both.")] = "both",
    routing: Annotated[
        list[str] | None, typer.Option(help="A routing distribution; uniform and dirichlet-4 if none is named.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Only compile what would be measured, for a later run.")
    ] = False,
    configs: Annotated[int | None, typer.Option(min=1, help="Of each backend at most, the likeliest first.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few token counts and configurations.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what was measured with today's versions.")
    ] = False,
) -> None:
    """Measure every backend and configuration on this machine, and remember which is fastest for what."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    from moe_dispatch.policies.calibration.calibrate import DEFAULT_ROUTINGS, Progress
    from moe_dispatch.policies.calibration.calibrate import calibrate as measure

    models = [*(model or []), *map(str, config or [])]
    if not models:
        raise InvalidInputError("calibrate needs --model NAME or --config FILE; both may be given several times")
    dtypes = [dtype_of(name) for name in dtype or ["bf16"]]
    counts = tokens_of(tokens) if tokens else None
    modes = modes_of(mode) if mode != "both" else None  # whatever there is here
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=ERR) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(progress: Progress) -> None:
            left = "" if progress.left_s is None else f"{progress.left_s:.0f} s left"
            bar.update(
                task, completed=progress.done, total=progress.total, description=escape(progress.what), left=left
            )

        report = measure(
            models, dtypes, tokens=counts, budget_s=budget, quick=quick, resume=resume,
            device=device, backends=backend, timeout_s=timeout, most_configs=configs,
            on_progress=show, modes=modes, routings=routing or DEFAULT_ROUTINGS, compile_only=compile_only,
        )  # fmt: skip
    _print(report)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not (report.measured or report.skipped or compile_only or resume):
        ERR.print("[red]no backend here takes it[/red]; `moe-dispatch explain` says what speaks against each")
        raise typer.Exit(1)


def _print(report: "CalibrationReport") -> None:
    for (layer, mode), winners in report.winners().items():
        heading(f"{layer} ({mode})")
        rows = table("M", "fastest", "time", numbers=("M", "time"))
        for M, ((backend, config), us) in winners.items():
            options = ", ".join(f"{name}={value}" for name, value in config)
            rows.add_row(str(M), escape(backend + (f"  {options}" if options else "")), microseconds(us))
        OUT.print(rows)
    disqualified = report.disqualified()
    if disqualified:
        heading("disqualified")
        reasons = {(one.candidate.backend, one.disqualified): (str(one.layer), one.M) for one in disqualified}
        for (backend, why), (layer, M) in reasons.items():
            OUT.print(f"{escape(backend)} at M={M} of {layer}: {escape(why or '')}")
    for name, why in report.unavailable.items():
        OUT.print(f"[dim]not here: {escape(name)}: {escape(why)}[/dim]")
    for note in report.skipped:
        OUT.print(f"[yellow]skipped[/yellow] {escape(note)}")
    state = "stopped; what was measured is kept" if report.interrupted else "calibrated"
    points = len({(one.layer.key, one.M, one.mode) for one in report.measured})
    spent = ", ".join(
        f"{_WORK.get(what, what)} {seconds:.0f}" for what, seconds in report.spent.items() if seconds > 0.5
    )
    OUT.print(
        f"\n{state}: {len(report.measured)} measurements at {points} points in {report.seconds:.0f} s"
        f"{f' ({spent})' if spent else ''}, {escape(str(report.path))}"
    )
