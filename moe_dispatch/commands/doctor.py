"""`moe-dispatch doctor`: what is here, what is missing, and how to get it."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.markup import escape

from moe_dispatch.commands.console import OUT, heading, machine_line, table
from moe_dispatch.dispatch.backend_pool import BackendStatus
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.dispatch.quarantine import Quarantine, QuarantineEntry
from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.problem import ELEMENT_BYTES, DType
from moe_dispatch.settings import VARIABLES, cache_dir, set_variables
from moe_dispatch.workloads import ROUTINGS, Workload, make_experts

# Small, and aligned so that no backend refuses it for its shape.
_PROBE: Final = Workload("probe", E=4, topk=2, K=256, N=128)
_PROBE_TOKENS: Final = 8


@dataclass(frozen=True)
class BackendReport:
    """A backend as `doctor` shows it.

    Attributes:
        name: Registered name.
        dtypes: Weight dtypes it runs on this machine; empty if it runs none.
        reasons: Why it runs none.
        versions: Of the libraries it depends on.
        install_hint: How to get it.
        probe: By dtype, what running a tiny layer showed; empty without ``--probe``.
    """

    name: str
    dtypes: tuple[DType, ...]
    reasons: tuple[str, ...]
    versions: dict[str, str]
    install_hint: str
    probe: dict[str, str]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help='Machine-readable; "machine" serves `--machine`.')] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Lift the quarantine.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Run a tiny layer on every backend, against fp32.")] = False,
) -> None:
    """Show the machine, every backend (or why not, and how to get it), the quarantine and the notes of the policies."""
    dispatcher = get_dispatcher()
    lifted = _lift(dispatcher.quarantine) if reset else None
    reports = [_report(dispatcher, status, probe=probe) for status in dispatcher.planner.statuses()]
    entries, notes = dispatcher.quarantine.entries(), dispatcher.planner.notes()
    environment = set_variables()
    if as_json:
        found = {
            "machine": dispatcher.machine.model_dump(mode="json"),
            "fingerprint": dispatcher.machine.fingerprint,
            "backends": [dataclasses.asdict(report) for report in reports],
            "quarantine": [entry.model_dump(mode="json") for entry in entries],
            "policy_notes": list(notes),
            "environment": environment,
            "cache_dir": str(cache_dir()),
        }
        typer.echo(json.dumps(found, indent=1))
        return
    OUT.print(f"[bold]machine[/bold]  {escape(machine_line(dispatcher.machine))}")
    if dispatcher.machine.driver:
        OUT.print(f"         driver {dispatcher.machine.driver} · CUDA {dispatcher.machine.cuda}")
    _print_backends(reports)
    _print_quarantine(entries, lifted)
    _print_rest(notes, environment)


def _lift(quarantine: Quarantine) -> int:
    try:
        return quarantine.reset()
    except OSError as error:
        raise MoEDispatchError(
            f"the quarantine cannot be lifted: {error}; make {cache_dir()} writable, or set MOE_DISPATCH_CACHE_DIR to "
            "another folder"
        ) from error


def _report(dispatcher: Dispatcher, status: BackendStatus, *, probe: bool) -> BackendReport:
    name = status.name
    reasons = list(status.reasons)
    dtypes: list[DType] = []
    if status.available:
        refusals: dict[str, None] = {}
        for dtype in ELEMENT_BYTES:
            problem = _PROBE.problem(_PROBE_TOKENS, dtype, dispatcher.machine)
            against = dispatcher.planner.backend(name).unsupported_reasons(problem)
            if against:
                refusals.update(dict.fromkeys(against))
            else:
                dtypes.append(dtype)
        if not dtypes:
            # A dtype it never takes says nothing about the machine; what remains does.
            reasons += [text for text in refusals if not text.startswith("takes ")] or list(refusals)
    probed: dict[str, str] = {dtype: _probe(name, dtype, dispatcher) for dtype in dtypes} if probe else {}
    return BackendReport(name, tuple(dtypes), tuple(reasons), status.versions, status.install_hint, probed)


def _probe(name: str, dtype: DType, dispatcher: Dispatcher) -> str:
    import torch

    from moe_dispatch.api import moe_forward
    from moe_dispatch.measure import make_inputs, reference_outputs, relative_error

    device = dispatcher.machine.device
    experts = make_experts(_PROBE, dtype, device, torch.Generator(device).manual_seed(0))
    (given,) = make_inputs(
        _PROBE.problem(_PROBE_TOKENS, dtype, dispatcher.machine), ROUTINGS["uniform"], device, count=1
    )
    (truth,) = reference_outputs(experts, (given,))
    try:
        with torch.no_grad():
            out = moe_forward(given.hidden_states, experts, given.topk_weights, given.topk_ids, backend=name)
    except MoEDispatchError as failure:
        return f"failed: {failure}"
    error = relative_error(out, truth)
    tolerance = dispatcher.planner.backend(name).tolerance.get(dtype, 0.0)
    return f"{'ok' if error <= tolerance else 'WRONG'}, error {error:.1e} (tolerance {tolerance:.0e})"


def _print_backends(reports: list[BackendReport]) -> None:
    heading("backends")
    rows = table("backend", "here", "detail")
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
        if report.dtypes:
            detail = [", ".join(report.dtypes) + (f"  ({versions})" if versions else "")]
            detail += [f"{dtype}: {text}" for dtype, text in report.probe.items()]
            broken = any(not text.startswith("ok") for text in report.probe.values())
            here = "[red]broken[/red]" if broken else "[green]yes[/green]"
        else:
            detail, here = list(report.reasons), "[yellow]no[/yellow]"
        rows.add_row(report.name, here, escape("\n".join(detail)))
    OUT.print(rows)


def _print_quarantine(entries: tuple[QuarantineEntry, ...], lifted: int | None) -> None:
    heading("quarantine")
    if lifted is not None:
        OUT.print(f"lifted: {lifted} {'entry' if lifted == 1 else 'entries'}")
    if not entries:
        OUT.print("empty")
        return
    rows = table("backend", "when", "cause", "problem")
    for entry in entries:
        fatal = " [red](killed a process)[/red]" if entry.fatal else ""
        rows.add_row(entry.backend, entry.when, escape(entry.cause) + fatal, escape(entry.problem))
    OUT.print(rows)
    OUT.print("Lift it with `moe-dispatch doctor --reset`.", style="dim")


def _print_rest(notes: tuple[str, ...], environment: dict[str, str]) -> None:
    heading("notes")
    for note in notes or ("nothing to report",):
        OUT.print(f"{escape(note)}")
    heading("environment")
    OUT.print(f"cache    {escape(str(cache_dir()))}")
    for name, value in environment.items():
        OUT.print(f"{name}={escape(value)}  [dim]{VARIABLES[name]}[/dim]")
    if not environment:
        OUT.print("no MOE_DISPATCH_… variable is set")
