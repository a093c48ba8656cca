"""`moe-dispatch bench`: whole-layer times, each behind a check against fp32, kept as JSON Lines."""

import datetime
import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe_dispatch.commands.console import ERR, INTERRUPTED, OUT, heading, machine_line, microseconds, table
from moe_dispatch.commands.options import dtype_of, modes_of, tokens_of
from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.problem import Mode

if TYPE_CHECKING:
    from moe_dispatch.benchmarks.rows import BenchRow
    from moe_dispatch.benchmarks.sweep import Configs, Plan, Sweep
    from moe_dispatch.machine import Machine
    from moe_dispatch.workloads import RoutingDistribution

TOKENS: Final = tuple(1 << power for power in range(15))  # 1 to 16384
ACCEPTANCE_MODELS: Final = ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A named model, E,topk,K,N or the path of a config.json; repeatable."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Token counts M, separated by commas.")] = ",".join(map(str, TOKENS)),
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp8, fp16 or fp32; repeatable.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend or a baseline; repeatable. All of both if left out; 'all': ours."),
    ] = None,
    config: Annotated[
        str, typer.Option(help="Of each backend: 'default', 'all', or 'chosen', which calibration found fastest.")
    ] = "default",
    mode: Annotated[str | None, typer.Option(help="graph, eager or both. On a CPU eager.")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="A routing distribution; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where rows go; a dated file for this machine if left out.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip the rows that --out (else the newest file) has.")
    ] = False,
    budget: Annotated[float | None, typer.Option(help="Start no further point after so many seconds.")] = None,
    seconds: Annotated[float, typer.Option(help="Of timing for each row.")] = 0.3,
    baselines: Annotated[bool, typer.Option(help="Run the baselines as their own users would.")] = True,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the rows next to their file.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON Lines instead of a table.")] = False,
) -> None:
    """Time whole MoE layers, right results only, beside the baselines; the rows can be resumed and plotted."""
    from moe_dispatch.benchmarks.baselines import BASELINES
    from moe_dispatch.benchmarks.sweep import Plan, available_backends
    from moe_dispatch.dispatch.process import get_dispatcher
    from moe_dispatch.registry import BACKENDS
    from moe_dispatch.workloads import workload

    dispatcher = get_dispatcher()
    machine = dispatcher.machine
    notes: list[str] = []
    ours, theirs = _chosen(backend, BACKENDS.names(), tuple(BASELINES), baselines=baselines)
    plan = Plan(
        workloads=tuple(map(workload, model or ACCEPTANCE_MODELS)),
        dtypes=tuple(dict.fromkeys(map(dtype_of, dtype or ("bf16", "fp8")))),
        tokens=tuple(sorted(set(tokens_of(tokens)))),
        routings=tuple(map(_routing, routing or ("uniform",))),
        modes=_modes(mode, machine),
        backends=available_backends(ours, dispatcher.machine, notes.append),
        baselines=tuple(BASELINES[name](machine) for name in theirs),
        configs=_configs(config),
        point_s=seconds,
        budget_s=budget,
    )
    path = out or _default_path(machine, resume=resume)
    if path.exists() and not resume:
        raise InvalidInputError(f"{path} exists already; --resume goes on with it, --out names another")
    _make_room(path)
    sweep = _sweep(plan, path, machine, notes, resume=resume)
    ERR.print(f"[bold]{escape(machine_line(machine))}[/bold]\n{escape(str(path))}")
    interrupted = False
    with _progress(sweep):
        try:
            sweep.run()
        except KeyboardInterrupt:
            interrupted = True
    _report(sweep, json_=json_)
    if plot and (rows := _rows(path)):
        from moe_dispatch.benchmarks.reports.plots import draw

        for drawn in draw(rows, path.parent):
            ERR.print(f"drew {escape(str(drawn))}")
    if interrupted:
        ERR.print(f"interrupted; {len(sweep.written)} rows are kept, --resume --out {escape(str(path))} goes on")
        raise typer.Exit(INTERRUPTED)


def _chosen(
    names: Sequence[str] | None, ours: tuple[str, ...], theirs: tuple[str, ...], *, baselines: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of backends and of baselines to run."""
    if not names:
        return ours, theirs if baselines else ()
    for name in names:
        if name not in ("all", *ours, *theirs):
            raise UnknownNameError("backend or baseline", name, ("all", *ours, *theirs))
    wanted = {*names, *(ours if "all" in names else ()), *(theirs if "all" in names and baselines else ())}
    return tuple(n for n in ours if n in wanted), tuple(n for n in theirs if n in wanted)


def _routing(name: str) -> "RoutingDistribution":
    from moe_dispatch.workloads import ROUTINGS

    if name not in ROUTINGS:
        raise UnknownNameError("routing distribution", name, tuple(ROUTINGS))
    return ROUTINGS[name]


def _configs(given: str) -> "Configs":
    choices: dict[str, Configs] = {"default": "default", "all": "all", "chosen": "chosen"}
    if given not in choices:
        raise InvalidInputError(f"--config must be {', '.join(choices)}, got {given!r}")
    return choices[given]


def _modes(given: str | None, machine: "Machine") -> tuple[Mode, ...]:
    on_gpu = machine.device == "cuda"
    modes = modes_of(given or ("both" if on_gpu else "eager"))
    if "graph" in modes and not on_gpu:
        raise InvalidInputError(f"--mode {given} needs a CUDA device, and this is {machine.name}; use --mode eager")
    return modes


def _default_path(machine: "Machine", *, resume: bool) -> Path:
    """In a checkout benchmarks/results/<machine>/, else here."""
    kept = Path("benchmarks", "results")
    folder = kept / machine.slug if kept.is_dir() else Path()
    if resume and (earlier := sorted(folder.glob("20*.jsonl"))):
        return earlier[-1]
    now = datetime.datetime.now(datetime.UTC)
    return folder / f"{now:%Y-%m-%d-%H%M%S}.jsonl"


def _make_room(path: Path) -> None:
    """Find out that rows cannot be written before any was measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise InvalidInputError(f"rows cannot be written to {path} ({error}); --out names another file") from error


def _sweep(plan: "Plan", path: Path, machine: "Machine", notes: list[str], *, resume: bool) -> "Sweep":
    import torch

    from moe_dispatch.benchmarks.rows import timed_keys
    from moe_dispatch.benchmarks.sweep import Provenance, Sweep

    with ERR.status("measuring the ceilings"):
        provenance = Provenance.here(machine)
    done = timed_keys(path) if resume else set()
    return Sweep(plan, path, torch.device(machine.device), provenance, done, notes=notes)


def _rows(path: Path) -> "list[BenchRow]":
    from moe_dispatch.benchmarks import rows

    return rows.load([path]) if path.exists() else []


@contextmanager
def _progress(sweep: "Sweep") -> Iterator[None]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=ERR, transient=True) as progress:
        task = progress.add_task("", total=sweep.plan.points)

        def advance(description: str | None) -> None:
            if description is None:
                progress.advance(task)
            else:
                progress.update(task, description=escape(description))

        sweep.advance = advance
        yield


def _report(sweep: "Sweep", *, json_: bool) -> None:
    """The rows as tables, fastest first within a point, and why others are missing."""
    if json_:
        for row in sweep.written:
            OUT.print(row.model_dump_json(), soft_wrap=True, markup=False)
    else:
        ordered = sorted(sweep.written, key=_order)
        for (layer, dtype), rows in itertools.groupby(ordered, key=lambda row: (row.workload, row.dtype)):
            heading(f"{layer} {dtype}")
            OUT.print(_table(list(rows)))
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in sweep.spent.items())
    ERR.print(f"[dim]{escape(spent)}[/dim]" if spent else "")
    for note in sweep.notes:
        ERR.print(f"[dim]no row: {escape(note)}[/dim]")


def _table(rows: "Sequence[BenchRow]") -> Table:
    shown = table(
        "M", "routing", "mode", "backend", "time", "of roofline", "error", numbers=("M", "of roofline", "error")
    )
    configs = {(row.backend, *row.config.items()) for row in rows}
    names = Counter(name for name, *_ in configs)
    for row in rows:
        shown.add_row(
            str(row.M),
            row.routing,
            row.mode,
            escape(_label(row) if names[row.backend] > 1 else row.backend),
            microseconds(row.us) if row.us is not None else f"[red]{escape(row.reason)}[/red]",
            f"{row.fraction:.2f}" if row.fraction is not None else "–",
            f"{row.error:.1e}" if row.error is not None else "–",
        )
    return shown


def _order(row: "BenchRow") -> tuple[str, str, int, str, str, float]:
    return row.workload, row.dtype, row.M, row.routing, row.mode, row.us if row.us is not None else float("inf")


def _label(row: "BenchRow") -> str:
    settings = ",".join(f"{name}={value}" for name, value in row.config.items())
    return f"{row.backend}({settings})" if settings else row.backend
