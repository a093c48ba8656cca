"""Work on a second CUDA stream beside the current one."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_streams = threading.local()


@contextlib.contextmanager
def forked(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A second stream that begins after all work of the current one, which at the end of the block waits for it.

    Launch on it under ``torch.cuda.stream(…)``. In a CUDA graph's capture the two waits make a branch of the graph. The
    current stream waits after an exception too: what it frees may be in use on the other.

    A tensor that the branch hands out must be allocated outside of it. The caching allocator gives memory back to the
    stream that it was allocated for, and that one alone is ordered after the join. What is allocated inside must stay
    inside.

    Args:
        device: A CUDA device.
    """
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        yield side
    finally:
        current.wait_stream(side)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The second stream of this thread: with one of the process, a thread's launches would join another's capture."""
    streams: dict[int, torch.cuda.Stream] = _streams.__dict__.setdefault("by_device", {})
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in streams:
        streams[index] = torch.cuda.Stream(device)
    return streams[index]
