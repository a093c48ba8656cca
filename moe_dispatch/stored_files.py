"""Files that any version of this package may have written: damaged ones are refused, newer ones are left to theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pydantic

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.system import compression, files

Stored = TypeVar("Stored", bound=pydantic.BaseModel)


class NewerFileError(PolicyFileError):
    """A file that a newer version of this package wrote. It is not used, and not replaced."""


def read_bytes(path: Path, anew: str = "delete it") -> bytes:
    """The content of a file, which is compressed if its name ends with .xz; `anew` as for `parsed`.

    Raises:
        FileNotFoundError: There is no such file.
        PolicyFileError: It is not a regular file, too large, or not readable.
    """
    try:
        return compression.read_bytes(path, limit=files.MAX_BYTES)
    except ValueError as error:
        raise PolicyFileError(f"{path} is damaged: {error}; {anew}") from error
    except FileNotFoundError:
        raise
    except files.UnusableFileError as error:
        raise PolicyFileError(f"{path} cannot be used: {error.strerror}; {anew}") from error
    except OSError as error:
        raise PolicyFileError(f"{path} cannot be read: {error.strerror}; make it readable, or {anew}") from error


def parsed(kind: type[Stored], content: bytes, origin: str, schema: int, anew: str) -> Stored:
    """Check a file's content.

    Args:
        kind: What the file holds, with a field ``schema_version``.
        content: JSON.
        origin: Where it comes from, for messages.
        schema: The schema version that this version of the package reads.
        anew: What to do where it is damaged, for messages.

    Raises:
        NewerFileError: It is of a later schema.
        PolicyFileError: It is damaged or of an earlier schema; the message says what is wrong where.
    """
    try:
        return kind.model_validate_json(content)
    except pydantic.ValidationError as error:
        raise _refusal(origin, error, schema, anew) from error


def _refusal(origin: str, error: pydantic.ValidationError, schema: int, anew: str) -> PolicyFileError:
    """The first thing that is wrong with a file, and how to make it anew if that is damage."""
    first = error.errors(include_url=False, include_input=True)[0]
    where = ".".join(map(str, first["loc"]))
    if where != "schema_version":
        return PolicyFileError(f"{origin} is damaged: {where + ': ' if where else ''}{first['msg'][:300]}; {anew}")
    version = first["input"]
    read = f"{origin} has schema version {str(version)[:40]} and this version of moe_dispatch reads {schema}"
    if isinstance(version, int) and version > schema:
        return NewerFileError(
            f"{read}; it is left to the newer version that wrote it. Use that one, or set MOE_DISPATCH_CACHE_DIR to a "
            "folder of this one's"
        )
    return PolicyFileError(f"{read}; {anew}")


def require_older(path: Path, parse: Callable[[bytes, str], object]) -> None:
    """Refuse to replace a file that a newer version of this package wrote.

    Raises:
        NewerFileError: It is one.
    """
    try:
        parse(read_bytes(path), str(path))
    except NewerFileError:
        raise
    except (FileNotFoundError, PolicyFileError):
        return
