"""`calibrate --parallel`: measures what joins the ranks of a group, then whole layers by each exchange."""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from moe_dispatch.dispatch.call import on_device
from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import present_device
from moe_dispatch.parallel import exchange_times
from moe_dispatch.parallel.comparison import compare_exchanges
from moe_dispatch.parallel.exchange import CallKind, Tokens
from moe_dispatch.parallel.exchange_times import LayerTimes, LinkTimes, ParallelCalibration
from moe_dispatch.parallel.expert_parallel import process_group
from moe_dispatch.parallel.parts import rank_columns
from moe_dispatch.parallel.placement import Division, Placement
from moe_dispatch.parallel.session import Options, Session
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.parallel.trial import ExchangeFailedError, Trial, drawn_inputs, stage
from moe_dispatch.problem import QUANTIZED_DTYPES, DType, Mode
from moe_dispatch.stored_files import NewerFileError, require_older
from moe_dispatch.system.files import check_writable, locked, set_aside, write_atomically
from moe_dispatch.workloads import Workload, make_experts, torch_dtype

logger = logging.getLogger(__name__)

DEFAULT_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384)
KINDS: Final[tuple[Tokens, ...]] = ("sharded", "replicated")
_ROW_BYTES: Final = 4096  # of the rows by which links are measured: 4 KiB to 64 MiB of a rank
_LINK_TOKENS: Final = (1, 8, 32, 128, 512, 2048, 8192, 16384)
_LINK_TOKENS_ON_CPU: Final = _LINK_TOKENS[:5]
_LINK_EXPERTS: Final = 16  # of each rank
_LINK_TOPK: Final = 8


@dataclass(frozen=True)
class ParallelReport:
    """What a calibration of a group did, equal on every rank.

    Attributes:
        path: The file that holds the result, written by rank 0.
        measured: What this run measured.
        skipped: Layers and token counts that were left out, each with the reason.
    """

    path: Path
    measured: ParallelCalibration
    skipped: tuple[str, ...]


def calibrate_parallel(
    layers: Sequence[tuple[Workload, DType]],
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    divisions: Sequence[Division] = ("experts",),
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    timeout_s: float = 60.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ParallelReport:
    """Measure the links between all ranks and layers spread over them, and keep the result for them. Collective.

    Times are those of the slowest rank. What an earlier calibration with the same versions measured of other layers and
    token counts stays in the file. Groups that exist already keep their choices.

    Args:
        layers: Whole layers with the dtypes of their weights; each rank makes random weights of its experts.
        tokens: Token counts of a rank.
        divisions: What of each layer is divided over the ranks: ``"experts"``, ``"columns"`` or both, in turn.
        device: This rank's device; the current GPU if None, else the CPU.
        budget_s: No further token count is begun after so many seconds of rank 0. None for no limit.
        timeout_s: Seconds that a rank waits for the others in a call.
        on_progress: Called with a line of text before each step.

    Raises:
        InvalidInputError: A layer has fewer experts than there are ranks, or columns that they do not divide.
        PolicyFileError: Rank 0 cannot write the result, or a newer version wrote what is there; raised on every rank.
        ExpertParallelMismatchError: The ranks give different arguments.
        ExpertParallelLostError: A rank is dead or late.
    """
    begin = time.monotonic()
    options = (Options(kind, None, None, timeout_s, max(600.0, timeout_s)) for kind in KINDS)
    sessions = [Session(process_group(None), present_device(device), each, calibrated=False) for each in options]
    leader = sessions[0]
    size = len(leader.control.ranks)
    if small := [workload.name for workload, _ in layers if size > workload.E]:
        raise InvalidInputError(
            f"each of {size} ranks holds at least one expert, and {', '.join(small)} has fewer; start fewer ranks, or "
            "leave that layer out"
        )
    if "columns" in divisions:
        for workload, dtype in layers:
            rank_columns(workload, dtype, size)
    facts = {
        "layers": [(dataclasses.astuple(each), dtype) for each, dtype in layers],
        "tokens": tuple(tokens),
        "divisions": tuple(divisions),
    }
    leader.control.require_equal("calibrate", facts)
    path = exchange_times.calibration_path(leader.topology)
    _on_first_rank(leader, lambda: _require_writable(path), path)
    links: list[LinkTimes] = []
    times: list[LayerTimes] = []
    skipped: list[str] = []
    with torch.no_grad(), on_device(leader.device):
        for session in sessions:
            on_progress(f"links, {session.options.tokens} tokens")
            links += _links(session)
        for (workload, dtype), division in itertools.product(layers, divisions):
            held, mine = _part_of(workload, division, leader.control.rank, size)
            generator = torch.Generator(leader.device).manual_seed(leader.control.rank)
            try:
                local = stage(leader, functools.partial(make_experts, mine, dtype, leader.device, generator))
            except ExchangeFailedError as error:
                skipped.append(f"{workload.name} {dtype} by {division}: its weights could not be made: {error}")
                continue
            for session in sessions:
                layer = ShardedExperts(session, local, Placement(session.control.rank, held, division))
                for M in sorted(set(tokens), reverse=True):  # what exchanges get for many tokens serves few as well
                    what = f"{workload.name} {dtype} by {division}, {session.options.tokens} tokens, M={M}"
                    late = budget_s is not None and time.monotonic() - begin > budget_s
                    if leader.control.gather_numbers([late])[0][0]:
                        skipped.append(f"{what}: no time left")
                        continue
                    on_progress(what)
                    try:
                        times += _whole_calls(layer, workload.topk, M, dtype)
                    except ExchangeFailedError as error:
                        skipped.append(f"{what}: {error}")
            del local, layer
    result = ParallelCalibration(
        topology=leader.topology, versions=leader.versions, links=tuple(links), layers=tuple(times)
    )
    _on_first_rank(leader, lambda: save(path, result), path)
    return ParallelReport(path, result, tuple(skipped))


def _part_of(workload: Workload, division: Division, rank: int, size: int) -> tuple[tuple[int, ...], Workload]:
    """What `Placement` says of every rank's experts, and a rank's part of a layer."""
    if division == "columns":
        return (workload.E,) * size, workload.sharded(size)
    held = tuple((each + 1) * workload.E // size - each * workload.E // size for each in range(size))
    return held, dataclasses.replace(workload, E=held[rank])


def _links(session: Session) -> Iterator[LinkTimes]:
    """Transfers by each exchange at several sizes, with hardly any experts behind them."""
    device, ranks = session.device, len(session.control.ranks)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    K = _ROW_BYTES // dtype.itemsize
    weights = ExpertWeights(
        torch.zeros(_LINK_EXPERTS, 32, K, device=device, dtype=dtype),
        torch.zeros(_LINK_EXPERTS, K, 16, device=device, dtype=dtype),
    )
    layer = ShardedExperts(session, weights, Placement(session.control.rank, (_LINK_EXPERTS,) * ranks))
    samples: dict[tuple[str, Mode], list[tuple[int, float]]] = {}
    for M in reversed(_LINK_TOKENS_ON_CPU if device.type == "cpu" else _LINK_TOKENS):
        kind, inputs = _call(layer, _LINK_TOPK, M, dtype)
        session.watch.begin()
        for name in session.candidates(kind):
            for mode in session.modes:
                if name not in session.candidates(dataclasses.replace(kind, mode=mode)):
                    continue
                try:
                    us = Trial(layer, session.exchanges[name], kind, inputs).transfers_us(graph=mode == "graph")
                except ExchangeFailedError as error:
                    session.bar(dataclasses.replace(kind, mode=mode), name, str(error))
                    continue
                samples.setdefault((name, mode), []).append((exchange_times.sent_bytes(kind), us))
    for (name, mode), measured in samples.items():
        if len(measured) > 1:
            yield LinkTimes.of(name, session.options.tokens, mode, measured)


def _whole_calls(layer: ShardedExperts, topk: int, M: int, dtype: DType) -> Iterator[LayerTimes]:
    kind, inputs = _call(layer, topk, M, torch_dtype("bf16" if dtype in QUANTIZED_DTYPES else dtype))
    for mode, splits in compare_exchanges(layer, kind, inputs).splits.items():
        yield LayerTimes(kind=dataclasses.replace(kind, mode=mode), splits=splits)


def _call(layer: ShardedExperts, topk: int, M: int, act_dtype: torch.dtype) -> tuple[CallKind, Any]:
    session = layer.session
    kind = session.kind(layer.placement, layer.local, M, topk, act_dtype)
    seed = 0 if session.options.tokens == "replicated" else session.control.rank
    return kind, drawn_inputs(layer, M, topk, act_dtype, seed)


def _require_writable(path: Path) -> None:
    require_older(path, exchange_times.parse)
    check_writable(path)


def save(path: Path, result: ParallelCalibration) -> None:
    """Write a calibration with the layers that the file has; one that is damaged is set aside first.

    Raises:
        NewerFileError: A newer version of this package wrote the file.
        OSError: It cannot be written.
    """
    with locked(path):
        try:
            older = exchange_times.read(path, result.topology)
        except FileNotFoundError:
            older = None
        except NewerFileError:
            raise
        except PolicyFileError as error:
            logger.warning("%s", set_aside(path, error))
            older = None
        write_atomically(path, result.with_layers_of(older).model_dump_json())


def _on_first_rank(session: Session, run: Callable[[], None], path: Path) -> None:
    fault = ""
    if session.control.rank == 0:
        try:
            run()
        except OSError as error:
            why = error.strerror or error
            fault = f"rank 0 cannot write {path} ({why}); set MOE_DISPATCH_CACHE_DIR to another folder"
        except PolicyFileError as error:
            fault = f"on rank 0, {error}"
    if fault := session.control.gather_objects(fault)[0]:
        raise PolicyFileError(fault)
