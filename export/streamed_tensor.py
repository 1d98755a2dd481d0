"""A weight as a graph holds it before it is written: where it comes from, its axes' order and its type, no values.

onnx_ir asks a tensor for its bytes when the model is saved, one after the other. This one fetches them from the checkpoint at that moment:
as a byte range of its file where type and order are as stored, otherwise in slabs that are turned and converted one by one. So the memory
of an export is one tensor of the checkpoint, whatever the model's size. Passes may turn (`transposed`) and convert (`as_type`) it for free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from agvas.weights import LazyTensor, check_finite, in_type

# What is converted at once.
SLAB_BYTES = 64 << 20
TYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
TORCH_TYPES = {kind: dtype for dtype, kind in TYPES.items()}


@dataclass(frozen=True)
class _View:
    """How the source's values are seen: axis i is the source's axis `order[i]`, in `dtype`."""

    source: LazyTensor
    order: tuple[int, ...]
    dtype: ir.DataType

    @property
    def as_stored(self) -> bool:
        return self.order == tuple(range(len(self.order))) and TYPES[self.source.dtype] == self.dtype


class StreamedTensor(ir.LazyTensor):  # type: ignore[misc]
    """A checkpoint's tensor in a graph. A float one is float32 to begin with, as the reference computes with it.

    Reading or writing it raises ValueError where its type does not hold its values, or where one is NaN or infinite.
    """

    def __init__(self, source: LazyTensor, name: str | None = None, view: _View | None = None) -> None:
        kind = ir.DataType.FLOAT if source.dtype.is_floating_point else TYPES[source.dtype]
        self.view = view or _View(source, tuple(range(len(source.shape))), kind)
        shape = ir.Shape([source.shape[axis] for axis in self.view.order])
        super().__init__(self._read, self.view.dtype, shape, name=name)

    def transposed(self, order: tuple[int, ...], name: str | None = None) -> StreamedTensor:
        """With axis i of the result axis `order[i]` of this one."""
        return StreamedTensor(self.view.source, name, replace(self.view, order=tuple(self.view.order[axis] for axis in order)))

    def as_type(self, dtype: ir.DataType, name: str | None = None) -> StreamedTensor:
        """In another float type; the values are rounded once, from what the checkpoint holds in float32."""
        return StreamedTensor(self.view.source, name, replace(self.view, dtype=dtype))

    def _read(self) -> ir.Tensor:
        return ir.Tensor(_array(self._converted(self._turned())), dtype=self.dtype, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes at the file's position, in slabs."""
        span = self.view.source.span
        if span is not None and self.view.as_stored:
            with open(span.file, "rb") as source:
                source.seek(span.offset)
                _copy(source, file, span.length, lambda block: self._check(torch.frombuffer(block, dtype=self.view.source.dtype)))
            return
        tensor = self._turned()
        rows = len(tensor) if tensor.ndim else 0
        step = max(1, SLAB_BYTES // max(1, math.prod(tensor.shape[1:]) * 4)) if rows else 1
        for first in range(0, rows, step):
            file.write(_array(self._converted(tensor[first : first + step])).tobytes())
        if not rows and tensor.numel():
            file.write(self.tobytes())

    def _turned(self) -> torch.Tensor:
        return self.view.source.read().permute(self.view.order)

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        self._check(tensor)
        return in_type(tensor, TORCH_TYPES[self.dtype], self._told).contiguous()

    def _check(self, tensor: torch.Tensor) -> None:
        if not self.view.source.constant:
            check_finite(tensor, self._told)

    @property
    def _told(self) -> str:
        return self.name or "a weight"


def _copy(source: BinaryIO, file: BinaryIO, length: int, check: Callable[[bytearray], None]) -> None:
    while length:
        block = bytearray(min(length, SLAB_BYTES))
        if source.readinto(block) != len(block):  # type: ignore[attr-defined]
            raise OSError(f"{source.name}: expected {length} more bytes, got the file's end; copy the checkpoint again")
        check(block)
        file.write(block)
        length -= len(block)
    # What was copied once is not read again: it need not crowd other files out of the system's cache.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
    return tensor.numpy()
