"""Each row only to the ranks that hold an expert of it, once to each: all-to-all with counts known by the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dispatch.parallel.exchange import Arrived, CallKind, Exchange, ExchangeRequirements, LocalTokens
from moe_dispatch.parallel.gather import padded


@dataclass(frozen=True)
class Route:
    """Which rows went where.

    Attributes:
        token: ``[S]``, the token of each row sent, ordered by destination and then by token.
        sent: Rows sent to each rank.
        received: Rows received from each rank.
    """

    token: Tensor
    sent: list[int]
    received: list[int]


class AllToAllExchange(Exchange):
    """Three collectives out (counts, rows, ids with weights) and one back, whose rows are added in fp32 by rank.

    The host has to know the counts, so it waits for the device once in every call, and no CUDA graph can hold it. The
    rows that arrive are padded to one of few counts, so that kernels are chosen and compiled for few of them.
    """

    name = "alltoall"
    requirements = ExchangeRequirements(
        tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}), capturable=False, host_sync=True
    )

    def arriving_share(self, kind: CallKind) -> float:
        """See `Exchange.arriving_share`: the chance that one of a token's experts is on the rank."""
        return 1 - (1 - 1 / kind.ranks) ** kind.topk

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        place, topk = tokens.placement, tokens.wire_ids.shape[1]
        needed = place.destinations(tokens.wire_ids)
        every = self.collectives.all_gather(needed.sum(dim=0, keepdim=True)).tolist()  # [origin][destination]
        sent, received = every[place.rank], [row[place.rank] for row in every]
        # As nonzero, which would wait for the device to tell their number: the needed ones first, in their order.
        needless = needed.logical_not().t().flatten().byte()
        token = needless.sort(stable=True).indices[: sum(sent)] % max(1, needed.shape[0])
        room = rounded_rows(sum(received))
        rows = self.collectives.all_to_all(tokens.hidden_states[token], sent, received, room)
        slots = torch.cat((tokens.wire_ids, tokens.topk_weights.view(torch.int32)), dim=1)
        slots = self.collectives.all_to_all(slots[token], sent, received)
        slots = padded(slots, room, fill=-1)
        route = Route(token, sent, received)
        return Arrived(rows, slots[:, topk:].view(torch.float32), place.local_ids(slots[:, :topk]), route)

    def combine(self, partial: Tensor, arrived: Arrived, tokens: LocalTokens) -> Tensor:
        """See `Exchange.combine`."""
        route: Route = arrived.route
        back = self.collectives.all_to_all(partial[: sum(route.received)], route.received, route.sent)
        out = torch.zeros(tokens.hidden_states.shape, dtype=torch.float32, device=partial.device)
        # A rank returns a token once, so that no two rows of one addition meet and the order of sums is fixed.
        for token, rows in zip(torch.split(route.token, route.sent), torch.split(back, route.sent), strict=True):
            out.index_add_(0, token, rows.float())
        return out.to(partial.dtype)


def rounded_rows(count: int) -> int:
    """The least count from `count` on with at most four significant bits, so that it is at most an eighth larger."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step
