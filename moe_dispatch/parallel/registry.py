"""The exchanges by name, in the order in which a tie between them is decided."""

from typing import Final

from moe_dispatch.parallel.collectives import Collectives
from moe_dispatch.parallel.exchange import Exchange
from moe_dispatch.registry import Registry

ALWAYS: Final = "gather"  # The exchange that serves every kind of call.

EXCHANGES: Final = Registry(
    "exchange",
    Exchange,  # type: ignore[type-abstract]  # the registry holds subclasses and never instantiates the base
    {
        ALWAYS: "moe_dispatch.parallel.gather:GatherExchange",
        "direct": "moe_dispatch.parallel.direct:DirectExchange",
        "direct_fp8": "moe_dispatch.parallel.direct:DirectFp8Exchange",
        "replicated": "moe_dispatch.parallel.replicated:ReplicatedExchange",
        "alltoall": "moe_dispatch.parallel.all_to_all:AllToAllExchange",
        "nccl_ep": "moe_dispatch.parallel.libraries:NcclEpExchange",
        "deep_ep": "moe_dispatch.parallel.libraries:DeepEpExchange",
    },
    group="moe_dispatch.exchanges",
)


def make_exchanges(collectives: Collectives) -> dict[str, Exchange]:
    """Every registered exchange for a group, by name.

    Raises:
        BackendUnavailableError: A module of another package does not import.
    """
    return {name: EXCHANGES.load(name)(collectives) for name in EXCHANGES.names()}
