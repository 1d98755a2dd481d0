"""What agvas-import reads in published layouts computes what the parts' own libraries compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from conftest import picture
from imported_parts import TRAINED, Published, same_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from agvas import load, save
from agvas.importing import ImportSettings, import_parts
from agvas.training.adaptation import Adaptation


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_tower_s_features_are_transformers_hidden_states(the_parts: Published) -> None:
    """hidden_states[-1] is the last layer's output, before post_layernorm (whose weights would change it here)."""
    ours = load(the_parts.start).semantic_encoder
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(the_parts.onevision).eval().model
    features, embeddings = ours(images(45))
    output = theirs.vision_tower(images(45), output_hidden_states=True)
    expected = output.hidden_states[-1]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.last_hidden_state, expected, atol=1e-2)
    torch.testing.assert_close(embeddings, theirs.multi_modal_projector(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_language_model_s_logits_are_the_base_s(the_parts: Published) -> None:
    ids = torch.arange(5, 40)[None]
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(the_parts.onevision).eval()
    torch.testing.assert_close(load(the_parts.start).language(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def _in_memory(name: str) -> str:
    """As in the module: transformers 4.52 to 4.57 saved some LLaVAs so."""
    if "lm_head" in name:
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model', 'language_model')}"


def _with_vision_model(name: str) -> str:
    """As published: transformers before 5 had another module in the tower."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("prefixed", [_in_memory, _with_vision_model])
def test_older_and_newer_prefixes_are_the_same_base(the_parts: Published, prefixed: Callable[[str], str], tmp_path: Path) -> None:
    base = Path(shutil.copytree(the_parts.onevision, tmp_path / "base"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(base.glob("model*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (base / "model.safetensors.index.json").unlink()
    save_file({prefixed(name): tensor for name, tensor in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    import_parts(ImportSettings(base, tmp_path / "checkpoint", the_parts.sam, (the_parts.trained,)))
    same_tensors(load(tmp_path / "checkpoint"), the_parts.merged.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("given", ["sam_vit_mini.pth", "sam_model", "sam_model/model.safetensors"])
def test_sam_s_embeddings_are_transformers_from_either_layout(the_parts: Published, given: str, tmp_path: Path) -> None:
    import_parts(ImportSettings(the_parts.onevision, tmp_path / "start", the_parts.folder / given, untrained=0))
    model = load(tmp_path / "start")
    assert (model.config.pixel.window, model.config.pixel.global_layers, model.config.pixel.heads) == (3, (1,), 2)
    expected = the_parts.their_sam.vision_encoder(images(56)).last_hidden_state
    torch.testing.assert_close(model.pixel_encoder(images(56)).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_llava_15_takes_the_last_layer_but_one_without_the_class_token(the_parts: Published, tmp_path: Path) -> None:
    published.llava_15(tmp_path / "llava")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    import_parts(ImportSettings(tmp_path / "llava", tmp_path / "start", the_parts.sam, untrained=0))
    model = load(tmp_path / "start")
    assert (model.config.semantic.kind, model.config.semantic.layers, model.config.language.kind) == ("clip", 3, "llama")
    features, embeddings = model.semantic_encoder(images(45))
    expected = theirs.model.vision_tower(images(45), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeddings, theirs.model.multi_modal_projector(expected), atol=1e-5, rtol=1e-5)
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(model.language(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    prompt = model.prompt_encoder.encode()
    assert model.tokenizer.id_to_token(prompt.prefix[0]) == "<s>"
    assert model.segment(picture()).anomaly_map.shape == (41, 67)


def test_a_tied_head_is_the_table_and_stays_it(the_parts: Published, tmp_path: Path) -> None:
    """LLaVA-OneVision 0.5B."""
    theirs = published.onevision(tmp_path / "tied", tied=True)
    opened = import_parts(ImportSettings(tmp_path / "tied", tmp_path / "start", the_parts.sam, untrained=0)).opened
    assert opened.config.language.tied_head
    model = load(tmp_path / "start")
    assert model.language.lm_head.weight is model.language.get_input_embeddings().weight
    assert torch.equal(model.language.lm_head.weight, theirs.lm_head.weight)
    save(model, tmp_path / "saved")
    assert "language.lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    again = load(tmp_path / "saved")
    assert again.language.lm_head.weight is again.language.get_input_embeddings().weight
    same_tensors(again, model.state_dict())
    adaptation = Adaptation(model, TRAINED, 0)
    with torch.no_grad():
        model.language.get_input_embeddings().weight.mul_(2)
    adaptation.save(tmp_path / "trained")
    import_parts(ImportSettings(tmp_path / "tied", tmp_path / "both", the_parts.sam, (tmp_path / "trained",)))
    assert torch.equal(load(tmp_path / "both").language.lm_head.weight, 2 * theirs.lm_head.weight)
    # The same over the base as imported before.
    import_parts(ImportSettings(tmp_path / "start", tmp_path / "again", None, (tmp_path / "trained",)))
    model = load(tmp_path / "again")
    assert model.config.language.tied_head and torch.equal(model.language.lm_head.weight, 2 * theirs.lm_head.weight)
