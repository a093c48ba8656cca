# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Device functions of the kernels that carry tokens: copies of whole rows, and slots as they travel. Needs Triton."""

import triton
import triton.language as tl


@triton.jit
def moe_words(address):
    """An address that is a multiple of 16, as a pointer to 8-byte words: two of them are one access of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def moe_travelling_id(ids, E):
    """Ids in 32 bits. What lies outside 0…E-1 in 64 bits would not stay outside when cut, so it becomes -1."""
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)
