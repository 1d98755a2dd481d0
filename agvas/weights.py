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
from safetensors import SafetensorError, safe_open
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
        constant: the model's own, as a mask of infinities is, and no weight, in which such a value is a fault.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    span: Span | None = None
    constant: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, end: int) -> LazyTensor:
        """Its rows `first` to `end`, whose bytes lie side by side."""
        row = self.bytes // self.shape[0]
        span = None if self.span is None else Span(self.span.file, self.span.offset + first * row, (end - first) * row)
        return LazyTensor((end - first, *self.shape[1:]), self.dtype, lambda: self.read()[first:end].clone(), span)


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
    last = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if last < size:  # a download that was resumed wrongly; the library refuses it, too
        raise ValueError(f"{path} cannot be read: its tensors end at byte {last} of {size}; copy the file again")
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


def safetensors_folder(folder: Path, name: str = "model.safetensors") -> dict[str, LazyTensor]:
    """The tensors of `folder`/`name`, or of the shards that `name`.index.json lists, as Hugging Face's libraries write them.

    Raises:
        ValueError: neither file, an index that is none, a shard missing, or shards that do not hold what the index says.
    """
    if (folder / name).is_file():
        return safetensors_file(folder / name)
    index = folder / f"{name}.index.json"
    places = index_of(index)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(places.values())):
        tensors |= safetensors_file(shard_of(index, shard))
    check_index(index, places, tensors)
    return tensors


def index_of(index: Path) -> dict[str, str]:
    """Which shard each tensor lies in, as an index says. ValueError where the file is none."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError("weight_map does not map names to files")
    except OSError as error:
        raise ValueError(f"{index.parent} has neither {index.name.removesuffix('.index.json')} nor {index.name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}; copy the file again") from error
    return dict(places)


def shard_of(index: Path, shard: str) -> Path:
    """A shard's path. ValueError where it is missing, or lies outside the folder."""
    if Path(shard).name != shard:
        raise ValueError(f"{index} names {shard!r}, expected a file beside it; do not use this checkpoint")
    if not (index.parent / shard).is_file():
        raise ValueError(f"{index.parent} lacks {shard}, which {index.name} names; copy every shard")
    return index.parent / shard


def check_index(index: Path, places: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse shards that hold other tensors than their index says."""
    if differing := sorted(places.keys() ^ tensors.keys()):
        listed = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ValueError(f"{index} and its shards do not belong together: {listed} in one and not in the other; copy all files again")


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the file again") from error

    return read


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse a float tensor with NaN or infinite values: whatever computes with it gives no result, or none of some inputs alone.

    Raises:
        ValueError: names the tensor.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ValueError(f"{name} holds {count} NaN or infinite values of {tensor.numel()}; save the weights again, in float32")


def overflows(tensor: Tensor, made: Tensor) -> bool:
    """Whether a finite value of a float tensor is infinite in `made`, the same in another type: float16 ends at 65,504."""
    return not bool(made.isfinite().all()) and bool((tensor.isfinite() & ~made.isfinite()).any())


def in_type(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A float tensor in another float type; any other as it is.

    Raises:
        ValueError: the type does not hold it. It would be infinite there, and in a norm's statistics silence a channel without a word.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if overflows(tensor, made):
        largest, short = float(tensor[tensor.isfinite()].abs().max()), str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} has values up to {largest:.3g}, which {short} does not hold; take bfloat16 or float32 (bf16, fp32)")
    return made
