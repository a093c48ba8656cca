"""Ceilings of a device: the memory bandwidth and matrix rates from which a layer's roofline follows."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import pydantic
import torch
from torch import Tensor

from moe_dispatch.machine import Machine
from moe_dispatch.measure.inputs import timing_events
from moe_dispatch.numerics import FP8
from moe_dispatch.problem import FP8_DTYPES, DType, MoEProblem

COPY_BYTES: Final = {"cuda": 4 << 30, "cpu": 64 << 20}
PRODUCT_SIZE: Final = {"cuda": 8192, "cpu": 512}
MEASURE_SECONDS: Final = {"cuda": 0.3, "cpu": 0.1}


class Ceilings(pydantic.BaseModel):
    """Sustained rates of a device; None where they are unknown or the device has no such unit.

    Attributes:
        bandwidth: Bytes per second of a large copy, counting bytes read and bytes written.
        bf16_flops: Operations per second of a large BF16 product; FP16 is taken as equal.
        fp8_flops: The same for e4m3 with one scale per tensor.
        fp32_flops: The same for FP32 without TF32.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    bandwidth: float = pydantic.Field(gt=0)
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    fp32_flops: float | None = None

    def flops(self, dtype: DType) -> float | None:
        """The matrix rate for weights of this dtype."""
        if dtype in FP8_DTYPES:
            return self.fp8_flops
        return self.fp32_flops if dtype == "fp32" else self.bf16_flops

    def roofline_us(self, problem: MoEProblem, experts: float | None = None) -> float | None:
        """The roofline of a problem in µs; None where the matrix rate of its dtype is unknown.

        Args:
            problem: The layer call.
            experts: Experts that were hit; the expectation under uniform routing if None.
        """
        flops = self.flops(problem.dtype)
        return None if flops is None else problem.roofline_us(self.bandwidth, flops, experts)


@dataclass(frozen=True)
class KnownCeilings:
    """Ceilings of a device that this project measured.

    Attributes:
        ceilings: The rates, rounded.
        evidence: How, on what and when they were measured.
    """

    ceilings: Ceilings
    evidence: str


# By `Machine.slug`. A device is listed only if it was measured; every other one is measured in the run that needs it.
KNOWN_CEILINGS: Final[Mapping[str, KnownCeilings]] = {
    "nvidia_h200": KnownCeilings(
        Ceilings(bandwidth=4.3e12, bf16_flops=700e12, fp8_flops=1300e12),
        "8192³ products and a copy of 4 GiB on one NVIDIA H200 (132 SMs, driver 580.159.04, torch 2.11.0+cu130), "
        "2026-11-23. The run in benchmarks/results/nvidia_h200/bench.jsonl.xz measured 4.22e12, 696e12 and 1307e12.",
    ),
}
H200_CEILINGS: Final = KNOWN_CEILINGS["nvidia_h200"].ceilings


def known_ceilings(machine: Machine) -> Ceilings | None:
    """The recorded ceilings of a machine's device; None where it was never measured."""
    known = KNOWN_CEILINGS.get(machine.slug)
    return known.ceilings if known else None


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """Measure a device's ceilings on random data: medians over about 0.3 s each, after warm-up.

    On a CPU smaller operands are used, and FP8 is None.

    Args:
        device: ``"cpu"`` or a CUDA device.
    """
    place = torch.device(device)
    size = PRODUCT_SIZE[place.type]
    source = torch.empty(COPY_BYTES[place.type] // 4, dtype=torch.int32, device=place).random_()
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _median_seconds(functools.partial(target.copy_, source), place)
    del source, target

    left, right = (torch.randn(size, size, device=place, dtype=torch.float32) for _ in range(2))
    rates: dict[str, float | None] = {}
    for name, product in (
        ("bf16_flops", _plain_product(left.bfloat16(), right.bfloat16())),
        ("fp32_flops", _plain_product(left, right)),
        ("fp8_flops", _fp8_product(left, right)),
    ):
        rates[name] = None if product is None else 2 * size**3 / _median_seconds(product, place)
    return Ceilings(bandwidth=bandwidth, **rates)


def _plain_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    return lambda: left @ right


def _fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor] | None:
    if left.device.type != "cuda" or torch.cuda.get_device_capability(left.device) < (8, 9):
        return None
    one = torch.ones((), device=left.device, dtype=torch.float32)
    a, b = left.to(FP8), right.to(FP8)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _median_seconds(operation: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        operation()
    samples: list[float] = []
    deadline = time.perf_counter() + MEASURE_SECONDS[device.type]
    while len(samples) < 5 or time.perf_counter() < deadline:
        if device.type == "cuda":
            start, end = timing_events()
            start.record()
            operation()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            operation()
            samples.append(time.perf_counter() - begin)
    return statistics.median(samples)
