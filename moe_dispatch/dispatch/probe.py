"""Probes of foreign backends: a tiny layer is run and compared with the reference before anything real is."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.backend import Backend, BackendConfig, Inputs
from moe_dispatch.dispatch.checks import shares_memory
from moe_dispatch.dispatch.torch_state import KeptState
from moe_dispatch.dispatch.watched_runs import ContractError, check_result, same_bits, tensors_of_rows
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.guard import foreign_errors
from moe_dispatch.numerics import QuantizedRows, quantize_rows_torch
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import BACKENDS, LAST_RESORT
from moe_dispatch.system import failures
from moe_dispatch.workloads import ROUTINGS, make_experts, torch_dtype

SEED: Final = 20


@dataclass(frozen=True)
class _Trial:
    """One of the calls that a probe makes.

    Attributes:
        inputs: The call's arguments; the rows may be what another rank sends.
        truth: The right answer, fp32 ``[M, K]``.
        before: Copies of all tensors that the backend sees.
        out: What `Backend.run_into` gets; None where `Backend.run` is called.
        stored: Where the answer lies after `Backend.run_into`, of as many elements as the truth.
        kind: What is particular about the call, for messages.
    """

    inputs: tuple[Any, ...]
    truth: Tensor
    before: tuple[Tensor, ...]
    out: Tensor | PeerRows | None = None
    stored: Tensor | None = None
    kind: str = ""

    def run(self, backend: Backend, config: BackendConfig) -> Tensor:
        """Make the call, and return what it computed.

        Raises:
            ContractError: It returned something else than it was to return.
        """
        run: Any = backend.run if self.out is None else backend.run_into
        arguments = (*self.inputs, config) if self.out is None else (*self.inputs, config, self.out)
        result = run(*arguments)
        check_result(result, arguments)
        return result if self.stored is None else self.stored


def probe(backend: Backend, problem: MoEProblem, device: torch.device) -> str:
    """Run a tiny layer of the problem's dtypes, activation and biases through a backend, on three inputs.

    The routing holds what a backend must get right and a benchmark never shows: ids outside 0…E-1 with NaN for weights,
    and the same expert twice in a row. The third run goes into memory of ours. Of rows and memory of other ranks, what
    a backend of another package says it takes is tried after these. All results are compared after the last run, and
    the inputs with copies.

    Returns:
        Why the backend cannot be trusted; empty if its results are right. What it raises becomes the reason, unless it
        is a lost device or a lack of memory, which is raised on.
    """
    tiny = dataclasses.replace(problem, M=5, K=256, N=256, E=4, topk=2, mode="eager", needs_grad=False)
    if backend.unsupported_reasons(tiny):
        tiny = dataclasses.replace(tiny, K=1024, N=1024)
    tolerance = backend.tolerance.get(tiny.dtype)
    if not isinstance(tolerance, int | float):
        return "it declares no tolerance for weights of this dtype, by which its probe could be judged"
    # Outside of inference mode, so that a result that is made inside is seen.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        experts = make_experts(
            tiny, tiny.dtype, device, torch.Generator(device).manual_seed(SEED), act_dtype=tiny.act_dtype
        )
        trials = list(_trials(backend, tiny, experts))
        state = KeptState(device)
        try:
            config = backend.default_config(tiny)
            outs = [trial.run(backend, config) for trial in trials]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except ContractError as error:
            return f"its probe was wrong: {error}"
        except foreign_errors() as error:
            if failures.lost_device(error) or failures.out_of_memory(error):
                raise  # says nothing about the backend's arithmetic
            return f"its probe raised {failures.summary(error)}"
        finally:
            changed = state.restore()
        return f"its probe was wrong: it changed {changed}" if changed else _verdict(outs, trials, tolerance)


def _trials(backend: Backend, tiny: MoEProblem, experts: ExpertWeights) -> Iterator[_Trial]:
    first, second, third = (_inputs(tiny, experts, seed) for seed in range(SEED, SEED + 3))
    yield _trial(backend, tiny, first)
    yield _trial(backend, tiny, second)
    yield _into_ours(backend, tiny, third)
    if _of_this_package(backend):
        return
    hidden, _, *routing = third
    if tiny.dtype == "fp8" and backend.takes_quantized_rows(tiny):
        rows = QuantizedRows(*quantize_rows_torch(hidden), hidden.dtype)
        yield _into_ours(backend, tiny, (rows, experts, *routing), "over quantised rows")
    if backend.starts_before_arrival:
        travelling = TravellingRows(hidden, hidden[1:3], first=1, arrived=None, captured=False)
        yield _into_ours(backend, tiny, (travelling, experts, *routing), "over travelling rows")
    if backend.stores_to_peers:
        memory = hidden.new_full((2, 3, tiny.K), torch.nan)  # of two ranks, each with a row before those of the output
        addresses = torch.tensor([each.data_ptr() for each in memory], dtype=torch.int64, device=experts.device)
        peers = PeerRows(addresses, memory[0, 0].nbytes, 2, hidden.new_empty(1))
        four = hidden[:4], experts, *(each[:4] for each in routing)
        yield _trial(backend, tiny, four, peers, memory[:, 1:], "into the memory of several ranks")


def _of_this_package(backend: Backend) -> bool:
    """Whether its stages, which tests of conformance hold to it, take what other ranks send, and no library does."""
    made = getattr(backend.run, "__self__", None)  # behind a `GuardedBackend`
    return type(made).__module__.startswith("moe_dispatch.")


def _inputs(tiny: MoEProblem, experts: ExpertWeights, seed: int) -> Inputs:
    device = experts.device
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tiny.M, tiny.K, generator=generator, dtype=torch.float32, device=device)
    weights, ids = ROUTINGS["uniform"].sample(tiny.M, tiny.E, tiny.topk, "cpu", torch.Generator().manual_seed(seed))
    ids[0, 0], ids[1, 1] = -1, tiny.E
    weights[0, 0] = weights[1, 1] = torch.nan
    ids[2, 1] = ids[2, 0]
    return hidden.to(torch_dtype(tiny.act_dtype)), experts, weights.to(device), ids.to(device)


def _into_ours(backend: Backend, tiny: MoEProblem, inputs: tuple[Any, ...], kind: str = "") -> _Trial:
    out = torch.full((tiny.M, tiny.K), torch.nan, dtype=torch_dtype(tiny.act_dtype), device=inputs[1].device)
    return _trial(backend, tiny, inputs, out, out, kind)


def _trial(
    backend: Backend, tiny: MoEProblem, inputs: tuple[Any, ...], out: Tensor | PeerRows | None = None,
    stored: Tensor | None = None, kind: str = "",
) -> _Trial:  # fmt: skip
    rows, *others = inputs
    reference: Any = BACKENDS.load(LAST_RESORT)(backend.machine)
    config = reference.config_type.model_validate(
        {"compute_fp32": True, "quantize_activations": backend.quantizes_activations(tiny)}
    )
    arrived = rows.wait() if isinstance(rows, TravellingRows) else rows
    truth = torch.empty(others[2].shape[0], tiny.K, dtype=torch.float32, device=others[2].device)
    reference.run_into(arrived, *others, config, truth)
    return _Trial(inputs, truth, tuple(tensor.clone() for tensor in _seen(inputs)), out, stored, kind)


def _seen(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors that a backend could write to, or return memory of."""
    rows, experts, topk_weights, topk_ids = inputs
    tensors = (*tensors_of_rows(rows), *experts.tensors())
    return topk_weights, topk_ids, *(tensor for _, tensor in tensors)


def _verdict(outs: list[Tensor], trials: list[_Trial], tolerance: float) -> str:
    """What is wrong with a probe's results; empty if nothing is."""
    if not all(all(map(same_bits, _seen(trial.inputs), trial.before)) for trial in trials):
        return "its probe was wrong: it wrote to its inputs"
    if shares_memory(outs[0], outs[1]):
        return "its probe was wrong: it returned the same memory for two calls, and each output must be fresh memory"
    for out, trial in zip(outs, trials, strict=True):
        error = ((out.float().reshape(trial.truth.shape) - trial.truth).norm() / trial.truth.norm()).item()
        if not error <= tolerance:  # NaN included
            allowed = f"at most {tolerance:g} is allowed{' ' if trial.kind else ''}{trial.kind}"
            return f"its probe was wrong: relative error {error:.3g} against fp32, {allowed}"
    return ""
