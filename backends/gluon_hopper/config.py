"""The one setting of the Hopper kernels that a measurement may choose; their tiles are fixed, see `tiles`."""

import pydantic

from moe_dispatch.backend import BackendConfig


class GluonHopperConfig(BackendConfig):
    """The order in which tiles are computed.

    Attributes:
        group_m: Row blocks of one expert whose tiles are computed at about the same time, so that they share the
            expert's weights in the L2 cache.
    """

    group_m: int = pydantic.Field(default=8, ge=1)
