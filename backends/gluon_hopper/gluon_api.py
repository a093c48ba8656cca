"""What the kernels use of Gluon that has another name in another Triton. Imported by kernel modules only.

Read in Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0; `backend` refuses others. To admit the next Triton, compile the kernels
under it (tests/backends/test_gluon_compile.py), bridge here what changed, and raise `backend.LAST_TRITON`.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

try:
    from triton.experimental.gluon import aggregate  # since Triton 3.8
except ImportError:
    from triton.language.core import _aggregate as aggregate

__all__ = ["aggregate", "copy_async", "field", "reinterpret", "tma_load"]

# reinterpret(buf, dtype, shape, layout): shared memory seen as another tensor; since Triton 3.8 both must have the same
# number of bytes. Public since Triton 3.9.
if hasattr(gl.shared_memory_descriptor, "reinterpret"):
    reinterpret = gl.shared_memory_descriptor.reinterpret
else:
    reinterpret = gl.shared_memory_descriptor._reinterpret
# tma_load(descriptor, coordinates, barrier, buf, pred): copies a block into shared memory; the barrier counts it.
# Renamed in Triton 3.8.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# copy_async(buf, pointers, mask): each thread copies elements into shared memory. Renamed in Triton 3.8.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.constexpr_function  # type: ignore[untyped-decorator]  # Triton's
def field(value: Any) -> Any:
    """A value as a field of an aggregate holds it: what is known when the kernel is compiled becomes a constexpr."""
    return value if hasattr(value, "_flatten_ir") else gl.constexpr(value)
