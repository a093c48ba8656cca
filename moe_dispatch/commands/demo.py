"""`moe-dispatch demo`: a real MoE model generates tokens through `moe_forward`, on whatever device there is."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from moe_dispatch.commands.console import OUT, heading, line, machine_line, microseconds, plain, print_json, table
from moe_dispatch.commands.options import AsJson, Device, Model
from moe_dispatch.errors import MoEDispatchError
from moe_dispatch.system.libraries import library_status

if TYPE_CHECKING:
    from moe_dispatch.commands.demo_run import DemoReport


def demo(
    device: Device = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Number of tokens to generate.", min=1, max=512)] = 32,
    model: Model = "",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the demo's calibration in the cache directory instead of dropping it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate a layer, generate tokens with a Qwen3-MoE model whose every MoE layer is dispatched, and check them.

    The weights are random; --model chooses the shape of the MoE layer.
    """
    if find_spec("transformers") is None:
        raise MoEDispatchError(f"the demo needs transformers: {library_status('transformers', '', '').remedy}")
    from moe_dispatch.commands.demo_run import run

    report = run(device, model, tokens, keep=keep)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if not report.right:
        raise typer.Exit(1)


def _print(report: "DemoReport") -> None:
    layer = report.size.layer
    OUT.print("[bold]moe_dispatch[/bold]  one call, the fastest backend that this machine allows")
    line(plain(machine_line(report.machine)), style="dim")
    line(
        f"Qwen3-MoE, random weights: {report.size.layers} layers, E={layer.E} topk={layer.topk} K={layer.K} "
        f"N={layer.N}, {report.size.dtype}",
        style="dim",
    )
    _print_rows(report)
    if report.missing:
        heading("not here")
        for name, reasons in report.missing.items():
            for reason in reasons:
                line(f"{plain(name)}: {plain(reason)}")
    _print_verdict(report)


def _print_rows(report: "DemoReport") -> None:
    heading("one MoE layer")
    shown = table("tokens", "runs", "time", "naive", "ratio", "error", numbers=("tokens", "time", "naive"))
    for row in report.rows:
        ratio = "–" if row.backend == "reference" else f"{row.naive_us / row.us:.1f}×"
        shown.add_row(
            str(row.M),
            f"[green]{plain(row.backend)}[/green]",
            microseconds(row.us),
            microseconds(row.naive_us),
            ratio,
            f"{row.error:.0e}",
        )
    OUT.print(shown)
    for row in report.rows:
        line(f"M={row.M} runs {plain(row.backend)}: {plain(row.why)}")
    ran = ", ".join(f"{plain(name)} {count}×" for name, count in report.ran.items())
    line(f"time: medians, warm, host included · error: against fp32 · layers run so far: {ran}", style="dim")


def _print_verdict(report: "DemoReport") -> None:
    OUT.print()
    mark = "[green]✓[/green]" if report.right else "[red]✗[/red]"
    line(
        f"{mark} {report.same} of {report.tokens} tokens equal the model's own; "
        f"logits differ by {report.logits_error:.1e} (bound {report.bound:.0e})"
    )
    if report.same < report.tokens:
        line(
            f"  At the first difference the model's own logits prefer its token by {report.logits_gap:.1e} of their "
            f"size; up to {report.bound:.0e} it is a tie that rounding decides.",
            style="dim",
        )
