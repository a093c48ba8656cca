"""Fixtures of the tests of backends."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.stub_kernels import cpu_is_the_device


@pytest.fixture
def cpu_launches_stubs() -> Iterator[None]:
    """Stub kernels are launched on CPU tensors, and nothing is recorded for a gradient."""
    with cpu_is_the_device(), torch.no_grad():
        yield
