"""Every experts class that the installed transformers decorates agrees with its own forward, or says why it is kept."""

import functools
import importlib
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.errors import MoEDispatchWarning
from moe_dispatch.integrations.transformers import register, report
from moe_dispatch.integrations.transformers.layout import layout_of, model_forward
from tests.integrations.transformers_families import Family, build, families, families_without_interface
from tests.integrations.transformers_models import TOLERANCE, call_of, calls

FEWEST = 55  # 5.17 decorates so many and 5.24 decorates 68
KEPT = {"MuseSparkExperts"}  # it normalises the output of each expert
# Families with experts that transformers gives no interface: a class of each, and what its configuration needs.
OUT_OF_REACH: dict[str, tuple[str, dict[str, Any]]] = {
    "aria": ("AriaTextForCausalLM", {}),  # in 5.17
    "dbrx": ("DbrxForCausalLM", {"attn_config": {"rope_theta": 1e4}}),
    "doge": ("DogeForCausalLM", {"is_moe": True}),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "llama4": ("Llama4ForCausalLM", {}),
    "longcat_flash": ("LongcatFlashForCausalLM", {}),
    "nllb_moe": ("NllbMoeForConditionalGeneration", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", {}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {}),
    "vitpose_backbone": ("VitPoseBackbone", {"num_experts": 6}),
}


def compare_gradients(module: Any, family: Family) -> None:
    """Those of hidden_states, of the router's weights and of every parameter, against the module's own forward."""
    rows, ids, weights = call_of(module, M=6)
    rows.requires_grad_()
    weights.requires_grad_()
    leaves = [rows, weights, *module.parameters()]
    own, ours = (
        torch.autograd.grad(forward(rows, ids, weights).square().sum(), leaves)
        for forward in (functools.partial(model_forward(module), module), module)
    )
    for gradient, expected in zip(ours, own, strict=True):
        assert expected.any(), family
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), family


@pytest.mark.slow  # imports every MoE model of transformers
def test_every_decorated_class_agrees_or_says_why_not() -> None:
    register()
    kinds: Counter[str] = Counter()
    for family in families():
        module = build(family, torch.float32)
        for dtype, tolerance in TOLERANCE.items():
            module.to(dtype)
            for M in (11, 1):  # prefill and decode
                call = call_of(module, M)
                before = calls()
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", MoEDispatchWarning)
                    own = model_forward(module)(module, *call).float()
                    out = module(*call).float()
                assert (out - own).norm() <= tolerance * own.norm(), (family, dtype, M)
                kept = bool(layout_of(module).unfit)
                assert calls() - before == (0 if kept else 1), (family, layout_of(module).unfit)
        if not kept:
            compare_gradients(module.to(torch.float32), family)
        kinds["kept" if kept else "dispatched"] += 1
        assert not kept or family.name in KEPT, (family, layout_of(module).unfit)
    print(dict(kinds))
    assert kinds["dispatched"] >= FEWEST


def test_every_family_without_an_interface_is_known_and_reported() -> None:
    """transformers accepts experts_implementation for them too, and asks nothing registered."""
    register()
    found = families_without_interface()
    assert found
    assert found <= OUT_OF_REACH.keys(), "new families: look at them, and name them in docs/transformers.md"
    for family in sorted(found):
        name, needs = OUT_OF_REACH[family]
        kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
        with torch.device("meta"):
            model = kind(kind.config_class(**needs))
        model.set_experts_implementation("moe_dispatch")
        lines = report(model).layers
        assert lines, family
        assert {line.state for line in lines} == {"out of reach"}, family
