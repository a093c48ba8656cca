"""A layer whose experts are spread over ranks, as one of them holds it; `moe_forward` takes it for its weights."""

from typing import Any

from moe_dispatch.dispatch.settled_plans import SettledPlans
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.parallel.placement import Placement
from moe_dispatch.parallel.session import Session


class ShardedExperts:
    """This rank's part of a layer. `ExpertParallel` makes it.

    Args:
        session: The group.
        local: This rank's weights.
        placement: Which rank holds which experts.

    Attributes:
        session: As given.
        local: As given.
        placement: As given.
        number: The layer's number within the group.
        E: Experts of the whole layer: ids of a call are 0…E-1.
        K: Hidden size.
        N: Intermediate size of an expert on this rank.
        dtype: The weights' dtype.
        device: This rank's device.
        checked: How often kinds of arguments came since they were checked; `forward` keeps it.
        settled: Kinds of arguments that came often, which need no check; `forward` keeps it.
        plans: What serves a kind of call; `forward` keeps it.
    """

    def __init__(self, session: Session, local: ExpertWeights, placement: Placement) -> None:
        self.session, self.local, self.placement = session, local, placement
        self.number = session.number_of_layer()
        self.E, self.K, self.N = placement.experts, local.K, local.N
        self.dtype, self.device = local.dtype, local.device
        self.checked: dict[Any, int] = {}
        self.settled = SettledPlans[bool](on_cuda=local.device.type == "cuda")
        self.plans: dict[Any, Any] = {}
        self._expecting: dict[int, ExpertWeights] = {}

    def weights_expecting(self, share: float) -> ExpertWeights:
        """The local weights, with the load that is expected of rows of which each rank gets this share.

        Where each rank gets the tokens that need it only, more of a row's slots have their expert here.
        """
        routed = max(self.local.E, round(self.E * share))
        if routed not in self._expecting:
            whole = routed == self.local.E
            self._expecting[routed] = self.local.among(None if whole else routed)
        return self._expecting[routed]

    def __repr__(self) -> str:
        place = self.placement
        part = (
            f"experts {place.first} to {place.first + self.local.E - 1} of {self.E}"
            if place.division == "experts"
            else f"{self.N} of each expert's columns"
        )
        return f"ShardedExperts({part} on rank {place.rank} of {len(place.held)}, {self.local})"
