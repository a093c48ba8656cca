"""Compiles and proves everything that serving may run, while the engine profiles its memory.

In vLLM the engine's profiling run makes the first call of a layer. It comes before the KV cache is sized and before
graphs are captured, so what is allocated here is accounted for, and a capture meets nothing new. Layers of one shape
share their plans: the first one warms up for all.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_dispatch.api import explain, warm_up
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.integrations.engine_takeover import Batches, Takeover

if TYPE_CHECKING:
    from moe_dispatch.problem import Mode


def prepare(
    takeover: Takeover,
    batches: Batches,
    experts: ExpertWeights,
    topk: int,
    act_dtype: torch.dtype,
    *,
    into_out: bool,
) -> None:
    """Before a layer's call: say what has been decided, and warm up for layers of this kind once for these batches.

    One INFO line says what will run. While a CUDA graph is captured nothing is done.

    Args:
        takeover: The engine's.
        batches: Those of the layer's own engine: what an engine before it has run may be fewer tokens.
        experts: The layer's weights.
        topk: Experts per token.
        act_dtype: The dtype of hidden_states.
        into_out: Whether the engine's calls give `out` to `moe_forward`.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    takeover.tell()
    kind = (experts.spec, topk, act_dtype, batches)
    if kind in takeover.warmed:
        return
    with takeover.warming:
        if kind in takeover.warmed:
            return
        takeover.warmed.add(kind)  # a failure below must not come again with every call: its backend is barred by then
        begin = time.monotonic()
        warm_up(experts, topk, batches.captured, act_dtype, up_to=batches.most_tokens, into_out=into_out)
        takeover.logger.info(
            "moe_dispatch warmed up for %r, M ≤ %d, in %.1f s; %s",
            experts,
            batches.most_tokens,
            time.monotonic() - begin,
            _choices(batches.captured or (1, batches.most_tokens), experts, topk, act_dtype),
        )


def _choices(counts: Sequence[int], experts: ExpertWeights, topk: int, act_dtype: torch.dtype) -> str:
    """Which backends run at which token counts, which policies chose them, and what would choose better."""
    capability = get_dispatcher(experts.device).machine.capability
    mode: Mode = "eager" if capability is None else "graph"
    runs: dict[str, list[int]] = {}
    policies: Counter[str] = Counter()
    for M in counts:
        chosen = explain(experts.problem(M, topk, act_dtype, capability, mode)).chosen
        if chosen is not None:
            runs.setdefault(chosen.choice.backend, []).append(M)
            policies[chosen.choice.policy] += 1
    backends = ", ".join(f"{name} at M={','.join(map(str, at))}" for name, at in runs.items())
    measured = policies["calibrated"] == len(counts)
    # Four numbers stand for a layer with SiLU and without biases.
    plain = experts.activation == "silu" and experts.gate_up_bias is None and not experts.interleaved
    layer = f"{experts.E},{topk},{experts.K},{experts.N}" if plain else "FOLDER_OF_THE_MODEL"
    hint = f"; `moe-dispatch calibrate --model {layer} --dtype {experts.dtype}` measures this layer here"
    return f"{backends}, by {' and '.join(policies)}{'' if measured else hint}"
