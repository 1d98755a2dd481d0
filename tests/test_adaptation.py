"""What learns and what keeps still (paper B.2), kept apart and merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import new_tiny, picture
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from agvas import AGVAS
from agvas.config import tiny
from agvas.training.adaptation import Adaptation, LoRASettings, TrainedParts

PAPERS = TrainedParts()


@pytest.fixture
def model() -> AGVAS:
    return new_tiny()


def trainable(model: AGVAS) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def shaken(model: AGVAS) -> None:
    """Every trainable parameter moved, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_papers_parts_learn_and_the_encoders_keep_still(model: AGVAS) -> None:
    whole = {name for name, _ in model.named_parameters() if name.startswith(("spam.", "mask_decoder."))}
    whole |= {"language.model.embed_tokens.weight", "language.lm_head.weight"}
    Adaptation(model, PAPERS, 0)
    adapters = {name for name in trainable(model) if "lora_" in name}
    assert trainable(model) == whole | adapters
    layers = model.config.language.layers
    assert len(adapters) == layers * 2 * 2  # two projections, two factors each
    assert {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name} == {16}


def test_adapters_change_nothing_before_they_learn(model: AGVAS) -> None:
    before = model.segment(picture())
    Adaptation(model, PAPERS, 0)
    after = model.eval().segment(picture())
    assert after.text == before.text
    assert abs(after.score - before.score) < 1e-6


@torch.no_grad()
def test_a_merged_model_says_what_the_adapted_one_did(model: AGVAS) -> None:
    keys = model.state_dict().keys()
    adaptation = Adaptation(model, PAPERS, 0)
    shaken(model)
    model.eval()
    ids = torch.arange(10, 24)[None]
    adapted = model.language(input_ids=ids).logits
    merged = adaptation.merge()
    assert merged.state_dict().keys() == keys
    torch.testing.assert_close(merged.language(input_ids=ids).logits, adapted, atol=2e-5, rtol=1e-5)
    assert not trainable(merged)


@torch.no_grad()
def test_what_was_trained_is_kept_as_peft_keeps_it(model: AGVAS, tmp_path: Path) -> None:
    """peft itself puts the adapter on the base's language model; the rest goes in by name."""
    adaptation = Adaptation(model, PAPERS, 0)
    shaken(model)
    adaptation.save(tmp_path)
    merged = adaptation.merge()
    base = new_tiny()
    rest = load_file(tmp_path / "trained.safetensors")
    assert not base.load_state_dict(rest, strict=False).unexpected_keys
    loaded = PeftModel.from_pretrained(base.language, str(tmp_path)).merge_and_unload()
    for name, tensor in merged.language.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    record = json.loads((tmp_path / "trained.json").read_text())
    assert record == {"parts": ["language", "mask_decoder", "spam"], "adapter": True, "tensors": sorted(rest)}


def test_a_model_too_small_to_be_pretrained_learns_whole(model: AGVAS) -> None:
    slow = ("pixel_encoder.patch_embed", "mask_decoder.upscaling")
    fast, slower = Adaptation(model, TrainedParts(lora=None, encoders=True, slow=slow, slow_share=0.1), 0).groups()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert trainable(model) == set(names.values())
    assert (fast.share, slower.share) == (1.0, 0.1)
    assert {names[id(parameter)] for parameter in slower.parameters} == {name for name in names.values() if name.startswith(slow)}


def test_layers_that_are_not_there_are_refused(model: AGVAS) -> None:
    with pytest.raises(ValueError, match=r"lora.targets: expected names of linear layers, got \['query'\]"):
        Adaptation(model, TrainedParts(lora=LoRASettings(targets=("query",))), 0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"rank": 0}, "lora.rank: expected 1 or more, got 0"), ({"alpha": -1}, "lora.alpha"), ({"dropout": 1.0}, "lora.dropout")],
)
def test_adapters_that_there_cannot_be_are_refused_by_name(setting: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoRASettings(**setting)  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_adapters() -> None:
    def adapters(seed: int) -> dict[str, Tensor]:
        model = new_tiny()
        Adaptation(model, PAPERS, seed)
        return {name: parameter for name, parameter in model.named_parameters() if "lora_A" in name}

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_the_neck_of_another_vit_learns_and_its_backbone_keeps_still(tmp_path: Path) -> None:
    config = tiny()
    pixel = replace(config.pixel, kind="clip", window=0, global_layers=())
    model = AGVAS(replace(config, pixel=pixel), new_tiny().tokenizer)
    adaptation = Adaptation(model, PAPERS, 0)
    assert {name for name in trainable(model) if name.startswith("pixel_encoder.")} == {
        f"pixel_encoder.neck.{name}" for name in model.pixel_encoder.neck.state_dict()
    }
    adaptation.save(tmp_path)
    assert "pixel_encoder.neck.conv1.weight" in load_file(tmp_path / "trained.safetensors")
