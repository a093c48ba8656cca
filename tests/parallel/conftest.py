"""Ranks that the tests of a module share."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks, ranks


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(3, tmp_path_factory.mktemp("three")) as started:
        yield started
