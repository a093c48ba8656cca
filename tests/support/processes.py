"""Child processes of a test that have every module imported already."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch

_CONTEXT = multiprocessing.get_context("fork")


def start_child(run: Callable[..., object], *arguments: object) -> BaseProcess:
    """Run a function, without gradients, in a fork of this process."""
    child = _CONTEXT.Process(target=_without_threads, args=(run, *arguments))
    child.start()
    return child


def exit_code(child: BaseProcess) -> int | None:
    """How a child ends.

    Returns:
        0 where its function returns, 1 where it raises, and the negative number of the signal that ends the process;
        None where it does not end within a minute.
    """
    child.join(60)
    code = child.exitcode
    child.kill()
    return code


def _without_threads(run: Callable[..., object], *arguments: object) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with torch.no_grad():
        run(*arguments)
