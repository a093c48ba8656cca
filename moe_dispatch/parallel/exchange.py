"""What an exchange is: it brings each token to the ranks that hold its experts, and the results back.

To add one, subclass `Exchange`, declare what it needs, write `dispatch` and `combine`, and register it
(`registry.EXCHANGES`). Between the two verbs every rank runs its own experts with `moe_forward`'s contract: rows,
weights and local ids, where an id outside the rank's experts adds nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from torch import __version__ as torch_version

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.numerics import QuantizedRows
from moe_dispatch.parallel.agreement import library_versions
from moe_dispatch.parallel.collectives import Collectives
from moe_dispatch.parallel.placement import Division, Placement
from moe_dispatch.problem import DTYPES, ELEMENT_BYTES, DType, Mode
from moe_dispatch.system.libraries import library_version

Tokens = Literal["sharded", "replicated"]


@dataclass(frozen=True)
class CallKind:
    """One kind of distributed call, equal on every rank: what a choice of the exchange may depend on.

    Attributes:
        M: Greatest token count of a rank; in a CUDA graph the capacity.
        K: Hidden size.
        N: Intermediate size of an expert on one rank.
        E: Experts of the whole layer.
        topk: Experts per token.
        dtype: The weights' dtype.
        act_dtype: The dtype of hidden_states.
        tokens: ``"sharded"`` where each rank has tokens of its own, ``"replicated"`` where all have the same.
        division: What of the layer is divided; see `Placement`.
        ranks: Ranks of the group.
        hosts: How many hosts they are on; a host whose name is unknown counts as one of its own.
        mode: ``"graph"`` while a CUDA graph is captured.
    """

    M: int
    K: int
    N: int
    E: int
    topk: int
    dtype: DType
    act_dtype: DType
    tokens: Tokens
    division: Division
    ranks: int
    hosts: int = 1
    mode: Mode = "eager"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of hidden_states."""
        return self.K * ELEMENT_BYTES[self.act_dtype]


@dataclass(frozen=True)
class ExchangeRequirements:
    """What an exchange takes, as data.

    Attributes:
        tokens: Whether it serves sharded tokens, replicated ones, or both.
        divisions: Divisions of a layer that it serves.
        dtypes: Dtypes of the weights.
        transports: Libraries of the process group that it runs on.
        act_dtypes: Dtypes of hidden_states.
        libraries: Distributions that must be installed, each with the release whose interface is called; ``""`` stands
            for any release.
        torch: The release of torch that its library's wheels are built for; empty where any will do.
        nccl: The oldest NCCL that it takes; empty where any will do.
        one_domain: Whether all ranks must be GPUs that address each other's memory, which is taken to be a host's.
        capturable: Whether it may run while a CUDA graph is captured.
        host_sync: Whether the host waits for the device in every call.
    """

    tokens: frozenset[Tokens] = frozenset(get_args(Tokens))
    divisions: frozenset[Division] = frozenset(get_args(Division))
    dtypes: frozenset[DType] = frozenset(DTYPES)
    transports: frozenset[str] = frozenset({"gloo", "nccl"})
    act_dtypes: frozenset[DType] = frozenset({"bf16", "fp16", "fp32"})
    libraries: tuple[tuple[str, str], ...] = ()
    torch: str = ""
    nccl: str = ""
    one_domain: bool = False
    capturable: bool = True
    host_sync: bool = False

    def reasons_against(self, kind: CallKind) -> list[str]:
        """Every declared requirement that a kind of call misses, each with the limit and the value."""
        checks = (
            _missed("tokens that are", self.tokens, kind.tokens),
            _missed("a layer divided by", self.divisions, kind.division),
            _missed("weights in", self.dtypes, kind.dtype),
            _missed("hidden_states in", self.act_dtypes, kind.act_dtype),
            "cannot be captured in a CUDA graph" if kind.mode == "graph" and not self.capturable else "",
            f"needs all ranks on one host, got {kind.hosts} hosts" if self.one_domain and kind.hosts > 1 else "",
        )
        return [reason for reason in checks if reason]

    def reasons_of_rank(self, collectives: Collectives) -> list[str]:
        """Every declared requirement that this rank misses whatever the call, each with the limit and the value."""
        nccl = library_versions(collectives.device)["NCCL"] if self.nccl else ""
        wheels = f"torch {self.torch}, for which its wheels are built"
        checks = (
            _missed("a process group on", self.transports, collectives.library),
            *(_lacks(f"{name} {release}".strip(), release, library_version(name)) for name, release in self.libraries),
            _lacks(wheels, self.torch, torch_version),
            f"needs NCCL {self.nccl}, got {nccl}" if nccl and _numbers(nccl) < _numbers(self.nccl) else "",
        )
        return [reason for reason in checks if reason]


@dataclass(frozen=True)
class LocalTokens:
    """This rank's part of a call.

    Attributes:
        hidden_states: ``[M, K]``, contiguous.
        topk_weights: fp32 ``[M, topk]``, contiguous.
        topk_ids: int32 or int64 ``[M, topk]``, contiguous, global.
        placement: Which rank holds which experts.
        capacity: Greatest M of any rank, equal on all of them.
        replicated: Whether the other ranks have the same tokens.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    placement: Placement
    capacity: int
    replicated: bool

    @cached_property
    def wire_ids(self) -> Tensor:
        """int32 ``[M, topk]``, global; see `Placement.wire_ids`."""
        return self.placement.wire_ids(self.topk_ids)


@dataclass(frozen=True)
class Arrived:
    """The rows that a rank's experts are to run, and what the way back needs.

    Attributes:
        hidden_states: ``[R, K]``: a tensor; codes and multipliers where the exchange sends those; or rows of which some
            may not have arrived yet.
        topk_weights: fp32 ``[R, topk]``.
        topk_ids: int32 ``[R, topk]``, local; an id outside the rank's experts adds nothing. Rows that pad have no other
            ids, and any values in hidden_states.
        route: Whatever `Exchange.combine` needs of the dispatch.
        out: Memory of the ranks that the rows came from, where a backend may store its results; None if there is none.
    """

    hidden_states: Tensor | QuantizedRows | TravellingRows
    topk_weights: Tensor
    topk_ids: Tensor
    route: Any = None
    out: PeerRows | None = None


class Exchange(ABC):
    """One way to bring tokens to experts on other ranks and their results back.

    Class attributes to declare: `name` and `requirements`. Every rank runs the same exchange in the same call, so that
    neither verb may decide by local values whether to communicate.

    Args:
        collectives: The collectives of the group.
    """

    name: ClassVar[str]
    requirements: ClassVar[ExchangeRequirements] = ExchangeRequirements()

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def unavailable_reasons(self) -> tuple[str, ...]:
        """Why it cannot run on this rank at all, each with its remedy; empty if it can."""
        return tuple(self.requirements.reasons_of_rank(self.collectives))

    def unsupported_reasons(self, kind: CallKind) -> tuple[str, ...]:
        """All reasons why it cannot serve a kind of call. Pure: the same on every rank."""
        return tuple(self.requirements.reasons_against(kind))

    def arriving_share(self, kind: CallKind) -> float:
        """The rows that one rank expects under uniform routing, as a part of the tokens of all ranks."""
        del kind
        return 1.0

    def prepare(self, kind: CallKind) -> None:  # noqa: B027 - most exchanges need nothing
        """Get what calls of a kind need and cannot get while they run, such as memory. Collective; not captured."""

    @abstractmethod
    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """Bring the tokens of all ranks to where their experts are. Collective."""

    @abstractmethod
    def combine(self, partial: Any, arrived: Arrived, tokens: LocalTokens) -> Tensor:
        """Bring results back and add them up. Collective.

        Args:
            partial: ``[R, K]``, for each row that arrived the weighted sum over this rank's experts; or `arrived.out`,
                where there is one and the backend stored the sums there.
            arrived: What `dispatch` returned.
            tokens: What `dispatch` was given.

        Returns:
            ``[M, K]`` in hidden_states' dtype.
        """


def _missed(what: str, allowed: frozenset[Any], value: str) -> str:
    return "" if value in allowed else f"takes {what} {' or '.join(sorted(allowed))}, got {value}"


def _lacks(what: str, wanted: str, version: str) -> str:
    """What is missing where `version` (empty: not installed) is not of release `wanted` (empty: any); else empty."""
    fits = version.startswith(wanted) and not (wanted and version[len(wanted) :][:1].isdigit())
    return "" if version and fits else f"needs {what}, got {version or 'none'}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
