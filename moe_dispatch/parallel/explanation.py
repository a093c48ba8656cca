"""Why an exchange serves a kind of call, as data that prints itself."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.parallel.exchange import CallKind
from moe_dispatch.parallel.registry import ALWAYS
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
        against: Every reason against each registered exchange; none if it could serve.
        local: The choice of the backend for the rows that a rank expects.
    """

    kind: CallKind
    chosen: str
    why: str
    against: Mapping[str, tuple[str, ...]]
    local: Explanation

    def __str__(self) -> str:
        lines = [str(self.kind)]
        for name, reasons in self.against.items():
            mark = "->" if name == self.chosen else "  "
            why = self.why if name == self.chosen else "" if reasons else "could serve"
            lines.append(f"{mark} {name}" + (f": {why}" if why else ""))
            lines += [f"     not here: {reason}" for reason in reasons]
        return "\n".join([*lines, "this rank's experts:", str(self.local)])


def explain_call(layer: ShardedExperts, topk: int, M: int, mode: Mode = "eager") -> ParallelExplanation:
    """Explain the calls of a layer with up to M tokens on a rank."""
    session = layer.session
    dtype = torch.bfloat16 if layer.local.fp8 else layer.local.gate_up.dtype
    kind = dataclasses.replace(session.kind(layer.placement, layer.local, M, topk, dtype), mode=mode)
    exchange = session.exchanges[session.name_of_choice(kind)]
    if session.options.exchange:
        why = "named by the caller"
    elif exchange.name == ALWAYS and not session.was_measured(kind):
        why = f"serves every kind of call; warm_up has not measured M up to {bucket(kind).M}"
    else:
        why = f"measured as fastest by warm_up for M up to {bucket(kind).M}"
    share = exchange.arriving_share(kind)
    rows = round(share * M * (1 if kind.tokens == "replicated" else kind.ranks))
    machine = session.dispatcher.machine
    problem = layer.weights_expecting(share).problem(max(1, rows), topk, dtype, machine.capability, mode)
    against = {name: session.reasons_against(name, kind) for name in session.exchanges}
    return ParallelExplanation(kind, exchange.name, why, against, session.dispatcher.planner.explain(problem))
