"""A measured row, and the JSON Lines files that rows are kept in, one a line or packed (see `packed`)."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

import pydantic

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.measure import Ceilings
from moe_dispatch.problem import DType, Mode

RowKey = tuple[str, str, int, str, str, str, str]
_RENAMED: Final = {"floor_us": "roofline_us", "floor_from": "roofline_from"}


class BenchRow(pydantic.BaseModel):
    """One backend in one configuration at one point; without a time where it was not right.

    Attributes:
        workload: Name of the model, or ``E,topk,K,N``.
        E: Experts.
        topk: Experts per token.
        K: Hidden size.
        N: Intermediate size.
        dtype: Of the weights.
        M: Tokens.
        backend: A backend's or a baseline's name.
        config: The backend's configuration as JSON data.
        mode: ``"graph"`` or ``"eager"``.
        routing: Name of the routing distribution.
        us: Median time of the layer in µs; None where it was not timed.
        us_q1: Lower quartile.
        us_q3: Upper quartile.
        samples: Samples behind the three.
        inputs: Distinct inputs and routings that each sample ran over.
        hit_experts: Experts that got a token, mean over the inputs.
        roofline_us: Roofline for these hits; None where the matrix rate is unknown.
        roofline_from: Ceilings that the roofline uses: ``"device"`` (`known_ceilings`) or ``"measured"`` in this run.
        fraction: roofline_us / us; None where either is.
        error: Greatest relative error against fp32; None where it raised, or was not finite.
        deterministic: Whether repeated runs gave the same bits; None where it was not timed.
        reason: Why there is no time; empty where there is one.
        machine: The device's name.
        fingerprint: The machine's.
        versions: Of everything that the time depends on.
        commit: Of the checkout, with ``-dirty`` where it had changes; empty outside one.
        ceilings: Measured in the same run; the device's recorded ones, or None, where the rows come from a calibration.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    workload: str
    E: int
    topk: int
    K: int
    N: int
    dtype: DType
    M: int = pydantic.Field(ge=1)
    backend: str
    config: dict[str, int | str | bool]
    mode: Mode
    routing: str
    us: float | None = pydantic.Field(default=None, gt=0)
    us_q1: float | None = None
    us_q3: float | None = None
    samples: int = 0
    inputs: int = 0
    hit_experts: float
    roofline_us: float | None
    roofline_from: Literal["device", "measured"]
    fraction: float | None = None
    error: float | None = None
    deterministic: bool | None = None
    reason: str = ""
    machine: str
    fingerprint: str
    versions: dict[str, str]
    commit: str
    ceilings: Ceilings | None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _recorded_names(cls, data: Any) -> Any:
        return recorded(data) if isinstance(data, dict) else data

    @pydantic.model_validator(mode="after")
    def _time_or_reason(self) -> Self:
        if (self.us is None) != bool(self.reason):
            raise ValueError("a row has a time or a reason why not, never both or neither")
        return self

    @property
    def key(self) -> RowKey:
        """What was measured; a resumed run skips what it finds."""
        return row_key(self.workload, self.dtype, self.M, self.backend, self.config, self.mode, self.routing)


def recorded(data: dict[str, Any]) -> dict[str, Any]:
    """A recorded row or a part of one, with the keys and values of today."""
    renamed = {_RENAMED.get(name, name): value for name, value in data.items()}
    if renamed.get("roofline_from") in ("peers", "baselines"):
        renamed["roofline_from"] = "device"
    return renamed


def row_key(workload: str, dtype: str, M: int, backend: str, config: dict[str, Any], mode: str, routing: str) -> RowKey:
    """The identity of a row."""
    return workload, dtype, M, backend, json.dumps(config, sort_keys=True), mode, routing


def append(path: Path, row: pydantic.BaseModel) -> None:
    """Add a row in one write, so that an interrupted run leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            # A run killed inside a write left half a line: end it, so that it spoils no row but its own.
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(row.model_dump_json().encode() + b"\n")
        file.flush()


def load(paths: Iterable[Path]) -> list[BenchRow]:
    """Read rows from files and folders; a later row replaces an earlier one of the same key on the same machine.

    In a folder, claims (`claims`) lie beside rows and are passed over.

    Raises:
        InvalidInputError: A line is not a row, nor one that is cut off.
    """
    rows: dict[tuple[str, RowKey], BenchRow] = {}
    for path in paths:
        for row in _read(path):
            rows[row.fingerprint, row.key] = row
    return list(rows.values())


def timed_keys(path: Path) -> set[RowKey]:
    """Keys of the rows that have a time, in a file that need not be there.

    A row without one is tried again: what lacked memory or was wrong may have been mended.
    """
    return {row.key for row in load([path]) if row.us is not None} if path.exists() else set()


def _read(path: Path) -> Iterator[BenchRow]:
    if path.is_dir():
        for inside in sorted(path.rglob("*.jsonl")):
            lines = _lines(inside)
            if not lines or not lines[0].startswith('{"claim"'):
                yield from _parsed(inside, lines)
        return
    yield from _parsed(path, _lines(path))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}); give .jsonl files of `moe-dispatch bench`"
        ) from error


def _parsed(path: Path, lines: list[str]) -> Iterator[BenchRow]:
    if lines and lines[0].startswith('{"packed"'):
        from moe_dispatch.benchmarks.packed import unpack  # which imports this module

        try:
            yield from unpack(lines)
        except (ValueError, KeyError, IndexError) as error:
            raise InvalidInputError(f"{path} is damaged: {error}") from error
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield BenchRow.model_validate_json(line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "json_invalid" and "EOF" in first["msg"]:  # cut off inside a write
                continue
            raise InvalidInputError(
                f"{path}:{number} is not a benchmark row: {'.'.join(map(str, first['loc']))} {first['msg']}"
            ) from error
