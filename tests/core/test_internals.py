"""The private names of torch that a call depends on: there in the versions that were read, and not fatal where gone."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from moe_dispatch.dispatch import internals


@pytest.fixture
def reloaded() -> Iterator[None]:
    """Let a test reload the module over another torch, and load it over the real one again."""
    yield
    importlib.reload(internals)


def test_the_names_are_there() -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in internals.READ_IN:
        pytest.skip(f"torch {version} was not read; it has what the other tests here and in test_dispatcher need")
    assert callable(torch._C._is_any_autocast_enabled)
    assert callable(torch._C._dynamo.guards.TensorGuards)
    assert callable(torch._C._is_tracing)
    assert callable(torch._C._len_torch_dispatch_stack)
    assert callable(torch._C._SetExcludeDispatchKeyGuard)
    assert torch.version.cuda is None or callable(torch._C._cuda_isCurrentStreamCapturing)
    assert isinstance(forward_ad._current_level, int)
    assert vars(internals)["FakeTensor"] is not None


@pytest.mark.usefixtures("reloaded")
def test_without_them_the_public_questions_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as renamed:  # for a moment: torch itself reads both names
        renamed.delattr(torch._C, "_is_any_autocast_enabled")
        renamed.setattr(forward_ad, "_current_level", None)
        importlib.reload(internals)
    monkeypatch.setattr(internals, "FakeTensor", None)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert internals.kind_check([torch.ones(3)]) is None
    assert internals.any_autocast_enabled()
    plain = torch.ones(3)
    assert not internals.forward_mode_entered(plain, plain)
    assert not internals.is_fake(plain)
    with forward_ad.dual_level():
        assert not internals.forward_mode_entered(plain)
        assert internals.forward_mode_entered(plain, forward_ad.make_dual(plain, plain))
    with FakeTensorMode() as mode:
        assert internals.is_fake(mode.from_tensor(plain))


def test_with_them_the_private_ones_do() -> None:
    plain = torch.ones(3)
    assert not internals.forward_mode_entered(plain)
    with forward_ad.dual_level():
        assert internals.forward_mode_entered(plain)
    assert not internals.any_autocast_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert internals.any_autocast_enabled()
    fits = internals.kind_check([plain])
    assert fits is not None
    others = [
        plain.double(), plain.to("meta"), torch.nn.Parameter(plain), plain.clone().requires_grad_(),
        plain.expand(1, 3), torch.ones(6)[::2], torch.ones(1).expand(3),
    ]  # fmt: skip
    assert fits(torch.zeros(3))
    assert not any(map(fits, others))
    for state in (torch.inference_mode(), torch.autocast("cpu")):
        with state:
            assert not fits(plain)
    assert not torch.func.vmap(lambda row: torch.tensor(fits(row)))(torch.ones(2, 3)).any()
