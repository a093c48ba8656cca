"""What several tests of the core take."""

import pytest

from tests.core.test_dispatcher import Call, make_call


@pytest.fixture
def call() -> Call:
    return make_call(6)
