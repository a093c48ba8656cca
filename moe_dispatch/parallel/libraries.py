"""Exchanges of libraries that are not adapted here yet. Each says why, so that `explain` lists it with its reason."""

from torch import Tensor

from moe_dispatch.parallel.exchange import Arrived, Exchange, ExchangeRequirements, LocalTokens
from moe_dispatch.system.libraries import library_version


class LibraryExchange(Exchange):
    """Base of the exchanges below, none of which runs anything.

    Attributes:
        distribution: Name of the library's distribution.
        lacking: What speaks against it where the library is installed.
    """

    distribution: str
    lacking: str

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Exchange.unavailable_reasons`."""
        version = library_version(self.distribution)
        missing = f"{self.distribution} {version}: {self.lacking}" if version else f"needs {self.distribution}"
        return (*super().unavailable_reasons(), missing)

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
    distribution = "nccl-extensions"
    lacking = "an adapter for it has not been written; it has to be measured on two GPUs first"


class DeepEpExchange(LibraryExchange):
    """DeepEP, DeepSeek's kernels over NVLink and RDMA; its normal mode delivers what `Exchange.dispatch` promises."""

    name = "deep_ep"
    requirements = ExchangeRequirements(
        transports=frozenset({"nccl"}), tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}),
        act_dtypes=frozenset({"bf16"}), libraries=("sgl-deep-ep",), capturable=False, host_sync=True,
    )  # fmt: skip
    distribution = "sgl-deep-ep"
    lacking = "an adapter for it has not been written; no wheel of it is built for torch 2.11 or 2.12"
