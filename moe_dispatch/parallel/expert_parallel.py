"""`ExpertParallel`: spreads the experts of layers over the ranks of a process group."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist

from moe_dispatch.dispatch.call import on_device
from moe_dispatch.dispatch.checks import check, check_act_dtype, check_layer
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import present_device
from moe_dispatch.parallel.comparison import Compared, compare_exchanges
from moe_dispatch.parallel.exchange import Tokens
from moe_dispatch.parallel.explanation import ParallelExplanation, explain_call
from moe_dispatch.parallel.parts import columns_of, experts_of, placed, share_of_columns
from moe_dispatch.parallel.placement import Division, Placement
from moe_dispatch.parallel.session import Options, Session
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.parallel.trial import drawn_inputs
from moe_dispatch.problem import Mode


class ExpertParallel:
    """A group of ranks that hold a layer's experts together.

    ep = ExpertParallel(dist.group.WORLD, tokens="sharded", max_tokens=16384)
    layer = ep.shard(experts_local, experts=256)
    out = moe_forward(hidden_states, layer, topk_weights, topk_ids)   # global ids

    Creating one, making a layer, `warm_up` and every call are collective: all ranks do them in the same order. At
    creation the ranks compare software, environment variables and calibrations, leave out backends and exchanges that
    one of them lacks, and take over what ``moe-dispatch calibrate --parallel`` left on rank 0. Every later choice
    follows from what was agreed then and from facts that are equal on all ranks, so that none of them can choose apart.

    An eager call first exchanges token counts on the host, which also finds a rank that is dead, late or elsewhere. It
    takes one round of gloo (0.1 to 1 ms); a program that knows the counts states them (`tokens_per_rank`) instead.

    Args:
        group: The process group, or a one-dimensional DeviceMesh; NCCL for GPUs, gloo for CPUs.
        tokens: ``"sharded"`` where each rank has tokens of its own, as with data-parallel attention; ``"replicated"``
            where all ranks have the same, as with tensor-parallel attention.
        max_tokens: Most tokens of a rank in a call. A CUDA graph of sharded tokens whose counts are not stated pads to
            it.
        exchange: The exchange of every call, by name. None chooses: the fastest by the calibration or else by what
            `warm_up` measures, and ``gather`` where neither tells, and in CUDA graphs that were not warmed up.
        device: Where this rank's layers are; the current GPU if None, else the CPU.
        timeout: Seconds that a rank waits for the others in a call. On GPUs it holds for what happens on the host and
            for the kernels of ``direct``; NCCL's own timeout ends collectives that hang on the device.
        first_timeout: Seconds that it waits at creation and in `warm_up`, where kernels compile.

    Raises:
        ExpertParallelMismatchError: The ranks differ in software, settings, calibrations or these arguments.
        ExpertParallelLostError: A rank does not take part.
        InvalidInputError: The group has no backend for the device, or an argument is not what is described above.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        tokens: Tokens = "sharded",
        max_tokens: int | None = None,
        exchange: str | None = None,
        device: torch.device | str | None = None,
        timeout: float = 60.0,
        first_timeout: float = 600.0,
    ) -> None:
        if tokens not in ("sharded", "replicated"):
            raise InvalidInputError(f"tokens must be 'sharded' or 'replicated', got {tokens!r}")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise InvalidInputError(f"max_tokens must be a positive integer or None, got {max_tokens!r}")
        for name, seconds in (("timeout", timeout), ("first_timeout", first_timeout)):
            if not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
                raise InvalidInputError(f"{name} must be a finite number of seconds above 0, got {seconds!r}")
        options = Options(tokens, max_tokens, exchange, float(timeout), float(first_timeout))
        self._session = Session(process_group(group), present_device(device), options)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._session.collectives.rank

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._session.collectives.size

    def shard(self, experts_local: ExpertWeights, *, experts: int) -> ShardedExperts:
        """A layer of which every rank brings its own experts: consecutive ids, in the order of ranks.

        Args:
            experts_local: This rank's weights. Ranks may hold different numbers of experts.
            experts: Experts of the whole layer.

        Raises:
            ExpertParallelMismatchError: Shapes, dtypes or activations differ, or the experts are not `experts` in all.
        """
        return self._layer(experts_local, "experts", experts)

    def split(self, all_experts: ExpertWeights, division: Division = "experts") -> ShardedExperts:
        """A layer of which every rank has all experts: each keeps a copy of its own part.

        Args:
            all_experts: The whole layer's weights, the same on every rank; they can be freed afterwards.
            division: ``"experts"`` for consecutive experts; ``"columns"`` for a share of each expert's N columns, which
                loads every rank alike whatever the routing.

        Raises:
            InvalidInputError: There are fewer experts than ranks, or N cannot be divided among them: block FP8 is in
                whole blocks of 128, MXFP4 of 32.
            ExpertParallelMismatchError: The ranks hold different layers.
        """
        check_layer(all_experts)
        if division not in get_args(Division):
            raise InvalidInputError(f"division must be 'experts' or 'columns', got {division!r}")
        if division == "columns":
            return self.tensor(share_of_columns(all_experts, self.rank, self.size))
        return self.shard(experts_of(all_experts, self.rank, self.size), experts=all_experts.E)

    def tensor(self, columns_local: ExpertWeights) -> ShardedExperts:
        """A layer of which every rank holds a part of each expert's columns, as tensor parallelism cuts them.

        Args:
            columns_local: gate_up ``[E, 2·N/ranks, K]`` and down ``[E, K, N/ranks]`` of every expert; with block FP8 in
                whole blocks of 128. A bias of down that every rank holds in full is added once, by rank 0.

        Raises:
            ExpertParallelMismatchError: Shapes, dtypes or activations differ.
        """
        check_layer(columns_local)
        return self._layer(columns_of(columns_local, self.rank), "columns", columns_local.E)

    def _layer(self, local: ExpertWeights, division: Division, experts: int) -> ShardedExperts:
        check_layer(local)
        session = self._session
        held = placed(session.control, local, division, experts, session.device)
        return ShardedExperts(session, local, Placement(self.rank, held, division))

    @contextlib.contextmanager
    def tokens_per_rank(self, counts: Sequence[int] | int) -> Iterator[None]:
        """State the token counts of all ranks, so that calls inside exchange none. Every rank states the same.

        Args:
            counts: Tokens of each rank in the order of the group, or one number for all of them. CUDA graphs captured
                inside pad to the greatest.

        Raises:
            InvalidInputError: It is not one count for each rank, or more than `max_tokens`.
        """
        stated = tuple(counts) if isinstance(counts, Iterable) else (counts,) * self.size
        if len(stated) != self.size or any(type(count) is not int or count < 0 for count in stated):
            raise InvalidInputError(f"counts must be {self.size} integers of at least 0, got {counts!r}")
        limit = self._session.options.max_tokens
        if limit is not None and max(stated) > limit:
            raise InvalidInputError(f"a rank has {max(stated)} tokens, and max_tokens is {limit}")
        if self._session.options.tokens == "replicated" and len(set(stated)) > 1:
            raise InvalidInputError(f"replicated tokens are as many on every rank, got {counts!r}")
        before, self._session.stated = self._session.stated, stated
        try:
            yield
        finally:
            self._session.stated = before

    def warm_up(
        self,
        layer: ShardedExperts,
        topk: int,
        tokens: Sequence[int],
        act_dtype: torch.dtype | None = None,
    ) -> tuple[Compared, ...]:
        """Run every exchange for these token counts in lockstep, measure them, and keep the fastest of each.

        Where a calibration knows the fastest, only that one is run. An exchange that fails on any rank is used on none.
        A choice holds for token counts up to the same power of two, and for every layer of the same shape and dtype in
        this group.

        Args:
            layer: A layer of this group.
            topk: Experts per token.
            tokens: Tokens of each rank. A captured graph needs its own count, or `max_tokens`, in here.
            act_dtype: The dtype of hidden_states. None stands for the weights' own, or BF16 with FP8 weights.

        Returns:
            What was measured, one entry for each token count.

        Raises:
            ExpertParallelMismatchError: The ranks give different arguments.
            ExpertParallelLostError: A rank is dead or late.
        """
        session = self._session
        counts = self._numbers(layer, topk, tokens)
        check_act_dtype(act_dtype)
        dtype = act_dtype or layer.local.usual_act_dtype
        facts = {"layer": layer.number, "topk": topk, "tokens": counts, "act_dtype": str(dtype)}
        session.control.require_equal("warm_up", facts)
        compared: dict[int, Compared] = {}
        with torch.no_grad(), on_device(session.device), session.watch.patience(session.options.first_timeout):
            for M in sorted(set(counts), reverse=True):  # what exchanges get for many tokens serves few as well
                seed = 0 if session.options.tokens == "replicated" else self.rank
                inputs = hidden, weights, ids = drawn_inputs(layer, M, topk, dtype, seed)
                check(hidden, layer.local, weights, ids)
                kind = session.kind(layer.placement, layer.local, M, topk, dtype)
                compared[M] = compare_exchanges(layer, kind, inputs)
        return tuple(compared[M] for M in counts)

    def capturable(self, layer: ShardedExperts, topk: int, M: int) -> bool:
        """Whether calls of up to M tokens a rank can be captured in a CUDA graph, as far as is known."""
        explained = self.explain(layer, topk, M, "graph")
        return not explained.against[explained.chosen]

    def explain(self, layer: ShardedExperts, topk: int, M: int, mode: Mode = "eager") -> ParallelExplanation:
        """Which exchange serves calls of up to M tokens a rank, why, and what runs this rank's experts. Not collective.

        Args:
            layer: A layer of this group.
            topk: Experts per token.
            M: Greatest token count of a rank.
            mode: ``"graph"`` for calls that are captured in a CUDA graph.

        Raises:
            InvalidInputError: An argument is not what is described above.
        """
        self._numbers(layer, topk, [M])
        if mode not in get_args(Mode):
            raise InvalidInputError(f"mode must be 'eager' or 'graph', got {mode!r}")
        return explain_call(layer, topk, M, mode)

    def _numbers(self, layer: object, topk: object, tokens: object) -> tuple[int, ...]:
        """The token counts, if they and topk are numbers for a layer of this group.

        Raises:
            InvalidInputError: They are not, or it is none.
        """
        if not isinstance(layer, ShardedExperts) or layer.session is not self._session:
            raise InvalidInputError(f"layer must be one that this group made, got {layer!r}")
        counts = tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)
        if type(topk) is not int or not 1 <= topk <= layer.E or not all(type(M) is int and M > 0 for M in counts):
            raise InvalidInputError(
                f"topk must be 1 to {layer.E} and tokens positive integers, got topk={topk!r} and tokens={tokens!r}"
            )
        return counts


def process_group(group: Any) -> dist.ProcessGroup:
    """The process group that an argument names: itself, that of a one-dimensional DeviceMesh, or all ranks if None."""
    if not dist.is_available() or not dist.is_initialized():
        raise InvalidInputError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
    if hasattr(group, "get_group"):  # a DeviceMesh of one dimension
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidInputError(
            f"group must be a process group of this rank or a one-dimensional DeviceMesh, got {type(group).__name__}"
        )
    return group
