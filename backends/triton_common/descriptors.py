"""Tensor descriptors, kept by the memory that they describe.

A tensor descriptor, through which TMA loads blocks, holds an address, a shape, strides and the size of a block. To make
one and to encode it for the device costs the host about as much as a launch, so `Descriptors` keeps both. It keeps
them under the tensor's address, dtype and shape, not under the layer: a layer's memory can be replaced any time
(``weight.data = …``, which is what weight updates, sleep modes and ``module.cpu(); module.cuda()`` do), and the next
call then finds or makes another descriptor. Intermediates have theirs too: torch gives calls of a kind the same memory
again and again. What is kept holds no tensor, so memory that was replaced is freed.

Needs no Triton until a descriptor is made.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dispatch.backends.triton_common.features import interpreting
from moe_dispatch.backends.triton_common.stand_ins import Buffer
from moe_dispatch.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_dispatch.backends.triton_common.internals import Encoding
    from moe_dispatch.experts import ExpertWeights
    from moe_dispatch.problem import MoEProblem

# Descriptors kept by a backend, and encodings kept by a step of a replay; when full, all are dropped and made again.
MAX_DESCRIPTORS: Final = 4096
_KEPT: Final = "_moe_dispatch_kept"


class View(Protocol):
    """How a kernel sees a tensor; hashable. Descriptors of one view and dtype differ in address, shape and strides."""

    def describe(self, tensor: Tensor, /) -> Any:
        """A tensor descriptor of the tensor, which holds the tensor."""


class WeightView(NamedTuple):
    """How a kernel sees a weight.

    Attributes:
        shape: What the contiguous weight is viewed as.
        block: The blocks that are loaded, in the view's dimensions after they are swapped.
        swapped: Two dimensions of the view that change places, if any.
        transposed: Whether the weight is stored by columns, so that the view is one of ``weight.mT``.
        element: The dtype of the view, if another than the weight's.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    swapped: tuple[int, int] | None = None
    transposed: bool = False
    element: torch.dtype | None = None

    def describe(self, weight: Tensor) -> Any:
        """A tensor descriptor of the weight, which holds the weight.

        Raises:
            InvalidInputError: The weight's memory was freed, or replaced by some of another size or layout.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        memory, element = weight.mT if self.transposed else weight, self.element or weight.dtype
        elements = weight.numel() * weight.element_size() // element.itemsize
        if elements != math.prod(self.shape) or not memory.is_contiguous() or not _is_there(weight):
            layout = ".transpose(1, 2) of a contiguous tensor" if self.transposed else "contiguous"
            raise InvalidInputError(
                f"an expert weight was replaced after ExpertWeights checked it: it must be {layout} with "
                f"{math.prod(self.shape)} elements of {element}, got {list(weight.shape)} with strides "
                f"{list(weight.stride())}{'' if _is_there(weight) else ' and its memory is freed'}; wrap it in a new "
                "ExpertWeights"
            )
        view = memory.view(element).view(self.shape)
        view = view.transpose(*self.swapped) if self.swapped else view
        return TensorDescriptor.from_tensor(view, list(self.block))


def boxes_mix_gate_and_up(layer: "ExpertWeights | MoEProblem") -> bool:
    """Whether a box of gate_up's memory can hold as many gate rows as up rows, in an order that a product can read.

    Not where weights are stored by columns and each column has its gate rows first: the two runs of a box then lie
    within its innermost dimension, and no layout of shared memory that tensor cores read has them side by side.
    """
    return not layer.transposed or layer.interleaved or not layer.gated


def _is_there(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() >= (weight.storage_offset() + weight.numel()) * weight.element_size()


class Descriptors:
    """The tensor descriptors of a backend."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...], View], Any] = {}
        self._kinds: dict[tuple[torch.dtype, View], tuple[object, ...]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, tensor: Tensor, view: View) -> Any:
        """The descriptor of a tensor where it lies now; made if none is kept. Of a `Buffer` one is made every time.

        Raises:
            InvalidInputError: As `WeightView.describe`.
        """
        if interpreting():
            return view.describe(tensor)  # the interpreter reads the tensor itself
        if isinstance(tensor, Buffer):
            return self._keep(view.describe(tensor), tensor.dtype, view)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), view)
        descriptor = self._kept.get(key)
        if descriptor is None:
            descriptor = self._keep(view.describe(tensor), tensor.dtype, view)
            if len(self._kept) >= MAX_DESCRIPTORS:
                self._kept.clear()
            self._kept[key] = descriptor
        return descriptor

    def _keep(self, descriptor: Any, dtype: torch.dtype, view: View) -> Any:
        kind = self._kinds.get((dtype, view))
        if kind is None:
            kind = self._kinds[dtype, view] = _kind(descriptor)
        if not isinstance(descriptor.base, Buffer):
            descriptor.base = Memory(descriptor.base.data_ptr(), descriptor.base.dtype)
        setattr(descriptor, _KEPT, Kept(kind, {}))
        return descriptor


def _kind(descriptor: Any) -> tuple[object, ...]:
    fields = [field.name for field in dataclasses.fields(descriptor)]
    options = [repr(getattr(descriptor, name)) for name in fields if name not in ("base", "shape", "strides")]
    return type(descriptor), descriptor.base.dtype, len(descriptor.shape), *options


class Memory(NamedTuple):
    """What a kept descriptor has for a tensor: all that Triton asks of one, without the memory itself."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.address


def with_base(descriptor: Any, base: "Tensor | Memory") -> Any:
    """The same descriptor of other memory, without the checks of its class."""
    copy = object.__new__(type(descriptor))
    vars(copy).update(vars(descriptor), base=base)
    return copy


class Kept(NamedTuple):
    """What is kept on a tensor descriptor that will not change.

    Attributes:
        kind: All that a kernel's code may depend on: everything but address, shape and strides.
        encoded: By `Encoding.key`, the kernel's arguments for the descriptor.
    """

    kind: tuple[object, ...]
    encoded: dict[str, list[Any]]


def kept_on(argument: object) -> Kept | None:
    """What is kept on a kernel's argument; None if it is no descriptor of `Descriptors`."""
    kept: Kept | None = getattr(argument, _KEPT, None)
    return kept


def encoded(descriptor: Any, encoding: "Encoding") -> list[Any]:
    """The kernel's arguments for a descriptor of `Descriptors`, encoded once; see `internals.encode`."""
    kept: Kept = getattr(descriptor, _KEPT)
    arguments = kept.encoded.get(encoding.key)
    if arguments is None:
        from moe_dispatch.backends.triton_common.internals import encode

        arguments = kept.encoded[encoding.key] = encode(descriptor, encoding)
    return arguments
