"""Packages of other projects that a test hides, or writes itself."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def forgotten(*roots: str) -> Iterator[None]:
    """Whatever this process has loaded of these packages is hidden, and what is loaded meanwhile is dropped."""

    def loaded() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in roots}

    hidden = loaded()
    for name in hidden:
        del sys.modules[name]
    yield
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(hidden)


def write_package(root: Path, name: str, init: str) -> None:
    """A package with this `__init__.py`, in empty ones."""
    package = root.joinpath(*name.split("."))
    package.mkdir(parents=True)
    for folder in package.relative_to(root).parents:
        root.joinpath(folder, "__init__.py").touch()
    package.joinpath("__init__.py").write_text(init)
