"""Rows packed for the repository, column by column: values of one kind side by side compress to fewer bytes.

A packed file is one JSON object. `runs` (machine, versions, commit, ceilings) and `configs` (a backend and its
configuration) hold what many rows share. `points` has one list per field of a point, beside the number of its run and
the number of its rows; `rows` has one list per field of a row, beside the number of its configuration. Numbers keep
`SIGNIFICANT_DIGITS`, errors `ERROR_DIGITS`. A time ``us`` is a whole number of units of 1e-``decimals`` µs; quartiles
are its distances ``below`` and ``above`` in these units, small numbers. `row_files.load` reads packed files as others.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import Any, Final

from moe_dispatch.benchmarks.rows import BenchRow

FORMAT: Final = 4
RUN: Final = ("machine", "fingerprint", "versions", "commit", "ceilings", "roofline_from")
POINT: Final = (
    "workload", "E", "topk", "K", "N", "dtype", "M", "mode", "routing", "inputs", "hit_experts", "roofline_us",
)  # fmt: skip
CONFIG: Final = ("backend", "config")
_TIMES: Final = ("us", "decimals", "below", "above")
ROW: Final = (*_TIMES, "samples", "error", "deterministic", "reason", "joules_per_token")
SIGNIFICANT_DIGITS: Final = 5
ERROR_DIGITS: Final = 2
# What is raised where a file is read that is damaged, or of another kind; pydantic's and json's errors are ValueErrors.
DAMAGED: Final = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)


def is_packed(lines: Sequence[bytes]) -> bool:
    """Whether these are the lines of a packed file."""
    return bool(lines) and lines[0].startswith(b'{"packed"')


def latest(files: Iterable[Iterable[BenchRow]]) -> list[BenchRow]:
    """The rows of several files, the newest last, without a backend's at points of the machine that a later file has.

    As in `moe_dispatch.policies.measurements.merge.merge`, a configuration that was not timed again goes as well.
    """
    kept: dict[tuple[str, str, str, int, str, str, str], list[BenchRow]] = {}
    for file in files:
        measured: dict[tuple[str, str, str, int, str, str, str], list[BenchRow]] = {}
        for row in file:
            key = (row.machine, row.workload, row.dtype, row.M, row.mode, row.routing, row.backend)
            measured.setdefault(key, []).append(row)
        kept |= measured
    return list(chain.from_iterable(kept.values()))


def pack(rows: Iterable[BenchRow]) -> str:
    """Rows as the content of a packed file, in an order that depends on the rows alone."""
    runs: dict[str, int] = {}
    configs: dict[str, int] = {}
    points: list[list[Any]] = []
    packed_rows: list[list[Any]] = []
    fields = map(_fields, sorted(rows, key=_order))
    for (run, *point), members in groupby(fields, lambda row: [_number(runs, row, RUN), *_values(row, POINT)]):
        before = len(packed_rows)
        packed_rows += ([_number(configs, row, CONFIG), *_values(row, ROW)] for row in members)
        points.append([run, len(packed_rows) - before, *point])
    content = {
        "packed": FORMAT,
        "runs": list(map(json.loads, runs)),
        "configs": list(map(json.loads, configs)),
        "points": _columns(("run", "rows", *POINT), points),
        "rows": _columns(("config", *ROW), packed_rows),
    }
    return json.dumps(content, separators=(",", ":")) + "\n"


def unpack(text: str) -> Iterator[BenchRow]:
    """The rows behind the content of a packed file.

    Raises:
        DAMAGED: The file is damaged.
    """
    content = json.loads(text)
    if content["packed"] != FORMAT:
        raise ValueError(f"packed as format {content['packed']}, and this version reads {FORMAT}")
    points, rows = _records(content["points"]), _records(content["rows"])
    if sum(point["rows"] for point in points) != len(rows):
        raise ValueError(f"its points have another number of rows than the {len(rows)} that are there")
    remaining = iter(rows)
    for point in points:
        shared = content["runs"][point.pop("run")] | point
        for row in islice(remaining, shared.pop("rows")):
            config = content["configs"][row.pop("config")]
            unpacked = BenchRow.model_validate(shared | config | _with_times(row))
            fraction = unpacked.roofline_us / unpacked.us if unpacked.roofline_us and unpacked.us else None
            yield unpacked.model_copy(update={"fraction": fraction})


def _order(row: BenchRow) -> tuple[str, str, str, str, int, str, str, str, str]:
    config = json.dumps(row.config, sort_keys=True)
    return (
        row.fingerprint, row.commit, row.workload, row.dtype, row.M, row.mode, row.routing, row.backend, config,
    )  # fmt: skip


def _fields(row: BenchRow) -> dict[str, Any]:
    fields = {name: _rounded(value) for name, value in row.model_dump(mode="json").items()}
    if row.error is not None:
        fields["error"] = float(f"{row.error:.{ERROR_DIGITS}g}")
    if not row.us:
        return fields | dict.fromkeys(_TIMES)
    unit = 10.0 ** (decimals := _decimals(row.us))
    us = round(row.us * unit)
    spread: tuple[int, int] | tuple[None, None] = None, None
    if row.us_q1 is not None and row.us_q3 is not None:
        spread = round(us - row.us_q1 * unit), round(row.us_q3 * unit - us)
    return fields | dict(zip(_TIMES, (us, decimals, *spread), strict=True))


def _with_times(fields: dict[str, Any]) -> dict[str, Any]:
    us, decimals, below, above = map(fields.pop, _TIMES)
    if us is None:
        return fields
    times = {"us": us} | ({} if below is None else {"us_q1": us - below, "us_q3": us + above})
    return fields | {name: round(count / 10.0**decimals, decimals) for name, count in times.items()}


def _values(fields: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [fields[name] for name in names]


def _number(numbers: dict[str, int], fields: Mapping[str, Any], names: Sequence[str]) -> int:
    """The number of the object that these fields make, in order of appearance."""
    return numbers.setdefault(json.dumps({name: fields[name] for name in names}), len(numbers))


def _columns(names: Sequence[str], records: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [record[column] for record in records] for column, name in enumerate(names)}


def _records(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _rounded(value: Any) -> Any:
    return round(value, _decimals(value)) if isinstance(value, float) and value else value


def _decimals(value: float) -> int:
    """How many decimals a number keeps; negative where its last digits before the point go too."""
    return SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(abs(value)))
