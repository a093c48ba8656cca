"""Nothing to dispatch where every rank has all tokens: one all-reduce adds the results."""

from torch import Tensor

from moe_dispatch.parallel.exchange import Arrived, Exchange, ExchangeRequirements, LocalTokens


class ReplicatedExchange(Exchange):
    """For tensor-parallel attention, after which all ranks have the same tokens: one all-reduce and no padding."""

    name = "replicated"
    requirements = ExchangeRequirements(tokens=frozenset({"replicated"}))

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        ids = tokens.placement.local_ids(tokens.wire_ids)
        return Arrived(tokens.hidden_states, tokens.topk_weights, ids)

    def combine(self, partial: Tensor, arrived: Arrived, tokens: LocalTokens) -> Tensor:  # noqa: ARG002
        """See `Exchange.combine`."""
        return self.collectives.all_reduce(partial)
