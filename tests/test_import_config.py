"""The configuration and the tokenizer of what agvas-import makes: the base's own, or told to be assumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published
import pytest
import torch
from imported_parts import Published, same_tensors
from tokenizers import Tokenizer

from agvas import CheckpointError, load
from agvas.checkpoint import open_checkpoint
from agvas.config import ablated
from agvas.importing import ImportSettings, import_parts


def test_pictures_are_normalised_as_the_base_s_processor_says(the_parts: Published) -> None:
    """The processor class's defaults are CLIP's."""
    preprocessing = open_checkpoint(the_parts.start).config.preprocessing
    assert preprocessing.semantic_mean == (127.5, 63.75, 31.875)
    assert preprocessing.semantic_std == (127.5, 102.0, 76.5)
    assert (preprocessing.pixel_size, preprocessing.semantic_size) == (56, 45)


def test_the_config_is_the_base_s_own(the_parts: Published) -> None:
    language = open_checkpoint(the_parts.start).config.language
    assert (language.rope_theta, language.norm_epsilon, language.heads, language.key_value_heads) == (1_000_000.0, 1e-6, 6, 2)
    assert (language.vocabulary, language.max_positions, language.tied_head) == (published.VOCABULARY, 512, False)


def test_anchors_are_added_behind_the_base_s_tokens(the_parts: Published) -> None:
    before = Tokenizer.from_file(str(the_parts.onevision / "tokenizer.json")).get_vocab_size()
    tokenizer = open_checkpoint(the_parts.start).tokenizer
    assert [tokenizer.token_to_id(anchor) for anchor in ("[NOR]", "[ANO]", "[SEG]")] == [before, before + 1, before + 2]
    assert tokenizer.encode("a[SEG]b", add_special_tokens=False).ids.count(before + 2) == 1


def test_without_a_config_the_shapes_tell_and_the_rest_is_said_to_be_assumed(the_parts: Published, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(the_parts.trained, tmp_path / "trained"))
    (folder / "config.json").unlink()
    done = import_parts(ImportSettings(the_parts.onevision, tmp_path / "checkpoint", the_parts.sam, (folder,)))
    assert any("spam.heads = 8" in note for note in done.notes)
    same_tensors(load(tmp_path / "checkpoint"), the_parts.merged.state_dict())


@pytest.mark.parametrize(("field", "value"), [("language.heads", 12), ("language.rope_theta", 10.0), ("pixel.heads", 3)])
def test_a_config_of_another_base_is_refused_though_every_shape_fits(
    the_parts: Published, field: str, value: float, tmp_path: Path
) -> None:
    fields = json.loads((the_parts.trained / "config.json").read_text())
    part, name = field.split(".")
    fields[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = ImportSettings(the_parts.onevision, tmp_path / "out", the_parts.sam, (the_parts.trained,), config=tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=f"does not belong to this base and pixel encoder: {field} is {value}"):
        import_parts(settings)
    assert not (tmp_path / "out").exists()


def test_a_single_anchors_training_is_imported_with_that_anchor_alone(the_parts: Published, tmp_path: Path) -> None:
    config = ablated(load(the_parts.start).config, "single-anchor")
    (tmp_path / "ablated.json").write_text(config.to_json())
    import_parts(ImportSettings(the_parts.onevision, tmp_path / "start", the_parts.sam, untrained=0, config=tmp_path / "ablated.json"))
    model = load(tmp_path / "start")
    state = tmp_path / "run" / "state" / "step"
    state.mkdir(parents=True)
    (state.parent / "latest").write_text("step")
    torch.save({"module": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}, state / "mp_rank_00_model_states.pt")
    found = import_parts(ImportSettings(the_parts.onevision, tmp_path / "stopped", the_parts.sam, (state.parent,))).opened.config
    assert found.mask_decoder.roles == config.mask_decoder.roles == ("segment",)
    assert found.prompts.anchors == ("[SEG]",) and found.prompts.answer == config.prompts.answer


def test_anchors_and_roles_that_differ_in_number_are_no_checkpoint(the_parts: Published, a_copy: Path) -> None:
    path = a_copy / "start" / "config.json"
    fields = json.loads(path.read_text())
    fields["mask_decoder"]["roles"] = ["segment"]
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="prompts.anchors: expected one for each of mask_decoder.roles"):
        load(a_copy / "start")
