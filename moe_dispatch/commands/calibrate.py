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
    model: Annotated[list[str] | None, typer.Option(help="Name or E,topk,K,N; may be repeated.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="config.json of a Hugging Face model.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32 or fp8; may be repeated.")] = None,
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "",
    budget: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Measure only this backend; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a candidate counts as hung.")] = 60.0,
    mode: Annotated[str, typer.Option(help="graph, eager or both.")] = "both",
    routing: Annotated[
        list[str] | None, typer.Option(help="Routing distribution; uniform and dirichlet-4 by default.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Only compile what would be measured, for a later run.")
    ] = False,
    configs: Annotated[int | None, typer.Option(min=1, help="Most configurations per backend.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few token counts and configurations.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what was measured with today's versions.")
    ] = False,
) -> None:
    """Measure backends and configurations on this machine, and keep which is fastest at which token count."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    from moe_dispatch.policies.calibration.calibrate import DEFAULT_ROUTINGS, Progress
    from moe_dispatch.policies.calibration.calibrate import calibrate as measure

    models = [*(model or []), *map(str, config or [])]
    if not models:
        raise InvalidInputError("calibrate needs --model NAME or --config FILE; both may be given several times")
    dtypes = [dtype_of(name) for name in dtype or ["bf16"]]
    counts = tokens_of(tokens) if tokens else None
    modes = modes_of(mode) if mode != "both" else None  # every mode that the device has
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=ERR) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(progress: Progress) -> None:
            left = "" if progress.left_s is None else f"{progress.left_s:.0f} s left"
            bar.update(
                task, completed=progress.done, total=progress.total, description=escape(progress.what), left=left
            )
            if not ERR.is_terminal and progress.what != "compiling":  # a bar shows in a terminal only
                ERR.print(escape(f"{progress.done}/{progress.total} {progress.what} {left}".rstrip()))

        report = measure(
            models, dtypes, tokens=counts, budget_s=budget, quick=quick, resume=resume,
            device=device, backends=backend, timeout_s=timeout, most_configs=configs,
            on_progress=show, modes=modes, routings=routing or DEFAULT_ROUTINGS, compile_only=compile_only,
        )  # fmt: skip
    failure = "" if compile_only or report.interrupted else report.failure()
    _print(report, "compiled" if compile_only else "nothing was measured" if failure else "calibrated")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if failure:
        ERR.print(f"[red]error:[/red] {escape(failure)}")
        raise typer.Exit(1)


def _print(report: "CalibrationReport", state: str) -> None:
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
        for (backend, reason), (layer, M) in reasons.items():
            OUT.print(f"{escape(backend)} at M={M} of {layer}: {escape(reason or '')}")
    for name, reason in report.unavailable.items():
        OUT.print(f"[dim]not here: {escape(name)}: {escape(reason)}[/dim]")
    for note in report.skipped:
        OUT.print(f"[yellow]skipped[/yellow] {escape(note)}")
    if report.interrupted:
        state = "stopped; what was measured is kept"
    points = len({one.point for one in report.measured})
    spent = ", ".join(
        f"{_WORK.get(what, what)} {seconds:.0f}" for what, seconds in report.spent.items() if seconds > 0.5
    )
    OUT.print(
        f"\n{state}: {len(report.measured)} measurements at {points} points in {report.seconds:.0f} s"
        f"{f' ({spent})' if spent else ''}, {escape(str(report.path))}"
    )
