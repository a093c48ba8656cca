"""The environment, read once per process."""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Final

from moe_dispatch.errors import InvalidInputError

DEFAULT_POLICIES: Final = ("calibrated", "shipped", "learned", "rules")
_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        backend: ``MOE_DISPATCH_BACKEND``: the backend of every call that names none; empty to choose.
        policies: ``MOE_DISPATCH_POLICY``: comma-separated names, asked in this order.
        disabled: ``MOE_DISPATCH_DISABLE``: comma-separated backends that are never chosen.
        log_level: ``MOE_DISPATCH_LOG_LEVEL`` of the logger ``moe_dispatch``; empty to leave it alone.
    """

    backend: str = ""
    policies: tuple[str, ...] = DEFAULT_POLICIES
    disabled: frozenset[str] = frozenset()
    log_level: str = ""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the four variables.

        Raises:
            InvalidInputError: The log level is none.
        """
        level = os.environ.get("MOE_DISPATCH_LOG_LEVEL", "").upper()
        if level and level not in _LEVELS:
            raise InvalidInputError(f"MOE_DISPATCH_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {level!r}")
        return cls(
            backend=os.environ.get("MOE_DISPATCH_BACKEND", "").strip(),
            policies=_names("MOE_DISPATCH_POLICY") or DEFAULT_POLICIES,
            disabled=frozenset(_names("MOE_DISPATCH_DISABLE")),
            log_level=level,
        )


@functools.cache
def settings() -> Settings:
    """The process's settings; the first call reads the environment and sets the log level."""
    found = Settings.from_environment()
    if found.log_level:
        logger = logging.getLogger("moe_dispatch")
        logger.setLevel(found.log_level)
        # Without any handler Python prints warnings at most, and the level would show nothing.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        handler.addFilter(lambda _: not logging.getLogger().handlers)  # a program that prints its log prints ours
        logger.addHandler(handler)
    return found


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())
