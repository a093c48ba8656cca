"""`moe-dispatch explain`: which backend runs a model's MoE layer at which token count, and why."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from moe_dispatch.api import explain as explain_problem
from moe_dispatch.commands.console import OUT, heading, machine_line, microseconds, table
from moe_dispatch.commands.options import dtype_of, tokens_of
from moe_dispatch.dispatch.explanation import Explanation
from moe_dispatch.dispatch.process import get_dispatcher
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DTYPES, Mode
from moe_dispatch.workloads import Workload, workload


def explain(
    model: Annotated[
        str, typer.Option(help="A named model, E,topk,K,N, or the path of a Hugging Face config.json.")
    ] = "qwen3-30b-a3b",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)} (block FP8).")] = "bf16",
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "1,16,64,256,1024,4096",
    machine: Annotated[
        Path | None, typer.Option(help="A machine described in JSON (`moe-dispatch doctor --json`), not this one.")
    ] = None,
    mode: Annotated[str, typer.Option(help="eager, or graph: while a CUDA graph is captured.")] = "eager",
    full: Annotated[bool, typer.Option("--full", help="The whole ranking at every token count.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say which backend runs a layer at which token count, and why; for this machine or a described one."""
    layer = workload(model)
    there = Machine.load(machine) if machine else get_dispatcher().machine
    explanations = [
        explain_problem(
            layer.problem(M, dtype_of(dtype), there, _mode(mode)), machine=there if machine is not None else None
        )
        for M in tokens_of(tokens)
    ]
    if as_json:
        typer.echo(json.dumps([explanation.to_dict() for explanation in explanations], indent=1))
    elif full:
        OUT.print("\n\n".join(map(str, explanations)), markup=False, soft_wrap=True)
    else:
        _print(layer, dtype, mode, explanations)


def _mode(text: str) -> Mode:
    if text not in ("eager", "graph"):
        raise InvalidInputError(f"--mode must be eager or graph, got {text!r}")
    return text  # type: ignore[return-value]  # mypy does not narrow a str by membership


def _print(layer: Workload, dtype: str, mode: str, explanations: Sequence[Explanation]) -> None:
    there = explanations[0].machine
    letters = f"E={layer.E} topk={layer.topk} K={layer.K} N={layer.N}"
    OUT.print(f"[bold]{escape(layer.name)}[/bold]  {letters}  {dtype}  {layer.activation}  {mode}")
    OUT.print(escape(machine_line(there)), style="dim")
    OUT.print()
    rows = table("tokens", "runs", "time", "why", "policy", numbers=("tokens", "time"))
    for explanation in explanations:
        M = str(explanation.problem.M)
        if (chosen := explanation.chosen) is None:
            rows.add_row(M, "[red]nothing[/red]", "–", "no backend can run it", "")
            continue
        choice = chosen.choice
        rows.add_row(
            M, f"[green]{choice.backend}[/green]", microseconds(choice.us), escape(choice.reason), choice.policy
        )
    OUT.print(rows)
    if against := _against(explanations):
        heading("not here")
        rows = table("backend", "because")
        for name, reasons in against.items():
            rows.add_row(name, escape("\n".join(reasons)))
        OUT.print(rows)
    for note in dict.fromkeys(note for explanation in explanations for note in explanation.notes):
        OUT.print(f"[yellow]note:[/yellow] {escape(note)}")


def _against(explanations: Sequence[Explanation]) -> dict[str, list[str]]:
    """Every backend's reasons, each with the token counts it holds at unless it holds at all of them."""
    held: dict[str, dict[str, list[int]]] = {}
    for explanation in explanations:
        reasons: dict[str, set[str]] = {name: set(why) for name, why in explanation.unranked.items()}
        for candidate in explanation.candidates:
            reasons.setdefault(candidate.choice.backend, set()).update(candidate.against)
        for name, why in reasons.items():
            for reason in sorted(why):
                held.setdefault(name, {}).setdefault(reason, []).append(explanation.problem.M)
    return {
        name: [
            reason if len(at) == len(explanations) else f"{reason} (at {', '.join(map(str, at))} tokens)"
            for reason, at in why.items()
        ]
        for name, why in held.items()
    }
