"""What a record of transformers' implementations says of ours: by how much each alternative is slower or faster."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

OURS: Final = "moe_dispatch"
_CASE: Final = ("mode", "what", "tokens")  # the keys of a row that say what was measured


def verdicts(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each case that was measured of ours: the median of its turns beside those of the alternatives.

    Args:
        rows: Those of `transformers_inference` or `gradients`; rows without a time are passed over.
    """
    times: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if "ms" in row:
            case = tuple(str(row[key]) for key in _CASE if key in row)
            times.setdefault(case, {}).setdefault(row["implementation"], []).append(row["ms"])
    for case, turns in times.items():
        medians = {name: statistics.median(each) for name, each in turns.items()}
        ours = medians.pop(OURS, None)
        if ours is None:
            continue
        others = [
            f"{name} {ms:.3f} ms ({max(ms, ours) / min(ms, ours):.2f}× {'slower' if ms > ours else 'FASTER'})"
            for name, ms in sorted(medians.items(), key=lambda pair: pair[1])
        ]
        fastest = "fastest" if ours <= min(medians.values(), default=ours) else "NOT the fastest"
        beside = ", ".join(others) or "no alternative was measured"
        yield f"{' '.join(case)}: {OURS} {ours:.3f} ms is {fastest}; {beside}"
