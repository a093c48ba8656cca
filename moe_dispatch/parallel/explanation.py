"""Why an exchange serves a kind of call, as data that prints itself."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.parallel.exchange import CallKind
from moe_dispatch.parallel.exchange_times import Split
from moe_dispatch.parallel.session import bucket
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.problem import Mode


@dataclass(frozen=True)
class ParallelExplanation:
    """The exchanges for one kind of call, and the choice of the backend that runs a rank's experts.

    Attributes:
        kind: The kind of call.
        chosen: The exchange that serves it.
        why: What the choice rests on.
        splits: Where the time of a call goes by each exchange that was measured for this kind of call.
        against: Every reason against each registered exchange; none if it could serve.
        local: The choice of the backend for the rows that a rank expects.
    """

    kind: CallKind
    chosen: str
    why: str
    splits: Mapping[str, Split]
    against: Mapping[str, tuple[str, ...]]
    local: Explanation

    def __str__(self) -> str:
        lines = [str(self.kind)]
        for name, reasons in self.against.items():
            mark = "->" if name == self.chosen else "  "
            why = self.why if name == self.chosen else "" if reasons else "could serve"
            time = str(self.splits.get(name, ""))
            lines.append(f"{mark} {name}" + (f": {', '.join(filter(None, (why, time)))}" if why or time else ""))
            lines += [f"     not here: {reason}" for reason in reasons]
        return "\n".join([*lines, "this rank's experts:", str(self.local)])


def explain_call(layer: ShardedExperts, topk: int, M: int, mode: Mode = "eager") -> ParallelExplanation:
    """Explain the calls of a layer with up to M tokens on a rank."""
    session = layer.session
    dtype = layer.local.usual_act_dtype
    kind = dataclasses.replace(session.kind(layer.placement, layer.local, M, topk, dtype), mode=mode)
    exchange = session.exchanges[session.name_of_choice(kind)]
    expected, kept = session.expected(kind), session.kept_splits(kind)
    if session.options.exchange:
        why = "named by the caller"
    elif expected is not None and exchange.name == session.calibrated_choice(kind, whole=kept is not None):
        why = f"{expected.basis} as the fastest"
    elif kept is not None:
        why = f"measured as fastest by warm_up for M up to {bucket(kind).M}"
    else:
        why = f"serves every kind of call; warm_up has not measured M up to {bucket(kind).M}"
    splits = kept or (expected.splits if expected is not None else {})
    share = exchange.arriving_share(kind)
    rows = round(share * M * (1 if kind.tokens == "replicated" else kind.ranks))
    machine = session.dispatcher.machine
    problem = layer.weights_expecting(share).problem(max(1, rows), topk, dtype, machine.capability, mode)
    against = {name: session.reasons_against(name, kind) for name in session.exchanges}
    return ParallelExplanation(kind, exchange.name, why, splits, against, session.dispatcher.planner.explain(problem))
