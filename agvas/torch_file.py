"""A file of torch.save, such as sam_vit_h_4b8939.pth: its tensors listed without being read, and no code of it run.

torch reads such a file with `weights_only`, which builds tensors and plain containers alone, and under fake tensors, which have a
place in the file in lieu of values. Files that hold objects of other libraries are refused, as are those of torch before 1.6, which
are no zip archives.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agvas.weights import LazyTensor, Span, check_index, index_of, shard_of


def torch_file(path: Path, key: str | None = None) -> dict[str, LazyTensor]:
    """The tensors of a state dictionary saved by torch.

    Args:
        key: of the dictionary that holds them, where the file's own does not.

    Raises:
        ValueError: no such file, an old one, one with objects that are no tensors and containers, or no dictionary of tensors.
    """
    content = read_structure(path)
    state = content if key is None else content.get(key)
    if not isinstance(state, Mapping):
        where = "" if key is None else f" under {key!r}"
        raise ValueError(f"{path}: expected a dictionary of tensors{where}, got {type(state).__name__}; give a state dictionary's file")
    return {name: _lazy(path, name, value) for name, value in state.items() if isinstance(value, Tensor)}


def torch_folder(folder: Path, name: str = "pytorch_model.bin") -> dict[str, LazyTensor]:
    """The tensors of `folder`/`name`, or of the shards that `name`.index.json lists. ValueError as torch_file."""
    if (folder / name).is_file():
        return torch_file(folder / name)
    index = folder / f"{name}.index.json"
    places = index_of(index)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(places.values())):
        tensors |= torch_file(shard_of(index, shard))
    check_index(index, places, tensors)
    return tensors


def read_structure(path: Path) -> Any:
    """What a file holds, its tensors without values. ValueError where it cannot be read in this way."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            head = file.read(16)
        if head and not head.startswith((b"PK", b"\x80")):  # an archive cut short, perhaps to nothing, or of torch before 1.6
            raise ValueError(
                f"{path}: expected weights (a file of torch.save, or .safetensors), got a file that begins with {head!r}; give the one "
                "that holds them"
            )
        raise ValueError(
            f"{path} cannot be read: no file of torch.save since torch 1.6, or cut short; copy it again, "
            f"or rewrite it once with python -c 'import torch; torch.save(torch.load(\"{path.name}\", weights_only=True), \"new.pth\")'"
        )
    try:
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        what = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]) or str(error)[:200]
        raise ValueError(
            f"{path} holds more than tensors ({what}), which could run code when read; where you trust it, save its tensors alone: "
            f"torch.save(state_dict, file), or as safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the file again") from error


def _lazy(path: Path, name: str, tensor: Tensor) -> LazyTensor:
    storage = tensor.untyped_storage()
    start, size = storage._checkpoint_offset, storage.nbytes()  # type: ignore[attr-defined]
    shape, stride, first, dtype = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
    if start + size > path.stat().st_size:
        raise ValueError(f"{path} cannot be read: cut short within {name}; copy the file again")
    span = Span(path, start + first * dtype.itemsize, tensor.numel() * dtype.itemsize) if tensor.is_contiguous() else None
    return LazyTensor(shape, dtype, _reader(path, start, size, dtype, shape, stride, first), span)


def _reader(
    path: Path, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], first: int
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        stored = np.memmap(path, np.uint8, "c", start, size)  # copy on write: torch wants memory that it may write to
        return torch.from_numpy(stored).view(dtype).as_strided(shape, stride, first).clone(memory_format=torch.contiguous_format)

    return read
