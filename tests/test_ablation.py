"""An ablation of a checkpoint: a part is left out, the others keep their weights, and what is tuned then is measured as the whole is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import new_tiny, picture
from PIL import Image
from torch import Tensor

from agvas import AGVAS, load, save
from agvas.config import ABLATIONS, ANCHORS, ablated
from agvas.training import cli
from agvas.training.ablation import leave_out
from benchmarks.predictors import Source, open_predictor
from runtime.prompts import PromptEncoder

LEFT_OUT = {"no-seg": "[SEG]", "no-relative": "[NOR], [ANO]", "no-spam": "SPAM", "single-anchor": "[NOR], [ANO], SPAM"}


def maps_of(model: AGVAS) -> dict[str, Tensor]:
    """Each anchor's logits from random states of the three anchors."""
    generator = torch.Generator().manual_seed(0)
    states, pixels = torch.randn(1, 3, 24, generator=generator), torch.randn(1, 32, 7, 7, generator=generator)
    roles = model.mask_decoder.roles
    kept = [number for number, role in enumerate(("normal", "anomalous", "segment")) if role in roles]
    logits: list[Tensor] = []
    model.mask_decoder.fuse = lambda found: logits.append(found)  # type: ignore[method-assign, assignment, func-returns-value]
    with torch.no_grad():
        model.mask_decoder(states[:, kept], pixels)
    return dict(zip(roles, logits[0][0]))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_is_left_is_the_whole_model_without_a_part(ablation: str) -> None:
    model, whole = new_tiny(), new_tiny()
    assert leave_out(model, ablation) == f"ablation {ablation}: {LEFT_OUT[ablation]} left out of tiny, all other parts keep their weights"
    assert model.config == ablated(whole.config, ablation)
    built = AGVAS(model.config, model.tokenizer)  # as a checkpoint of it is loaded
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in built.state_dict().items()
    }
    assert isinstance(model.prompt_encoder, PromptEncoder) and len(model.prompt_encoder.anchor_ids) == len(model.mask_decoder.roles)
    assert (model.spam is None) == (ablation in ("no-spam", "single-anchor"))
    expected = whole.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(("mask_decoder.queries", "mask_decoder.hypernetworks")):
            assert torch.equal(tensor, expected[name]), name


def test_each_anchor_keeps_its_own_query_and_hypernetwork() -> None:
    """Without attention between the tokens an anchor's map does not feel that others are gone."""
    found = {}
    for ablation in (None, "no-seg", "no-relative"):
        model = new_tiny()
        if ablation is not None:
            leave_out(model, ablation)
        for block in model.mask_decoder.transformer.layers:
            torch.nn.init.zeros_(block.self_attn.out_proj.weight)
            torch.nn.init.zeros_(block.cross_attn_image_to_token.out_proj.weight)
            block.skip_first_layer_pe = False
        found[ablation] = maps_of(model)
    for ablation in ("no-seg", "no-relative"):
        for role, logits in found[ablation].items():
            torch.testing.assert_close(logits, found[None][role], atol=1e-5, rtol=1e-4)
    assert found["no-seg"].keys() | found["no-relative"].keys() == found[None].keys()


def test_an_ablation_of_an_ablation_is_refused() -> None:
    model = new_tiny()
    leave_out(model, "no-spam")
    with pytest.raises(ValueError, match="expected a whole AG-VAS, got tiny-no-spam, which lacks a part already"):
        leave_out(model, "no-seg")


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(picture()).save(data / "a.png")
    Image.fromarray(np.where(picture().mean(axis=2) > 200, 255, 0).astype(np.uint8)).save(data / "m.png")
    (data / "manifest.csv").write_text("image,mask,label\na.png,m.png,1\n")
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"anomaly": {"probability": 1, "sources": [{"kind": "manifest", "root": "data"}]}}))
    return file


@pytest.mark.parametrize("ablation", ["no-seg", "single-anchor"])
def test_agvas_train_tunes_an_ablation_of_a_checkpoint(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ablation: str
) -> None:
    save(new_tiny(), tmp_path / "base")
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(mixture), "--steps", "1", "--batch", "1"]
    assert cli.main([*arguments, "--ablation", ablation, "--output", str(tmp_path / "run")]) == 0
    assert f"ablation {ablation}: {LEFT_OUT[ablation]} left out of tiny" in capsys.readouterr().err
    tuned = load(tmp_path / "run" / "checkpoint")
    assert tuned.config.name == f"tiny-{ablation}"
    assert tuned.config.prompts.anchors == (ANCHORS[:2] if ablation == "no-seg" else ANCHORS[2:])
    assert tuned.segment(picture()).anomaly_map.shape == picture().shape[:2]
    assert cli.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert f"model was tiny-{ablation}, is tiny" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"fusion weight: expected a checkpoint with all of .*, got tiny-{ablation} with "):
        open_predictor(Source(checkpoint=str(tmp_path / "run" / "checkpoint"), fusion_weight=0.9))
    open_predictor(Source(checkpoint=str(tmp_path / "run" / "checkpoint")))
