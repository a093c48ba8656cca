"""`moe-dispatch doctor`: what is here, what is wrong or missing, and how to mend it."""

from typing import TYPE_CHECKING, Annotated

import typer

from moe_dispatch.commands.console import OUT, heading, line, machine_line, plain, print_json, table
from moe_dispatch.commands.options import AsJson, Device
from moe_dispatch.settings import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_dispatch.commands.doctor_report import BackendReport, DoctorReport
    from moe_dispatch.dispatch.quarantine import QuarantineEntry
    from moe_dispatch.system.libraries import LibraryStatus


def doctor(
    device: Device = None,
    reset: Annotated[bool, typer.Option("--reset", help="Lift the quarantine.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Run a tiny layer on every backend, against fp32.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the machine, every backend and library, calibrations and the quarantine, and what is wrong.

    The exit status is 1 if something is wrong: a call would raise, a result is wrong, or nothing can be kept on disk.
    """
    from moe_dispatch.commands.doctor_report import examine

    report = examine(device, reset=reset, probe=probe)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if report.problems:
        raise typer.Exit(1)


def _print(report: "DoctorReport") -> None:
    line(f"[bold]moe-dispatch {report.version}[/bold]  {plain(machine_line(report.machine))}")
    if report.machine.driver:
        line(f"driver {plain(report.machine.driver)} · CUDA {plain(report.machine.cuda or 'none')}", style="dim")
    _print_backends(report.backends)
    _print_libraries(report.libraries)
    _print_calibrations(report)
    _print_quarantine(report.quarantine, report.lifted)
    heading("environment")
    line(f"cache: {plain(report.cache_dir)}")
    for name, value in report.environment.items():
        line(f"{name}={plain(value)}  [dim]{plain(VARIABLES[name])}[/dim]")
    if not report.environment:
        line("no MOE_DISPATCH_… variable is set")
    if report.policy_notes:
        heading("notes")
        for note in report.policy_notes:
            line(plain(note))
    heading("problems")
    for problem in report.problems:
        line(f"[red]✗[/red] {plain(problem)}")
    if not report.problems:
        line("[green]✓[/green] none")


def _print_backends(reports: "Sequence[BackendReport]") -> None:
    heading("backends")
    rows = table("backend", "here", "weights", "versions")
    for report in reports:
        here = "[red]broken[/red]" if report.broken else "[green]yes[/green]"
        libraries = {name: version for name, version in report.versions.items() if version and name != "moe_dispatch"}
        rows.add_row(
            plain(report.name),
            here if report.dtypes else "[yellow]no[/yellow]",
            ", ".join(report.dtypes) or "–",
            plain(", ".join(f"{name} {version}" for name, version in libraries.items())) or "–",
        )
    OUT.print(rows)
    for report in reports:
        for reason in report.reasons:
            line(f"{plain(report.name)}: {plain(reason)}")
        for dtype, verdict in report.probe.items():
            line(f"{plain(report.name)} {dtype}: {plain(verdict)}")


def _print_libraries(statuses: "Sequence[LibraryStatus]") -> None:
    heading("libraries")
    rows = table("library", "installed", "known to work", "remedy")
    for status in statuses:
        installed = plain(status.installed) or "–"
        needed = status.remedy if status.fault or not status.installed else ""
        rows.add_row(
            plain(status.library),
            f"[yellow]{installed}[/yellow]" if status.fault else installed,
            plain(status.known),
            plain(needed),
        )
    OUT.print(rows)
    for status in statuses:
        if status.fault:
            line(f"[yellow]{plain(status.fault)}[/yellow]")


def _print_calibrations(report: "DoctorReport") -> None:
    from moe_dispatch.commands.calibrated_layers import layers_table

    heading("calibration")
    if not report.calibrated:
        line("none on this machine: `moe-dispatch calibrate --model NAME` measures a layer")
        return
    OUT.print(layers_table(report.calibrated))


def _print_quarantine(entries: "Sequence[QuarantineEntry]", lifted: int | None) -> None:
    heading("quarantine")
    if lifted is not None:
        line(f"lifted: {lifted} {'entry' if lifted == 1 else 'entries'}")
    for entry in entries:
        fatal = " [red](killed a process)[/red]" if entry.fatal else ""
        line(f"{plain(entry.backend)}, {plain(entry.when)}: {plain(entry.cause)}{fatal}")
        line(f"  {plain(entry.problem)}", style="dim")
    if entries:
        line("Lift it with `moe-dispatch doctor --reset`.", style="dim")
    else:
        line("empty")
