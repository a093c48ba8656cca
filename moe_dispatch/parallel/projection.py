"""What a layer would take on more GPUs: a projection from cost models of one GPU and figures of the links.

Nothing here was measured on more than one GPU. Experts' times are those that the policies predict for one GPU with the
load of the busiest rank, or with a rank's columns of every expert, without the rests of a calibration; transfers are
latency plus bytes over bandwidth (`links`). Routing is uniform.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.measure import H200_CEILINGS, known_ceilings
from moe_dispatch.parallel.links import Cluster, crossing, slots_of_busiest
from moe_dispatch.parallel.parts import rank_columns
from moe_dispatch.parallel.placement import Division
from moe_dispatch.problem import ELEMENT_BYTES, DType, MoEProblem
from moe_dispatch.settings import Settings
from moe_dispatch.workloads import Workload

# Of an expert on each GPU: a tile's width, and a block of FP8's scales. Narrower ones no cost model was fitted to.
LEAST_COLUMNS: Final = 128
# With more rows for each expert a GPU runs its tokens in slices: cost models are fitted to as many at most.
_ROWS: Final = 4096
# The cost models are of calls with rests between them. Products without rests bring a card to its power limit, where
# its clock falls within tens of ms: from the first share of the matrix rate to the second, with a time constant in µs.
# Least squares through four times of one H200 with all experts, each of 8 calls in a row after a rest: qwen3-30b-a3b in
# BF16 and deepseek-v3 in FP8, 8192 and 32768 tokens (benchmarks/results/nvidia_h200_x2). One share for all of them, as
# deepseek-v3 with 8192 tokens gives it (0.85), is 9 % off.
_RATE_AT_FIRST: Final = 0.965
_RATE_IN_THE_END: Final = 0.84
_FALLS_IN_US: Final = 30e3


@dataclass(frozen=True)
class Projected:
    """One layer on some ranks.

    Attributes:
        M: Tokens of each rank.
        ranks: GPUs.
        one_gpu_us: Time of one GPU that holds all experts and gets the tokens of all ranks, in µs.
        experts_us: Time of the busiest rank's experts.
        dispatch_us: Time of the rows on their way to the experts.
        combine_us: Time of the results on their way back.
        early_us: The part of it in which the experts still run: ``direct`` sends each sum as it is computed.
        division: What of the layer is divided over the GPUs: ``"experts"``, or ``"columns"`` of each expert.
        exchange: Which way to send them is fastest: ``direct``, ``gather``, ``alltoall``, or ``alltoall by node``,
            which first sends a row once to each host and which no exchange here does.
    """

    M: int
    ranks: int
    one_gpu_us: float
    experts_us: float
    dispatch_us: float
    combine_us: float
    early_us: float
    division: Division
    exchange: str

    @property
    def transfer_us(self) -> float:
        """Both ways together."""
        return self.dispatch_us + self.combine_us

    @property
    def us(self) -> float:
        """Time of all ranks together, where experts wait for all of their rows."""
        return self.experts_us + self.transfer_us - self.early_us

    @property
    def serial(self) -> float:
        """Speed-up where experts wait for all of their rows."""
        return self.one_gpu_us / self.us

    @property
    def overlapped(self) -> float:
        """Speed-up where transfers hide behind experts as far as possible."""
        return self.one_gpu_us / max(self.experts_us, self.transfer_us)


class Projection:
    """Projects layers onto ranks.

    Args:
        machine: The GPU of each rank, described or at hand; its cost models or those of a like device must ship.
        cluster: What connects the ranks.
    """

    def __init__(self, machine: Machine, cluster: Cluster) -> None:
        self._machine, self._cluster = machine, cluster
        self._ceilings = known_ceilings(machine) or H200_CEILINGS
        # Cost models alone: a ratio of a measured time to a predicted one would mix two kinds of errors.
        self._planner = Dispatcher(machine, Settings(policies=("learned",)), live=False).planner

    def project(
        self, layer: Workload, dtype: DType, M: int, ranks: int, *, division: Division = "experts",
        wire_fp8: bool = False, calls: float = math.inf,
    ) -> Projected:  # fmt: skip
        """One layer at M tokens of each rank.

        Args:
            layer: The layer.
            dtype: Dtype of the weights.
            M: Tokens of each rank.
            ranks: GPUs: at most `Cluster.node`, or a multiple of it; a divisor of E where experts are divided.
            division: What of the layer is divided. By columns every rank runs all slots, and needs all rows.
            wire_fp8: Whether rows cross to the experts as FP8 codes with a scale per 128 columns.
            calls: Calls in a row after a rest; infinite for a device that never rests.

        Raises:
            InvalidInputError: So many ranks do not divide the layer or the hosts, or no cost model knows the layer.
        """
        node, by_columns = self._cluster.node, division == "columns"
        if ranks < 2 or (layer.E % ranks and not by_columns) or (ranks > node and ranks % node):
            divides = "" if by_columns else f"divide E={layer.E} and "
            raise InvalidInputError(f"ranks must {divides}be 2 to {node} or a multiple of {node}, got {ranks}")
        if by_columns:
            rank_columns(layer, dtype, ranks)
        whole = layer.problem(ranks * M, dtype, self._machine, "graph")
        row = layer.K * ELEMENT_BYTES[whole.act_dtype]
        out = layer.K * (1 + 4 / 128) if wire_fp8 else row
        ways = [crossing(self._cluster, ranks, M, bytes_, layer.E, layer.topk) for bytes_ in (out, row)]
        dispatch, combine = (dataclasses.asdict(way) for way in ways)
        # Summing reads one row for each slot that is here.
        sums_us = 1e6 * whole.slots / (1 if by_columns else ranks) * row / self._ceilings.bandwidth
        early = dict.fromkeys(dispatch, 0.0)
        early["direct"] = min(sums_us, combine["direct"] - self._cluster.direct.latency_us)
        ways_of_columns = ("direct", "gather")  # the others send a row to fewer ranks than all
        exchange = min(
            ways_of_columns if by_columns else dispatch, key=lambda name: dispatch[name] + combine[name] - early[name]
        )
        if by_columns:
            experts_us = self._us(layer.sharded(ranks).problem(ranks * M, dtype, self._machine, "graph"), calls)
        else:
            experts_us = self._busiest_us(whole, ranks, calls)
        return Projected(
            M, ranks, self._us(whole, calls), experts_us, dispatch[exchange], combine[exchange], early[exchange],
            division, exchange.replace("_", " "),
        )  # fmt: skip

    def _busiest_us(self, whole: MoEProblem, ranks: int, calls: float) -> float:
        """A layer with the slots of the busiest rank: as many of each token as in the layers of the cost models.

        Really more tokens arrive, each with fewer slots here. Copying and quantising those is not counted. Between two
        numbers of tokens time is taken as linear.
        """
        E = whole.E // ranks
        topk = min(whole.topk, E)
        tokens = slots_of_busiest(whole.M, whole.E, whole.topk, ranks) / topk
        fewer = max(1, math.floor(tokens))
        less, more = (self._us(dataclasses.replace(whole, E=E, topk=topk, M=M), calls) for M in (fewer, fewer + 1))
        return less + max(0.0, tokens - fewer) * (more - less)

    def _us(self, problem: MoEProblem, calls: float) -> float:
        slices = max(1.0, problem.slots / problem.E / _ROWS)
        candidates = self._planner.explain(dataclasses.replace(problem, M=round(problem.M / slices))).candidates
        times = [each.choice.us for each in candidates if each.choice.us is not None and not each.against]
        if not times:
            raise InvalidInputError(
                f"no cost model for {problem} on {self._machine.name}; describe a GPU whose models ship "
                "(--machine h200), or make models from a calibration: `moe-dispatch fit`"
            )
        rested_us = slices * min(times)
        falling = math.exp(-calls * rested_us / _FALLS_IN_US)
        rate = _RATE_IN_THE_END + (_RATE_AT_FIRST - _RATE_IN_THE_END) * falling
        flops = self._ceilings.flops(problem.dtype) or math.inf
        read, multiply = problem.roofline_us(self._ceilings.bandwidth, math.inf), problem.roofline_us(math.inf, flops)
        return rested_us * math.hypot(read, multiply / rate) / math.hypot(read, multiply)
