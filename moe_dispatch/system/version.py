"""The versions of this package and of others, from the metadata of installed distributions."""

import contextlib
import importlib.metadata
from collections.abc import Iterator


def installed_version() -> str:
    """The version of this package that pip installed; ``"unknown"`` for sources that run without being installed."""
    return distribution_version("moe-dispatch") or "unknown"


def distribution_version(name: str) -> str:
    """The version of an installed distribution; empty if there is none."""
    return next((version for _, version in distributions(name)), "")


def distributions(name: str) -> Iterator[tuple[importlib.metadata.Distribution, str]]:
    """The installed distributions of a name with their versions, in the order of the search path.

    A removal that failed leaves a folder ``NAME-….dist-info`` without metadata, which is passed over.
    """
    for distribution in importlib.metadata.distributions(name=name):
        version = None
        with contextlib.suppress(Exception):  # which one differs between releases of Python
            version = distribution.version
        if version:
            yield distribution, version
