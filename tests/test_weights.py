"""A checkpoint's tensors, read when asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agvas.checkpoint import open_checkpoint
from agvas.weights import LazyTensor, safetensors_file
from agvas.writing import write_tensors

TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "brain": torch.linspace(-1, 1, 5).to(torch.bfloat16),
    "count": torch.tensor(7),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_every_tensor_is_listed_and_reads_as_it_was_saved(file: Path) -> None:
    lazy = safetensors_file(file)
    assert lazy.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (lazy[name].shape, lazy[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert lazy[name].bytes == tensor.numel() * tensor.element_size()
        assert torch.equal(lazy[name].read(), tensor)


def test_tensors_written_one_after_the_other_are_what_the_library_reads(file: Path, tmp_path: Path) -> None:
    tensors = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "y.safetensors", tensors, {"format": "pt"})
    assert load_file(tmp_path / "y.safetensors").keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "y.safetensors").items())
    sizes = [path.stat().st_size for path in (file, tmp_path / "y.safetensors")]
    assert abs(sizes[0] - sizes[1]) < 64, "but for spaces in the header"
    tensors["half"] = LazyTensor((3, 3), torch.float16, lambda: TENSORS["half"])
    with pytest.raises(ValueError, match=r"half: expected torch.float16 \[3, 3\], got torch.float16 \[2, 3\]"):
        write_tensors(tmp_path / "z.safetensors", tensors)


def test_a_span_holds_the_tensor_s_very_bytes(file: Path) -> None:
    span = safetensors_file(file)["half"].span
    assert span is not None
    stored = span.file.read_bytes()[span.offset : span.offset + span.length]
    assert np.array_equal(np.frombuffer(stored, np.float16).reshape(2, 3), TENSORS["half"].numpy())


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_file_cut_short_is_refused_by_name(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="x.safetensors.*copy the file again"):
        safetensors_file(file)


def test_an_opened_checkpoint_has_the_model_s_tensors_and_no_weights_in_memory() -> None:
    opened = open_checkpoint("nano")
    skeleton = opened.skeleton()
    assert opened.tensors.keys() == skeleton.state_dict().keys()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
