"""Energy of a layer call, by the energy counter of the device."""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from moe_dispatch.measure.inputs import Call, LayerInputs, synchronize
from moe_dispatch.problem import Mode

# The counter is read after each batch of passes, which is short beside the interval of the counter's updates.
BATCH_SECONDS: Final = 0.005
MOST_PASSES: Final = 10_000
# A counter that does not advance for this long, or for ten batches where they are longer, does not count.
STALE_SECONDS: Final = 2.0


class EnergyMeter(Protocol):
    """An energy counter."""

    def joules(self) -> float:
        """Joules that the device has consumed since some fixed time, idle power included."""


@dataclass(frozen=True)
class EnergyMeasurement:
    """How the energy of every candidate is measured.

    Attributes:
        meter: Energy counter of the device.
        seconds: Seconds of calls per candidate.
    """

    meter: EnergyMeter
    seconds: float


class NvmlMeter:
    """The energy counter of an NVIDIA GPU (Volta and newer), which NVML updates every 20 to 100 ms.

    Args:
        device: The CUDA device.

    Raises:
        ImportError: pynvml (nvidia-ml-py) is not installed.
        Exception: NVML does not load, or the GPU has no energy counter.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        # By UUID, because NVML does not renumber devices by CUDA_VISIBLE_DEVICES.
        uuid = torch.cuda.get_device_properties(device).uuid
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.joules()

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def energy_meter(device: torch.device) -> EnergyMeter | str:
    """The meter of a device, or the reason why it has none."""
    if device.type != "cuda":
        return f"energy is measured on NVIDIA GPUs only, and this is {device.type}"
    try:
        return NvmlMeter(device)
    except Exception as error:  # noqa: BLE001 - NVML has an exception of its own for each of its errors
        return f"energy is not measured: {type(error).__name__}: {error} (it needs nvidia-ml-py and NVML's counter)"


def joules_per_call(
    call: Call,
    inputs: Sequence[LayerInputs],
    meter: EnergyMeter,
    *,
    mode: Mode,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Energy of one layer call in joules, averaged over calls in a row for at least `seconds`.

    The calls follow each other without rests, so a layer at full power runs at the clock that the device sustains: a
    lower one than in the timings. The average begins and ends at an update of the counter, whose interval would be an
    error of several per cent of a second otherwise. Other processes on the device count too.

    Args:
        call: The layer; has run on the inputs before.
        inputs: Distinct inputs, taken in turn.
        meter: Energy counter of their device.
        mode: ``"graph"`` replays a CUDA graph of all inputs, ``"eager"`` calls.
        seconds: Least duration, above 0.
        clock: Monotonic seconds.

    Raises:
        RuntimeError: The counter does not advance.
    """
    device = inputs[0].hidden_states.device
    with torch.no_grad():
        graph = _captured(call, inputs) if mode == "graph" else None

        def launch(passes: int) -> Callable[[], None]:
            """Enqueue passes, and return what waits for their end."""
            for _ in range(passes):
                if graph is not None:
                    graph.replay()
                else:
                    for layer_inputs in inputs:
                        call(layer_inputs)
            if device.type != "cuda":
                return lambda: None
            return torch.cuda.current_stream(device).record_event().synchronize

        launch(1)()
        begin = clock()
        launch(1)()
        once = clock() - begin
        batch = max(1, min(MOST_PASSES, math.ceil(BATCH_SECONDS / max(once, 1e-6))))
        stale_s = max(STALE_SECONDS, 10 * batch * once)
        start: tuple[float, float, int] | None = None
        passes, reading, advanced = 0, meter.joules(), clock()
        wait = launch(batch)
        while True:
            following = launch(batch)  # The device has work while the host reads the counter.
            wait()
            wait = following
            passes += batch
            before, reading, now = reading, meter.joules(), clock()
            if reading <= before:
                if now - advanced > stale_s:
                    raise RuntimeError(f"the energy counter did not advance within {stale_s:.0f} s of calls")
                continue
            advanced = now
            if start is None:
                start = now, reading, passes
            elif now - start[0] >= seconds:
                synchronize(device)
                return (reading - start[1]) / (passes - start[2]) / len(inputs)


def _captured(call: Call, inputs: Sequence[LayerInputs]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer_inputs in inputs:
            call(layer_inputs)
    return graph
