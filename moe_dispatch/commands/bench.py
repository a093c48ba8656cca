"""`moe-dispatch bench`: times of whole layers, each behind a check against fp32, kept as JSON Lines."""

import datetime
import errno
import functools
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe_dispatch.commands.console import (
    ERR,
    INTERRUPTED,
    OUT,
    heading,
    machine_line,
    microseconds,
    plain,
    print_json,
    table,
)
from moe_dispatch.commands.options import (
    AsJson,
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
from moe_dispatch.errors import InvalidInputError, UnknownNameError
from moe_dispatch.problem import DType, Mode

if TYPE_CHECKING:
    from moe_dispatch.benchmarks.plan import BenchPlan, Configs
    from moe_dispatch.benchmarks.rows import BenchRow
    from moe_dispatch.benchmarks.sweep import Sweep
    from moe_dispatch.machine import Machine
    from moe_dispatch.workloads import Workload

TOKENS: Final = tuple(1 << power for power in range(15))  # 1 to 16384
MODELS: Final = ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")
DTYPES: Final[tuple[DType, ...]] = ("bf16", "fp8")
# Options whose values a suite brings.
SUITE_OPTIONS: Final = ("tp", "tokens", "backend", "config", "mode", "routing", "seconds", "baselines")


def bench(
    context: typer.Context,
    model: Models = None,
    tp: TensorParallel = 1,
    tokens: Annotated[str, typer.Option(help="Token counts M, separated by commas.")] = ",".join(map(str, TOKENS)),
    dtype: Dtypes = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend, a baseline or 'all'; repeatable. Default: all backends and baselines."),
    ] = None,
    config: Annotated[
        str,
        typer.Option(help="Configurations of each backend: 'default', 'all', or 'chosen', the calibration's choice."),
    ] = "default",
    mode: Annotated[str | None, typer.Option(help="graph, eager or both. Default: both; eager on a CPU.")] = None,
    routing: Routings = None,
    suite: Annotated[
        str | None, typer.Option(help="Run a named suite instead, such as 'scoreboard'; --model and --dtype narrow it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File that rows are added to. Default: a dated file for this machine.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with --out, else with the newest file: skip what was timed here."),
    ] = False,
    budget: Annotated[float | None, typer.Option(help="Start no further point after this many seconds.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing for each row.")] = 0.3,
    energy: Annotated[
        float, typer.Option(help="Also run each row for so many seconds and record joules per token; 0 not to.")
    ] = 0.0,
    baselines: Annotated[bool, typer.Option(help="Also run the baselines, as their own users would.")] = True,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the rows next to their file.")] = False,
    json_: AsJson = False,
) -> None:
    """Time whole MoE layers, correct results only, beside the baselines. Runs can be resumed and plotted.

    Without --model: deepseek-v3, qwen3-30b-a3b and mixtral-8x7b. Without --dtype: all. Without --routing: uniform.
    """
    from moe_dispatch.benchmarks.baselines import BASELINES
    from moe_dispatch.benchmarks.candidates import available_backends
    from moe_dispatch.benchmarks.plan import BenchPlan
    from moe_dispatch.dispatch.process import get_dispatcher
    from moe_dispatch.registry import BACKENDS
    from moe_dispatch.workloads import ROUTINGS

    deadline = math.inf if budget is None else time.perf_counter() + seconds_of("--budget", budget, zero=True)
    seconds_of("--seconds", seconds, zero=True)
    seconds_of("--energy", energy, zero=True)
    machine = get_dispatcher().machine
    notes: list[str] = []
    if suite is None:
        names, others = _runners(backend, BACKENDS.names(), tuple(BASELINES), with_baselines=baselines)
        plans = [
            BenchPlan(
                workloads=_workloads(model or MODELS, tp), dtypes=tuple(dtypes_of(dtype or DTYPES)),
                tokens=tuple(sorted(set(tokens_of(tokens)))),
                routings=tuple(ROUTINGS[name] for name in routing_names(routing or ("uniform",))),
                modes=_modes(mode, machine), configs=_configs(config), point_s=seconds,
                backends=available_backends(names, machine, notes.append),
                baselines=tuple(BASELINES[name](machine) for name in others),
            )
        ]  # fmt: skip
    else:
        _refuse_options_of_a_suite(context, suite)
        plans = _suite_plans(machine, notes, suite, model, dtype)
    path = out or _default_path(machine, resume=resume)
    if os.path.lexists(path) and not resume:
        raise InvalidInputError(f"{path} exists already; --resume goes on with it, --out names another")
    _check_writable(path)
    sweep = _sweep(path, machine, notes, deadline, energy, resume=resume)
    ERR.print(f"[bold]{plain(machine_line(machine))}[/bold]\n{plain(str(path))}")
    interrupted = False
    with _progress(sweep, sum(plan.points for plan in plans)):
        try:
            sweep.run(plans)
        except KeyboardInterrupt:
            interrupted = True
    _report(sweep, json_=json_)
    if plot and (rows := _rows(path)):
        from moe_dispatch.benchmarks.reports.plots import draw

        for drawn in draw(rows, path.parent):
            ERR.print(f"drew {plain(str(drawn))}")
    if interrupted:
        ERR.print(f"interrupted; {len(sweep.written)} rows are kept, --resume --out {plain(str(path))} goes on")
        raise typer.Exit(INTERRUPTED)


def _suite_plans(
    machine: "Machine", notes: list[str], name: str, models: Sequence[str] | None, dtypes: Sequence[str] | None
) -> "list[BenchPlan]":
    """The plans of a suite, over the backends that are available here."""
    from moe_dispatch.benchmarks.baselines import BASELINES
    from moe_dispatch.benchmarks.candidates import available_backends
    from moe_dispatch.benchmarks.suites import SUITES

    if name not in SUITES:
        raise UnknownNameError("suite", name, tuple(SUITES))
    if machine.device != "cuda":
        raise InvalidInputError(f"suites time CUDA graphs, which need a CUDA device; this is {machine.name}")
    suite = SUITES[name]
    backends = available_backends(suite.backends, machine, notes.append)
    return list(
        suite.plans(
            _workloads(models or suite.models),
            tuple(dtypes_of(dtypes or suite.dtypes)),
            {backend.name: backend for backend in backends},
            {baseline: BASELINES[baseline](machine) for baseline in suite.baselines},
        )
    )


def _refuse_options_of_a_suite(context: typer.Context, suite: str) -> None:
    for name in SUITE_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InvalidInputError(
                f"--{name} cannot be combined with --suite {suite}, which brings its own; leave one of the two out"
            )


def _workloads(names: Sequence[str], tp: int = 1) -> "tuple[Workload, ...]":
    from moe_dispatch.workloads import workload

    return tuple(workload(name).sharded(tp) for name in names)


def _runners(
    names: Sequence[str] | None, backends: tuple[str, ...], baselines: tuple[str, ...], *, with_baselines: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the backends and of the baselines to run."""
    if not names:
        return backends, baselines if with_baselines else ()
    for name in names:
        if name not in ("all", *backends, *baselines):
            raise UnknownNameError("backend or baseline", name, ("all", *backends, *baselines))
    wanted = set(names)
    if "all" in names:
        wanted |= {*backends, *(baselines if with_baselines else ())}
    return tuple(n for n in backends if n in wanted), tuple(n for n in baselines if n in wanted)


def _configs(text: str) -> "Configs":
    from moe_dispatch.benchmarks.plan import CONFIGS

    if text not in CONFIGS:
        raise InvalidInputError(f"--config must be one of {', '.join(CONFIGS)}, got {text!r}")
    return text


def _modes(text: str | None, machine: "Machine") -> tuple[Mode, ...]:
    on_gpu = machine.device == "cuda"
    modes = modes_of(text or ("both" if on_gpu else "eager"))
    if "graph" in modes and not on_gpu:
        raise InvalidInputError(f"--mode {text} needs a CUDA device, and this is {machine.name}; use --mode eager")
    return modes


def _default_path(machine: "Machine", *, resume: bool) -> Path:
    """A dated file in benchmarks/results/<machine>/ of a checkout, else in the working directory."""
    results = Path("benchmarks", "results")
    folder = results / machine.slug if results.is_dir() else Path()
    if resume and (earlier := sorted(folder.glob("20*.jsonl"))):
        return earlier[-1]
    now = datetime.datetime.now(datetime.UTC)
    return folder / f"{now:%Y-%m-%d-%H%M%S}.jsonl"


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise InvalidInputError(f"rows cannot be written to {path} ({error}); --out names another file") from error


def _sweep(
    path: Path, machine: "Machine", notes: list[str], deadline: float, energy_s: float, *, resume: bool
) -> "Sweep":
    import torch

    from moe_dispatch.benchmarks.provenance import Provenance
    from moe_dispatch.benchmarks.row_files import timed_keys
    from moe_dispatch.benchmarks.sweep import Sweep
    from moe_dispatch.measure.energy import energy_meter, joules_per_call

    with ERR.status("measuring the ceilings"):
        provenance = Provenance.here(machine)
    energy = None
    if energy_s > 0:
        meter = energy_meter(torch.device(machine.device))
        if isinstance(meter, str):
            notes.append(meter)
        else:
            energy = functools.partial(joules_per_call, meter=meter, seconds=energy_s)
    done = timed_keys(path, machine.fingerprint) if resume else set()
    return Sweep(path, provenance, done, deadline, notes=notes, energy=energy)


def _rows(path: Path) -> "list[BenchRow]":
    from moe_dispatch.benchmarks.row_files import load

    return load([path]) if os.path.exists(path) else []


@contextmanager
def _progress(sweep: "Sweep", points: int) -> Iterator[None]:
    """Show which point is measured: a bar on a terminal, one line per point anywhere else."""
    if not ERR.is_terminal:
        begin = time.perf_counter()

        def print_line(description: str | None) -> None:
            if description is not None:
                ERR.print(f"{time.perf_counter() - begin:4.0f} s  {plain(description)}")

        sweep.advance = print_line
        yield
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=ERR, transient=True) as progress:
        task = progress.add_task("", total=points)

        def advance(description: str | None) -> None:
            if description is None:
                progress.advance(task)
            else:
                progress.update(task, description=plain(description))

        sweep.advance = advance
        yield


def _report(sweep: "Sweep", *, json_: bool) -> None:
    """Print the rows as tables, the fastest first within a point, and the reasons why others are missing."""
    if json_:
        for row in sweep.written:
            print_json(row.model_dump(mode="json"), indent=None)
    else:
        ordered = sorted(sweep.written, key=_order)
        for (layer, dtype), rows in itertools.groupby(ordered, key=lambda row: (row.workload, row.dtype)):
            heading(f"{layer} {dtype}")
            OUT.print(_table(list(rows)))
    ERR.print(f"[dim]{plain(str(sweep.stopwatch))}[/dim]")
    for note in sweep.notes:
        ERR.print(f"[dim]note: {plain(note)}[/dim]")


def _table(rows: "Sequence[BenchRow]") -> Table:
    energy = ("energy per token",) if any(row.joules_per_token is not None for row in rows) else ()
    numbers = ("M", "of roofline", *energy, "error")
    shown = table("M", "routing", "mode", "backend", "time", "of roofline", *energy, "error", numbers=numbers)
    configs = {(row.backend, *row.config.items()) for row in rows}
    names = Counter(name for name, *_ in configs)
    for row in rows:
        shown.add_row(
            str(row.M),
            row.routing,
            row.mode,
            plain(_label(row) if names[row.backend] > 1 else row.backend),
            microseconds(row.us) if row.us is not None else f"[red]{plain(row.reason)}[/red]",
            f"{row.fraction:.2f}" if row.fraction is not None else "–",
            *([f"{1e3 * row.joules_per_token:.3g} mJ" if row.joules_per_token is not None else "–"] * len(energy)),
            f"{row.error:.1e}" if row.error is not None else "–",
        )
    return shown


def _order(row: "BenchRow") -> tuple[str, str, int, str, str, float]:
    return row.workload, row.dtype, row.M, row.routing, row.mode, row.us if row.us is not None else float("inf")


def _label(row: "BenchRow") -> str:
    settings = ",".join(f"{name}={value}" for name, value in row.config.items())
    return f"{row.backend}({settings})" if settings else row.backend
