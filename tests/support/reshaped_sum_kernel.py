# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A sum of a reshaped tensor that Triton 3.6 computes wrongly with eight warps: see `misplaced_reduction`."""

import triton
import triton.language as tl


@triton.jit
def _moe_reshaped_sum_kernel(values_ptr, out_ptr):
    offs = tl.arange(0, 8)[:, None, None] * 1024 + tl.arange(0, 2)[None, :, None] * 512 + tl.arange(0, 512)[None, None]
    values = tl.load(values_ptr + offs).to(tl.float32)
    sums = tl.permute(tl.sum(tl.reshape(values, [8, 2, 64, 8]), axis=3), (1, 0, 2))
    tl.store(out_ptr + tl.arange(0, 2), tl.sum(tl.reshape(sums, [2, 512]), axis=1))
