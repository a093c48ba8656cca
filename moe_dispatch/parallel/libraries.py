"""Exchanges of libraries as data alone: what each would need, and why it does not serve here, for `explain` to say.

Nothing calls the libraries. DeepEP's wheels are built for another torch, and NCCL EP needs a newer NCCL, than the two
GPUs had that this package was measured on, so that no call could be run once. A collective that was only read about may
hang every rank or bring wrong rows; a reason cannot.
"""

from typing import NoReturn

from moe_dispatch.parallel.exchange import Exchange, ExchangeRequirements


class LibraryExchange(Exchange):
    """Base of the exchanges below, none of which runs anything."""

    def unavailable_reasons(self) -> tuple[str, ...]:
        """See `Exchange.unavailable_reasons`."""
        uncalled = "no code calls it yet: no call of it could be run on the GPUs that this package was measured on"
        return (*super().unavailable_reasons(), uncalled)

    def dispatch(self, *_: object) -> NoReturn:
        """See `Exchange.dispatch`."""
        raise NotImplementedError("; ".join(self.unavailable_reasons()))

    def combine(self, *_: object) -> NoReturn:
        """See `Exchange.combine`."""
        self.dispatch()


class NcclEpExchange(LibraryExchange):
    """NCCL EP, NVIDIA's library on NCCL's device API; its flat layout delivers what `Exchange.dispatch` promises."""

    name = "nccl_ep"
    requirements = ExchangeRequirements(
        transports=frozenset({"nccl"}), tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}),
        act_dtypes=frozenset({"bf16"}), libraries=(("nccl-extensions", "0.1.0"),), nccl="2.30.7",
    )  # fmt: skip


class DeepEpExchange(LibraryExchange):
    """DeepEP, DeepSeek's kernels over NVLink and RDMA; its normal mode delivers what `Exchange.dispatch` promises."""

    name = "deep_ep"
    requirements = ExchangeRequirements(
        transports=frozenset({"nccl"}), tokens=frozenset({"sharded"}), divisions=frozenset({"experts"}),
        act_dtypes=frozenset({"bf16"}), libraries=(("sgl-deep-ep", "0.1.0"),), torch="2.13", capturable=False,
        host_sync=True,
    )  # fmt: skip
