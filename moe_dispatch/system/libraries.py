"""Which optional libraries are installed, found without importing any of them."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path


def library_version(name: str) -> str:
    """The version of an optional library without importing it; empty where it is absent.

    `deep_gemm` may be a package of its own (from several wheels) or vLLM's copy.
    """
    if name == "deep_gemm":
        for distribution in ("sgl-deep-gemm", "deep-gemm"):
            if version := _distribution_version(distribution):
                return f"{version} ({distribution})"
        package = deep_gemm_package()
        return _declared_version(package) if package else ""
    return _distribution_version(name.replace("_", "-")) if importlib.util.find_spec(name) else ""


def deep_gemm_package() -> Path | None:
    """The folder of DeepGEMM: top-level, or vLLM's copy; found without importing either."""
    for name, inside in (("deep_gemm", "."), ("vllm", "third_party/deep_gemm")):
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            if (package := Path(location, inside)).joinpath("__init__.py").is_file():
                return package
    return None


def _declared_version(package: Path) -> str:
    found = re.search(
        r"^__version__ = ['\"]([^'\"]+)", (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found.group(1) if found else "unknown"


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
