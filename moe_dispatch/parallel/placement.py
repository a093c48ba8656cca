"""Which rank holds which experts of a layer, and the ids of a call as this rank's experts know them."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Division = Literal["experts", "columns"]


@dataclass(frozen=True)
class Placement:
    """How a layer is divided over the ranks of a group.

    Attributes:
        rank: This process's rank in the group.
        held: Number of experts that each rank holds, in the order of ranks: blocks of consecutive ids. With
            ``"columns"`` every rank holds a part of each expert's N columns, and so all experts.
        division: What is divided: ``"experts"``, or ``"columns"`` as under tensor parallelism.
    """

    rank: int
    held: tuple[int, ...]
    division: Division = "experts"

    @functools.cached_property
    def experts(self) -> int:
        """Experts of the whole layer."""
        return self.held[0] if self.division == "columns" else sum(self.held)

    @functools.cached_property
    def first(self) -> int:
        """The global id of this rank's first expert."""
        return 0 if self.division == "columns" else sum(self.held[: self.rank])

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """For each rank the global id after its last expert."""
        ends = [0]
        for count in self.held:
            ends.append(ends[-1] + count)
        return tuple(ends[1:])

    def wire_ids(self, topk_ids: Tensor) -> Tensor:
        """Global ids as int32; what lies outside 0…E-1 in 64 bits stays outside in 32."""
        return topk_ids.clamp(-1, self.experts).to(torch.int32)

    def local_ids(self, wire_ids: Tensor) -> Tensor:
        """The ids as this rank's experts are numbered; outside their range is what other ranks hold, or none does."""
        return wire_ids - self.first if self.first else wire_ids

    def destinations(self, wire_ids: Tensor) -> Tensor:
        """Which ranks each token needs: bool ``[M, ranks]`` for ids ``[M, topk]``."""
        ends = _on_device(self.ends, wire_ids.device)
        # Ids outside 0…E-1 go to a further column, which is cut off.
        owners = torch.where(wire_ids < 0, len(self.held), torch.bucketize(wire_ids, ends, right=True))
        needed = torch.zeros(wire_ids.shape[0], len(self.held) + 1, dtype=torch.bool, device=wire_ids.device)
        return needed.scatter_(1, owners, value=True)[:, :-1]


@functools.lru_cache(maxsize=64)
def _on_device(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The tensor of `Placement.ends`, kept: to copy it in each call would make the host wait for the device."""
    return torch.tensor(ends, dtype=torch.int32, device=device)
