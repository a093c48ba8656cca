"""A model's prefill and decode under every experts implementation of transformers, eager and compiled, by turns.

    python -m moe_dispatch.benchmarks.record.transformers_inference --out transformers_inference.jsonl

Models and rows are those of `gradients`, without gradients: a prefill of one sequence, and decode steps of several
sequences with a static cache. "compiled" is ``torch.compile(fullgraph=True, mode="reduce-overhead")``, which replays
CUDA graphs; the eager implementation cannot be compiled so. A row also has tokens per second, or the reason why there
is no measurement. First come the differences of the outputs from the eager implementation's.

``--implementations deepgemm`` is transformers' implementation by DeepGEMM, with the installed package in place of the
copy that it would fetch from the hub.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from moe_dispatch.backends.deep_gemm.library import MODULES
from moe_dispatch.benchmarks.record.gradients import IMPLEMENTATIONS, Row, build, measure, parser_of, write
from moe_dispatch.integrations.transformers import register

Mode = Literal["eager", "compiled"]

_DEEP_GEMM: Final = "deepgemm"
_DECODE_STEPS: Final = 16  # between two synchronisations; a model that generates launches ahead of the device, too
_WARM_UPS: Final = {"eager": 1, "compiled": 3}  # CUDA graphs are recorded at the second run
_COMPILED_CASES: Final = 64  # implementations × cases: each is another graph of the same code


@dataclass(frozen=True)
class Case:
    """What is measured: a prefill of one sequence, or one decode step of several.

    Attributes:
        what: ``"prefill"`` or ``"decode"``.
        tokens: Tokens in one call of the model: the length of the sequence, or how many sequences decode together.
    """

    what: Literal["prefill", "decode"]
    tokens: int


CASES: Final = {f"{case.what}-{case.tokens}": case for case in (
    Case("decode", 1), Case("decode", 32), Case("prefill", 4096),
)}  # fmt: skip


class Step:
    """One case as a callable that runs the model ``repeats`` times, always with the same inputs and cache."""

    def __init__(self, model: Any, case: Case, device: str) -> None:
        from transformers import StaticCache

        is_prefill = case.what == "prefill"
        shape = (1, case.tokens) if is_prefill else (case.tokens, 1)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(*shape, model.config.hidden_size, generator=generator)
        self.repeats = 1 if is_prefill else _DECODE_STEPS
        self.cache = None if is_prefill else StaticCache(config=model.config, max_cache_len=_DECODE_STEPS)
        self.arguments = {
            "inputs_embeds": hidden.to(device, torch.bfloat16), "past_key_values": self.cache,
            "use_cache": self.cache is not None,
        }  # fmt: skip

    def __call__(self, call: Callable[..., Any]) -> Tensor:
        """The last hidden states of the last repetition."""
        if self.cache is not None and self.cache.is_initialized:
            self.cache.reset()
        with torch.no_grad():
            for _ in range(self.repeats):
                torch.compiler.cudagraph_mark_step_begin()
                out: Tensor = call(**self.arguments).last_hidden_state
        return out


def differences(
    model: Any, steps: dict[Case, Step], implementations: Sequence[str], hopeless: set[tuple[str, Case]]
) -> Iterator[Row]:
    """‖out − eager‖ / ‖eager‖ after all layers. Where roundings differ, a router may choose another expert.

    What has no result is added to `hopeless`.
    """
    for case, step in steps.items():
        model.set_experts_implementation("eager")
        expected = step(model).float()
        for name in implementations:
            if name == "eager":
                continue
            model.set_experts_implementation(name)
            row: Row = {"what": f"difference, {case.what}", "tokens": case.tokens, "implementation": name}
            try:
                yield row | {"difference": float((step(model).float() - expected).norm() / expected.norm())}
            except torch.OutOfMemoryError:
                hopeless.add((name, case))
                yield row | {"reason": "out of memory"}


def measure_case(call: Callable[..., Any], step: Step, case: Case, mode: Mode, device: str) -> Row:
    """One measurement, per call of the model; a reason in its place where memory or the compiler does not allow it."""
    try:
        for _ in range(_WARM_UPS[mode]):
            step(call)
        row = measure(lambda: step(call), device)
    except torch.OutOfMemoryError:
        return {"reason": "out of memory"}
    except torch._dynamo.exc.TorchDynamoException as error:
        return {"reason": f"not compiled: {str(error).splitlines()[0]}"}
    if "reason" in row:
        return row
    row |= {"ms": row["ms"] / step.repeats, "ms_fastest": row["ms_fastest"] / step.repeats}
    return row | {"tokens_per_s": 1e3 * case.tokens / row["ms"]}


def rows(
    model: Any, device: str, rounds: int, cases: tuple[Case, ...], modes: tuple[Mode, ...], deadline: float,
    implementations: Sequence[str] = IMPLEMENTATIONS, **compile_options: Any,
) -> Iterator[Row]:  # fmt: skip
    """Differences, then every measurement of a round before the next round; nothing begins after the deadline."""
    steps = {case: Step(model, case, device) for case in cases}
    hopeless: set[tuple[str, Case]] = set()  # no result before, in an earlier round or mode
    yield from differences(model, steps, implementations, hopeless)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **compile_options)
    with torch._dynamo.config.patch(recompile_limit=_COMPILED_CASES):
        for mode, turn, case in itertools.product(modes, range(rounds), cases):
            for name in implementations if turn % 2 == 0 else reversed(implementations):
                row = {"what": case.what, "mode": mode, "implementation": name, "tokens": case.tokens,
                            "turn": turn}  # fmt: skip
                if mode == "compiled" and name == "eager":
                    continue  # its loop over the experts that were chosen cannot be one graph
                if (name, case) in hopeless or time.monotonic() > deadline:
                    continue
                model.set_experts_implementation(name)
                if device == "cuda":
                    torch.cuda.empty_cache()
                row |= measure_case(compiled if mode == "compiled" else model, steps[case], case, mode, device)
                if "reason" in row:
                    hopeless.add((name, case))
                yield row


def use_installed_deep_gemm() -> None:
    """Have transformers find the installed DeepGEMM where it would look on the hub."""
    from transformers.integrations import deepgemm

    library = importlib.import_module(next(name for name in MODULES if importlib.util.find_spec(name)))
    deepgemm.is_deepgemm_loadable = lambda raise_error=False: True  # noqa: ARG005 - it asks for the hub's package
    deepgemm.lazy_load_kernel = lambda _name: library


def main() -> None:
    """Measure, print, and write."""
    parser = parser_of(__doc__, "transformers_inference.jsonl", 130.0)
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=list(get_args(Mode)))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    every = (*IMPLEMENTATIONS, _DEEP_GEMM)
    parser.add_argument("--implementations", nargs="+", choices=every, default=list(IMPLEMENTATIONS))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    register()
    if _DEEP_GEMM in arguments.implementations:
        use_installed_deep_gemm()
    model = build(arguments.model, arguments.layers, "cuda").eval()
    cases = tuple(CASES[name] for name in arguments.cases)
    modes, implementations = tuple(arguments.modes), tuple(arguments.implementations)
    made = rows(model, "cuda", arguments.rounds, cases, modes, deadline, implementations, mode="reduce-overhead")
    write(made, arguments)


if __name__ == "__main__":
    main()
