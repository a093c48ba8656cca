"""Energy of a call, by a described counter on a CPU and by NVML on a GPU."""

import itertools
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dispatch.measure import LayerInputs, make_inputs
from moe_dispatch.measure.energy import energy_meter, joules_per_call
from moe_dispatch.workloads import ROUTINGS
from tests.benchmarks.helpers import LAYER, plan, provenance, reference


class DescribedDevice:
    """A device that takes 10 ms and 3.05 joules for each call. Its own counter is updated every `update` calls."""

    def __init__(self, update: int) -> None:
        self.now, self.calls, self.update = 0.0, 0, update

    def call(self, inputs: LayerInputs) -> Tensor:
        self.now += 0.01
        self.calls += 1
        return inputs.hidden_states

    def joules(self) -> float:
        return 3.05 * (self.calls - self.calls % self.update)


def inputs(count: int = 4) -> tuple[LayerInputs, ...]:
    return make_inputs(LAYER.problem(2, "fp32", reference().machine), ROUTINGS["uniform"], "cpu", count)


def test_energy_is_that_of_the_calls_between_two_updates_of_the_counter() -> None:
    def measured(device: DescribedDevice) -> float:
        return joules_per_call(
            device.call, inputs(), "eager", meter=device.joules, seconds=1.0, clock=lambda: device.now
        )

    for update in (1, 20):
        device = DescribedDevice(update)
        assert measured(device) == pytest.approx(3.05)
        assert 100 <= device.calls <= 120 + 2 * update  # a second of calls, after passes that do not count
    with pytest.raises(RuntimeError, match="did not advance within 2 s"):
        measured(DescribedDevice(1 << 30))


def test_rows_have_energy_per_token_if_it_is_measured(tmp_path: Path) -> None:
    from moe_dispatch.benchmarks.sweep import Sweep

    energy = partial(joules_per_call, meter=itertools.count(1.0).__next__, seconds=0.01)
    (row,) = Sweep(tmp_path / "a.jsonl", provenance(), energy=energy).run([plan(reference(), tokens=(2,))])
    assert row.joules_per_token is not None
    assert 0 < row.joules_per_token <= 1 / 2 / 2  # two inputs of two tokens; at least one pass
    (row,) = Sweep(tmp_path / "b.jsonl", provenance()).run([plan(reference(), tokens=(2,))])
    assert row.joules_per_token is None


def test_a_device_without_a_meter_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter(torch.device("cpu")) == "energy is measured on NVIDIA GPUs only, and this is cpu"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reason = energy_meter(torch.device("cuda"))
    assert isinstance(reason, str)
    assert "nvidia-ml-py" in reason


@pytest.mark.gpu
def test_a_gpu_at_work_consumes_energy() -> None:
    pytest.importorskip("pynvml")
    meter = energy_meter(torch.device("cuda", 0))
    assert not isinstance(meter, str), meter
    operand = torch.randn(4096, 4096, device="cuda").bfloat16()
    problem = LAYER.problem(2, "bf16", reference().machine)
    on_gpu = make_inputs(problem, ROUTINGS["uniform"], "cuda", 2)
    joules = joules_per_call(lambda _: operand @ operand, on_gpu, "graph", meter=meter, seconds=1.0)
    watts = joules / (2 * 4096**3 / 700e12)
    assert 50 < watts < 2000
