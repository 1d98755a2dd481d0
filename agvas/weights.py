"""A checkpoint's tensors without their memory: name, shape and dtype at once, values when they are read.

Layouts differ in where a tensor lies and what has to be done to it (renamed, sliced, a LoRA added); whoever loads or exports sees a
mapping of the model's own names to `LazyTensor` all the same. A tensor that is stored just as the model wants it says where its bytes
are, so that a graph can point at them; nothing is cached, and one tensor is in memory as long as its reader holds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# safetensors' names, of those that a model's weights come in
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie: row-major, little-endian, nothing between them."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint.

    Attributes:
        read: its values, in `shape` and `dtype`, new at every call.
        span: where these very bytes lie; None where reading computes something.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    span: Span | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


LazyTensors = Mapping[str, LazyTensor]


def safetensors_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one .safetensors file. Its header alone is read.

    Raises:
        ValueError: not such a file, cut short, or a dtype that no weight comes in.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError(f"{path} cannot be read: it is no safetensors file, or cut short; copy the file again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: its header is none of safetensors ({error}); copy the file again") from error
    header.pop("__metadata__", None)
    start, size = 8 + length, path.stat().st_size
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        first, end = entry["data_offsets"]
        if start + end > size:
            raise ValueError(f"{path} cannot be read: cut short, {name} ends at byte {start + end} of {size}; copy the file again")
        tensors[name] = LazyTensor(
            tuple(entry["shape"]), DTYPES[entry["dtype"]], _reader(path, name), Span(path, start + first, end - first)
        )
    return tensors


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read
