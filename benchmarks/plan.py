"""What a benchmark measures: every combination of layers, token counts, modes, routings and candidates."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks.baselines import Baseline
from moe_dispatch.measure.inputs import DISTINCT_INPUTS
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import RoutingDistribution, Workload

Configs = Literal["default", "all", "chosen"]
CONFIGS: Final[tuple[Configs, ...]] = get_args(Configs)


@dataclass(frozen=True)
class BenchPlan:
    """Every combination of these is measured.

    Attributes:
        configs: Which configurations of a backend: its default, all, or the chosen one, which is what `moe_forward`
            runs by this machine's calibration, else by the shipped table.
        inputs: Distinct inputs and routings per point.
        point_s: Seconds of timing per candidate.
    """

    workloads: tuple[Workload, ...]
    dtypes: tuple[DType, ...]
    tokens: tuple[int, ...]
    routings: tuple[RoutingDistribution, ...]
    modes: tuple[Mode, ...]
    backends: tuple[Backend, ...]
    baselines: tuple[Baseline, ...] = ()
    configs: Configs = "default"
    inputs: int = DISTINCT_INPUTS
    point_s: float = 0.3

    @property
    def points(self) -> int:
        """Steps of progress: one per workload, dtype, M and mode."""
        return len(self.workloads) * len(self.dtypes) * len(self.tokens) * len(self.modes)
