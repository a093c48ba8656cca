"""Commands that make the repository's record: ``python -m moe_dispatch.benchmarks pack|ship|project``."""

from pathlib import Path
from typing import Annotated, Final

import typer

from moe_dispatch.benchmarks.packed import DAMAGED
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.policies.measurements.schema import CalibrationFile, parse_calibration
from moe_dispatch.stored_files import parsed, read_bytes
from moe_dispatch.system.compression import compressed
from moe_dispatch.system.files import write_atomically

_ANEW: Final = "give a file of `moe-dispatch calibrate`"


def pack(
    inputs: Annotated[list[Path], typer.Argument(help=".jsonl files or folders of rows; .json files of calibrations.")],
    out: Annotated[Path, typer.Option(help="Packed file to write; compressed if its name ends with .xz.")],
) -> None:
    """Pack rows and calibrations into one small file of rows.

    At a point that a later input has too, its backends' rows replace all that these backends had there before.
    """
    from moe_dispatch.benchmarks.packed import latest
    from moe_dispatch.benchmarks.packed import pack as pack_rows
    from moe_dispatch.benchmarks.record.calibration_rows import calibration_rows
    from moe_dispatch.benchmarks.row_files import load

    calibrations = (".json", ".json.xz")
    rows = latest(
        calibration_rows(_calibration(path)) if path.name.endswith(calibrations) else load([path]) for path in inputs
    )
    _write(out, pack_rows(rows))
    typer.echo(f"{len(rows)} rows, {out.stat().st_size:,} bytes: {out}")


def ship(
    calibrations: Annotated[list[Path], typer.Argument(help="Calibrations of one machine, the newest last.")],
    out: Annotated[Path, typer.Option(help="Table to write; compressed if its name ends with .xz.")],
) -> None:
    """Make a table to ship from a machine's calibrations."""
    from moe_dispatch.benchmarks.record.ship import LEAST_TOKENS, table, text

    made = table(map(_calibration, calibrations))
    if not made.points:
        raise InvalidInputError(f"no layer has a time at {LEAST_TOKENS} token counts or more; measure others, too")
    _write(out, text(made))
    measurements = sum(len(point.measurements) for point in made.points)
    typer.echo(f"{len(made.points)} points, {measurements} measurements, {out.stat().st_size:,} bytes: {out}")


def project(
    calibration: Annotated[
        Path, typer.Argument(help="File of `calibrate --parallel` on two GPUs, or that one as .xz.")
    ],
    rows: Annotated[list[Path] | None, typer.Argument(help="Rows of record.expert_parallel on two GPUs.")] = None,
) -> None:
    """Print what docs/expert-parallel.md says of more GPUs: links, the check against two, and the projection."""
    from moe_dispatch.benchmarks.record import json_lines
    from moe_dispatch.benchmarks.record.projection import markdown
    from moe_dispatch.parallel.exchange_times import SCHEMA, ParallelCalibration

    anew = "give a file of `moe-dispatch calibrate --parallel`"
    try:
        measured = parsed(ParallelCalibration, read_bytes(calibration, anew), str(calibration), SCHEMA, anew)
    except FileNotFoundError as error:
        raise InvalidInputError(f"{calibration} does not exist; {anew}") from error
    try:
        text = markdown(measured, [row for path in rows or () for row in json_lines.read(path)])
    except MoEDispatchError:
        raise
    except (OSError, *DAMAGED) as error:
        names = ", ".join(map(str, rows or ()))
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise InvalidInputError(f"{names}: no rows of record.expert_parallel ({why}); see `project --help`") from error
    typer.echo(text)


def _calibration(path: Path) -> CalibrationFile:
    try:
        return parse_calibration(read_bytes(path, _ANEW), str(path), _ANEW)
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path} does not exist; {_ANEW}") from error


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, compressed(text) if path.suffix == ".xz" else text)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written ({error}); --out names another file") from error
