"""What the ranks of the tests run; each function is called on all of them."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from moe_dispatch import moe_forward
from moe_dispatch.backends.exchange import push
from moe_dispatch.benchmarks.record import expert_parallel
from moe_dispatch.benchmarks.record.rank_clock import Clock
from moe_dispatch.dispatch.settled_plans import SETTLING_CALLS
from moe_dispatch.errors import InvalidInputError, MoEDispatchError, MoEDispatchWarning
from moe_dispatch.parallel import forward, watch
from moe_dispatch.parallel.exchange import Arrived, LocalTokens, Tokens
from moe_dispatch.parallel.expert_parallel import ExpertParallel
from moe_dispatch.parallel.gather import GatherExchange
from moe_dispatch.parallel.sharded_experts import ShardedExperts
from moe_dispatch.parallel.trial import Trial, drawn_inputs
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import settings
from moe_dispatch.testing import CASES, Case, Inputs, Precision, make_inputs, relative_error
from tests.conftest import poison, poisoned
from tests.parallel import twins

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp8": 2e-2}
LAYER = Case(M=12, E=8, topk=2, K=32, N=16)
FP32 = Precision("fp32", "fp32")
_made: dict[tuple[Any, ...], ExpertParallel] = {}

for _name in BACKENDS.names():  # before the ranks are forked, so that each does not import them again
    BACKENDS.load(_name)


def parallel(**options: Any) -> ExpertParallel:
    """The group with these options; made once, as making one is a message to all ranks."""
    key = tuple(sorted(options.items()))
    if key not in _made:
        _made[key] = twins.group_with(**options)
    return _made[key]


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def split_call(ep: ExpertParallel) -> tuple[torch.Tensor, ShardedExperts, torch.Tensor, torch.Tensor]:
    """A call of LAYER that is the same on all ranks, its experts divided among them."""
    hidden, experts, weights, ids = make_inputs(LAYER, FP32, "cpu").arguments
    return hidden, ep.split(experts), weights, ids


def tokens_of(M: int, spread: str) -> list[int]:
    """How M tokens are spread over the ranks: evenly, with none on the last rank, or ever more."""
    size = dist.get_world_size()
    if spread == "even":
        return [(rank + 1) * M // size - rank * M // size for rank in range(size)]
    if spread == "none on the last":
        return [(rank + 1) * M // (size - 1) - rank * M // (size - 1) for rank in range(size - 1)] + [0]
    counts = [min(M, 1)] + [0] * (size - 1)
    counts[-1] = M - sum(counts[:-1])
    return counts


def conformance(
    names: list[str], precision: Precision, tokens: str, exchange: str, spread: str, backend: str | None = None,
    rows_aside: int = push.ROWS_ASIDE,
) -> list[str]:  # fmt: skip
    """Run cases of the conformance suite through a layer that is spread over the ranks; returns what is wrong."""
    rank, faults = dist.get_rank(), []
    ep = parallel(tokens=tokens, exchange=exchange)
    for name in names:
        inputs = make_inputs(CASES[name], precision, "cpu")
        layer = ep.split(inputs.experts)
        mine = slice(None)
        if tokens == "sharded":
            counts = tokens_of(CASES[name].M, spread)
            mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        with mock.patch.object(push, "ROWS_ASIDE", rows_aside):
            if fault := _fault(inputs, layer, mine, TOLERANCE[precision.dtype], backend):
                faults.append(f"{name}: {fault}")
    return faults


def _fault(inputs: Inputs, layer: ShardedExperts, mine: slice, tolerance: float, backend: str | None) -> str:
    hidden, weights, ids = inputs.hidden_states[mine], inputs.topk_weights[mine], inputs.topk_ids[mine]
    truth = inputs.truth[mine]
    with poisoned(fill):
        out = moe_forward(hidden, layer, weights, ids, backend=backend)
        memory = torch.full(hidden.shape, torch.nan, dtype=hidden.dtype)
        into = moe_forward(hidden, layer, weights, ids, out=memory, backend=backend)
    if into is not memory or not torch.equal(out.nan_to_num(7), into.nan_to_num(7)):
        return "with out= it is another result"
    if (out.shape, out.dtype) != (hidden.shape, hidden.dtype) or not out.is_contiguous():
        return f"it returned {out.dtype} {list(out.shape)}"
    spoilt = truth.isnan().any(dim=1)
    if not out[spoilt].isnan().all():
        return "a NaN in a token was lost"
    error = relative_error(out[~spoilt], truth[~spoilt])
    return f"relative error {error:.1e}" if error > tolerance else ""


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """What must not be read, such as the padding of an exchange's buffers: NaN, and a valid id."""
    return poison(tensor) if tensor.is_floating_point() else tensor.fill_(1)


def slots_that_run(exchange: str, tokens: list[int]) -> tuple[int, int]:
    """How many slots this rank's experts run, and how many its tokens have, with so many tokens on each rank."""
    ep, M = twins.group_with(exchange=exchange), tokens[dist.get_rank()]
    inputs = make_inputs(dataclasses.replace(LAYER, M=max(tokens)), FP32, "cpu", seed=dist.get_rank())
    layer = ep.split(inputs.experts)
    run_local, ran = ep._session.run_local, []

    def counted(arguments: Any, backend: str | None) -> Any:
        ids = arguments[3]
        ran.append(int(((ids >= 0) & (ids < layer.local.E)).sum()))
        return run_local(arguments, backend)

    ep._session.run_local = counted  # type: ignore[assignment,method-assign]
    with poisoned(fill):
        moe_forward(inputs.hidden_states[:M], layer, inputs.topk_weights[:M], inputs.topk_ids[:M])
    return ran[0], M * LAYER.topk


def all_to_one_rank(tokens: str, exchange: str) -> float:
    """Every token needs experts of the first rank only; returns the error."""
    inputs = make_inputs(dataclasses.replace(LAYER, M=30), FP32, "cpu")
    layer = parallel(tokens=tokens, exchange=exchange).split(inputs.experts)
    ids = inputs.topk_ids % 2
    mine = slice(dist.get_rank(), None, dist.get_world_size()) if tokens == "sharded" else slice(None)
    out = moe_forward(inputs.hidden_states[mine], layer, inputs.topk_weights[mine], ids[mine])
    whole = moe_forward(inputs.hidden_states, inputs.experts, inputs.topk_weights, ids)
    return relative_error(out, whole[mine])


def columns(tokens: str, exchange: str, *, bias: bool) -> float:
    """A layer whose columns are divided; returns the error."""
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = make_inputs(dataclasses.replace(LAYER, N=16 * size, bias=bias), FP32, "cpu")
    layer = parallel(tokens=tokens, exchange=exchange).split(inputs.experts, "columns")
    assert (layer.N, layer.E) == (16, LAYER.E)
    mine = slice(rank, None, size) if tokens == "sharded" else slice(None)
    out = moe_forward(inputs.hidden_states[mine], layer, inputs.topk_weights[mine], inputs.topk_ids[mine])
    return relative_error(out, inputs.truth[mine])


def what_transfers_send(exchange: str) -> list[str]:
    """What `combine` gets while transfers are timed, where the experts store results in peers' memory."""
    ep = twins.group_with(exchange=exchange)
    session, layer = ep._session, ep.split(make_inputs(LAYER, FP32, "cpu").experts)
    kind = session.kind(layer.placement, layer.local, 4, LAYER.topk, torch.float32)
    served = session.exchanges[exchange]
    trial = Trial(layer, served, kind, drawn_inputs(layer, 4, LAYER.topk, torch.float32, seed=0))
    with (
        mock.patch.object(session, "run_local", lambda inputs, _: inputs.out),
        mock.patch.object(served, "combine", wraps=served.combine) as combine,
    ):
        trial.run_experts()
        trial.transfers_us()
    return sorted({type(call.args[0]).__name__ for call in combine.call_args_list})


def own_call(ep: ExpertParallel, M: int = 4, topk: int = 2, **options: Any) -> torch.Tensor:
    inputs = make_inputs(dataclasses.replace(LAYER, M=max(M, 1), topk=topk), FP32, "cpu", seed=1)
    layer = ep.split(inputs.experts)
    return moe_forward(inputs.hidden_states[:M], layer, inputs.topk_weights[:M], inputs.topk_ids[:M], **options)


def warmed(tokens: Tokens) -> list[tuple[Any, ...]]:
    """Warm up, and return what was chosen, measured and explained."""
    ep = ExpertParallel(tokens=tokens)
    hidden, layer, weights, ids = split_call(ep)
    before = ep.explain(layer, 2, 8).chosen
    compared = ep.warm_up(layer, topk=2, tokens=[2, 8])
    assert ep.explain(layer, 2, 8).chosen == compared[1].chosen
    assert ep.explain(layer, 2, 1000).chosen == "gather"
    assert f"-> {compared[1].chosen}: measured as fastest" in str(ep.explain(layer, 2, 7))
    moe_forward(hidden[:8], layer, weights[:8], ids[:8])
    assert before == "gather"
    return [(each.chosen, each.us, each.failed) for each in compared]


def exchanges_that_ran() -> list[str]:
    """Which exchanges run calls of one kind before and after another one is chosen for it."""
    ep = ExpertParallel()
    session, ran = ep._session, []
    for name, exchange in session.exchanges.items():

        def noted(tokens: LocalTokens, name: str = name, dispatch: Any = exchange.dispatch) -> Arrived:
            ran.append(name)
            arrived: Arrived = dispatch(tokens)
            return arrived

        exchange.dispatch = noted  # type: ignore[method-assign]
    call = split_call(ep)
    layer = call[1]
    for _ in range(2):
        for _ in range(SETTLING_CALLS + 2):
            moe_forward(*call)
        kind = session.kind(layer.placement, layer.local, LAYER.M, LAYER.topk, torch.float32)
        session.keep_choice(kind, "alltoall", {})
    return [name for name, _ in itertools.groupby(ran)]


def calls_that_are_checked(stated: bool) -> tuple[int, list[int]]:
    """How many of 20 calls of one kind are checked, and whether each call is that differs from it in something."""
    ep = ExpertParallel()
    call = hidden, _, _, ids = split_call(ep)
    differing: Any = [{"out": hidden.clone()}, {"backend": "reference"}, {}]
    with (
        ep.tokens_per_rank(LAYER.M) if stated else contextlib.nullcontext(),
        mock.patch.object(forward, "_check_once", wraps=forward._check_once) as check,
    ):
        first, *_ = [moe_forward(*call) for _ in range(20)]
        counts = [check.call_count]
        for arguments, options in ((*call[:3], ids.long()), {}), *((call, each) for each in differing):
            assert torch.allclose(moe_forward(*arguments, **options), first)
            counts.append(check.call_count)
    return counts[0], [after - before for before, after in itertools.pairwise(counts)]


def gradients_after_settled_calls() -> list[str]:
    """What a call raises that needs a gradient, after many of its kind under `no_grad` that needed none."""
    ep = ExpertParallel()
    hidden, layer, weights, ids = split_call(ep)
    leaf = hidden.clone().requires_grad_()
    for tokens in (hidden, leaf):
        for _ in range(SETTLING_CALLS + 2):
            with torch.no_grad():
                moe_forward(tokens, layer, weights, ids)
    raised = []
    for arguments, context in (((leaf, weights), torch.enable_grad()), ((hidden, weights), forward_ad.dual_level())):
        with context:
            try:
                moe_forward(arguments[0], layer, arguments[1], ids)
            except InvalidInputError as error:
                raised.append(str(error))
    return raised


class SlowGather(GatherExchange):
    """Takes long to dispatch, on every rank but the last, where it would be the fastest."""

    name = "slow"

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        if self.collectives.rank != self.collectives.size - 1:
            time.sleep(0.05)
        return super().dispatch(tokens)


class BrokenGather(GatherExchange):
    name = "broken"

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        if self.collectives.rank == self.collectives.size - 1:
            raise RuntimeError("no such luck")
        return Arrived(tokens.hidden_states, tokens.topk_weights, tokens.wire_ids)


def race_with_others() -> tuple[Any, ...]:
    """Warm up with an exchange that is slow on some ranks and one that is broken on another."""
    with twins.registered(SlowGather, BrokenGather):
        ep = ExpertParallel()
        layer = split_call(ep)[1]
        (compared,) = ep.warm_up(layer, topk=2, tokens=[4])
        reasons = ep.explain(layer, 2, 4).against["broken"]
    return compared.chosen, compared.us, compared.failed, reasons


def create_with(variable: str, value: str, **options: Any) -> None:
    """Make a group with an environment variable that only the last rank has."""
    last = is_last()
    if last and variable:
        os.environ[variable] = value
    settings.cache_clear()
    try:
        ExpertParallel(**{name: each[last] for name, each in options.items()})
    finally:
        os.environ.pop(variable, None)
        settings.cache_clear()


def with_another_calibration() -> None:
    """Make a group in which the last rank has a calibration of its own."""
    from moe_dispatch.machine import current_machine
    from moe_dispatch.policies.calibrated import calibration_path
    from moe_dispatch.policies.measurements.schema import CalibrationFile

    machine = current_machine("cpu")
    before = os.environ["MOE_DISPATCH_CACHE_DIR"]
    if is_last():
        os.environ["MOE_DISPATCH_CACHE_DIR"] = f"{before}/another"
        path = calibration_path(machine)
        path.parent.mkdir(parents=True, mode=0o700)
        path.write_text(CalibrationFile(machine=machine).model_dump_json())
    try:
        ExpertParallel()
    finally:
        os.environ["MOE_DISPATCH_CACHE_DIR"] = before


def layer_with(local: str) -> None:
    last = is_last()
    case = dataclasses.replace(LAYER, E=2, N=32 if last and local == "N" else 16)
    experts = make_inputs(case, FP32, "cpu").experts
    parallel().shard(experts, experts=2 * dist.get_world_size() + (local == "experts"))


def call_with(what: str) -> None:
    last = is_last()
    ep = parallel(tokens="replicated" if what == "tokens" else "sharded", timeout=100.0)
    own_call(
        ep, M=3 if last and what == "tokens" else 4, topk=3 if last and what == "topk" else 2,
        backend="reference" if last and what == "backend" else None,
    )  # fmt: skip


def call_without_tokens() -> None:
    """Make a call without a token on any rank, that names no backend there is."""
    own_call(parallel(timeout=100.0), M=0, backend="no_such")


def backends_that_ran() -> list[str]:
    """Which backends run a call where the last rank cannot use torch_grouped."""
    from moe_dispatch.backends.torch_grouped import TorchGroupedBackend

    last = is_last()
    disabled = os.environ.pop("MOE_DISPATCH_DISABLE")
    settings.cache_clear()
    reasons = ("it is broken here",) if last else ()
    with mock.patch.object(TorchGroupedBackend, "unavailable_reasons", return_value=reasons):
        ep = ExpertParallel()
    own_call(ep)
    os.environ["MOE_DISPATCH_DISABLE"] = disabled
    settings.cache_clear()
    return sorted(ep._session.dispatcher.stats())


def lack_memory_on_one_rank() -> tuple[float, int]:
    """Make calls of which the last rank's memory holds five tokens at a time; returns the error and the failures."""
    from moe_dispatch.backends.torch_grouped import TorchGroupedBackend

    run, failures = TorchGroupedBackend.run, list[int]()

    def lack(self: TorchGroupedBackend, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        if is_last() and hidden_states.shape[0] > 5:  # as many as a probe has
            failures.append(hidden_states.shape[0])
            raise torch.OutOfMemoryError("tried to allocate")
        return run(self, hidden_states, *others)

    disabled = os.environ.pop("MOE_DISPATCH_DISABLE")
    settings.cache_clear()
    with mock.patch.object(TorchGroupedBackend, "run", lack), warnings.catch_warnings():
        warnings.simplefilter("ignore", MoEDispatchWarning)
        ep = ExpertParallel()
        call = split_call(ep)
        truth = make_inputs(LAYER, FP32, "cpu").truth
        error = max(relative_error(moe_forward(*call), truth) for _ in range(3))
    os.environ["MOE_DISPATCH_DISABLE"] = disabled
    settings.cache_clear()
    assert "torch_grouped" in ep._session.dispatcher.stats()
    return error, len(failures)


def stated_counts() -> tuple[int, int]:
    """Calls with and without stated counts: how often the ranks told each other numbers."""
    ep, rank = ExpertParallel(), dist.get_rank()
    hidden, layer, weights, ids = split_call(ep)
    control = ep._session.control
    gather, times = control.gather_numbers, []

    def counted(numbers: Sequence[int]) -> list[list[int]]:
        times.append(1)
        return gather(numbers)

    control.gather_numbers = counted  # type: ignore[method-assign]
    arguments = hidden[:rank], layer, weights[:rank], ids[:rank]
    exchanged = moe_forward(*arguments)
    told = len(times)
    with ep.tokens_per_rank(range(ep.size)):
        stated = moe_forward(*arguments)
    assert torch.equal(exchanged, stated)
    return told, len(times) - told


def lose_a_rank(how: str, victim: int, timeout: float) -> Any:
    """One rank is lost in the second call."""
    ep = ExpertParallel(timeout=timeout, first_timeout=60.0)
    call = split_call(ep)
    with ep._session.watch.patience(60.0):  # the first call imports
        moe_forward(*call)
    watch.GRACE = 0.5  # type: ignore[misc]
    if dist.get_rank() == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "late":
            time.sleep(timeout + 1.0)
        if how == "failed":
            ep._session.dispatcher.forward = _fail  # type: ignore[assignment,method-assign]
    start = time.monotonic()
    try:
        moe_forward(*call)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        seconds, again = time.monotonic() - start, ""
        try:
            moe_forward(*call)
        except Exception as later:  # noqa: BLE001
            again = type(later).__name__
        return type(error).__name__, str(error), getattr(error, "ranks", ()), getattr(error, "call", 0), seconds, again
    return None


def recorded(folder: str, replicated: bool, divisions: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """Run the benchmark's record for a tiny layer: how many results were wrong, and the rows that rank 0 wrote."""
    out = Path(folder) / "rows.jsonl"
    options = argparse.Namespace(
        exchange=None,
        out=str(out),
        routing="uniform",
        replays=1,
        brief=False,
        replicated=replicated,
        division=divisions,
    )
    device = torch.device("cpu")
    with torch.no_grad():
        wrong = expert_parallel._run(
            dataclasses.replace(expert_parallel.TINY, E=18, N=48), "fp32", [4, 1], options, device,
            Clock(device, 2), lambda: None,
        )  # fmt: skip
    return wrong, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def refuse_on_one_rank(what: str) -> tuple[str, int]:
    """Calls that are right, until they are settled, one that the last rank refuses, and a right one again.

    Args:
        what: What is wrong on the last rank: ``"hidden_states"``, ``"weights"`` that were replaced before, or the
            ``"backend"`` that it names.
    """
    right = split_call(ExpertParallel(timeout=100.0))
    hidden, *others = right
    down, refusal = right[1].local.down, ""
    for _ in range(SETTLING_CALLS + 2):
        moe_forward(*right)
    memory = down.data
    if what == "hidden_states" and is_last():
        hidden = hidden.double()
    elif what == "weights":
        down.data = memory = memory.clone()
        moe_forward(*right)
        down.data = memory[:, 1:].contiguous() if is_last() else memory
    try:
        named = "no_such" if what == "backend" and is_last() else None
        moe_forward(hidden, *others, backend=named)  # type: ignore[arg-type]  # the layer is one of the others
    except MoEDispatchError as error:
        refusal = str(error)
    down.data = memory
    return refusal, moe_forward(*right).shape[0]


def name_what_cannot_run(variable: bool) -> tuple[str, int]:
    """A call by a backend that takes no such layer, and a right one.

    Args:
        variable: Whether the environment names the backend, for that call's group.
    """
    if variable:
        os.environ["MOE_DISPATCH_BACKEND"] = "gluon_hopper"
    settings.cache_clear()
    try:
        call = split_call(ExpertParallel(timeout=100.0))
        moe_forward(*call, backend=None if variable else "gluon_hopper")
    except MoEDispatchError as error:
        name = type(error).__name__
    os.environ.pop("MOE_DISPATCH_BACKEND", None)
    settings.cache_clear()
    return name, moe_forward(*call, backend="reference").shape[0]


def unlike_what_is_said_of_bad_arguments() -> list[str]:
    """What is said of arguments that are no layers and no numbers, where it does not begin as it should."""
    ep: Any = parallel(timeout=100.0)
    layer = split_call(ep)[1]
    numbers = f"topk must be 1 to {LAYER.E} and tokens positive integers, got "
    calls: dict[str, Any] = {
        "experts must be ExpertWeights(gate_up, down), got NoneType": lambda: ep.shard(None, experts=4),
        "experts must be ExpertWeights(gate_up, down), got list": lambda: ep.split([]),
        "experts must be ExpertWeights(gate_up, down), got str": lambda: ep.tensor("columns"),
        "counts must be 3 integers": lambda: ep.tokens_per_rank(1.5).__enter__(),
        "act_dtype must be": lambda: ep.warm_up(layer, 2, [1], "bf16"),
        "hidden_states is torch.float16": lambda: ep.warm_up(layer, 2, [1], torch.float16),
        "layer must be one that this group made, got None": lambda: ep.explain(None, 2, 1),
        f"{numbers}topk=99": lambda: ep.explain(layer, 99, 1),
        f"{numbers}topk=2 and tokens=[[1]]": lambda: ep.explain(layer, 2, [1]),
        f"{numbers}topk=2 and tokens=[-1]": lambda: ep.capturable(layer, 2, -1),
        "mode must be 'eager' or 'graph', got 'cuda'": lambda: ep.explain(layer, 2, 1, "cuda"),
        "device must be cpu, cuda or cuda:N, got []": lambda: type(ep)(device=[]),
        "no exchange is called 5": lambda: type(ep)(exchange=5),
    }
    unlike = []
    for start, call in calls.items():
        try:
            unlike.append(f"accepted: {call()}")
        except MoEDispatchError as error:
            unlike += [] if str(error).startswith(start) else [str(error)]
    return unlike


def _fail(*_: object) -> torch.Tensor:
    raise ValueError("this rank's experts failed")
