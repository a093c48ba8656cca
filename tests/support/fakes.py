"""Backends and policies that misbehave for real: they raise, lie, hang and die as foreign code does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_dispatch import Backend, BackendConfig, Choice, ExpertWeights, MoEProblem, Policy, Requirements
from moe_dispatch.backends.reference import ReferenceBackend, ReferenceConfig
from moe_dispatch.registry import BACKENDS, POLICIES

ANYTHING = Requirements(
    dtypes={"bf16": (0, 0), "fp16": (0, 0), "fp32": (0, 0), "fp8": (0, 0)},
    act_dtypes=frozenset({"bf16", "fp16", "fp32"}),
    cpu=True,
    bias=True,
    interleaved=True,
)


class Honest(Backend):
    """Right, by way of the reference."""

    name = "honest"
    requirements = ANYTHING
    needs_probe = False

    def run(
        self,
        hidden_states: Tensor,
        experts: ExpertWeights,
        topk_weights: Tensor,
        topk_ids: Tensor,
        config: BackendConfig,
    ) -> Tensor:
        reference = ReferenceBackend(self.machine)
        out: Tensor = reference.run(hidden_states, experts, topk_weights, topk_ids, ReferenceConfig())
        return out


class Raising(Honest):
    name = "raising"

    def run(self, *_: object, **__: object) -> Tensor:
        raise RuntimeError("the launch failed\nwith a second line")


class Lying(Honest):
    """Returns wrong numbers; foreign, so its probe should find out."""

    name = "lying"
    needs_probe = True

    def run(self, *call: Any, **named: Any) -> Tensor:
        return super().run(*call, **named) * 1.5


class Greedy(Honest):
    """Runs out of memory above a number of tokens."""

    name = "greedy"
    most_tokens = 0

    def workspace_bytes(self, problem: MoEProblem, config: BackendConfig) -> int:
        return 1 << 24

    def run(self, hidden_states: Tensor, *others: Any) -> Tensor:
        if hidden_states.shape[0] > self.most_tokens:
            raise torch.OutOfMemoryError(f"tried to allocate for {hidden_states.shape[0]} tokens")
        return super().run(hidden_states, *others)


class Losing(Honest):
    name = "losing"

    def run(self, *_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Killing(Honest):
    """Kills the process, as a segmentation fault does."""

    name = "killing"

    def run(self, *_: object, **__: object) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class KillingInItsProbe(Killing):
    """Kills the process as soon as it is tried, which for foreign code is its probe."""

    needs_probe = True


@contextmanager
def registered(*backends: type[Backend], **targets: str) -> Iterator[None]:
    """Backends known for a while: classes under their own names, and names that are imported on first use."""
    named: dict[str, type[Backend] | str] = {**{one.name: one for one in backends}, **targets}
    try:
        for name, target in named.items():
            BACKENDS.register(name, target)
        yield
    finally:
        for name in named:
            BACKENDS.unregister(name)


@contextmanager
def registered_policy(policy: type[Policy]) -> Iterator[None]:
    POLICIES.register(policy.name, policy)
    try:
        yield
    finally:
        POLICIES.unregister(policy.name)


@contextmanager
def ranked(*backends: type[Backend] | str, ranking: Any = None) -> Iterator[None]:
    """Register fake backends and a policy ``fixed`` that ranks just these, in this order, or answers `ranking`."""
    names = [one if isinstance(one, str) else one.name for one in backends]

    class Fixed(Policy):
        name = "fixed"

        def rank(self, problem: MoEProblem) -> Any:
            in_order = tuple(Choice(name, f"number {place} of this test") for place, name in enumerate(names, 1))
            return in_order if ranking is None else ranking

    with registered(*(one for one in backends if not isinstance(one, str))), registered_policy(Fixed):
        yield
