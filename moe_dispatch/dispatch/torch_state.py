"""What a thread has set torch to, and what a backend that runs on it has to leave as it was."""

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class KeptState:
    """This thread's settings, to compare with and to restore after foreign code.

    Those of the process, such as the default dtype and the random numbers, are left out: another thread may change them
    meanwhile.

    Args:
        device: The layer's device.
    """

    def __init__(self, device: torch.device) -> None:
        # What reads each setting, and what sets it, in the order in which they are restored.
        self._settings: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
            "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
            "whether autocast is enabled": (
                functools.partial(torch.is_autocast_enabled, device.type),
                functools.partial(torch.set_autocast_enabled, device.type),
            ),
            "the default device": (torch.get_default_device, _set_default_device),
        }
        if device.type == "cuda":
            current_stream = functools.partial(torch.cuda.current_stream, device)
            self._settings["the current stream"] = (current_stream, torch.cuda.set_stream)
            # Last, as a stream brings its own.
            self._settings["the current GPU"] = (torch.cuda.current_device, torch.cuda.set_device)
        self._values = {name: read() for name, (read, _) in self._settings.items()}

    def restore(self) -> str:
        """Undo what was changed.

        Returns:
            What had been changed, as words; empty if nothing had been.
        """
        changed = [name for name, (read, _) in self._settings.items() if read() != self._values[name]]
        if changed:
            for name, (_, write) in self._settings.items():
                write(self._values[name])
        return " and ".join(changed)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None)
    if torch.get_default_device() != device:  # else it was none, or is that of a `with` statement
        torch.set_default_device(device)
