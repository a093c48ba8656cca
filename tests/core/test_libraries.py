"""Which library is here, and which releases are known to work."""

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from moe_dispatch.machine import Machine
from moe_dispatch.system.libraries import (
    KNOWN_TO_WORK,
    Releases,
    install_hint,
    library_status,
    library_statuses,
    library_version,
    release_fault,
    unusable_wheel,
)
from moe_dispatch.system.version import installed_version


@pytest.mark.parametrize("releases", KNOWN_TO_WORK, ids=lambda releases: f"{releases.library} {releases.first}")
def test_a_range_covers_the_releases_that_tests_hold(releases: Releases) -> None:
    suffix = f" ({releases.wheel})" if releases.wheel else ""
    for version in (releases.first, releases.last, *releases.held_by):
        assert releases.covers(version + suffix)
    assert not releases.covers("0.0.1" + suffix)
    assert not releases.covers("99.0" + suffix)


@pytest.mark.parametrize(
    ("library", "installed", "torch", "fault", "remedy"),
    [
        ("vllm", "0.20.2", "2.11.0+cu130", "", "vllm==0.26.0"),
        ("vllm", "0.26.1", "2.11.0", "", "vllm==0.26.0"),
        ("vllm", "0.33.0", "2.11.0", "is built for torch 2.14, and this is torch 2.11", "vllm==0.26.0"),
        ("vllm", "0.27.0", "2.13.0+cpu", "", "vllm==0.32.0"),
        ("vllm", "0.32.1", "2.13.0", "", "vllm==0.32.0"),
        ("vllm", "0.29.0", "2.11.0", "is built for torch 2.13, and this is torch 2.11", "vllm==0.26.0"),
        ("vllm", "0.40.0", "2.14.1", "is not among the releases that are known to work", "vllm==0.33.0"),
        ("vllm", "", "2.14.1", "", "vllm==0.33.0"),
        ("vllm", "", "2.15.0", "", "vllm==0.33.0' 'torch==2.14.*"),
        ("vllm", "0.33.0", "2.15.0", "is built for torch 2.14, and this is torch 2.15", "vllm==0.33.0' 'torch==2.14.*"),
        ("deep_gemm", "0.2.5 (sgl-deep-gemm)", "2.15.0", "is built for", "sgl-deep-gemm==0.2.5' 'torch==2.14.*"),
        ("triton", "3.10.0", "2.16.0", "is not among", "triton==3.9.*' 'torch==2.15.*"),
        ("torch", "2.16.0", "2.16.0", "is not among", "torch==2.15.*"),
        ("deep_gemm", "0.1.3 (sgl-deep-gemm)", "2.11.0", "", "sgl-deep-gemm==0.1.3"),
        ("deep_gemm", "2.5.0", "2.11.0", "", "sgl-deep-gemm==0.1.3"),
        ("deep_gemm", "0.2.1 (sgl-deep-gemm)", "2.14.0", "is built for torch 2.13", "sgl-deep-gemm==0.2.5"),
        ("deep_gemm", "1.0.0 (deep-gemm)", "2.14.0", "is not among", "sgl-deep-gemm==0.2.5"),
        ("deep_gemm", "0.1.5 (sgl-deep-gemm)", "2.13.0", "is not among", "sgl-deep-gemm==0.2.1"),
        ("triton", "3.7.1", "2.13.0+cpu", "", "triton==3.7.*' 'torch==2.13.*"),
        ("triton", "3.9.0", "2.13.0", "is built for torch 2.15", "triton==3.7.*' 'torch==2.13.*"),
        ("transformers", "5.24.0", "2.15.0", "", "transformers>=5.17,<5.25"),
        ("transformers", "5.25.0", "2.15.0", "is not among", "transformers>=5.17,<5.25"),
    ],
)
def test_status(library: str, installed: str, torch: str, fault: str, remedy: str) -> None:
    status = library_status(library, installed, torch)
    assert fault in status.fault
    assert bool(status.fault) == bool(fault)
    assert status.remedy == f"pip install '{remedy}'"
    assert release_fault(library, installed, torch) == status.fault


def test_a_status_names_the_releases_for_this_torch_or_the_torches_there_are_releases_for() -> None:
    assert library_status("vllm", "", "2.11.0").known == "0.20.2 to 0.26"
    assert library_status("vllm", "", "2.15.0").known == (
        "0.20.2 to 0.26 (torch 2.11) or 0.27 to 0.32 (torch 2.13) or 0.33 (torch 2.14)"
    )
    assert library_status("deep_gemm", "", "2.14.0").known == "0.2.2 to 0.2.5 (sgl-deep-gemm) or 2.8.1"


def test_every_library_has_a_remedy_under_every_torch() -> None:
    for torch in ("2.11.0+cu130", "2.12.1", "2.13.0+cpu", "2.14.1", "2.15.0", "2.16.0"):
        for status in library_statuses({}, torch, ""):
            assert status.known != "none"
            assert status.remedy.startswith("pip install '"), status


def test_every_library_has_a_status() -> None:
    statuses = library_statuses({"vllm": "0.20.2"}, "2.11.0+cu130", "3.6.0")
    assert [status.library for status in statuses] == ["torch", "triton", "vllm", "deep_gemm", "transformers"]
    assert [status.installed for status in statuses][:4] == ["2.11.0+cu130", "3.6.0", "0.20.2", ""]


def test_hints_name_a_release_for_each_torch() -> None:
    assert install_hint("vllm") == (
        "pip install vllm==0.26.0 (torch 2.11) or vllm==0.32.0 (torch 2.13) or vllm==0.33.0 (torch 2.14)"
    )
    assert "vllm" not in install_hint("deep_gemm", "sgl-deep-gemm")


def test_only_wheels_with_the_abi_of_one_torch_must_not_be_loaded() -> None:
    assert unusable_wheel("vllm", "0.33.0", "2.11.0") == ""
    assert unusable_wheel("deep_gemm", "2.8.1", "2.11.0") == ""
    assert "pip install 'sgl-deep-gemm==0.1.3'" in unusable_wheel("deep_gemm", "0.2.5 (sgl-deep-gemm)", "2.11.0")


def unpack_wheel(root: Path, name: str, version: str, package: str) -> Path:
    """A package and its metadata, as pip or unzip leaves them."""
    folder = root / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "VERSION").write_text(f"{version}\n")
    info = root / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_the_version_is_that_of_the_package_that_an_import_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack_wheel(tmp_path / "wheel", "sgl-deep-gemm", "0.1.3", "deep_gemm")
    monkeypatch.syspath_prepend(str(tmp_path / "wheel"))
    assert library_version("deep_gemm") == "0.1.3 (sgl-deep-gemm)"
    other = tmp_path / "other" / "deep_gemm"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '2.5.0'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))  # the wheel's metadata is still there, further down
    assert library_version("deep_gemm") == "2.5.0"


@pytest.mark.parametrize("metadata", [None, "Name: triton\n"], ids=["empty folder", "no version"])
def test_what_a_failed_removal_left_is_passed_over(
    metadata: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = library_version("triton"), library_version("moe_dispatch"), Machine.inspect("cpu")
    for name in ("triton", "moe_dispatch", "sgl_deep_gemm"):
        left = tmp_path / f"{name}-1.0.dist-info"
        left.mkdir()
        if metadata is not None:
            (left / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (library_version("triton"), library_version("moe_dispatch"), Machine.inspect("cpu")) == known
    assert installed_version() == (known[1] or "unknown")
    unpack_wheel(tmp_path / "wheel", "sgl-deep-gemm", "0.1.3", "deep_gemm")
    monkeypatch.syspath_prepend(str(tmp_path / "wheel"))
    assert library_version("deep_gemm") == "0.1.3 (sgl-deep-gemm)"


def test_an_odd_package_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deep_gemm"
    package.mkdir()
    (package / "__init__.py").write_bytes(b"\xff\xfe\x00")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library_version("deep_gemm") == "unknown"
    numbered = tmp_path / "numbered" / "deep_gemm"
    numbered.mkdir(parents=True)
    (numbered / "__init__.py").touch()
    (numbered / "VERSION").write_text("0.3.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "numbered"))
    assert library_version("deep_gemm") == "0.3.0"
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))  # which has no __spec__
    assert library_version("vllm") == ""


def test_metadata_are_read_once_for_a_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run asks for versions, so each kind of call would pay for it."""
    unpack_wheel(tmp_path / "wheel", "sgl-deep-gemm", "0.1.3", "deep_gemm")
    monkeypatch.syspath_prepend(str(tmp_path / "wheel"))
    assert library_version("deep_gemm") == "0.1.3 (sgl-deep-gemm)"
    reads: list[str] = []
    monkeypatch.setattr(importlib.metadata, "distributions", reads.append)
    monkeypatch.setattr(importlib.util, "find_spec", reads.append)
    assert library_version("deep_gemm") == "0.1.3 (sgl-deep-gemm)"
    assert not reads
