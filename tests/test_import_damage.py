"""A part that does not fit, or is not whole, is named by agvas-import and nothing is left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from imported_parts import ADAPTER, TABLES, changed, in_json, removed, trained_without, without
from tokenizers import Tokenizer
from torch import Tensor

from agvas.import_cli import main

BASE = "onevision/model.safetensors"
UP = "language_model.model.layers.1.mlp.up_proj.weight"


def _in_config(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        fields = json.loads((folder / "onevision" / "config.json").read_text())
        change(fields)
        (folder / "onevision" / "config.json").write_text(json.dumps(fields))

    return apply


def _trained_with(name: str) -> Callable[[Path], None]:
    return changed("trained/trained.safetensors", lambda state: state.update({name: torch.zeros(5)}))


def _in_sam(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = torch.load(folder / "sam_vit_mini.pth")
        change(state)
        torch.save(state, folder / "sam_vit_mini.pth")

    return apply


def _all(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [damage(folder) for damage in damages] and None


def _with_tokens(folder: Path) -> None:
    """More of them than the table has rows."""
    tokenizer = Tokenizer.from_file(str(folder / "trained" / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<more {index}>" for index in range(published.VOCABULARY)])
    tokenizer.save(str(folder / "trained" / "tokenizer.json"))


def _llavas_own(name: str) -> str:
    """As LLaVA's own code names what Hugging Face's calls `name`."""
    changes = {
        "language_model.model.": "model.",
        "language_model.lm_head": "lm_head",
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "image_newline": "model.image_newline",
    }
    theirs = next(theirs for theirs in changes if name.startswith(theirs))
    return changes[theirs] + name.removeprefix(theirs)


def _renamed(state: dict[str, Tensor]) -> None:
    renamed = {_llavas_own(name): tensor for name, tensor in state.items()}
    assert "model.layers.0.self_attn.q_proj.weight" in renamed and "model.mm_projector.0.weight" in renamed
    state.clear()
    state.update(renamed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_in_config(lambda c: c.update(vision_feature_layer=[-1, -2])), "vision_feature_layer: expected one layer"),
        (_in_config(lambda c: c.update(projector_hidden_act="relu")), "projector_hidden_act: expected 'gelu', got 'relu'"),
        (_in_config(lambda c: c["vision_config"].update(hidden_act="gelu")), "vision_config.hidden_act: expected 'gelu_pytorch_tanh'"),
        (_in_config(lambda c: c.update(model_type="bert")), "is a bert, expected llava_onevision or llava"),
        (lambda folder: (folder / "onevision" / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
        (lambda folder: next((folder / "onevision").glob("model-00002*")).unlink(), "lacks model-00002.*copy every shard"),
        (lambda folder: (folder / "sam_vit_mini.pth").write_bytes(b"version https://git-lfs"), "begins with b'version"),
        (lambda folder: torch.save({"weight": torch.ones(3)}, folder / "sam_vit_mini.pth"), "has no image encoder of SAM"),
        (lambda folder: (folder / "trained" / "adapter_model.safetensors").unlink(), "adapter_config.json but neither"),
        (removed("trained/adapter_config.json"), "adapter_config.json cannot be read as peft's"),
        (removed("trained/adapter_config.json", ADAPTER), r"trained lacks adapter_config.json, adapter_model.*its trained.json names"),
        (
            without(ADAPTER, r"layers\.0\..*q_proj"),
            r"trained lacks the adapters of a layer that adapter_config.json names \(model.layers.0.self_attn.q_proj\): copy it again",
        ),
        (
            without(ADAPTER, "q_proj", "v_proj", r"layers\.[02]"),
            r"lacks the adapters of 8 layers .*\(model.layers.0.mlp.down_proj, model.layers.0.self_attn.q_proj, .* and 5 more\)",
        ),
        (without(ADAPTER, "lora_"), "adapter_model.safetensors: expected the adapters that adapter_config.json tells of, got none; copy"),
        (
            in_json("trained/adapter_config.json", r=8),
            r"model.layers.0.mlp.down_proj, .* and 6 more: expected adapters of rank 8, as trained/adapter_config.json says, got rank 3",
        ),
        (in_json("trained/adapter_config.json", rank_pattern={"2.self_attn.v_proj": 4}), "layers.2.self_attn.v_proj: .* of rank 4"),
        (in_json("trained/adapter_config.json", target_modules="model.*("), "adapter_config.json cannot be read as peft's"),
        (in_json("trained/adapter_config.json", modules_to_save=["lm_head"]), "lacks lm_head, which adapter_config.json names in mod"),
        (trained_without(*TABLES), "lacks language.lm_head.weight, language.model.embed_tokens.weight, which its trained.json names"),
        (trained_without(TABLES[1]), "trained lacks language.lm_head.weight, which its trained.json names: copy the whole folder again"),
        (
            _all(trained_without(*TABLES), in_json("trained/trained.json", tensors=None)),
            "trained.json cannot be read as what agvas-train leaves",
        ),
        (  # as agvas-train wrote it before
            _all(trained_without(*TABLES), lambda folder: (folder / "trained/trained.json").write_text('{"parts": ["language", "spam"]}')),
            "trained lacks language, which its trained.json names",
        ),
        (
            without(BASE, UP),
            rf"the parts do not fit together: missing language.model.layers.1.mlp.up_proj.weight \[37, 24\] "
            rf"\({UP} of onevision: copy every file of it again\)\n$",
        ),
        (
            changed(BASE, lambda state: state.update({UP: torch.zeros(37, 20)})),
            rf": language.model.layers.1.mlp.up_proj.weight is \[37, 20\], expected \[37, 24\] \({UP} of onevision: it is of another model",
        ),
        (
            changed(BASE, lambda state: state.update({UP.replace("1", "7"): torch.zeros(37, 24)})),
            rf": unexpected language.model.layers.7.mlp.up_proj.weight \[37, 24\] \({UP.replace('1', '7')} of onevision: it is of another",
        ),
        (changed(BASE, lambda state: state.update(other=torch.zeros(3))), r"unexpected other in onevision \(nothing here is called so"),
        (
            _in_sam(lambda state: state.pop("image_encoder.blocks.1.mlp.lin1.bias")),
            r"layers.1.mlp.lin1.bias \[23\] \(image_encoder.blocks.1.mlp.lin1.bias of sam_vit_mini.pth: copy the whole file again\)",
        ),
        (
            _in_sam(lambda state: state.update({"image_encoder.neck.2.weight": torch.zeros(3)})),
            r"neck.conv2.weight is \[3\], .*\(image_encoder.neck.2.weight of sam_vit_mini.pth: it is of another model, give the part that",
        ),
        (
            changed(BASE, _renamed),
            r"onevision has the names of LLaVA's own code \(model\..*, expected Hugging Face's layout; give the same base in .*llava-hf",
        ),
        (_with_tokens, rf"tokenizer.json has ids up to \d+, the vocabulary {published.VOCABULARY} rows \(give the tokenizer of"),
        (trained_without("spam.query.bias"), r"missing spam.query.bias \[256\] \(it was trained"),
        (trained_without("mask_decoder.frequencies"), r"missing mask_decoder.frequencies \[2, 16\]"),
        (_trained_with("spam.extra"), r"unexpected spam.extra \[5\]"),
        (_trained_with("other.extra"), "unexpected other.extra in .*trained"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    a_copy: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(a_copy)
    arguments = ["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained", "--output", "new"]
    before = sorted(path.name for path in a_copy.iterdir())
    monkeypatch.chdir(a_copy)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("agvas-import: ") and re.search(message, error), error
    assert sorted(path.name for path in a_copy.iterdir()) == before
