"""What several tests of benchmarks take."""

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file of rows, which is not there yet."""
    return tmp_path / "rows.jsonl"
