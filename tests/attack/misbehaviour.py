"""Backends and policies that misbehave, put together from parts: what they answer, raise, return and declare."""

from collections.abc import Callable
from typing import Any, Final

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch import Backend, Choice, MoEProblem, Policy, Requirements
from moe_dispatch.backend import BackendConfig, Inputs
from tests.attack.strategies import SCALARS
from tests.support.fakes import Honest

Spoil = Callable[[Tensor, Inputs], object]
NAME: Final = "hostile"


class Right(Honest):
    """Foreign, so it is probed."""

    name = NAME
    needs_probe = True


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


ERRORS: Final = st.sampled_from([
    Exception(), ValueError("no"), KeyError(1), SystemExit(3), SystemExit("bye"),
    AssertionError(), UnprintableError(),
    RecursionError("deep"), StopIteration(), MemoryError(), OSError(5, "I/O"), NotImplementedError("later"),
    ImportError("libcuda.so"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ExceptionGroup("many", [ValueError()]),
    torch.OutOfMemoryError("80 GiB"), RuntimeError("x" * 100_000), RuntimeError("[red]\x1b[31m\n\nsecond line"),
    DeprecationWarning("old"), TypeError(None), Exception(b"\xff"),
])  # fmt: skip


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: object, **__: object) -> Any:
        raise error

    return method


def answering(value: object) -> Callable[..., Any]:
    return lambda *_, **__: value


def _same_buffer() -> Spoil:
    buffers: dict[object, Tensor] = {}
    return lambda out, _: buffers.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)


def _of(inputs: Inputs, name: str) -> Tensor:
    hidden_states, experts, topk_weights, topk_ids = inputs
    return {
        "hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids,
        "gate_up": experts.gate_up, "down": experts.down,
    }[name]  # fmt: skip


def _writing_to(name: str) -> Spoil:
    def spoil(out: Tensor, inputs: Inputs) -> Tensor:
        _of(inputs, name).zero_()
        return out

    return spoil


# What the first run of every kind of call sees.
SEEN: Final[dict[str, Spoil]] = {
    "None": lambda *_: None,
    "a number": lambda *_: 1.0,
    "a list": lambda out, _: out.tolist(),
    "a tuple": lambda out, _: (out,),
    "an array": lambda out, _: out.float().numpy(),
    "fewer rows": lambda out, _: out[:-1].clone(),
    "fewer columns": lambda out, _: out[:, :-1].clone(),
    "one dimension": lambda out, _: out.flatten(),
    "one dimension more": lambda out, _: out[None],
    "double": lambda out, _: out.double(),
    "integers": lambda out, _: out.to(torch.int32),
    "the meta device": lambda out, _: out.to("meta"),
    "sparse": lambda out, _: out.to_sparse(),
    "strided": lambda out, _: torch.stack([out, out], dim=2)[..., 0],
    "expanded": lambda out, _: out[:1].expand(*out.shape[:1], -1) if len(out) > 1 else out[None],
    "hidden_states": lambda out, inputs: inputs[0].copy_(out),
    "part of hidden_states": lambda _, inputs: inputs[0][:],
    **{f"written to {name}": _writing_to(name) for name in ("hidden_states", "topk_weights", "topk_ids")},
    "part of a weight": lambda out, i: i[1].down.flatten()[: out.numel()].view(out.shape).to(out.dtype),
}
# What only the comparison of a probe sees.
PROBED: Final[dict[str, Spoil]] = {
    "scaled": lambda out, _: out * 1.5,
    "negated": lambda out, _: -out,
    "zero": lambda out, _: out * 0,
    "NaN": lambda out, _: out * torch.nan,
    "one NaN": lambda out, _: torch.cat([out.flatten()[:-1], out.new_full((1,), torch.nan)]).view(out.shape),
    "one Inf": lambda out, _: torch.cat([out.flatten()[:-1], out.new_full((1,), torch.inf)]).view(out.shape),
    "tokens in reverse": lambda out, _: out.flip(0),
    "columns in reverse": lambda out, _: out.flip(1),
    "random": lambda out, _: torch.rand_like(out),
    "one buffer": _same_buffer(),
    **{f"written to {name}": _writing_to(name) for name in ("gate_up", "down")},
}


def returning(spoil: Spoil) -> Callable[..., Any]:
    """A `run` whose right result is spoilt."""

    def run(self: Right, *arguments: Any) -> object:
        hidden_states, experts, topk_weights, topk_ids, _ = arguments
        return spoil(Right.run(self, *arguments), (hidden_states, experts, topk_weights, topk_ids))

    return run


QUESTIONS: Final = (
    "unavailable_reasons", "unsupported_reasons", "further_reasons", "configs", "default_config", "workspace_bytes",
    "deterministic", "measured_versions", "fast_path", "__init__", "run_into",
)  # fmt: skip
DECLARATIONS: Final = ("name", "requirements", "config_type", "tolerance", "install_hint", "needs_probe")
DECLARED: Final = SCALARS | st.sampled_from([
    Requirements, Requirements(dtypes={}), Requirements(dtypes=5), Requirements(dtypes={"fp32": None}, cpu=True),  # type: ignore[arg-type, dict-item]
    Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=None, cpu=True),  # type: ignore[arg-type]
    Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True, multiples={"fp32": {"Z": 8}}),
    Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True, libraries=(1, None)),  # type: ignore[arg-type]
    BackendConfig, dict, {}, {"fp32": 1e-2}, {"fp32": "1e-2"}, {"fp32": -1.0}, {"fp32": float("nan")},
])  # fmt: skip

members: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from(sorted(SEEN)).map(lambda name: {"run": returning(SEEN[name]), "needs_probe": False, "shown": name}),
    st.sampled_from(sorted(SEEN | PROBED)).map(lambda name: {"run": returning((SEEN | PROBED)[name]), "shown": name}),
    st.builds(
        lambda error, probe: {"run": raising(error), "needs_probe": probe, "shown": error}, ERRORS, st.booleans()
    ),
    st.builds(lambda name, error: {name: raising(error), "shown": error}, st.sampled_from(QUESTIONS), ERRORS),
    st.builds(
        lambda name, value: {name: answering(value), "shown": value}, st.sampled_from(QUESTIONS[:-1]), DECLARED
    ),
    st.builds(lambda name, value: {name: value, "shown": value}, st.sampled_from(DECLARATIONS), DECLARED),
    st.builds(
        lambda name, error: {name: property(raising(error)), "shown": error}, st.sampled_from(DECLARATIONS), ERRORS
    ),
)  # fmt: skip


def make_backend_class(parts: list[dict[str, Any]]) -> type[Backend]:
    """A backend that misbehaves in every way of the parts.

    One whose wrong values only a probe can see is probed: declaring that none is needed is a promise to be right.
    """
    body: dict[str, Any] = {}
    for part in parts:
        body |= {name: value for name, value in part.items() if name != "shown"}
    if body.get("needs_probe") is False and any(
        isinstance(part["shown"], str) and part["shown"] in PROBED for part in parts
    ):
        del body["needs_probe"]
    return type("Hostile", (Right,), body)


CHOICES: Final = st.builds(
    Choice,
    st.sampled_from(["reference", "torch_grouped", "unknown"]) | SCALARS,
    st.just("because") | SCALARS,
    st.none() | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2) | SCALARS,
    st.none() | st.floats() | SCALARS,
    st.just("") | SCALARS,
)


def make_policy_class(rank: Callable[..., Any], notes: Callable[..., Any]) -> type[Policy]:
    """A policy called ``fixed`` that ranks and notes as it is told."""

    class Fixed(Policy):
        name = "fixed"

        def rank(self, problem: MoEProblem) -> tuple[Choice, ...]:
            answer: tuple[Choice, ...] = rank(problem)
            return answer

        def notes(self) -> tuple[str, ...]:
            answer: tuple[str, ...] = notes()
            return answer

    return Fixed
