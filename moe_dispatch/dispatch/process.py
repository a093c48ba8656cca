"""The process's dispatchers, one for each device, and their counts."""

import dataclasses
import os
import threading

import torch

from moe_dispatch.dispatch.counters import Counters
from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import current_machine, present_device
from moe_dispatch.registry import BACKENDS, POLICIES

_dispatchers: dict[torch.device | str | None, Dispatcher] = {}  # by complete torch.device
_dispatchers_lock = threading.Lock()


def get_dispatcher(device: torch.device | str | None = None) -> Dispatcher:
    """The process's dispatcher for a device: the current CUDA device if None, else the CPU."""
    try:
        return _dispatchers[device]
    except KeyError:
        return _make_dispatcher(device)


def _make_dispatcher(device: torch.device | str | None) -> Dispatcher:
    wanted = present_device(device)
    with _dispatchers_lock:
        known = _dispatchers.get(wanted)
        if known is None:
            known = _dispatchers[wanted] = Dispatcher(current_machine(wanted.type, wanted.index))
        return known


def reset_dispatchers() -> None:
    """Drop every plan, policy and in-process quarantine, as after a calibration or in a forked child."""
    with _dispatchers_lock:  # else one that is being made with what was known before would be kept
        _dispatchers.clear()


def stats() -> dict[str, dict[str, int]]:
    """How often each backend ran, fell back and was quarantined in this process, over all devices."""
    total = Counters()
    for dispatcher in list(_dispatchers.values()):
        for name, counted in dispatcher.stats().items():
            total.count(name, **dataclasses.asdict(counted))
    return {name: dataclasses.asdict(summed) for name, summed in total.counts().items()}


def _after_fork_in_child() -> None:
    global _dispatchers_lock
    # Another thread of the parent may have held these locks at the fork. The child has no thread to release them.
    _dispatchers_lock = threading.Lock()
    for registry in (BACKENDS, POLICIES):
        registry.renew_lock()
    reset_dispatchers()


os.register_at_fork(after_in_child=_after_fork_in_child)
