"""`moe-dispatch demo`: a real MoE model generates tokens through `moe_forward`, on whatever is here."""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Final

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from moe_dispatch.api import moe_forward
from moe_dispatch.commands.console import OUT, heading, machine_line, microseconds, table
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.dispatch.process import get_dispatcher, reset_dispatchers, stats
from moe_dispatch.errors import InvalidInputError, MoEDispatchError
from moe_dispatch.experts import ExpertWeights
from moe_dispatch.machine import default_device
from moe_dispatch.measure import make_inputs, reference_outputs, relative_error
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, Workload, torch_dtype, workload

NAIVE: Final = "reference"
PROMPT_TOKENS: Final = 64
_TIMED_S: Final = 0.4  # of measuring per figure
_CALIBRATION_S: Final = {"cpu": 20.0, "cuda": 60.0}
_SEED: Final = 0
# Logits of two right implementations differ by rounding alone.
_LOGITS_TOLERANCE: Final = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class DemoSize:
    """What the demo runs on a kind of device.

    Attributes:
        layer: The MoE layer's shape.
        layers: Decoder layers.
        dtype: Of the model; fp32 on a CPU, where BF16 has no fast path everywhere.
    """

    layer: Workload
    layers: int
    dtype: DType


@dataclass(frozen=True)
class LayerRow:
    """One token count of the demo's layer.

    Attributes:
        M: Tokens.
        backend: What ran.
        why: The policy's reason.
        error: ‖out − fp32‖ / ‖fp32‖.
        us: Median time of `moe_forward`.
        naive_us: Median time of the naive loop.
    """

    M: int
    backend: str
    why: str
    error: float
    us: float
    naive_us: float


def demo(
    device: Annotated[str, typer.Option(help="cpu or cuda; what is here if left out.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, max=512)] = 32,
    model: Annotated[
        str, typer.Option(help="Shape of the MoE layer: a named model, or E,topk,K,N. Weights are random.")
    ] = "",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the demo's calibration in the cache directory instead of dropping it.")
    ] = False,
) -> None:
    """Calibrate a layer, generate tokens with a Qwen3-MoE model whose every MoE layer is dispatched, and check them."""
    if find_spec("transformers") is None:
        raise MoEDispatchError("the demo needs transformers: pip install 'moe-dispatch[transformers]'")
    where = _device(device)
    size = _size(where, model)
    with nullcontext() if keep else _passing_cache():
        _run(where, size, tokens)


@contextmanager
def _passing_cache() -> Iterator[None]:
    """A cache directory of the demo's own: its few measurements of a toy layer are no calibration of the machine."""
    before = os.environ.get("MOE_DISPATCH_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="moe_dispatch-demo-") as directory:
        os.environ["MOE_DISPATCH_CACHE_DIR"] = directory
        reset_dispatchers()
        try:
            yield
        finally:
            reset_dispatchers()
            if before is None:
                del os.environ["MOE_DISPATCH_CACHE_DIR"]
            else:
                os.environ["MOE_DISPATCH_CACHE_DIR"] = before


def _calibrate(size: DemoSize, where: torch.device) -> None:
    from moe_dispatch.policies.calibration.calibrate import calibrate

    calibrate([size.layer], [size.dtype], tokens=[1, PROMPT_TOKENS], budget_s=_CALIBRATION_S[where.type], device=where)


def _run(where: torch.device, size: DemoSize, tokens: int) -> None:
    dispatcher = get_dispatcher(where)
    layer = size.layer
    OUT.print("[bold]moe_dispatch[/bold]  one call, the fastest backend that this machine allows")
    OUT.print(escape(machine_line(dispatcher.machine)), style="dim")
    OUT.print(
        f"Qwen3-MoE, random weights: {size.layers} layers, E={layer.E} topk={layer.topk} K={layer.K} N={layer.N}, "
        f"{size.dtype}",
        style="dim",
    )
    with _steps(tokens) as step:
        step("calibrate", lambda _: _calibrate(size, where))
        dispatcher = get_dispatcher(where)
        built = step("build the model", lambda _: _build(size, where))
        prompt = torch.randint(1, built.config.vocab_size, (1, PROMPT_TOKENS), device=where)
        ours = step("generate, dispatched", lambda tick: _generate(built, prompt, tokens, "moe_dispatch", tick))
        theirs = step("generate, model's own", lambda tick: _generate(built, prompt, tokens, "eager", tick))
        logits = step("compare logits", lambda _: _compare_logits(built, ours, theirs))
        experts = _experts(built)
        decode = step("measure M=1", lambda _: _measure(experts, layer, 1, dispatcher))
        prefill = step(f"measure M={PROMPT_TOKENS}", lambda _: _measure(experts, layer, PROMPT_TOKENS, dispatcher))
    rows = [decode, prefill]
    _print_rows(rows)
    _print_missing(dispatcher, rows, layer, size.dtype)
    same = int((ours[:, PROMPT_TOKENS:] == theirs[:, PROMPT_TOKENS:]).sum())
    if not _print_verdict(same, tokens, logits, size.dtype):
        raise typer.Exit(1)


def _device(text: str) -> torch.device:
    chosen = text or default_device()
    if chosen not in ("cpu", "cuda"):
        raise InvalidInputError(f"--device must be cpu or cuda, got {text!r}")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("--device cuda was asked for, and torch sees no CUDA device; try --device cpu")
    return torch.device(chosen)


def _size(where: torch.device, model: str) -> DemoSize:
    small = Workload("qwen3-moe, small", E=32, topk=4, K=256, N=128)
    on_gpu = where.type == "cuda"
    layer = workload(model or "qwen3-30b-a3b") if model or on_gpu else small
    if layer.activation != "silu" or layer.bias:
        raise InvalidInputError(f"the demo's model is a Qwen3-MoE, whose gate is silu without biases; got {layer}")
    return DemoSize(layer, layers=4, dtype="bf16" if on_gpu else "fp32")


def _build(size: DemoSize, where: torch.device) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_dispatch.integrations.transformers import register

    register()
    layer = size.layer
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=layer.K,
        num_hidden_layers=size.layers,
        num_attention_heads=max(layer.K // 64, 1),
        num_key_value_heads=max(layer.K // 256, 1),
        head_dim=64,
        num_experts=layer.E,
        num_experts_per_tok=layer.topk,
        moe_intermediate_size=layer.N,
        intermediate_size=layer.N,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(_SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(size.dtype))
    try:
        with where:
            built = Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() == 3:  # transformers draws experts so small that their output would drown
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return built


class _Ticker:
    """A transformers streamer that moves a progress bar and keeps nothing."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._prompt_seen = False

    def put(self, _: Tensor) -> None:
        if self._prompt_seen:
            self._tick()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to flush."""


def _generate(built: Any, prompt: Tensor, tokens: int, implementation: str, tick: Callable[[], None]) -> Tensor:
    built.set_experts_implementation(implementation)
    out: Tensor = built.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=_Ticker(tick),
    )
    return out


@dataclass(frozen=True)
class _Logits:
    """The dispatched model's logits beside the model's own, over the model's own sequence.

    Attributes:
        error: ‖dispatched − own‖ / ‖own‖.
        gap: Where the generated tokens first differ, by how much the model's own logits prefer its own token, as a
            share of their root mean square; 0 where none differ.
    """

    error: float
    gap: float


def _compare_logits(built: Any, ours: Tensor, theirs: Tensor) -> _Logits:
    with torch.no_grad():
        built.set_experts_implementation("eager")
        own = built(theirs).logits.float()
        built.set_experts_implementation("moe_dispatch")
        dispatched = built(theirs).logits.float()
    gap = 0.0
    differing = (ours != theirs)[0].nonzero()
    if len(differing):
        at = int(differing[0])
        row = own[0, at - 1]
        gap = float((row[theirs[0, at]] - row[ours[0, at]]) / row.square().mean().sqrt())
    return _Logits(float((dispatched - own).norm() / own.norm()), gap)


def _experts(built: Any) -> ExpertWeights:
    first = built.model.layers[0].mlp.experts
    return ExpertWeights(first.gate_up_proj.detach(), first.down_proj.detach())


def _measure(experts: ExpertWeights, layer: Workload, M: int, dispatcher: Dispatcher) -> LayerRow:
    device = experts.device
    problem = layer.problem(M, experts.dtype, dispatcher.machine)
    (given,) = make_inputs(problem, ROUTINGS["uniform"], device, count=1, seed=_SEED)
    (truth,) = reference_outputs(experts, (given,))
    call = given.hidden_states, experts, given.topk_weights, given.topk_ids
    with torch.no_grad():
        error = relative_error(moe_forward(*call), truth)
        us, naive_us = _medians(lambda: moe_forward(*call), lambda: moe_forward(*call, backend=NAIVE), device=device)
    chosen = dispatcher.planner.explain(problem).chosen
    assert chosen is not None  # noqa: S101 - it has just run
    return LayerRow(M, chosen.choice.backend, chosen.choice.reason, error, us, naive_us)


def _medians(*calls: Callable[[], object], device: torch.device) -> tuple[float, ...]:
    """Median µs of each call, warm, the calls taking turns so that a busy moment strikes all of them."""

    def timed(call: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e6 * (time.perf_counter() - start)

    for call in calls:
        for _ in range(3):
            timed(call)
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + _TIMED_S * len(calls)
    while time.perf_counter() < end or len(samples[0]) < 5:
        for call, taken in zip(calls, samples, strict=True):
            taken.append(timed(call))
    return tuple(statistics.median(taken) for taken in samples)


@contextmanager
def _steps(tokens: int) -> Iterator[Callable[[str, Callable[[Callable[[], None]], Any]], Any]]:
    """A runner of named steps, each with a bar; what was done stays visible."""
    columns = (TextColumn("  {task.description:<24}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=OUT) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")

        def step(name: str, work: Callable[[Callable[[], None]], Any]) -> Any:
            total = tokens if name.startswith("generate") else 1
            task = progress.add_task(name, total=total)
            result = work(lambda: progress.advance(task))
            progress.update(task, completed=total)
            return result

        yield step


def _print_rows(rows: list[LayerRow]) -> None:
    heading("one MoE layer")
    shown = table("tokens", "runs", "time", "naive", "ratio", "error", "why", numbers=("tokens", "time", "naive"))
    for row in rows:
        ratio = "–" if row.backend == NAIVE else f"{row.naive_us / row.us:.1f}×"
        shown.add_row(
            str(row.M),
            f"[green]{row.backend}[/green]",
            microseconds(row.us),
            microseconds(row.naive_us),
            ratio,
            f"{row.error:.0e}",
            escape(row.why),
        )
    OUT.print(shown)
    ran = ", ".join(f"{name} {counts['ran']}×" for name, counts in stats().items() if counts["ran"])
    OUT.print(f"time: medians, warm, host included · error: against fp32 · layers run so far: {ran}", style="dim")


def _print_missing(dispatcher: Dispatcher, rows: list[LayerRow], layer: Workload, dtype: DType) -> None:
    explanation = dispatcher.planner.explain(layer.problem(rows[-1].M, dtype, dispatcher.machine))
    against = {candidate.choice.backend: candidate.against for candidate in explanation.candidates}
    against |= explanation.unranked
    missing = {name: reasons for name, reasons in against.items() if reasons}
    if missing:
        heading("not here")
        shown = table("backend", "because")
        for name, reasons in missing.items():
            shown.add_row(name, escape("; ".join(reasons)))
        OUT.print(shown)


def _print_verdict(same: int, tokens: int, logits: _Logits, dtype: DType) -> bool:
    """Tokens must agree; where the model's own logits nearly tie, rounding may decide otherwise."""
    OUT.print()
    bound = _LOGITS_TOLERANCE[dtype]
    right = logits.error <= bound and logits.gap <= bound
    mark = "[green]✓[/green]" if right else "[red]✗[/red]"
    OUT.print(
        f"{mark} {same} of {tokens} tokens equal the model's own; "
        f"logits differ by {logits.error:.1e} (bound {bound:.0e})"
    )
    if same < tokens:
        OUT.print(
            f"  Where they part, the model's own logits prefer its token by {logits.gap:.1e} of their size "
            f"(up to {bound:.0e} is a tie that rounding decides).",
            style="dim",
        )
    return right
