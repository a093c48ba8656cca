"""The forward while torch.compile or torch.export traces it. Imported then only: it imports all of torch's compiler."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from moe_dispatch.dispatch import torch_operator
from moe_dispatch.dispatch.autocast import computed_dtype
from moe_dispatch.dispatch.internals import forward_mode_entered
from moe_dispatch.dispatch.uncompiled import call_uncompiled
from moe_dispatch.integrations.transformers.eager import eager_forward
from moe_dispatch.integrations.transformers.gate import gate_state
from moe_dispatch.integrations.transformers.layout import LAYOUT, Layout, inspect_module
from moe_dispatch.integrations.transformers.own import own_forward, warn_once
from moe_dispatch.integrations.transformers.takeover import unfit_tensors, unknown_arguments
from moe_dispatch.integrations.transformers.weights import (
    as_indexed,
    others_by_name,
    sources_of,
)
from moe_dispatch.numerics import FP8
from moe_dispatch.tensor_memory import offloaded


def traced_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **others: object
) -> Tensor:
    """A layer in the graph: as the operator where its tensors can be read as they are, else as its own implementation.

    A trace takes for a constant what is kept of one layer, and uses it for all of them; a module's tensors it takes for
    inputs, and its layout it guards.
    """
    layout: Layout | None = getattr(module, LAYOUT, None)
    gate = gate_state(module)
    if layout is None or layout.gate != gate:
        layout = inspect_in_trace(module, *gate)
    own = bool(layout.unfit or unknown_arguments(tuple(others)))
    if not own:
        sources = sources_of(module, layout)
        own = bool(unfit_tensors(sources, hidden_states.dtype))
    if own:
        return own_forward(module, hidden_states, top_k_index, top_k_weights, **others)
    if offloaded(module) or forward_mode_entered(hidden_states, top_k_weights, *sources):
        if torch.compiler.is_exporting():
            return own_forward(module, hidden_states, top_k_index, top_k_weights)
        out: Tensor = call_uncompiled(eager_forward, module, hidden_states, top_k_index, top_k_weights)
        return out
    dtype = computed_dtype(sources[0])
    tokens = hidden_states
    if dtype == FP8:
        sources = tuple(source.detach() for source in sources)  # transformers' FP8 parameters claim to have a gradient
    else:
        tokens = hidden_states.to(dtype)
    gate_up, down, *rest = as_indexed(layout, sources)
    result = torch_operator.call_tensors(
        tokens, top_k_weights, top_k_index, gate_up.to(dtype), down.to(dtype), **others_by_name(gate_up, rest),
        activation=layout.activation, interleaved=layout.interleaved, backend=None,
    )  # fmt: skip
    return result.to(hidden_states.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def inspect_in_trace(module: nn.Module, *_gate: object) -> Layout:
    """The layout of a module that has not run yet, or whose gate changed since; a constant of the graph.

    Not kept on the module: the trace has seen, and guards, that there is none. It guards the arguments, too, which is
    why those of the gate are among them. The inspection runs the gate, in a thread of its own because fake tensors,
    proxies and functionalisation are at work in this one.
    """
    with ThreadPoolExecutor(1) as pool:
        layout = pool.submit(inspect_module, module).result()
    if layout.unfit:
        warn_once(module, layout.unfit)
    return layout
