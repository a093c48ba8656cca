"""The version of this package, from the metadata of the installed distribution."""

import importlib.metadata


def installed_version() -> str:
    """The version that pip installed; ``"unknown"`` for sources that run without being installed."""
    try:
        return importlib.metadata.version("moe-dispatch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
