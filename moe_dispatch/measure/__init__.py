"""Inputs, verification, timing and ceilings: results are checked against fp32 before they are timed, in turns."""

from moe_dispatch.measure.ceilings import H200_CEILINGS, Ceilings, known_ceilings, measure_ceilings
from moe_dispatch.measure.inputs import Call, LayerInputs, backend_call, fast_path_call, make_inputs
from moe_dispatch.measure.layer import SampleLayer, sample_layer, with_truths
from moe_dispatch.measure.timing import Timing, Turns, quartiles, time_interleaved
from moe_dispatch.measure.verify import Verdict, reference_outputs, relative_error, verify, worst_row_error

__all__ = [
    "H200_CEILINGS",
    "Call",
    "Ceilings",
    "LayerInputs",
    "SampleLayer",
    "Timing",
    "Turns",
    "Verdict",
    "backend_call",
    "fast_path_call",
    "known_ceilings",
    "make_inputs",
    "measure_ceilings",
    "quartiles",
    "reference_outputs",
    "relative_error",
    "sample_layer",
    "time_interleaved",
    "verify",
    "with_truths",
    "worst_row_error",
]
