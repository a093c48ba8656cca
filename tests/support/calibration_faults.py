"""Backends that fail, each in its own way and for real; the calibration's worker imports them from here."""

import itertools
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from moe_dispatch.backend import Requirements
from tests.support.fakes import Honest


class RightBackend(Honest):
    """The reference under another name."""

    name = "right"
    requirements = Requirements(dtypes={"fp32": (0, 0)}, act_dtypes=frozenset({"fp32"}), cpu=True)
    needs_probe = True

    def run(self, *call: Any, **named: Any) -> Tensor:
        return self.spoil(super().run(*call, **named))

    def spoil(self, out: Tensor) -> Tensor:
        """What this backend does to the right answer."""
        return out


class WrongBackend(RightBackend):
    name = "wrong"

    def spoil(self, out: Tensor) -> Tensor:
        return out * 1.5


class NanBackend(RightBackend):
    name = "nan"

    def spoil(self, out: Tensor) -> Tensor:
        out[0, 0] = torch.nan
        return out


class UnstableBackend(RightBackend):
    """No two of 97 runs in a row give the same bits. Of random factors this near to 1 every 84th pair is the same."""

    name = "unstable"
    runs = itertools.count()

    def spoil(self, out: Tensor) -> Tensor:
        return out * (1 + 1e-6 * (next(self.runs) % 97))


class RaisingBackend(RightBackend):
    name = "raising"

    def spoil(self, out: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")


class HangingBackend(RightBackend):
    name = "hanging"

    def spoil(self, out: Tensor) -> Tensor:
        time.sleep(3600)
        return out


class ExitingBackend(RightBackend):
    name = "exiting"

    def spoil(self, out: Tensor) -> Tensor:
        os._exit(7)


class KilledBackend(RightBackend):
    name = "killed"

    def spoil(self, out: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return out


class HungryBackend(RightBackend):
    name = "hungry"

    def spoil(self, out: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")


class LostContextBackend(RightBackend):
    name = "lost"

    def spoil(self, out: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
