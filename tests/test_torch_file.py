"""Files of torch.save: listed without their values, read to the bit, and never run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from agvas.torch_file import torch_file

BASE = torch.arange(40.0).reshape(5, 8)
TENSORS = {
    "plain": torch.arange(6.0).reshape(2, 3),
    "brain": torch.linspace(-1, 1, 5).to(torch.bfloat16),
    "transposed": BASE.T,
    "slice": BASE[1:3],
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(TENSORS | {"step": 3}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_every_tensor_is_listed_and_reads_as_it_was_saved(file: Path) -> None:
    lazy = torch_file(file)
    assert lazy.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (lazy[name].shape, lazy[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(lazy[name].read(), tensor), name
        assert lazy[name].read().is_contiguous()


def test_a_span_holds_the_tensor_s_very_bytes_and_a_transposed_one_has_none(file: Path) -> None:
    lazy = torch_file(file)
    span = lazy["slice"].span
    assert span is not None and lazy["transposed"].span is None
    stored = file.read_bytes()[span.offset : span.offset + span.length]
    assert np.array_equal(np.frombuffer(stored, np.float32).reshape(2, 8), BASE[1:3].numpy())


def test_what_is_read_can_be_changed_without_changing_the_file(file: Path) -> None:
    before = file.read_bytes()
    torch_file(file)["plain"].read().zero_()
    assert file.read_bytes() == before
    assert torch.equal(torch_file(file)["plain"].read(), TENSORS["plain"])


class Runs:
    """What a hostile file would do when read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "hook": Runs()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile.pth holds more than tensors \(.*mkdir\).*which could run code"):
        torch_file(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none_say_so(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for kept in (0, 10, len(content) // 2):
        file.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="x.pth cannot be read"):
            torch_file(file)
    torch.save(TENSORS["plain"], tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors, got FakeTensor|expected a dictionary of tensors, got Tensor"):
        torch_file(tmp_path / "tensor.pth")
    torch.save({"module": TENSORS}, tmp_path / "nested.pth")
    assert torch_file(tmp_path / "nested.pth", "module").keys() == TENSORS.keys()
    with pytest.raises(ValueError, match="expected a dictionary of tensors under 'model', got NoneType"):
        torch_file(tmp_path / "nested.pth", "model")


def test_a_file_of_an_old_torch_says_how_to_rewrite_it(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="no file of torch.save since torch 1.6.*rewrite it once with"):
        torch_file(tmp_path / "old.pth")
