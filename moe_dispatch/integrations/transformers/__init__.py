"""`moe_forward` inside Hugging Face transformers (5.17 and newer): one registration, then a name to ask for.

    from moe_dispatch.integrations.transformers import register, report

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_dispatch")
    print(report(model))

A loaded model takes ``model.set_experts_implementation("moe_dispatch")``. A layer that no backend computes exactly as
the model does keeps what transformers would have run by default (``grouped_mm``), with one warning that says why;
`report` lists the decision for every layer. At its first eager call a layer is compared with the model's own forward on
two tokens, and keeps that forward if the two disagree.

Memory: a layer's tensors are read in place, transposed ones (gpt-oss, aria) too, and nothing is held of them between
calls, so that whatever moves or changes them is seen by the next call.

Under torch.compile and torch.export a layer stays in the graph, ``fullgraph=True`` included. Two things break the
graph: forward-mode differentiation, and a layer that is offloaded by a hook of its own. Compiling the blocks of a
model one by one recompiles for every layer that has neither run nor been looked at: call ``report(model)`` first,
which looks at all of them.
"""

from moe_dispatch.integrations.transformers.register import NAME, register
from moe_dispatch.integrations.transformers.report import LayerReport, ModelReport, report

__all__ = ["NAME", "LayerReport", "ModelReport", "register", "report"]
