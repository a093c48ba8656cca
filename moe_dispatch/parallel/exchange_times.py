"""Times of exchanges as `moe-dispatch calibrate --parallel` measures and stores them, and what follows from them."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.parallel.exchange import CallKind, Tokens
from moe_dispatch.parallel.links import fitted
from moe_dispatch.parallel.topology import Topology
from moe_dispatch.problem import DType, Mode
from moe_dispatch.settings import cache_dir, calibration_search_path
from moe_dispatch.system.files import read_bytes

# Above this ratio of two neighbouring measured token counts nothing is interpolated, because times bend too much.
APART: Final = 16

Name = Annotated[str, pydantic.Field(min_length=1, max_length=80)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=1, lt=1 << 40)]


class Strict(pydantic.BaseModel):
    """Base class of what the file holds: immutable, without unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Split(Strict):
    """Where the time of a call goes: three measured times in µs, each the slowest rank's.

    Attributes:
        us: A whole call.
        experts_us: A rank's experts alone, on the rows that arrive.
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
        return (
            f"{self.us:.1f} µs = experts {self.experts_us:.1f} + exposed transfer {self.exposed_us:.1f} "
            f"(hidden {self.hidden_us:.1f})"
        )


class LinkTimes(Strict):
    """Transfers by one exchange, and the line through them.

    Attributes:
        exchange: The exchange.
        tokens: How tokens lie.
        mode: Eager calls or replays of a CUDA graph.
        samples: Bytes of the rows that a rank gives to all others in dispatch, and the time of dispatch and combine
            together in µs.
        latency_us: α, of one way, by `links.fitted`.
        bytes_per_us: β.
    """

    exchange: Name
    tokens: Tokens
    mode: Mode
    samples: tuple[tuple[Count, Positive], ...]
    latency_us: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    bytes_per_us: Positive

    @classmethod
    def of(cls, exchange: str, tokens: Tokens, mode: Mode, samples: Sequence[tuple[int, float]]) -> "LinkTimes":
        """The line through samples."""
        latency, rate = fitted([(count, us / 2) for count, us in samples])
        return cls(
            exchange=exchange, tokens=tokens, mode=mode, samples=tuple(samples), latency_us=latency, bytes_per_us=rate
        )

    def us(self, kind: CallKind) -> float:
        """Dispatch and combine of a kind of call."""
        return 2 * (self.latency_us + sent_bytes(kind) / self.bytes_per_us)


class LayerTimes(Strict):
    """Whole calls of one layer at one token count in one mode, by each exchange that ran. Letters as in `CallKind`."""

    K: Count
    N: Count
    E: Count
    topk: Count
    dtype: DType
    act_dtype: DType
    tokens: Tokens
    mode: Mode
    M: Count
    splits: dict[Name, Split]

    @property
    def layer(self) -> tuple[object, ...]:
        """What a curve over M is drawn for."""
        return layer_of(self)


class ParallelCalibration(Strict):
    """What was measured on the ranks of one topology.

    Attributes:
        schema_version: Version of this format.
        topology: The ranks.
        versions: Versions that the times depend on; any change retires the file.
        links: Transfers alone.
        layers: Whole calls.
    """

    schema_version: Literal[1] = 1
    topology: Topology
    versions: dict[Name, str]
    links: tuple[LinkTimes, ...]
    layers: tuple[LayerTimes, ...]

    def with_layers_of(self, other: "ParallelCalibration | None") -> "ParallelCalibration":
        """This calibration, and what another one of the same versions measured of layers that this one did not."""
        if other is None or other.versions != self.versions:
            return self
        known = {(each.layer, each.M) for each in self.layers}
        older = tuple(each for each in other.layers if (each.layer, each.M) not in known)
        return self.model_copy(update={"layers": self.layers + older})


def layer_of(kind: CallKind | LayerTimes) -> tuple[object, ...]:
    """What of a kind of call its times are looked up by, besides M."""
    return kind.K, kind.N, kind.E, kind.topk, kind.dtype, kind.act_dtype, kind.tokens, kind.mode


def sent_bytes(kind: CallKind) -> int:
    """Bytes of the rows that a rank would give to all others if each row went everywhere."""
    return kind.M * kind.row_bytes * (kind.ranks - 1)


def calibration_path(topology: Topology, directory: Path | None = None) -> Path:
    """The file of a topology, which `moe-dispatch calibrate --parallel` writes."""
    return (directory or cache_dir()) / "calibration" / "parallel" / f"{topology.key}.json"


def read(path: Path, topology: Topology) -> ParallelCalibration:
    """The calibration in a file.

    Raises:
        FileNotFoundError: There is none.
        PolicyFileError: It cannot be read, is damaged, or is of other ranks.
    """
    try:
        file = ParallelCalibration.model_validate_json(read_bytes(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PolicyFileError(
            f"{path} cannot be read: {error.strerror or error}; make it readable or delete it"
        ) from error
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PolicyFileError(f"{path} is damaged ({where}: {first['msg']}); delete it, or calibrate again") from error
    if file.topology != topology:
        raise PolicyFileError(f"{path} was measured on {file.topology}, and this is {topology}; calibrate here")
    return file


def find(topology: Topology) -> ParallelCalibration | None:
    """The calibration of a topology: the machine's own file, or that of a folder of ``MOE_DISPATCH_CALIBRATION_PATH``.

    Raises:
        PolicyFileError: The first file that exists cannot be used.
    """
    shared = (entry / f"{topology.key}.json" for entry in calibration_search_path() if entry.suffix != ".json")
    for path in (calibration_path(topology), *shared):
        try:
            return read(path, topology)
        except FileNotFoundError:
            continue
    return None


@dataclass(frozen=True)
class Expected:
    """What a calibration says of a kind of call.

    Attributes:
        us: The time that each exchange is ranked by, in µs.
        basis: What these times are.
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
        self._points: dict[tuple[object, ...], dict[int, dict[str, Split]]] = {}
        for each in calibration.layers:
            self._points.setdefault(each.layer, {})[each.M] = each.splits

    def expected(self, kind: CallKind) -> Expected | None:
        """Whole calls of this layer between whose token counts M lies, else transfers alone by the links' lines."""
        if kind.division == "experts" and (points := self._points.get(layer_of(kind))):
            tokens = sorted(points)
            place = bisect.bisect_left(tokens, kind.M)
            around = tokens[place : place + 1] if kind.M in points else tokens[max(place - 1, 0) : place + 1]
            if kind.M in points or (len(around) == 2 and around[1] <= APART * around[0]):
                splits = _between(kind.M, around, [points[M] for M in around])
                where = "at M=" + " and ".join(map(str, around))
                return Expected({name: each.us for name, each in splits.items()}, f"calibrated {where}", splits)
        lines = [each for each in self._links if (each.tokens, each.mode) == (kind.tokens, kind.mode)]
        if not lines:
            return None
        return Expected({each.exchange: each.us(kind) for each in lines}, "expected of the calibrated links", {})


def _between(M: int, tokens: Sequence[int], points: Sequence[Mapping[str, Split]]) -> dict[str, Split]:
    """Times at M, as powers of M between two measured token counts, of exchanges that were timed at both."""
    share = 0.0 if len(tokens) == 1 else math.log(M / tokens[0]) / math.log(tokens[1] / tokens[0])
    splits = {}
    for name in points[0]:
        if name in points[-1]:
            ends = points[0][name].model_dump(), points[-1][name].model_dump()
            splits[name] = Split(**{key: us ** (1 - share) * ends[1][key] ** share for key, us in ends[0].items()})
    return splits
