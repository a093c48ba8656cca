"""What ranks tell each other on the host: facts at creation, the numbers of a call, votes after first runs."""

import datetime
import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from moe_dispatch.parallel.errors import ExpertParallelMismatchError
from moe_dispatch.parallel.watch import Watch

_created: Final[dict[tuple[int, ...], "itertools.count[int]"]] = {}


class Control:
    """A gloo group beside the one that carries tensors, so that waiting for a rank ends on the host, with its name.

    Creating one is collective over the ranks of `group`.

    Args:
        group: The process group of the layer's tensors.
        timeout: Seconds that a rank waits for the others in a call.
        first_timeout: Seconds that it waits where first runs compile.

    Attributes:
        ranks: Global ranks, in the order of the group.
        rank: This process's place among them.
        watch: Follows the calls.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float, first_timeout: float) -> None:
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank(group)
        number = next(_created.setdefault(self.ranks, itertools.count()))
        # Every rank of a group creates its objects in one order, so that the number names the same one on each.
        prefix = f"moe_dispatch/{'-'.join(map(str, self.ranks))}/{number}"
        # torch has no public way to the store by which a process group came together.
        store = PrefixStore(prefix, distributed_c10d._get_default_store())
        self.watch = Watch(store, self.ranks, self.rank, timeout)
        self._first_timeout = first_timeout
        with self.watch.waiting(first_timeout):
            self._group = dist.new_group(
                list(self.ranks),
                backend="gloo",
                timeout=datetime.timedelta(seconds=max(timeout, first_timeout)),
                use_local_synchronization=True,
            )

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's object, in the order of the group; for what happens once, as objects are pickled."""
        values: list[Any] = [None] * len(self.ranks)
        with self.watch.waiting(self._first_timeout):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's integers, in the order of the group."""
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        out = [torch.empty_like(mine) for _ in self.ranks]
        with self.watch.waiting(self.watch.timeout):
            work: Any = dist.all_gather(out, mine, group=self._group, async_op=True)
            work.wait(datetime.timedelta(seconds=self.watch.timeout))
        return [each.tolist() for each in out]

    def require_equal(self, what: str, facts: dict[str, Any]) -> None:
        """Compare facts with the other ranks.

        Args:
            what: What the ranks are about to do, for the message.
            facts: This rank's, by name; values that can be pickled.

        Raises:
            ExpertParallelMismatchError: They differ; raised on every rank.
        """
        self.compare(what, self.gather_objects(facts))

    def compare(self, what: str, every: Sequence[dict[str, Any]], remedy: str = "") -> None:
        """See `require_equal`; for facts that are gathered already, by rank; `remedy` is a sentence for the message."""
        names = dict.fromkeys(name for facts in every for name in facts)
        values = {name: [facts.get(name) for facts in every] for name in names}
        differing = {name: each for name, each in values.items() if any(value != each[0] for value in each)}
        if differing:
            raise ExpertParallelMismatchError(what, differing, self.ranks, remedy)
