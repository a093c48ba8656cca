"""Energy of a layer call, by the energy counter of the device."""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from moe_dispatch.measure.inputs import Call, LayerInputs, synchronize
from moe_dispatch.measure.timing import EagerPass, GraphPass
from moe_dispatch.problem import Mode

# The counter is read after batches of passes that are short beside the interval of its updates.
BATCH_SECONDS: Final = 0.005
MOST_PASSES: Final = 10_000
STALE_SECONDS: Final = 2.0  # A counter that does not advance for so long does not count.

# Joules that a device has consumed since some fixed time, idle power included.
EnergyMeter = Callable[[], float]
# `joules_per_call` by a meter.
EnergyOf = Callable[[Call, Sequence[LayerInputs], Mode], float]


def energy_meter(device: torch.device) -> EnergyMeter | str:
    """The energy counter of an NVIDIA GPU (Volta and newer), or the reason why a device has none.

    An H200 updates it every 100 ms, and NVML takes 3 ms to read it.
    """
    if device.type != "cuda":
        return f"energy is measured on NVIDIA GPUs only, and this is {device.type}"
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # By UUID, because NVML does not renumber devices by CUDA_VISIBLE_DEVICES.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # noqa: BLE001 - NVML has an exception of its own for each of its errors
        return f"energy is not measured: {type(error).__name__}: {error} (it needs nvidia-ml-py and NVML's counter)"
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def joules_per_call(
    call: Call,
    inputs: Sequence[LayerInputs],
    mode: Mode,
    *,
    meter: EnergyMeter,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Energy of one layer call in joules, averaged over calls in a row for at least `seconds`.

    The calls follow each other without rests, so a layer at full power runs at the clock that the device sustains: a
    lower one than in the timings. The average begins and ends at updates of the counter, which lags behind by up to the
    time between two of them. Other processes on the device count too.

    Args:
        call: The layer; has run on the inputs before.
        inputs: Distinct inputs, taken in turn.
        mode: ``"graph"`` replays a CUDA graph of all inputs, ``"eager"`` calls.
        meter: Energy counter of their device.
        seconds: Least duration, above 0.
        clock: Monotonic seconds.

    Raises:
        RuntimeError: The counter does not advance.
    """
    device = inputs[0].hidden_states.device
    with torch.no_grad():
        run = GraphPass(call, inputs, None) if mode == "graph" else EagerPass(call, inputs)

        def launch(passes: int) -> Callable[[], None]:
            """Enqueue passes, and return what waits for their end."""
            run.launch(passes)
            if device.type != "cuda":
                return lambda: None
            wait: Callable[[], None] = torch.cuda.current_stream(device).record_event().synchronize
            return wait

        launch(1)()
        begin = clock()
        launch(1)()
        batch = max(1, min(MOST_PASSES, math.ceil(BATCH_SECONDS / max(clock() - begin, 1e-6))))
        start: tuple[float, float, int] | None = None
        passes, reading, advanced = 0, meter(), clock()
        wait = launch(batch)
        while True:
            following = launch(batch)  # The device has work while the host reads the counter.
            wait()
            wait = following
            passes += batch
            before, reading, now = reading, meter(), clock()
            if reading <= before:
                if now - advanced > STALE_SECONDS:
                    raise RuntimeError(f"the energy counter did not advance within {STALE_SECONDS:g} s of calls")
                continue
            advanced = now
            if start is None:
                start = now, reading, passes
            elif now - start[0] >= seconds:
                synchronize(device)
                return (reading - start[1]) / (passes - start[2]) / len(inputs)
