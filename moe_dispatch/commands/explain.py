"""`moe-dispatch explain`: which backend runs a model's MoE layer at which token count, and why."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moe_dispatch.commands.console import OUT, heading, line, machine_line, microseconds, plain, print_json, table
from moe_dispatch.commands.options import (
    AsJson,
    Dtype,
    MachineName,
    Model,
    TensorParallel,
    dtype_of,
    mode_of,
    tokens_of,
)
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_dispatch.dispatch.explanation import Explanation
    from moe_dispatch.workloads import Workload

EAGER: Final = "eager"
_CANNOT: Final = "–"
_LEGEND: Final = (
    f"*: runs; ok: can run, no time known; {_CANNOT}: cannot run. Measured times are geometric means over the "
    "routings of the calibration, uniform and dirichlet-4 by default; one routing alone takes longer or shorter."
)


def explain(
    model: Model = "qwen3-30b-a3b",
    dtype: Dtype = "bf16",
    tp: TensorParallel = 1,
    tokens: Annotated[str, typer.Option("--tokens", help="Token counts M, comma-separated.")] = "1,16,64,256,1024,4096",
    mode: Annotated[str, typer.Option("--mode", help="eager, or graph: while a CUDA graph is captured.")] = EAGER,
    machine: MachineName = None,
    full: Annotated[bool, typer.Option("--full", help="Print the whole ranking at every token count.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            "--parallel",
            metavar="GPUS",
            help="Project the layer onto these numbers of GPUs, comma-separated, with --tokens on each.",
        ),
    ] = None,
    wire_fp8: Annotated[bool, typer.Option("--wire-fp8", help="With --parallel: rows travel as FP8.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which backend runs a layer at which token count, and why; for this machine or a described one."""
    from moe_dispatch.dispatch.dispatcher import Dispatcher
    from moe_dispatch.dispatch.process import get_dispatcher
    from moe_dispatch.machine import Machine
    from moe_dispatch.workloads import workload

    counts, weights, captured = tokens_of(tokens), dtype_of(dtype), mode_of(mode)
    layer = workload(model).sharded(tp)
    dispatcher = get_dispatcher() if machine is None else Dispatcher(Machine.load(machine), live=False)
    if parallel is not None:
        from moe_dispatch.commands.parallel import print_projection

        if mode != EAGER or full:
            raise InvalidInputError("--parallel projects times of replayed graphs; leave out --mode and --full")
        print_projection(layer, weights, counts, parallel, dispatcher.machine, wire_fp8=wire_fp8, as_json=as_json)
        return
    if wire_fp8:
        raise InvalidInputError("--wire-fp8 is about rows between GPUs; give --parallel GPUS, too")
    problems = [layer.problem(M, weights, dispatcher.machine, captured) for M in dict.fromkeys(counts)]
    explanations = [dispatcher.planner.explain(problem) for problem in problems]
    if as_json:
        print_json([explanation.to_dict() for explanation in explanations])
    elif full:
        OUT.print("\n\n".join(map(str, explanations)), markup=False, soft_wrap=True)
    else:
        _print(layer, explanations)


def _print(layer: "Workload", explanations: "Sequence[Explanation]") -> None:
    problem = explanations[0].problem
    letters = f"E={layer.E} topk={layer.topk} K={layer.K} N={layer.N}"
    line(f"[bold]{plain(layer.name)}[/bold]  {letters}  {problem.dtype}  {layer.activation}  {problem.mode}")
    line(plain(machine_line(explanations[0].machine)), style="dim")
    OUT.print()
    _print_times(explanations)
    line(_LEGEND, style="dim")
    heading("why")
    for tokens, text in _grouped((explanation.problem.M, _choice(explanation)) for explanation in explanations):
        line(f"{tokens}: {plain(text)}")
    _print_refusals(explanations)
    for note in dict.fromkeys(note for explanation in explanations for note in explanation.notes):
        line(f"[yellow]note:[/yellow] {plain(note)}")


def _print_times(explanations: "Sequence[Explanation]") -> None:
    """Backends by token counts, in as many tables as the width needs."""
    shown: dict[str, None] = {}
    for explanation in explanations:
        if explanation.chosen:
            shown.setdefault(explanation.chosen.choice.backend)
    for explanation in explanations:
        shown |= dict.fromkeys([candidate.choice.backend for candidate in explanation.candidates])
        shown |= dict.fromkeys(explanation.unranked)
    per_table = max(1, (OUT.width - max(map(len, shown))) // (len("*99.9 µs") + 2))
    for start in range(0, len(explanations), per_table):
        part = explanations[start : start + per_table]
        tokens = [str(explanation.problem.M) for explanation in part]
        rows = table("tokens", *tokens, numbers=tokens)
        for name in shown:
            rows.add_row(plain(name), *(_cell(explanation, name) for explanation in part))
        OUT.print(rows)


def _cell(explanation: "Explanation", backend: str) -> str:
    able = [
        candidate
        for candidate in explanation.candidates
        if candidate.choice.backend == backend and not candidate.against
    ]
    if not able:
        return "ok" if explanation.unranked.get(backend) == () else _CANNOT
    time = "ok" if able[0].choice.us is None else microseconds(able[0].choice.us)
    return f"[green]*{time}[/green]" if able[0] is explanation.chosen else time


def _choice(explanation: "Explanation") -> str:
    if explanation.chosen is None:
        return "nothing can run it"
    choice = explanation.chosen.choice
    return f"{choice.backend}: {choice.reason} [{choice.policy}]"


def _print_refusals(explanations: "Sequence[Explanation]") -> None:
    """One line for each backend and reason, with the token counts that it holds at unless it holds at all of them."""
    held: dict[tuple[str, str], tuple[str, list[int]]] = {}
    for explanation in explanations:
        for name, reasons in _refusals(explanation).items():
            for reason in dict.fromkeys(reasons):
                # "needs M·topk ≤ 4096, got 8192" is the same reason at more tokens.
                _, counts = held.setdefault((name, reason.partition(", got ")[0]), (reason, []))
                if explanation.problem.M not in counts:
                    counts.append(explanation.problem.M)
    if held:
        heading("cannot run")
    for (name, _), (reason, counts) in held.items():
        where = "" if len(counts) == len(explanations) else f" at {', '.join(map(str, counts))} tokens"
        line(f"{plain(name)}{where}: {plain(reason)}")


def _refusals(explanation: "Explanation") -> dict[str, tuple[str, ...]]:
    """The reasons of every backend that cannot run the problem in any configuration."""
    refusals: dict[str, tuple[str, ...]] = dict(explanation.unranked)
    for candidate in explanation.candidates:
        refusals[candidate.choice.backend] = (*refusals.get(candidate.choice.backend, ()), *candidate.against)
    able = {candidate.choice.backend for candidate in explanation.candidates if not candidate.against}
    return {name: reasons for name, reasons in refusals.items() if name not in able}


def _grouped(texts: Iterable[tuple[int, str]]) -> list[tuple[str, str]]:
    """Equal texts once, each with its token counts: ``("1, 16", text)``."""
    tokens: dict[str, list[int]] = {}
    for M, text in texts:
        tokens.setdefault(text, []).append(M)
    return [(", ".join(map(str, counts)), text) for text, counts in tokens.items()]
