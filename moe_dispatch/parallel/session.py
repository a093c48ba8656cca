"""What the layers of one expert-parallel group share: the agreement, the exchanges, and what is chosen among them."""

import contextlib
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch.arrived_rows import ArrivedInputs, PeerRows
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.internals import any_autocast_enabled
from moe_dispatch.errors import InvalidInputError, MoEDispatchError, UnknownNameError, warn
from moe_dispatch.machine import current_machine
from moe_dispatch.parallel import agreement
from moe_dispatch.parallel.collectives import Collectives
from moe_dispatch.parallel.control import Control
from moe_dispatch.parallel.errors import ExpertParallelLostError, ExpertParallelMismatchError
from moe_dispatch.parallel.exchange import CallKind, Exchange, Tokens
from moe_dispatch.parallel.exchange_times import ExchangeTable, Expected, ParallelCalibration, Split, find
from moe_dispatch.parallel.placement import Placement
from moe_dispatch.parallel.registry import ALWAYS, EXCHANGES, make_exchanges
from moe_dispatch.parallel.topology import Topology, nvlinks
from moe_dispatch.parallel.watch import ProcessIdentity
from moe_dispatch.problem import Mode
from moe_dispatch.settings import Settings, settings
from moe_dispatch.weight_checks import DTYPE_NAMES

_REMEDY: Final = (
    "Give every rank the same software, settings and calibration files; one MOE_DISPATCH_CACHE_DIR serves all of them."
)
_DTYPES: Final = tuple(DTYPE_NAMES)
_REFUSED: Final = -1  # in place of a token count
_NUMBERS: Final = ("call", "layer", "topk", "dtype of hidden_states", "named backend", "tokens")


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `ExpertParallel` that must be equal on every rank.

    Attributes:
        tokens: Whether each rank has tokens of its own or all have the same.
        max_tokens: Most tokens of a rank in a call; None for no limit.
        exchange: The exchange of every call; None to choose.
        timeout: Seconds that a rank waits for the others in a call.
        first_timeout: Seconds that it waits where first runs compile.
    """

    tokens: Tokens
    max_tokens: int | None
    exchange: str | None
    timeout: float
    first_timeout: float


class Session:
    """One expert-parallel group in this process. Making one is collective.

    Args:
        group: The process group.
        device: Where this rank's layers are.
        options: Equal on every rank.
        calibrated: Whether choices follow the calibration of these ranks, where rank 0 has one.

    Attributes:
        options: As given.
        collectives: The group's collectives on tensors.
        control: What ranks tell each other on the host.
        dispatcher: Runs this rank's experts, without backends that another rank lacks.
        exchanges: Every registered exchange by name.
        unavailable: For an exchange that some rank cannot use, the reasons.
        barred: Exchanges that failed in `warm_up`, by kind of call, with the reason.
        topology: The devices of all ranks and what joins them.
        choices: How often the choice of exchanges has changed.
        stated: Token counts of all ranks as the caller stated them; None where ranks tell each other in every call.

    Raises:
        ExpertParallelMismatchError: The ranks differ in something that a choice depends on.
        ExpertParallelLostError: A rank did not take part.
        UnknownNameError: No exchange has the name in `options`.
    """

    topology: Topology

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, options: Options, *, calibrated: bool = True
    ) -> None:
        if options.exchange is not None and options.exchange not in EXCHANGES.names():
            raise UnknownNameError("exchange", options.exchange, EXCHANGES.names())
        self.options, self.device = options, device
        self.control = Control(group, options.timeout, options.first_timeout)
        self.watch = self.control.watch
        self.collectives = Collectives(group, device, self.watch)
        self.exchanges: dict[str, Exchange] = make_exchanges(self.collectives)
        self.unavailable: dict[str, tuple[str, ...]] = {}
        self.barred: dict[CallKind, dict[str, str]] = {}
        self.stated: tuple[int, ...] | None = None
        self.choices = 0
        self._chosen: dict[CallKind, tuple[str, Mapping[str, Split]]] = {}
        self._layers = 0
        self.dispatcher = self._agree(settings())
        self._table = self._agreed_table() if calibrated else None

    def _agree(self, configured: Settings) -> Dispatcher:
        """Exchange the facts of all ranks, and make the dispatcher that they allow."""
        machine = current_machine(self.device.type, self.device.index)
        dispatcher = Dispatcher(machine, configured)
        every: list[dict[str, Any]] = self.control.gather_objects({
            "identity": ProcessIdentity.here(),
            "facts": {**agreement.facts(dispatcher, configured, self.device), **dataclasses.asdict(self.options)},
            "barred": agreement.barred_backends(dispatcher),
            "unavailable": {name: exchange.unavailable_reasons() for name, exchange in self.exchanges.items()},
            "nvlinks": nvlinks(machine, self.device),
        })  # fmt: skip
        self.watch.identities = tuple(each["identity"] for each in every)
        hosts = [each.host or str(rank) for rank, each in enumerate(self.watch.identities)]
        numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
        self._hosts = len(numbers)
        self.control.compare("their setup", [each["facts"] for each in every], _REMEDY)
        self.topology = Topology(
            devices=tuple(each["facts"]["machine"] for each in every), hosts=tuple(map(numbers.__getitem__, hosts)),
            nvlinks=tuple(each["nvlinks"] for each in every),
        )  # fmt: skip
        self.unavailable = self._merged([each["unavailable"] for each in every])
        barred = {
            name: "; ".join(reasons) for name, reasons in self._merged([each["barred"] for each in every]).items()
        }
        if configured.backend in barred:
            values = [each["barred"].get(configured.backend, "available") for each in every]
            named = {f"backend {configured.backend!r}, which MOE_DISPATCH_BACKEND names": values}
            raise ExpertParallelMismatchError("their setup", named, self.control.ranks, _REMEDY)
        # What this rank lacks itself is a reason already.
        others = {name: reason for name, reason in barred.items() if name not in every[self.control.rank]["barred"]}
        return Dispatcher(machine, configured, barred=others) if others else dispatcher

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that the device has."""
        return ("eager", "graph") if self.device.type == "cuda" else ("eager",)

    @property
    def versions(self) -> dict[str, str]:
        """Versions that times of exchanges depend on, equal on all ranks."""
        machine = self.dispatcher.machine
        own = {"driver": machine.driver, "cuda": machine.cuda, "torch": machine.torch, "triton": machine.triton}
        return {**own, **agreement.library_versions(self.device)}

    def _agreed_table(self) -> ExchangeTable | None:
        """What rank 0 has of a calibration of these ranks; files of the others are not read, and so cannot differ."""
        calibration, unused = find(self.topology, self.versions) if self.control.rank == 0 else (None, [])
        text = self.control.gather_objects(calibration.model_dump_json() if calibration else "")[0]
        if unused:  # a warning that a program turns into an error does not leave the other ranks waiting
            warn(f"not every calibration of {self.topology} is used: {'; '.join(unused)}")
        return ExchangeTable(ParallelCalibration.model_validate_json(text)) if text else None

    def _merged(self, every: list[dict[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
        """Reasons by name over all ranks, each once, with the ranks that have it unless all do."""
        holders: dict[str, dict[str, list[int]]] = {}
        for rank, by_name in zip(self.control.ranks, every, strict=True):
            for name, reasons in by_name.items():
                for reason in reasons:
                    holders.setdefault(name, {}).setdefault(reason, []).append(rank)
        return {
            name: tuple(
                reason if len(ranks) == len(every) else f"{reason} (rank {', '.join(map(str, ranks))})"
                for reason, ranks in by_reason.items()
            )
            for name, by_reason in holders.items()
        }

    def number_of_layer(self) -> int:
        """The number of a new layer: every rank makes its layers in one order."""
        self._layers += 1
        return self._layers

    # A call.

    def agreed_capacity(self, layer: int, M: int, topk: int, act_dtype: torch.dtype, backend: str | None) -> int:
        """The greatest token count of any rank in this call, equal on all of them.

        The ranks tell each other, which also finds ranks that are dead, late or in another call; unless the caller
        has stated the counts, or a CUDA graph is captured, in which no host takes part.

        Raises:
            ExpertParallelMismatchError: The ranks are not in the same call.
            ExpertParallelLostError: A rank does not come.
            InvalidInputError: There are more tokens than were stated.
        """
        options = self.options
        if self.stated is not None:
            stated = self.stated[self.control.rank]
            if stated != M:
                error = InvalidInputError(f"this rank has {M} tokens, and tokens_per_rank states {stated}")
                self.watch.failed(error)
                raise error
            return max(self.stated)
        if self.capturing:
            if options.tokens == "replicated":
                return M
            if options.max_tokens is None or options.max_tokens < M:
                raise InvalidInputError(
                    f"a CUDA graph of {M} sharded tokens needs a capacity that is equal on all ranks: state the counts "
                    f"with tokens_per_rank, or give max_tokens of at least {M} (it is {options.max_tokens})"
                )
            return options.max_tokens
        named = zlib.crc32((backend or "").encode())
        numbers = (self.watch.call, layer, topk, _DTYPES.index(act_dtype), named, M)
        every = self.control.gather_numbers(numbers)
        refusing = [rank for rank, row in zip(self.control.ranks, every, strict=True) if row[-1] == _REFUSED]
        if refusing:
            raise InvalidInputError(
                f"rank {', '.join(map(str, refusing))} refuses the arguments of call {self.watch.call}, as its own "
                "error says; nothing was run"
            )
        differing: dict[str, list[int]] = {}
        for name, values in zip(_NUMBERS, zip(*every, strict=True), strict=True):
            if len(set(values)) > 1 and (name != "tokens" or options.tokens == "replicated"):
                differing[name] = list(values)
        if differing:
            raise ExpertParallelMismatchError(f"call {self.watch.call}", differing, self.control.ranks)
        capacity = max(row[-1] for row in every)
        if options.max_tokens is not None and capacity > options.max_tokens:
            raise InvalidInputError(f"a rank has {capacity} tokens, and max_tokens is {options.max_tokens}")
        return capacity

    def refuse(self, error: MoEDispatchError) -> None:
        """Tell the other ranks that this one cannot make the current call; they refuse it as well.

        Where the ranks exchange no counts the others cannot know before they wait in vain.
        """
        if self.stated is not None or self.capturing:
            self.watch.failed(error)
            return
        with contextlib.suppress(ExpertParallelLostError):
            self.control.gather_numbers([self.watch.call, *[0] * (len(_NUMBERS) - 2), _REFUSED])

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is captured."""
        return self.collectives.capturing

    @property
    def mode(self) -> Mode:
        """How a call is made now."""
        return "graph" if self.capturing else "eager"

    def run_local(self, inputs: ArrivedInputs, backend: str | None) -> Tensor | PeerRows:
        """Run this rank's experts over rows that arrived; what is returned is for `Exchange.combine`."""
        if any_autocast_enabled() and torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):  # see `call_eagerly`
                return self.run_local(inputs, backend)
        rows, experts, topk_weights, topk_ids, out = inputs
        if out is not None or not isinstance(rows, Tensor):
            return self.dispatcher.arrived.forward(inputs, backend)
        return self.dispatcher.forward(rows, experts, topk_weights, topk_ids, backend)

    # The choice of the exchange.

    def reasons_against(self, name: str, kind: CallKind) -> tuple[str, ...]:
        """Every reason against an exchange for a kind of call; the same on every rank."""
        failed = self.barred.get(bucket(kind), {}).get(name)
        reasons = (*self.unavailable.get(name, ()), *self.exchanges[name].unsupported_reasons(kind))
        return (*reasons, f"failed in warm_up: {failed}") if failed else reasons

    def candidates(self, kind: CallKind) -> tuple[str, ...]:
        """The exchanges that every rank can use for a kind of call."""
        return tuple(name for name in self.exchanges if not self.reasons_against(name, kind))

    def choose(self, kind: CallKind) -> Exchange:
        """The exchange of a kind of call; see `name_of_choice`.

        Raises:
            InvalidInputError: The named exchange cannot serve such a call.
        """
        name = self.name_of_choice(kind)
        if self.options.exchange is not None and (reasons := self.reasons_against(name, kind)):
            raise InvalidInputError(
                f"exchange {name!r} is named and cannot serve {kind}: {'; '.join(reasons)}. Leave `exchange` out to "
                "have one chosen"
            )
        return self.exchanges[name]

    def name_of_choice(self, kind: CallKind) -> str:
        """The exchange that the caller named, whether or not it can serve the call, else the chosen one.

        That is what `warm_up` kept, else the fastest by the calibration, else `gather`. A CUDA graph of a kind that was
        not warmed up captures `gather`: what another exchange needs from before, such as memory, is not there.
        """
        if self.options.exchange is not None:
            return self.options.exchange
        if (kept := self._chosen.get(bucket(kind))) is not None:
            return kept[0]
        return (self.calibrated_choice(kind) if kind.mode == "eager" else None) or ALWAYS

    def expected(self, kind: CallKind) -> Expected | None:
        """What the calibration says of a kind of call."""
        return None if self._table is None else self._table.expected(kind)

    def calibrated_choice(self, kind: CallKind, *, whole: bool = False) -> str | None:
        """The fastest exchange by the calibration; None where that says nothing of the kind.

        Args:
            kind: The kind of call.
            whole: Whether times of whole calls must have been measured: links alone do not count.
        """
        expected = self.expected(kind)
        return None if expected is None or (whole and not expected.splits) else expected.best(self.candidates(kind))

    def kept_splits(self, kind: CallKind) -> Mapping[str, Split] | None:
        """The times that `warm_up` measured for a kind of call; None where it measured none."""
        kept = self._chosen.get(bucket(kind))
        return None if kept is None else kept[1]

    def keep_choice(self, kind: CallKind, name: str, splits: Mapping[str, Split]) -> None:
        """Choose an exchange for a kind of call from now on. Every rank does so with the same arguments."""
        self._chosen[bucket(kind)] = name, splits
        self.choices += 1

    def bar(self, kind: CallKind, name: str, reason: str) -> None:
        """Use an exchange no longer for a kind of call. Every rank does so alike."""
        self.barred.setdefault(bucket(kind), {})[name] = reason
        self.choices += 1

    def kind(self, placement: Placement, layer: Any, M: int, topk: int, act_dtype: torch.dtype) -> CallKind:
        """The kind of a call.

        Args:
            placement: Which rank holds which experts.
            layer: This rank's ExpertWeights.
            M: The agreed capacity.
            topk: Experts per token.
            act_dtype: The dtype of hidden_states.
        """
        return CallKind(
            M=M, K=layer.K, N=layer.N, E=placement.experts, topk=topk, dtype=layer.dtype,
            act_dtype=DTYPE_NAMES[act_dtype], tokens=self.options.tokens, division=placement.division,
            ranks=self.collectives.size, hosts=self._hosts, mode=self.mode,
        )  # fmt: skip


def bucket(kind: CallKind) -> CallKind:
    """The kind with M rounded up to a power of two: a choice holds for all of these."""
    return dataclasses.replace(kind, M=1 << max(kind.M - 1, 0).bit_length())
