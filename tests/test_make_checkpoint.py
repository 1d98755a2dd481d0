"""The maker of random checkpoints writes what the libraries themselves read, and the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from peft import PeftConfig
from transformers import LlavaOnevisionForConditionalGeneration

from agvas import load
from agvas.checkpoint import open_checkpoint, weight_files
from agvas.config import tiny
from agvas.importing import ImportSettings, import_parts
from agvas.torch_file import torch_file
from agvas.training.adaptation import Adaptation, TrainedParts
from benchmarks.make_checkpoint import Size, main, make_parts
from export.cli import main as export
from runtime import Segmenter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "parts"
    assert main(["--size", "mini", "--output", str(folder)]) == 0
    return folder


@torch.no_grad()
def test_transformers_reads_the_base_and_computes_what_the_checkpoint_does(made: Path) -> None:
    theirs, report = LlavaOnevisionForConditionalGeneration.from_pretrained(made / "base", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = load(made / "checkpoint")
    images = torch.randn(2, 3, 45, 45)
    expected = theirs.eval().model.vision_tower(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours.semantic_encoder(images)[0], expected, atol=1e-5, rtol=1e-5)


def test_torch_reads_sams_file_as_we_do(made: Path) -> None:
    theirs = torch.load(made / "sam.pth", weights_only=True, mmap=True)
    ours = torch_file(made / "sam.pth")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].read(), tensor) for name, tensor in theirs.items())
    assert "image_encoder.blocks.1.attn.rel_pos_h" in theirs and "image_encoder.neck.3.bias" in theirs


def test_peft_reads_the_adapter_and_it_changes_the_base(made: Path) -> None:
    assert PeftConfig.from_pretrained(str(made / "trained")).r == 16
    name = "language.model.layers.0.self_attn.v_proj.weight"
    assert open_checkpoint(made / "checkpoint").tensors[name].span is None


def test_what_was_imported_is_exported_and_the_bundle_segments(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """All the way from published layouts to a mask: random encoders, and of the trained part what says the answer, with faint adapters.
    In the sizes of the other tests' bundles, whose graphs are traced once."""
    make_parts(Size(tiny(), torch.float32, 40_000), tmp_path)
    Adaptation(load(tiny_checkpoint), TrainedParts(lora=None), 0).save(tmp_path / "trained")
    path = tmp_path / "trained" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0.01}))
    import_parts(ImportSettings(tmp_path / "base", tmp_path / "checkpoint", tmp_path / "sam.pth", (tmp_path / "trained",)))
    settings = ["--precision", "fp32", "--lmm", "float", "--parity", "none", "--output", str(tmp_path / "bundle")]
    assert export(["--checkpoint", str(tmp_path / "checkpoint"), *settings]) == 0
    found = Segmenter(tmp_path / "bundle", engine="onnxruntime")(picture())
    expected = load(tmp_path / "checkpoint").segment(picture())
    assert found.text == expected.text and expected.anchor_states is not None
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4)


def test_the_same_seed_makes_the_same_and_a_folder_that_is_there_is_left_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--size", "mini", "--output", str(tmp_path / "same")]) == 0
    assert main(["--size", "mini", "--output", str(tmp_path / "other"), "--seed", "1"]) == 0
    first, same, other = (
        [path.read_bytes() for path in weight_files(folder / "checkpoint") if path.suffix != ".json"]
        for folder in (made, tmp_path / "same", tmp_path / "other")
    )
    assert first == same and all(mine != theirs for mine, theirs in zip(first, other, strict=True))
    assert main(["--output", str(made)]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err
