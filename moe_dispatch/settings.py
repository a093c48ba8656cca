"""The environment variables of this package: one table, read in one place."""

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_dispatch.errors import InvalidInputError
from moe_dispatch.system.files import private_temporary_folder

# Every variable that this package reads, with the text that `moe-dispatch doctor` and the README print.
VARIABLES: Final[Mapping[str, str]] = {
    "MOE_DISPATCH_BACKEND": "the backend of every call that names none",
    "MOE_DISPATCH_POLICY": "the policies to use, comma-separated, in order of precedence",
    "MOE_DISPATCH_MINIMIZE": "`time` (default) or `energy`: what measured backends are ranked by",
    "MOE_DISPATCH_DISABLE": "backends that are never chosen, comma-separated",
    "MOE_DISPATCH_MACHINE": "a shipped machine (`h200`) or a JSON file that replaces what is seen of this machine",
    "MOE_DISPATCH_CACHE_DIR": "the absolute path under which calibrations and the quarantine are kept",
    "MOE_DISPATCH_CALIBRATION_PATH": "files and folders of calibrations that are only read, separated by `:`",
    "MOE_DISPATCH_LOG_LEVEL": "the level of the logger `moe_dispatch`",
    "MOE_DISPATCH_VLLM": "`1` gives the expert layers of a vLLM engine to `moe_forward`",
    "MOE_DISPATCH_SGLANG": "`1` gives the expert layers of an SGLang engine to `moe_forward`",
    "MOE_DISPATCH_COMMIT": "the commit that measurements record, where no git checkout tells it",
}
DEFAULT_POLICIES: Final = ("calibrated", "shipped", "learned", "rules")
_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables in `VARIABLES`; one that is not set leaves the default below."""

    backend: str = ""
    policies: tuple[str, ...] = DEFAULT_POLICIES
    minimize: str = "time"
    disabled: frozenset[str] = frozenset()
    machine: str = ""
    cache_dir: Path | None = None
    calibration_path: tuple[Path, ...] = ()
    log_level: str = ""
    vllm: bool = False
    sglang: bool = False
    commit: str = ""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the variables.

        Raises:
            InvalidInputError: The log level or what to minimise is unknown, or a path is relative.
        """
        minimize = _text("MINIMIZE").lower() or "time"
        if minimize not in ("time", "energy"):
            raise InvalidInputError(f"MOE_DISPATCH_MINIMIZE must be time or energy, got {minimize!r}")
        level = _text("LOG_LEVEL").upper()
        if level and level not in _LEVELS:
            raise InvalidInputError(f"MOE_DISPATCH_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {level!r}")
        return cls(
            backend=_text("BACKEND"),
            policies=_names("POLICY") or DEFAULT_POLICIES,
            minimize=minimize,
            disabled=frozenset(_names("DISABLE")),
            machine=_text("MACHINE"),
            cache_dir=_path("CACHE_DIR", _text("CACHE_DIR")) if _text("CACHE_DIR") else None,
            calibration_path=tuple(
                _path("CALIBRATION_PATH", text) for text in _text("CALIBRATION_PATH").split(os.pathsep) if text.strip()
            ),
            log_level=level,
            vllm=_is_on("VLLM"),
            sglang=_is_on("SGLANG"),
            commit=_text("COMMIT"),
        )


def _is_on(name: str) -> bool:
    return _text(name).lower() not in ("", "0", "false", "no", "off")


def set_variables() -> dict[str, str]:
    """The variables that are set, with their values."""
    return {name: value for name in VARIABLES if (value := os.environ.get(name))}


def variables_table() -> str:
    """The variables as the Markdown table of the README."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    return "\n".join(["| Variable | Meaning |", "|---|---|", *rows])


@functools.cache
def settings() -> Settings:
    """The process's settings; the first call reads the environment and sets the log level."""
    read = Settings.from_environment()
    if read.log_level:
        logger = logging.getLogger("moe_dispatch")
        logger.setLevel(read.log_level)
        # Without any handler Python prints warnings at most, and the level would show nothing.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        # A program that has configured the root logger prints our records already.
        handler.addFilter(lambda _: not logging.getLogger().handlers)
        logger.addHandler(handler)
    return read


def cache_dir() -> Path:
    """``MOE_DISPATCH_CACHE_DIR``, else ``$XDG_CACHE_HOME/moe_dispatch``, else ``~/.cache/moe_dispatch``.

    A user without a home directory gets a private folder in the system's temporary directory. The folder need not
    exist and may not be usable; reading and writing deal with that.

    Raises:
        InvalidInputError: ``MOE_DISPATCH_CACHE_DIR`` is a relative path.
    """
    if named := Settings.from_environment().cache_dir:
        return named
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG specification has relative paths ignored
        return base / "moe_dispatch"
    try:
        home = Path.home()
    except RuntimeError:  # a container's user may have no home
        return private_temporary_folder()
    # A relative one, as by HOME=., would be another folder in each working directory.
    return home / ".cache" / "moe_dispatch" if home.is_absolute() else private_temporary_folder()


def calibration_search_path() -> tuple[Path, ...]:
    """``MOE_DISPATCH_CALIBRATION_PATH``: files (see `is_file_name`) and folders; none of them need exist.

    Raises:
        InvalidInputError: An entry is a relative path.
    """
    return Settings.from_environment().calibration_path


def is_file_name(entry: Path) -> bool:
    """Whether an entry of `calibration_search_path` names a file, by its ending; others name folders."""
    return entry.name.endswith((".json", ".json.xz"))


def _text(variable: str) -> str:
    return os.environ.get(f"MOE_DISPATCH_{variable}", "").strip()


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in _text(variable).split(",") if name.strip())


def _path(variable: str, text: str) -> Path:
    try:
        path = Path(text.strip()).expanduser()
    except RuntimeError as error:
        raise InvalidInputError(f"MOE_DISPATCH_{variable}={text} cannot be expanded: {error}") from error
    if not path.is_absolute():
        raise InvalidInputError(
            f"MOE_DISPATCH_{variable} must be an absolute path, got {text!r}: a relative one would name another folder "
            "in each working directory"
        )
    return path
