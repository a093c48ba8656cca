"""Tokens and results stored directly in the memory of the other ranks, each way one kernel.

Every rank has memory of one layout that all ranks of the group can address:

    flags of tokens, results, rows | counts | tokens: rows, ids, weights, multipliers | results of each rank

`push_tokens` stores this rank's tokens in everyone's part for them, and `push_results` each rank's results in that
rank's part for this one. Both then set flags and wait for those of the others, program by program (`push_kernel`).
Where there are many tokens, one kernel sends ids and weights and another one the rows, on a second stream. The experts'
stream waits for that stream before `push_results`: what is said of tokens below holds for both kernels.

**Why one copy of each part is enough.** On every rank the kernels of a call run one after the other on one stream:
tokens, experts, results. A kernel sets flags before it waits, and ends only when all flags of its epoch have come.

- *Tokens* of a rank are overwritten by the next call of another rank. That rank begins it after its `push_results`,
  which ended only when this rank's had begun: after this rank's experts, which read the tokens.
- *Results* of a rank are overwritten by another rank's `push_results` of the next call, or by its experts before that.
  These begin after that rank's `push_tokens`, which ended only when this rank's of that call had begun: after this
  rank's `push_results` of the call before, which read them.
- *Counts* are overwritten with the tokens and read by `push_results` before it sets a flag.

For this the two parts have places that no call's shape moves: a rank may still read results of one call while another
stores tokens of the next. Flags only grow: each program counts its epochs in this rank's own memory, so that a replayed
CUDA graph needs nothing of the host, and a flag is at least the epoch that is waited for or has not come. All ranks
launch the same kernels in the same order with as many programs, for these follow from what is equal on all ranks.

**A rank that does not come.** Each program looks at a flag a limited number of times, and then notes the rank: in this
rank's memory, so that no later kernel waits, and in memory of the host. Results are NaN from then on, also those that
it stores for the others, as one that comes late finds all flags set. Nothing traps: a lost CUDA context would also take
what else the process does on the device, and could not say which rank is missing. Looks are counted, not nanoseconds,
so that the interpreter runs the same code.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from moe_dispatch.arrived_rows import PeerRows, TravellingRows
from moe_dispatch.backends.exchange.pack import WORD, aligned
from moe_dispatch.backends.triton_common.launch_options import pdl_option
from moe_dispatch.numerics import FP8, QuantizedRows
from moe_dispatch.problem import QUANT_BLOCK

FLAGS: Final = 128  # of each rank, and so the most programs of a kernel
LOOKS_PER_SECOND: Final = (
    2_000_000  # at a flag; a look takes an H200 0.4 to 0.8 µs, so that waits last longer than said
)
ROWS_ASIDE: Final = 8 << 20  # bytes of a rank's rows, which NVLink 4 carries in 25 µs
_ALIGNMENT: Final = 128
_Widths = tuple[tuple[int, torch.dtype], ...]  # columns and dtype of each thing that a token has
_WORD_LIMIT: Final = 1 << 16  # up to so many words programs take 4 KiB at a time, to be more


def tokens_bytes(ranks: int, capacity: int, topk: int, row_bytes: int, groups: int) -> int:
    """Bytes of the part for tokens.

    Args:
        ranks: Ranks of the group.
        capacity: Greatest M of any rank.
        topk: Experts per token.
        row_bytes: Bytes of a row as it travels, its multipliers not counted.
        groups: fp32 multipliers of a row; 0 where rows are not quantised.
    """
    rows = ranks * capacity
    return _rounded(rows * row_bytes) + 2 * _rounded(rows * topk * 4) + _rounded(rows * groups * 4)


def results_bytes(ranks: int, capacity: int, row_bytes: int) -> int:
    """Bytes of the part for results."""
    return _rounded(ranks * capacity * row_bytes)


def header_bytes(ranks: int) -> int:
    """Bytes of flags and counts, which are zero at first."""
    return _rounded(3 * ranks * FLAGS * 8) + _rounded(ranks * 8)


class PeerMemory:
    """One rank's view of the memory of all ranks.

    Args:
        own: This rank's, as bytes: header, tokens, results.
        addresses: For each rank the address of its memory as this one reaches it, multiples of 16.
        rank: This process's rank.
        tokens_bytes: Bytes of the part for tokens; equal on all ranks.
        programs: Most programs of a kernel: no more than run on the device at a time. Equal on all ranks.
        on_host: int64 ``[1]``, zero, in memory that the host reads without waiting and the device can write.
        pdl: Whether kernels may be programmatic dependents of those before (sm_90 and newer).
        aside: The stream for rows of many tokens; None where there are no streams.
    """

    def __init__(
        self, own: Tensor, addresses: Sequence[int], rank: int, tokens_bytes: int, programs: int, on_host: Tensor,
        *, pdl: bool, aside: torch.cuda.Stream | None,
    ) -> None:  # fmt: skip
        ranks, device = len(addresses), own.device
        self.own, self._rank, self._ranks, self._on_host = own, rank, ranks, on_host
        self._programs = min(programs, FLAGS)
        self._pdl = pdl
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._epochs = torch.zeros(3, FLAGS, dtype=torch.int64, device=device).unbind()
        self._lost = torch.zeros(1, dtype=torch.int64, device=device)
        self._flags = [which * ranks * FLAGS * 8 for which in range(3)]
        self._counts = _rounded(3 * ranks * FLAGS * 8)
        self._aside = aside
        self._tokens = header_bytes(ranks)
        self._results = self._tokens + tokens_bytes
        self._views: dict[tuple[object, ...], list[Tensor]] = {}
        self._peer_rows: dict[tuple[object, ...], PeerRows] = {}

    @property
    def lost_rank(self) -> int | None:
        """A rank that a kernel waited for in vain; None while all came. Does not wait for the device."""
        place = int(self._on_host.item())
        return place - 1 if place else None

    def push_tokens(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, capacity: int, first_experts: Tensor,
        E: int, seconds: float, quantize: bool = False,
    ) -> tuple[Tensor | QuantizedRows | TravellingRows, Tensor, Tensor]:  # fmt: skip
        """Give this rank's tokens to every rank, and get those of all.

        Args:
            hidden_states: ``[M, K]``, contiguous; rows are multiples of 16 bytes.
            topk_weights: ``[M, topk]``, contiguous, any float dtype.
            topk_ids: int32 or int64 ``[M, topk]``, contiguous, global; those outside 0…E-1 arrive as -1.
            capacity: Greatest M of any rank.
            first_experts: int32 ``[ranks]``: the global id of each rank's first expert.
            E: Experts of the whole layer.
            seconds: How long to wait for the others.
            quantize: Whether to send e4m3 codes with one fp32 multiplier per 128 columns instead of rows as they are; K
                is a multiple of 128 then.

        Returns:
            Rows ``[ranks·capacity, K]``, fp32 weights and int32 ids ``[ranks·capacity, topk]``, in this object's memory
            until the next call. Ids are numbered from this rank's first expert, and negative or too great where the
            expert is elsewhere. Rows beyond a rank's tokens hold anything; their ids are -1. Where those of a rank are
            `ROWS_ASIDE` bytes or more, they may still be on their way.
        """
        from moe_dispatch.backends.exchange.push_kernel import _moe_push_tokens_kernel

        (M, K), topk = hidden_states.shape, topk_ids.shape[1]
        dtype = FP8 if quantize else hidden_states.dtype
        widths = (K, dtype), (topk, torch.int32), (topk, torch.float32), (quantize * K // QUANT_BLOCK, torch.float32)
        places = self._places(capacity, widths)
        row_bytes = K * dtype.itemsize
        hidden_states = aligned(hidden_states)

        def launch(which: int, block: int, programs: int, *, slots: bool, rows: bool, pdl: bool) -> None:
            _moe_push_tokens_kernel[(programs,)](
                # inputs
                hidden_states, topk_weights, topk_ids, first_experts,
                # the memory of all ranks
                self._addresses, self._epochs[which], self._lost, self._on_host.data_ptr(),
                # shapes
                M, capacity, row_bytes // WORD, topk, E, self._rank, self._flags[which], self._counts, *places,
                _looks(seconds),
                # constants
                RANKS=self._ranks, PROGRAMS=FLAGS, BLOCK=block, SLOTS=slots, ROWS=rows, QUANTIZE=quantize, PDL=pdl,
                num_warps=8 if block == 512 else 16, **pdl_option(pdl),
            )  # fmt: skip

        block, programs = self._launch(capacity, row_bytes)
        codes, ids, weights, scale = self._arrived(capacity, widths, places)
        arrived = QuantizedRows(codes, scale, hidden_states.dtype) if quantize else codes
        if capacity * row_bytes < ROWS_ASIDE:
            launch(0, block, programs, slots=True, rows=True, pdl=self._pdl)
            return arrived, weights, ids
        launch(0, 512, min(self._programs, math.ceil(capacity * topk / 512)), slots=True, rows=False, pdl=self._pdl)
        event, captured = None, False
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream(self.own.device))
            with torch.cuda.stream(self._aside):
                launch(2, block, programs, slots=False, rows=True, pdl=False)
                event, captured = self._aside.record_event(), torch.cuda.is_current_stream_capturing()
        else:
            launch(2, block, programs, slots=False, rows=True, pdl=False)
        return TravellingRows(arrived, hidden_states, self._rank * capacity, event, captured), weights, ids

    def peer_rows(self, capacity: int, K: int, dtype: torch.dtype) -> PeerRows:
        """Where this rank's results belong on every rank: to be stored between `push_tokens` and `push_results`.

        Args:
            capacity: Greatest M of any rank.
            K: Columns.
            dtype: Of the results.
        """
        key = (capacity, K, dtype)
        if key not in self._peer_rows:
            offset = self._results + self._rank * capacity * K * dtype.itemsize
            like = torch.empty(1, dtype=dtype, device=self.own.device)
            self._peer_rows[key] = PeerRows(self._addresses, offset, capacity, like)
        return self._peer_rows[key]

    def push_results(
        self, partial: Tensor | PeerRows, M: int, K: int, *, capacity: int, seconds: float
    ) -> Tensor:  # fmt: skip
        """Give every rank its results, and add up those for this one.

        Args:
            partial: ``[ranks·capacity, K]``, contiguous: this rank's sums for the rows that `push_tokens` returned; or
                what `peer_rows` returned, where they were stored.
            M: This rank's tokens.
            K: Columns.
            capacity: Greatest M of any rank.
            seconds: How long to wait for the others.

        Returns:
            ``[M, K]`` in partial's dtype: the sum over ranks in fp32, in the order of ranks; NaN if a rank is lost.
        """
        from moe_dispatch.backends.exchange.push_kernel import _moe_push_results_kernel

        stored = isinstance(partial, PeerRows)
        values = partial.like if isinstance(partial, PeerRows) else partial
        row_bytes = K * values.element_size()
        out = values.new_empty(M, K)
        block, programs = self._launch(capacity, row_bytes)
        _moe_push_results_kernel[(programs,)](
            # inputs
            values,
            # outputs
            out,
            # the memory of all ranks
            self._addresses, self._epochs[1], self._lost, self._on_host.data_ptr(),
            # shapes
            M, capacity, row_bytes // WORD, self._rank, self._flags[1], self._counts, self._results, _looks(seconds),
            # constants
            RANKS=self._ranks, PROGRAMS=FLAGS, BLOCK=block, PER_WORD=WORD // values.element_size(), STORED=stored,
            PDL=self._pdl, num_warps=8 if block == 512 else 16, **pdl_option(self._pdl),
        )  # fmt: skip
        return out

    def _launch(self, capacity: int, row_bytes: int) -> tuple[int, int]:
        """Words that a program takes at a time, and the number of programs: equal on all ranks."""
        words = capacity * row_bytes // WORD
        block = 512 if words <= _WORD_LIMIT else 2048
        return block, max(1, min(self._programs, math.ceil(words / block)))

    def _places(self, capacity: int, widths: _Widths) -> list[int]:
        """Where rows, ids, weights and multipliers begin."""
        places = [self._tokens]
        for width, dtype in widths:
            places.append(places[-1] + _rounded(self._ranks * capacity * width * dtype.itemsize))
        if (end := places.pop()) > self._results:
            raise ValueError(f"{capacity} tokens take {end - self._tokens} of {self._results - self._tokens} bytes")
        return places

    def _arrived(self, capacity: int, widths: _Widths, places: list[int]) -> list[Tensor]:
        key = (capacity, widths)
        if key not in self._views:
            rows = self._ranks * capacity
            self._views[key] = [
                self.own[place : place + rows * width * dtype.itemsize].view(dtype).view(rows, width)
                for place, (width, dtype) in zip(places, widths, strict=True)
            ]
        return self._views[key]


def _looks(seconds: float) -> int:
    return min(int(seconds * LOOKS_PER_SECOND), (1 << 31) - 1)


def _rounded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
