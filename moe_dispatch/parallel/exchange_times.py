"""Times of exchanges as `moe-dispatch calibrate --parallel` stores them, and what they say of a kind of call."""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pydantic

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.parallel.exchange import CallKind, Tokens
from moe_dispatch.parallel.links import fitted
from moe_dispatch.parallel.topology import Topology
from moe_dispatch.problem import Mode
from moe_dispatch.settings import cache_dir, calibration_search_path, is_file_name
from moe_dispatch.stored_files import parsed, read_bytes

# Above this ratio of two neighbouring measured token counts nothing is interpolated, because times bend too much.
APART: Final = 16
SCHEMA: Final = 1

Name = Annotated[str, pydantic.Field(min_length=1, max_length=80)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class Stored(pydantic.BaseModel):
    """Base class of what the file holds: immutable, without unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Split(Stored):
    """Where the time of a call goes: three measured times in µs, each the slowest rank's.

    Attributes:
        us: A whole call.
        experts_us: A rank's experts alone, on the rows that arrive. Where the backend stores its results in the other
            ranks' memory, those stores are a part of it.
        transfers_us: Dispatch and combine alone.
    """

    us: Positive
    experts_us: Positive
    transfers_us: Positive

    @property
    def exposed_us(self) -> float:
        """What transfers add to the time of the experts."""
        return max(0.0, self.us - self.experts_us)

    @property
    def hidden_us(self) -> float:
        """What of the transfers runs at the same time as experts."""
        return max(0.0, self.transfers_us - self.exposed_us)

    def __str__(self) -> str:
        exposed = f"exposed transfer {self.exposed_us:.1f} (hidden {self.hidden_us:.1f})"
        return f"{self.us:.1f} µs = experts {self.experts_us:.1f} + {exposed}"


class LinkTimes(Stored):
    """Transfers by one exchange, and the line through them.

    Attributes:
        exchange: The exchange.
        tokens: How tokens lie.
        mode: Eager calls or replays of a CUDA graph.
        samples: `sent_bytes` and the time of dispatch and combine together in µs.
        latency_us: Time of one way without bytes, in µs: α of the line α + bytes/β that `fitted` returns.
        bytes_per_us: The rate of one way, in bytes per µs: β of that line.
    """

    exchange: Name
    tokens: Tokens
    mode: Mode
    samples: tuple[tuple[int, Positive], ...]
    latency_us: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    bytes_per_us: Positive

    @classmethod
    def of(cls, exchange: str, tokens: Tokens, mode: Mode, samples: Iterable[tuple[int, float]]) -> Self:
        """The line through samples."""
        kept = tuple(samples)
        latency, rate = fitted([(count, us / 2) for count, us in kept])
        return cls(exchange=exchange, tokens=tokens, mode=mode, samples=kept, latency_us=latency, bytes_per_us=rate)

    def us(self, kind: CallKind) -> float:
        """Time of dispatch and combine of a kind of call, in µs."""
        return 2 * (self.latency_us + sent_bytes(kind) / self.bytes_per_us)


class LayerTimes(Stored):
    """Whole calls of one kind, by each exchange that ran."""

    kind: CallKind
    splits: dict[Name, Split]


class ParallelCalibration(Stored):
    """What was measured on the ranks of one topology.

    Attributes:
        schema_version: Version of this format.
        topology: The ranks' devices, and what joins them.
        versions: Versions that the times depend on; any change retires the file.
        links: Times of transfers alone, by exchange.
        layers: Times of whole calls, by kind of call and exchange.
    """

    schema_version: Literal[1] = SCHEMA
    topology: Topology
    versions: dict[Name, str]
    links: tuple[LinkTimes, ...]
    layers: tuple[LayerTimes, ...]

    def with_layers_of(self, other: "ParallelCalibration | None") -> "ParallelCalibration":
        """This calibration, and what another one of the same versions measured of other kinds of calls."""
        if other is None or other.versions != self.versions:
            return self
        own = {each.kind for each in self.layers}
        older = tuple(each for each in other.layers if each.kind not in own)
        return self.model_copy(update={"layers": self.layers + older})


def sent_bytes(kind: CallKind) -> int:
    """Bytes of the rows that a rank would give to all others if each row went everywhere."""
    return kind.M * kind.row_bytes * (kind.ranks - 1)


def calibration_path(topology: Topology) -> Path:
    """The file of a topology, which `moe-dispatch calibrate --parallel` writes."""
    return cache_dir() / "calibration" / "parallel" / f"{topology.key}.json"


def read(path: Path, topology: Topology) -> ParallelCalibration:
    """The calibration in a file.

    Raises:
        FileNotFoundError: There is none.
        PolicyFileError: It cannot be read, is damaged, of another schema, or of other ranks.
    """
    file = parse(read_bytes(path), str(path))
    if file.topology != topology:
        raise PolicyFileError(f"{path} was measured on {file.topology}, and this is {topology}; calibrate here")
    return file


def parse(content: bytes, origin: str) -> ParallelCalibration:
    """Check a calibration's content.

    Raises:
        PolicyFileError: It is damaged or of another schema.
    """
    return parsed(ParallelCalibration, content, origin, SCHEMA, "delete it, or calibrate again")


def find(topology: Topology, versions: Mapping[str, str]) -> tuple[ParallelCalibration | None, list[str]]:
    """The calibration of a topology by these versions, and the reasons against files that come before it.

    This machine's own file comes first, then those of the folders in ``MOE_DISPATCH_CALIBRATION_PATH``.
    """
    reasons: list[str] = []
    shared = (entry / f"{topology.key}.json" for entry in calibration_search_path() if not is_file_name(entry))
    for path in (calibration_path(topology), *shared):
        try:
            file = read(path, topology)
        except FileNotFoundError:
            continue
        except PolicyFileError as error:
            reasons.append(str(error))
            continue
        if file.versions == versions:
            return file, reasons
        reasons.append(f"{path} was measured with {file.versions}, not {dict(versions)}; calibrate again")
    return None, reasons


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a calibration says of a kind of call.

    Attributes:
        us: The times in µs by which exchanges are compared.
        basis: Where these times come from, for `explain`: "calibrated at M=256".
        splits: Where the time goes, where whole calls were measured.
    """

    us: Mapping[str, float]
    basis: str
    splits: Mapping[str, Split]

    def best(self, able: Iterable[str]) -> str | None:
        """The exchange with the least time of those that can serve the call; None where none of them was measured."""
        return min((name for name in able if name in self.us), key=self.us.__getitem__, default=None)


class ExchangeTable:
    """Looks up what a calibration says.

    Args:
        calibration: The calibration.
    """

    def __init__(self, calibration: ParallelCalibration) -> None:
        self._links = calibration.links
        self._points: dict[CallKind, dict[int, dict[str, Split]]] = {}
        for each in calibration.layers:
            self._points.setdefault(dataclasses.replace(each.kind, M=0), {})[each.kind.M] = each.splits

    def expected(self, kind: CallKind) -> Expected | None:
        """By whole calls of this layer, measured at M or on both sides of it, else by the lines of the links."""
        points = self._points.get(dataclasses.replace(kind, M=0), {})
        tokens = sorted(points)
        place = bisect.bisect_left(tokens, kind.M)
        around = [kind.M] if kind.M in points else tokens[max(place - 1, 0) : place + 1]
        if kind.M in points or (len(around) == 2 and around[1] <= APART * around[0]):
            low, high = points[around[0]], points[around[-1]]
            share = 0.0 if low is high else math.log(kind.M / around[0]) / math.log(around[1] / around[0])
            splits = {name: _between(low[name], high[name], share) for name in low if name in high}
            basis = f"calibrated at M={' and '.join(map(str, around))}"
            return Expected({name: each.us for name, each in splits.items()}, basis, splits)
        us = {
            each.exchange: each.us(kind) for each in self._links if (each.tokens, each.mode) == (kind.tokens, kind.mode)
        }
        return Expected(us, "expected of the calibrated links", {}) if us else None


def _between(low: Split, high: Split, share: float) -> Split:
    """Times between two measured token counts, as powers of M."""
    ends = zip(low.model_dump().items(), high.model_dump().values(), strict=True)
    return Split(**{name: first ** (1 - share) * last**share for (name, first), last in ends})
