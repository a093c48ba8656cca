"""The measurement that chooses an exchange for a kind of call."""

import dataclasses
from collections.abc import Iterable

from torch import Tensor

from moe_dispatch.parallel.exchange import CallKind
from moe_dispatch.parallel.exchange_times import Split
from moe_dispatch.parallel.registry import ALWAYS
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.parallel.trial import ExchangeFailedError, Trial
from moe_dispatch.problem import Mode


@dataclasses.dataclass(frozen=True)
class Compared:
    """What the comparison of the exchanges for a kind of call showed, equal on every rank.

    Attributes:
        kind: The kind of call.
        chosen: The exchange that serves it from now on.
        splits: Times of eager calls, and of replays of a CUDA graph on a GPU, by each exchange that ran (or was
            captured): medians over bursts of calls of the slowest rank's time per call.
        failed: Why an exchange is not used, for each one that failed. One that could not be captured only is not in
            here; `explain` has the reason.
    """

    kind: CallKind
    chosen: str
    splits: dict[Mode, dict[str, Split]]
    failed: dict[str, str]

    @property
    def us(self) -> dict[str, float]:
        """Time of an eager call by each exchange, in µs."""
        return {name: split.us for name, split in self.splits["eager"].items()}


def compare_exchanges(layer: ShardedExperts, kind: CallKind, inputs: tuple[Tensor, Tensor, Tensor]) -> Compared:
    """Run the exchanges that can serve a kind of call, and keep the fastest in each mode. Collective.

    Where the caller named an exchange for the group, only that one is run. Where a calibration of whole calls tells the
    fastest in each mode, only these are run, unless one of them fails.

    Args:
        layer: The layer.
        kind: The kind of eager call, whose M is the capacity.
        inputs: hidden_states, topk_weights and global topk_ids of this rank.

    Raises:
        ExpertParallelLostError: A rank is dead or late.
        ExchangeFailedError: Not even `gather` runs, or the named exchange does not; raised on every rank.
    """
    session = layer.session
    session.watch.begin()
    kinds = {mode: dataclasses.replace(kind, mode=mode) for mode in session.modes}
    times: dict[Mode, dict[str, Split]] = {mode: {} for mode in kinds}
    failed: dict[str, str] = {}

    def measure(names: Iterable[str]) -> None:
        for name in names:
            try:
                trial = Trial(layer, session.exchanges[name], kind, inputs)
                trial.run_experts()
                times["eager"][name] = trial.split()
            except ExchangeFailedError as error:
                failed[name] = str(error)
                for each in kinds.values():
                    session.bar(each, name, str(error))
                continue
            if "graph" not in kinds or name not in session.candidates(kinds["graph"]):
                continue
            try:
                times["graph"][name] = trial.split(graph=True)
            except ExchangeFailedError as error:  # it may be the backend of this rank's experts; eager calls work
                session.bar(kinds["graph"], name, str(error))

    calibrated = {mode: session.calibrated_choice(each, whole=True) for mode, each in kinds.items()}
    if session.options.exchange is not None:
        measure([session.choose(kind).name])
    else:
        first = dict.fromkeys(name for name in calibrated.values() if name)
        measure(first)
        if any(name not in times[mode] for mode, name in calibrated.items()):
            measure(name for name in session.candidates(kind) if name not in first)
    if (needed := session.options.exchange or ALWAYS) in failed:
        raise ExchangeFailedError(f"{kind} cannot run: {failed[needed]}")
    for mode, each in kinds.items():
        able, name = times[mode], calibrated[mode]
        if name not in able:
            name = min(able, key=lambda measured: able[measured].us, default=ALWAYS)
        session.keep_choice(each, name, able)
    return Compared(kind, session.choose(kind).name, times, failed)
