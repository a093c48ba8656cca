"""All rows to all ranks: an all-gather before, a reduce-scatter after. It runs everywhere and every kind of call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch.parallel.exchange import Arrived, Exchange, ExchangeRequirements, LocalTokens


class GatherExchange(Exchange):
    """The reference among the exchanges: two all-gathers (rows; ids with weights) and one reduce-scatter.

    Each rank's rows are padded to the greatest token count. Of n ranks each receives n - 1 times the rows of one, which
    is nearly all it needs where n is small: with 256 experts, 8 of them per token, one of two ranks needs 99.7 % of the
    other's tokens, and one of eight 66 %.

    Where every rank has all tokens already nothing is dispatched; results are added by a reduce-scatter over blocks of
    rows and an all-gather.
    """

    name = "gather"
    requirements = ExchangeRequirements(capacity=True)

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        place = tokens.placement
        if tokens.replicated:
            return Arrived(tokens.hidden_states, tokens.topk_weights, place.local_ids(tokens.wire_ids))
        topk = tokens.wire_ids.shape[1]
        rows = self.collectives.all_gather(padded(tokens.hidden_states, tokens.capacity))
        slots = torch.cat((tokens.wire_ids, tokens.topk_weights.view(torch.int32)), dim=1)
        # A padding row has no expert; the same bits make its weights NaN, which then must not count.
        slots = self.collectives.all_gather(padded(slots, tokens.capacity, fill=-1))
        return Arrived(rows, slots[:, topk:].view(torch.float32), place.local_ids(slots[:, :topk]))

    def combine(self, partial: Tensor, arrived: Arrived, tokens: LocalTokens) -> Tensor:  # noqa: ARG002
        """See `Exchange.combine`."""
        M, ranks = tokens.hidden_states.shape[0], self.collectives.size
        if not tokens.replicated:
            return self.collectives.reduce_scatter(partial)[:M]
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
