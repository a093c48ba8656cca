"""Exchanges of libraries as data alone: what each would need, and why it does not serve here, for `explain` to say.

Nothing calls the libraries. DeepEP's wheels are built for another torch, and NCCL EP needs a newer NCCL, than the two
GPUs had that this package was measured on, so that no call could be run once. A collective that was only read about may
hang every rank or bring wrong rows; a reason cannot.
"""

from typing import ClassVar

from torch import Tensor
from torch import __version__ as torch_version

from moe_dispatch.parallel.agreement import library_versions
from moe_dispatch.parallel.exchange import Arrived, Exchange, ExchangeRequirements, LocalTokens
from moe_dispatch.system.libraries import library_version


class LibraryExchange(Exchange):
    """Base of the exchanges below, none of which runs anything.

    Attributes:
        distribution: Name of the library's distribution.
        release: The release whose interface was read.
        torch: The torch that its wheels are built for; empty where they do not depend on torch.
        nccl: The oldest NCCL that it takes.
    """

    distribution: ClassVar[str]
    release: ClassVar[str]
    torch: ClassVar[str] = ""
    nccl: ClassVar[str] = ""

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Exchange.unavailable_reasons`."""
        nccl = library_versions(self.collectives.device)["NCCL"]
        checks = (
            _lacks(f"{self.distribution} {self.release}", self.release, library_version(self.distribution)),
            self.torch and _lacks(f"torch {self.torch}, for which its wheels are built", self.torch, torch_version),
            f"needs NCCL {self.nccl}, got {nccl}" if nccl and _numbers(nccl) < _numbers(self.nccl) else "",
            "no code calls it yet: no call of it could be run on the GPUs that this package was measured on",
        )
        return (*super().unavailable_reasons(), *filter(None, checks))

    def dispatch(self, tokens: LocalTokens) -> Arrived:
        """See `Exchange.dispatch`."""
        raise NotImplementedError("; ".join(self.unavailable_reasons()))

    def combine(self, partial: Tensor, arrived: Arrived, tokens: LocalTokens) -> Tensor:
        """See `Exchange.combine`."""
        raise NotImplementedError("; ".join(self.unavailable_reasons()))


class NcclEpExchange(LibraryExchange):
    """NCCL EP, NVIDIA's library on NCCL's device API; its flat layout delivers what `Exchange.dispatch` promises."""

    name = "nccl_ep"
    requirements = ExchangeRequirements(
        transports=frozenset({"nccl"}), tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}), capacity=True,
        act_dtypes=frozenset({"bf16"}), libraries=("nccl-extensions",),
    )  # fmt: skip
    distribution, release, nccl = "nccl-extensions", "0.1.0", "2.30.7"


class DeepEpExchange(LibraryExchange):
    """DeepEP, DeepSeek's kernels over NVLink and RDMA; its normal mode delivers what `Exchange.dispatch` promises."""

    name = "deep_ep"
    requirements = ExchangeRequirements(
        transports=frozenset({"nccl"}), tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}),
        act_dtypes=frozenset({"bf16"}), libraries=("sgl-deep-ep",), capturable=False, host_sync=True,
    )  # fmt: skip
    distribution, release, torch = "sgl-deep-ep", "0.1.0", "2.13"


def _lacks(what: str, wanted: str, version: str) -> str:
    """Why a version is not of the wanted release; empty if it is."""
    fits = version.startswith(wanted) and not version[len(wanted) :][:1].isdigit()
    return "" if fits else f"needs {what}, got {version or 'none'}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
