"""All rows to all ranks: an all-gather before, a reduce-scatter after. It runs everywhere and every kind of call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.parallel import device_code
from moe_dispatch.parallel.exchange import Arrived, CallKind, Exchange, LocalTokens


class GatherExchange(Exchange):
    """The reference among the exchanges: an all-gather out and a reduce-scatter back.

    On NCCL a kernel packs rows, ids and weights, one all-gather carries them, and a second kernel reads the slots; rows
    are read where they arrive. On gloo, and where a row is no multiple of 16 bytes, rows and slots go in two.

    Each rank's rows are padded to the greatest token count. Of n ranks each receives n - 1 times the rows of one, which
    is nearly all it needs where n is small: with 256 experts, 8 of them per token, one of two ranks needs 99.7 % of the
    other's tokens, and one of eight 66 %.

    Where every rank has all tokens already nothing is dispatched; results are added by a reduce-scatter over blocks of
    rows and an all-gather.
    """

    name = "gather"

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        place = tokens.placement
        if tokens.replicated:
            return Arrived(tokens.hidden_states, tokens.topk_weights, place.local_ids(tokens.wire_ids))
        topk = tokens.topk_ids.shape[1]
        if self.packs(tokens.hidden_states.shape[1] * tokens.hidden_states.element_size()):
            return self._dispatch_packed(tokens, topk)
        rows = self.collectives.all_gather(padded(tokens.hidden_states, tokens.capacity))
        slots = torch.cat((tokens.wire_ids, tokens.topk_weights.view(torch.int32)), dim=1)
        # A padding row has no expert; the same bits make its weights NaN, which then must not count.
        slots = self.collectives.all_gather(padded(slots, tokens.capacity, fill=-1))
        return Arrived(rows, slots[:, topk:].view(torch.float32), place.local_ids(slots[:, :topk]))

    def packs(self, row_bytes: int) -> bool:
        """Whether rows of so many bytes travel with their slots; the same on every rank."""
        return self.collectives.library == "nccl" and row_bytes % 16 == 0

    def arriving_share(self, kind: CallKind) -> float:
        """See `Exchange.arriving_share`: slots that travel as rows are rows for the experts, too."""
        if kind.tokens == "replicated" or not self.packs(kind.row_bytes):
            return 1.0
        return 1 + device_code.pack().spare_rows(kind.M, kind.topk, kind.row_bytes) / kind.M

    def _dispatch_packed(self, tokens: LocalTokens, topk: int) -> Arrived:
        pack, place, hidden = device_code.pack(), tokens.placement, tokens.hidden_states
        K, capacity, ranks = hidden.shape[1], tokens.capacity, self.collectives.size
        segment = capacity + pack.spare_rows(capacity, topk, K * hidden.element_size())
        wire = hidden.new_empty(ranks * segment, K)
        own = wire[place.rank * segment : (place.rank + 1) * segment]
        pack.pack_tokens(
            hidden, tokens.topk_weights, tokens.topk_ids, own, capacity=capacity, E=place.experts
        )  # fmt: skip
        self.collectives.all_gather_in_place(wire, own)
        weights, ids = pack.unpack_slots(
            wire, ranks=ranks, capacity=capacity, topk=topk, first_expert=place.first
        )  # fmt: skip
        return Arrived(wire, weights, ids)

    def combine(self, partial: Tensor, arrived: Arrived, tokens: LocalTokens) -> Tensor:  # noqa: ARG002
        """See `Exchange.combine`."""
        M, ranks = tokens.hidden_states.shape[0], self.collectives.size
        if not tokens.replicated:
            sums = self.collectives.reduce_scatter(partial)
            return sums if sums.shape[0] == M else sums[:M]
        block = self.collectives.reduce_scatter(padded(partial, -(-M // ranks) * ranks, fill=0))
        return self.collectives.all_gather(block)[:M]


def padded(rows: Tensor, count: int, fill: int | None = None) -> Tensor:
    """``[M, …]`` as contiguous ``[count, …]``; the rows beyond M hold `fill`, or anything where that is None."""
    missing = count - rows.shape[0]
    if not missing:
        return rows.contiguous()
    if fill is not None:
        return F.pad(rows, (0, 0, 0, missing), value=fill)
    out = rows.new_empty(count, *rows.shape[1:])
    out[: rows.shape[0]] = rows
    return out
