"""A benchmark row: one backend or baseline, in one configuration, at one point."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic

from moe_dispatch.measure import Ceilings
from moe_dispatch.problem import DType, Mode

Size = Annotated[int, pydantic.Field(ge=1, lt=1 << 40)]
# From a picosecond to eleven days: what is outside was not measured, and neither packed nor drawn.
Micros = Annotated[float, pydantic.Field(ge=1e-6, le=1e12)]
RowKey = tuple[str, str, int, str, str, str, str]


class BenchRow(pydantic.BaseModel):
    """One backend in one configuration at one point, with its time or with the reason why it has none.

    Attributes:
        workload: Name of the model, or ``E,topk,K,N``.
        backend: Name of the backend or baseline.
        config: The backend's configuration as JSON data; empty for a baseline.
        us: Median time of one layer call in µs; None if it was not timed.
        us_q1: Lower quartile in µs.
        us_q3: Upper quartile in µs.
        samples: Number of samples behind the median and the quartiles.
        inputs: Number of distinct inputs and routings that each sample ran over.
        hit_experts: Experts that got at least one token, mean over the inputs.
        roofline_us: Least possible time for these hits in µs; None if the device's rates are unknown.
        roofline_from: Which ceilings the roofline uses: ``"device"`` are `known_ceilings` of the device, ``"measured"``
            those that were measured in this run (`ceilings`); None if there is no roofline.
        fraction: ``roofline_us / us``.
        joules_per_token: Energy of one call in joules, over M, without rests; None if it was not measured.
        error: Greatest relative error against fp32; None if the call raised or the result was not finite.
        deterministic: Whether repeated runs gave the same bits; None if it was not timed.
        reason: Why there is no time; empty if there is one.
        commit: Commit of the checkout, with ``-dirty`` if files were changed; empty outside a checkout.
        ceilings: Ceilings that were measured in the same run; None if none were.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    workload: str
    E: Size
    topk: Size
    K: Size
    N: Size
    dtype: DType
    M: Size
    backend: str
    config: dict[str, int | str | bool]
    mode: Mode
    routing: str
    us: Micros | None = None
    us_q1: Micros | None = None
    us_q3: Micros | None = None
    samples: int = 0
    inputs: int = 0
    hit_experts: float
    roofline_us: Micros | None = None
    roofline_from: Literal["device", "measured"] | None = None
    fraction: Annotated[float, pydantic.Field(ge=0, le=1e6)] | None = None
    joules_per_token: float | None = None
    error: float | None = None
    deterministic: bool | None = None
    reason: str = ""
    machine: str
    fingerprint: str
    versions: dict[str, str]
    commit: str
    ceilings: Ceilings | None = None

    @pydantic.model_validator(mode="after")
    def _time_or_reason(self) -> Self:
        if (self.us is None) != bool(self.reason):
            raise ValueError("a row has a time or a reason why not, never both or neither")
        return self

    @property
    def key(self) -> RowKey:
        """What was measured; a resumed run skips the keys that it finds."""
        return row_key(self.workload, self.dtype, self.M, self.backend, self.config, self.mode, self.routing)


def row_key(
    workload: str, dtype: str, M: int, backend: str, config: Mapping[str, Any], mode: str, routing: str
) -> RowKey:
    """The identity of a row."""
    return workload, dtype, M, backend, json.dumps(config, sort_keys=True), mode, routing
