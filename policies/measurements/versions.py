"""Which versions a measurement depends on, and which changes retire it."""

from collections.abc import Mapping

from moe_dispatch.backend import Backend


def relevant_versions(backend: Backend) -> dict[str, str]:
    """Versions that a measurement of `backend` depends on: driver, CUDA and torch of its machine, and its own."""
    machine = backend.machine
    return {"driver": machine.driver, "cuda": machine.cuda, "torch": machine.torch, **backend.measured_versions()}


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Each version that differs, as ``"torch 2.11.0 -> 2.13.0"``; empty if the measurement still holds."""
    names = [*then, *(name for name in now if name not in then)]
    return tuple(
        f"{name} {then.get(name) or 'none'} -> {now.get(name) or 'none'}"
        for name in names
        if then.get(name, "") != now.get(name, "")
    )
