"""Suites: named sets of measurements, as data.

The ``scoreboard`` suite measures what the targets (`targets`) need, and only that. Few tokens and many come first, and
every model and dtype at each token count, so that a run that is cut short has evidence for every region.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks.baselines import Baseline
from moe_dispatch.benchmarks.plan import BenchPlan, Configs
from moe_dispatch.policies.calibration.schedule import coarse_to_fine
from moe_dispatch.problem import DType, Mode
from moe_dispatch.workloads import ROUTINGS, Workload

MODELS: Final = ("deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")
REGIONS: Final[dict[str, tuple[int, ...]]] = {
    "decode": (1, 4, 16, 64),
    "middle": (256, 1024),
    "prefill": (4096, 16384),
}
TOKENS: Final = tuple(M for region in REGIONS.values() for M in region)
UNIFORM: Final = "uniform"
SKEWED: Final = "dirichlet-4"
SKEWED_TOKENS: Final = tuple(M for M in TOKENS if M >= 1024)
# Backends that are timed at every token count. `reference` is left out as a naive loop, and `vllm_fused_moe` because
# the baseline `vllm` measures it.
BACKENDS: Final = ("triton_persistent", "gluon_hopper", "deep_gemm", "torch_grouped")
# Timed at decode's token counts only: with more tokens a call takes up to 80 ms, and compiling and checking these
# backends took half of the suite's time.
BACKENDS_OF_FEW_TOKENS: Final = ("triton_splitk", "triton_vector")


@dataclass(frozen=True)
class Step:
    """Measurements that are made together: every combination of these, for all models and dtypes of the suite."""

    tokens: tuple[int, ...]
    routings: tuple[str, ...] = (UNIFORM,)
    modes: tuple[Mode, ...] = ("graph",)
    backends: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Steps that are measured one after another.

    Attributes:
        configs: Which configurations of the backends; see `BenchPlan`.
        point_s: Seconds of timing per candidate.
    """

    models: tuple[str, ...]
    dtypes: tuple[DType, ...]
    steps: tuple[Step, ...]
    configs: Configs = "default"
    point_s: float = 0.3

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of all backends that take part."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.backends))

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of all baselines that take part."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.baselines))

    def plans(
        self,
        workloads: Sequence[Workload],
        dtypes: Sequence[DType],
        backends: Mapping[str, Backend],
        baselines: Mapping[str, Baseline],
    ) -> Iterator[BenchPlan]:
        """The steps as plans, over the backends and baselines that are available, by their names."""
        for step in self.steps:
            yield BenchPlan(
                workloads=tuple(workloads),
                dtypes=tuple(dtypes),
                tokens=step.tokens,
                routings=tuple(ROUTINGS[name] for name in step.routings),
                modes=step.modes,
                backends=tuple(backends[name] for name in step.backends if name in backends),
                baselines=tuple(baselines[name] for name in step.baselines if name in baselines),
                configs=self.configs,
                point_s=self.point_s,
            )


SUITES: Final[dict[str, Suite]] = {
    "scoreboard": Suite(
        models=MODELS,
        dtypes=("fp8", "bf16"),
        configs="chosen",
        point_s=0.1,
        steps=(
            *(
                Step(
                    tokens=(M,),
                    routings=(UNIFORM, SKEWED) if M in SKEWED_TOKENS else (UNIFORM,),
                    modes=("graph", "eager") if M == 1 else ("graph",),
                    backends=BACKENDS_OF_FEW_TOKENS + BACKENDS if M in REGIONS["decode"] else BACKENDS,
                    baselines=("vllm", "vllm_deep_gemm", "vllm_triton_kernels"),
                )
                for M in coarse_to_fine(TOKENS)
            ),
        ),
    ),
}
