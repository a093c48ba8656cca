"""Commands that make the repository's record: ``python -m moe_dispatch.benchmarks pack|ship|project``."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.policies.measurements.schema import CalibrationFile, parse_calibration
from moe_dispatch.stored_files import read_bytes
from moe_dispatch.system.compression import compressed
from moe_dispatch.system.files import write_atomically


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
    from moe_dispatch.parallel.exchange_times import ParallelCalibration

    paths = [calibration, *(rows or ())]
    try:
        first, *more = map(json_lines.read, paths)
        measured = ParallelCalibration.model_validate(first[0])
    except (OSError, ValueError, IndexError) as error:  # pydantic's errors are ValueErrors
        names = ", ".join(map(str, paths))
        raise InvalidInputError(f"{names} are no calibration and its rows ({error}); see `project --help`") from error
    typer.echo(markdown(measured, [row for each in more for row in each]))


def _calibration(path: Path) -> CalibrationFile:
    try:
        return parse_calibration(read_bytes(path), str(path), "give a file of `moe-dispatch calibrate`")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path} does not exist; give a file of `moe-dispatch calibrate`") from error


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, compressed(text) if path.suffix == ".xz" else text)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written ({error}); --out names another file") from error
