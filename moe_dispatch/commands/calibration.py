"""`moe-dispatch calibration`: look at calibration files, and carry them from one machine to others of its kind."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moe_dispatch.commands.console import OUT, heading, line, plain, print_json
from moe_dispatch.commands.options import AsJson, Device
from moe_dispatch.errors import InvalidInputError, PolicyFileError

if TYPE_CHECKING:
    from moe_dispatch.policies.measurements.schema import CalibrationFile

Files = Annotated[list[Path], typer.Argument(help="Calibration files.")]

# What to do about a damaged file that the user has named; it may be any file.
_ANEW: Final = "give a file that `moe-dispatch calibrate` or `moe-dispatch calibration export` wrote"

calibration: Final = typer.Typer(
    help="Show calibrations, and carry them from one machine to others with the same hardware.", no_args_is_help=True
)


@calibration.command()
def show(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Calibration files; those that this machine uses by default.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show what calibration files cover, by default this machine's own and those of MOE_DISPATCH_CALIBRATION_PATH."""
    from moe_dispatch.commands.calibrated_layers import calibrated_layers, layers_table
    from moe_dispatch.machine import Machine
    from moe_dispatch.policies.calibrated import calibration_paths

    shown: list[dict[str, Any]] = []
    read = 0
    for path in files or calibration_paths(Machine.inspect(device)):
        try:
            file = _read(path) if files else _parsed(path)
        except FileNotFoundError:
            continue
        read += 1
        layers = list(calibrated_layers(file))
        machine = file.machine
        if as_json:
            listed = [dataclasses.asdict(each) for each in layers]
            shown.append(
                {"path": str(path), "machine": machine.name, "fingerprint": machine.fingerprint, "layers": listed}
            )
            continue
        heading(plain(path))
        line(f"measured on {plain(machine.name)}, fingerprint {plain(machine.fingerprint)}")
        OUT.print(layers_table(layers))
    if as_json:
        print_json(shown)
    elif not read:
        line("this machine has no calibration: `moe-dispatch calibrate --model NAME` measures a layer")


@calibration.command()
def export(
    out: Annotated[Path, typer.Argument(help="File to write, or a folder, in which the file gets its machine's name.")],
    device: Device = None,
) -> None:
    """Write this machine's own calibration to a file for other machines with the same hardware."""
    from moe_dispatch.machine import Machine
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.measurements.schema import read_calibration

    machine = Machine.inspect(device)
    try:
        file = read_calibration(calibration_path(machine), machine)
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"this machine ({machine.fingerprint}) has no calibration of its own; run `moe-dispatch calibrate` first"
        ) from error
    _write(_target(out, file), file)


@calibration.command(name="import")
def import_(files: Files, device: Device = None) -> None:
    """Merge calibrations into this machine's own; at a point a later file replaces what its backends had there."""
    from moe_dispatch.dispatch.process import reset_dispatchers
    from moe_dispatch.machine import Machine
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.measurements.merge import promote_winners, save
    from moe_dispatch.policies.measurements.schema import read_calibration

    machine = Machine.inspect(device)
    path = calibration_path(machine)
    # All are read before the first is merged, so that a damaged one leaves everything as it was.
    for file in [_required(read_calibration, each, machine, _ANEW) for each in files]:
        save(path, file.measurements(), machine)
    promote_winners(path, machine)
    reset_dispatchers()
    line(f"merged into {plain(path)}")


@calibration.command()
def merge(
    files: Files,
    out: Annotated[Path, typer.Option("--out", help="File to write, or a folder, as for `export`.")],
) -> None:
    """Merge calibrations of the same hardware into one file; of two measurements of a point the later file's counts."""
    from moe_dispatch.policies.measurements.merge import merge as merged
    from moe_dispatch.policies.measurements.merge import with_winners_promoted

    read = [_read(path) for path in files]
    for path, file in zip(files, read, strict=True):
        if file.machine.fingerprint != read[0].machine.fingerprint:
            raise InvalidInputError(
                f"{path} was measured on {file.machine.name} ({file.machine.fingerprint}) and {files[0]} on "
                f"{read[0].machine.name} ({read[0].machine.fingerprint}); merge calibrations of the same hardware"
            )
    last = read[-1].machine
    file = functools.reduce(lambda held, news: merged(held, news.measurements(), last), read)
    _write(_target(out, file), with_winners_promoted(file))


def _read(path: Path) -> "CalibrationFile":
    return _required(_parsed, path, _ANEW)


def _parsed(path: Path, *anew: str) -> "CalibrationFile":
    from moe_dispatch.policies.measurements.schema import parse_calibration
    from moe_dispatch.stored_files import read_bytes

    return parse_calibration(read_bytes(path, *anew), str(path), *anew)


def _required(read: Any, path: Path, *arguments: Any) -> "CalibrationFile":
    """What a function reads from a file that must exist."""
    try:
        file: CalibrationFile = read(path, *arguments)
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path} does not exist; give the path of a calibration file") from error
    return file


def _target(out: Path, file: "CalibrationFile") -> Path:
    return out / f"{file.machine.fingerprint}.json" if os.path.isdir(out) else out


def _write(path: Path, file: "CalibrationFile") -> None:
    from moe_dispatch.system.files import write_atomically

    try:
        write_atomically(path, file.model_dump_json(exclude_none=True))
    except OSError as error:
        raise PolicyFileError(f"{path} cannot be written: {error.strerror or error}; give another path") from error
    points = len(file.points)
    line(f"{points} point{'s' if points != 1 else ''} of {plain(file.machine.name)} written to {plain(path)}")
