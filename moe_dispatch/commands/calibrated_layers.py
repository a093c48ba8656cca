"""What a calibration file covers, layer by layer, for the commands that show it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_dispatch.commands.console import plain, table
from moe_dispatch.policies.measurements.schema import CalibrationFile
from moe_dispatch.problem import Mode

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer in one mode, as a calibration has it.

    Attributes:
        measured: Time of the latest measurement, UTC, ISO 8601; empty where the file does not say.
        versions: Version by library, of the latest measurement.
    """

    layer: str
    mode: Mode
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    backends: tuple[str, ...]
    measured: str
    versions: dict[str, str]


def calibrated_layers(file: CalibrationFile) -> Iterator[CalibratedLayer]:
    """Each layer in each mode of a file."""
    points: dict[tuple[int, Mode], list[int]] = {}
    for index, point in enumerate(file.points):
        points.setdefault((point.layer, point.mode), []).append(index)
    for (layer, mode), indices in points.items():
        measurements = [one for index in indices for one in file.points[index].measurements]
        candidates = [file.candidates[one.candidate] for one in measurements]
        latest = max(candidates, key=lambda candidate: candidate.measured, default=None)
        yield CalibratedLayer(
            layer=str(file.layers[layer]),
            mode=mode,
            tokens=tuple(sorted({file.points[index].M for index in indices})),
            routings=tuple(sorted({name for one in measurements for name in one.us})),
            backends=tuple(sorted({candidate.backend for candidate in candidates})),
            measured=latest.measured if latest else "",
            versions=dict(latest.versions) if latest else {},
        )


def layers_table(layers: Sequence[CalibratedLayer]) -> "Table":
    """The layers as a table for printing."""
    rows = table("layer", "mode", "tokens", "routing", "measured", "versions")
    for each in layers:
        rows.add_row(
            plain(each.layer),
            each.mode,
            _span(each.tokens),
            plain(", ".join(each.routings)),
            plain(each.measured[:10] or "unknown"),
            plain(", ".join(f"{name} {version}" for name, version in each.versions.items() if version)),
        )
    return rows


def _span(tokens: tuple[int, ...]) -> str:
    return str(tokens[0]) if len(tokens) == 1 else f"{len(tokens)} from {tokens[0]} to {tokens[-1]}"
