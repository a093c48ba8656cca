"""Rows packed for the repository: values that many rows share are written once.

There are three kinds of lines: ``run`` (machine, versions, commit, ceilings), ``config`` (a backend and its
configuration, numbered in order of appearance), and ``point`` with its rows as lists of the columns that ``run`` names.
Numbers keep `SIGNIFICANT_DIGITS`. A row's ``spread`` has the distances of the lower and the upper quartile from the
median ``us``, in units of the median's last digit: small whole numbers, which compress well. `row_files.load` reads
packed files like any others.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from moe_dispatch.benchmarks.rows import BenchRow

FORMAT: Final = 2
RUN: Final = ("machine", "fingerprint", "versions", "commit", "ceilings", "roofline_from")
POINT: Final = (
    "workload", "E", "topk", "K", "N", "dtype", "M", "mode", "routing", "inputs", "hit_experts", "roofline_us",
)  # fmt: skip
# Columns of a row, after the number of its configuration; trailing empty values are left out.
COLUMNS: Final = ("us", "spread", "samples", "error", "deterministic", "reason", "joules_per_token")
SIGNIFICANT_DIGITS: Final = 5


def is_packed(lines: Sequence[str]) -> bool:
    """Whether these are the lines of a packed file."""
    return bool(lines) and lines[0].startswith('{"packed"')


def latest(files: Iterable[Iterable[BenchRow]]) -> list[BenchRow]:
    """The rows of several files, the newest last, without those of a backend at points where a later file has it too.

    As in `moe_dispatch.policies.measurements.merge.merge`, a configuration that was not timed again goes as well.
    """
    kept: dict[tuple[str, str, int, str, str, str], list[BenchRow]] = {}
    for file in files:
        measured: dict[tuple[str, str, int, str, str, str], list[BenchRow]] = {}
        for row in file:
            key = (row.workload, row.dtype, row.M, row.mode, row.routing, row.backend)
            measured.setdefault(key, []).append(row)
        kept |= measured
    return list(itertools.chain.from_iterable(kept.values()))


def pack(rows: Iterable[BenchRow]) -> Iterator[str]:
    """Rows as packed lines, in an order that depends on the rows alone."""
    configs: dict[str, int] = {}
    run: dict[str, Any] = {}
    point: dict[str, Any] = {}
    pending: list[list[Any]] = []
    for row in sorted(rows, key=_order):
        data = row.model_dump(mode="json")
        this_run, this_point = ({name: data[name] for name in names} for names in (RUN, POINT))
        this_point = {name: _rounded(value) for name, value in this_point.items()}
        if (this_run, this_point) != (run, point) and pending:
            yield _line({"point": point, "rows": pending})
            pending = []
        if this_run != run:
            configs = {}
            yield _line({"packed": FORMAT, "columns": COLUMNS, "run": this_run})
        run, point = this_run, this_point
        config = _line({"backend": row.backend, "config": row.config})
        if config not in configs:
            configs[config] = len(configs)
            yield f'{{"config":{config}}}'
        data["us"], data["spread"] = _rounded(row.us), _spread(row)
        pending.append([configs[config], *_without_trailing_empties([_rounded(data[name]) for name in COLUMNS])])
    if pending:
        yield _line({"point": point, "rows": pending})


def unpack(lines: Iterable[str]) -> Iterator[BenchRow]:
    """The rows behind packed lines.

    Raises:
        ValueError, TypeError, ArithmeticError, LookupError: A line is damaged (pydantic's and json's errors are
            ValueErrors).
    """
    run: dict[str, Any] = {}
    columns: list[str] = []
    configs: list[dict[str, Any]] = []
    for line in lines:
        data = json.loads(line)
        if "run" in data:
            if data["packed"] != FORMAT:
                raise ValueError(f"packed as format {data['packed']}, and this version reads {FORMAT}")
            run, columns, configs = data["run"], data["columns"], []
        elif "config" in data:
            configs.append(data["config"])
        else:
            for number, *values in data["rows"]:
                of_row = _with_quartiles(dict(zip(columns, values, strict=False)))
                row = BenchRow.model_validate(run | data["point"] | configs[number] | of_row)
                fraction = row.roofline_us / row.us if row.roofline_us and row.us else None
                yield row.model_copy(update={"fraction": fraction})


def _order(row: BenchRow) -> tuple[str, str, str, str, int, str, str, str, str]:
    config = json.dumps(row.config, sort_keys=True)
    return (
        row.fingerprint, row.commit, row.workload, row.dtype, row.M, row.mode, row.routing, row.backend, config,
    )  # fmt: skip


def _line(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _without_trailing_empties(values: list[Any]) -> list[Any]:
    while values and values[-1] in (None, "", 0):
        values.pop()
    return values


def _spread(row: BenchRow) -> tuple[int, int] | None:
    if not row.us or row.us_q1 is None or row.us_q3 is None:
        return None
    us = _rounded(row.us)
    decimals = _decimals(us)  # of the rounded median, which is what the reader has
    return round((us - row.us_q1) * 10.0**decimals), round((row.us_q3 - us) * 10.0**decimals)


def _with_quartiles(values: dict[str, Any]) -> dict[str, Any]:
    if (spread := values.pop("spread", None)) is None:
        return values
    us, (below, above) = values["us"], spread
    decimals = _decimals(us)
    quartiles = us - below / 10.0**decimals, us + above / 10.0**decimals
    return values | dict(zip(("us_q1", "us_q3"), (round(us, decimals) for us in quartiles), strict=True))


def _rounded(value: Any) -> Any:
    return round(value, _decimals(value)) if isinstance(value, float) and value else value


def _decimals(value: float) -> int:
    """How many decimals a number keeps; negative where its last digits before the point go too."""
    return SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(abs(value)))
