"""What a thread has set torch to, and what a backend that runs on it has to leave as it was."""

from typing import Any

import torch


class KeptState:
    """This thread's settings, to compare with and to restore after foreign code.

    Those of the process, such as the default dtype and the random numbers, are left out: another thread may change them
    meanwhile.

    Args:
        device: The layer's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device
        self._values = self._now()

    def restore(self) -> str:
        """Undo what was changed.

        Returns:
            What had been changed, as words; empty if nothing had been.
        """
        now = self._now()
        if now == self._values:
            return ""
        changed = [name for name, value in self._values.items() if now[name] != value]
        values = iter(self._values.values())
        torch.set_grad_enabled(next(values))
        torch.set_autocast_enabled(self._on.type, next(values))
        default = next(values)
        torch.set_default_device(None)
        if torch.get_default_device() != default:  # else it was none, or is that of a `with` statement
            torch.set_default_device(default)
        if self._on.type == "cuda":
            torch.cuda.set_stream(next(values))
            torch.cuda.set_device(next(values))  # last: a stream brings its own
        return " and ".join(changed)

    def _now(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "whether gradients are recorded": torch.is_grad_enabled(),
            "whether autocast is enabled": torch.is_autocast_enabled(self._on.type),
            "the default device": torch.get_default_device(),
        }
        if self._on.type == "cuda":
            values["the current stream"] = torch.cuda.current_stream(self._on)
            values["the current GPU"] = torch.cuda.current_device()
        return values
