"""What was trained goes over the base in agvas-import: adapters as peft merges them, all else as it was left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from conftest import picture
from imported_parts import ADAPTER, TABLES, TARGETS, Published, in_json, removed, same_tensors, trained_without, without
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration, Qwen2ForCausalLM

from agvas import AGVAS, CheckpointError, load
from agvas.checkpoint import open_checkpoint
from agvas.contents import contents
from agvas.import_cli import main
from agvas.importing import ImportSettings, import_parts
from agvas.lora import read_settings
from agvas.training.adaptation import Adaptation, TrainedParts


@pytest.fixture(scope="module")
def imported(the_parts: Published) -> AGVAS:
    return load(the_parts.checkpoint)


def test_the_checkpoint_is_the_merged_model_bit_for_bit(the_parts: Published, imported: AGVAS) -> None:
    assert imported.config == the_parts.merged.config
    same_tensors(imported, the_parts.merged.state_dict())
    expected, found = the_parts.merged.segment(picture()), imported.segment(picture())
    assert found.answer_ids == expected.answer_ids
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-6)


def test_merged_weights_are_peft_s_own(the_parts: Published, imported: AGVAS) -> None:
    """peft puts the adapter on the base as transformers loads it."""
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(the_parts.onevision)
    theirs = Qwen2ForCausalLM(whole.config.text_config)
    theirs.model.load_state_dict(whole.model.language_model.state_dict())
    merged = PeftModel.from_pretrained(theirs, str(the_parts.trained)).merge_and_unload().state_dict()
    changed = [name for name in merged if any(f".{target}.weight" in name for target in TARGETS)]
    assert len(changed) == 3 * len(TARGETS)
    for name in changed:
        assert torch.equal(imported.language.state_dict()[name], merged[name]), name
        assert not torch.equal(merged[name], load(the_parts.start).language.state_dict()[name])


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_of_the_whole_llava_in_peft_s_names_is_merged_as_peft_merges_it(
    the_parts: Published, stabilised: bool, tmp_path: Path
) -> None:
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(the_parts.onevision)
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r".*language_model.*(q_proj|up_proj)",
        use_rslora=stabilised,
        alpha_pattern={"layers.1.mlp.up_proj": 20},
        init_lora_weights=False,
        modules_to_save=["lm_head"],
    )
    torch.manual_seed(2)
    adapted = get_peft_model(whole, settings)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = adapted.merge_and_unload().state_dict()
    import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (tmp_path / "adapter",)))
    found = load(tmp_path / "checkpoint").state_dict()
    for name, tensor in expected.items():
        if name.startswith("model.language_model."):
            assert torch.equal(found[f"language.model.{name.removeprefix('model.language_model.')}"], tensor), name
    assert torch.equal(found["language.lm_head.weight"], expected["lm_head.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"target_modules": r".*\.[12]\..*_proj", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_the_layers_that_have_adapters_are_peft_s(the_parts: Published, settings: dict[str, object], tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=2, **settings)  # type: ignore[arg-type]
    config.save_pretrained(str(tmp_path))
    found = read_settings(tmp_path / "adapter_config.json")
    for name, module in the_parts.merged.language.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert found.adapts(name) == bool(check_target_module_exists(config, name)), name


@pytest.mark.parametrize(
    ("targets", "gone"),
    [
        (["q_proj"], "model.language_model.layers.1.self_attn.q_proj"),
        (["q_proj"], "model.vision_tower.encoder.layers.0.self_attn.q_proj"),
        (r".*language_model.*(q_proj|up_proj)", "model.language_model.layers.2.mlp.up_proj"),
    ],
)
def test_an_adapter_of_the_whole_llava_that_lacks_a_layer_is_refused(
    the_parts: Published, targets: object, gone: str, tmp_path: Path
) -> None:
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(the_parts.onevision)
    get_peft_model(whole, LoraConfig(r=2, lora_alpha=2, target_modules=targets)).save_pretrained(str(tmp_path / "adapter"))  # type: ignore[arg-type]
    settings = ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (tmp_path / "adapter",))
    import_parts(settings)
    without("adapter/adapter_model.safetensors", re.escape(gone))(tmp_path)
    with pytest.raises(CheckpointError, match=rf"lacks the adapters of a layer that adapter_config.json names \({gone}\)"):
        import_parts(settings)


@pytest.mark.parametrize("rest", [TrainedParts(lora=None), TrainedParts(lora=None, frozen=("language.",)), TrainedParts(frozen=TABLES)])
def test_a_training_without_lora_or_with_frozen_parts_is_whole(the_parts: Published, rest: TrainedParts, tmp_path: Path) -> None:
    adaptation = Adaptation(load(the_parts.start), rest, 0)
    adaptation.save(tmp_path / "trained")
    done = import_parts(ImportSettings(the_parts.onevision, tmp_path / "checkpoint", the_parts.sam, (tmp_path / "trained",)))
    assert done.notes == ()
    same_tensors(load(tmp_path / "checkpoint"), adaptation.merge().state_dict())


def test_what_is_the_base_s_is_said_where_nothing_tells_whether_it_was_trained(a_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(a_copy / "onevision"), "--sam", str(a_copy / "sam_vit_mini.pth"), "--trained", str(a_copy / "trained")]
    removed("trained/trained.json")(a_copy)
    assert main([*arguments, "--output", str(a_copy / "new")]) == 0 and "the base's" not in capsys.readouterr().out
    removed("trained/adapter_config.json", ADAPTER)(a_copy)
    assert main([*arguments, "--output", str(a_copy / "new")]) == 0
    said = capsys.readouterr().out
    assert "note: the language model's layers are the base's: no trained part has any, or adapters; where it was trained with LoRA" in said
    trained_without(TABLES[1])(a_copy)
    assert main([*arguments, "--output", str(a_copy / "new")]) == 0
    said = capsys.readouterr().out
    assert "note: language.lm_head.weight: the base's, for no trained part has it; where it was trained, copy that part again" in said


def test_an_adapter_on_a_16_bit_base_is_not_rounded_away(the_parts: Published, tmp_path: Path) -> None:
    published.onevision(tmp_path / "half", dtype=torch.bfloat16)
    opened = import_parts(ImportSettings(tmp_path / "half", tmp_path / "checkpoint", the_parts.sam, (the_parts.trained,))).opened
    name = "language.model.layers.1.self_attn.q_proj.weight"
    merged, plain = opened.tensors[name], opened.tensors[name.replace("q_proj", "k_proj")]
    assert (merged.dtype, merged.span, plain.dtype) == (torch.float32, None, torch.bfloat16)
    factors = load_file(the_parts.trained / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    base = the_parts.theirs.state_dict()[name.replace("language.model", "model.language_model")].to(torch.bfloat16)
    exact = base.double() + 7 / 3 * (factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double())
    torch.testing.assert_close(merged.read().double(), exact, atol=1e-6, rtol=1e-6)


def test_bytes_that_can_be_used_as_they_stand_say_where_they_are(the_parts: Published) -> None:
    opened = open_checkpoint(the_parts.checkpoint)
    for name in ("pixel_encoder.layers.2.attn.qkv.weight", "semantic_encoder.projector.linear_1.weight", "spam.query.weight"):
        tensor = opened.tensors[name]
        assert tensor.span is not None
        with open(tensor.span.file, "rb") as file:
            file.seek(tensor.span.offset)
            stored = np.frombuffer(file.read(tensor.span.length), np.float32).reshape(tensor.shape)
        assert np.array_equal(stored, tensor.read().numpy()), name


def test_embeddings_that_training_resized_make_the_vocabulary(the_parts: Published, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(the_parts.trained, tmp_path / "trained"))
    rest = load_file(folder / "trained.safetensors")
    for name in ("language.model.embed_tokens.weight", "language.lm_head.weight"):
        rest[name] = torch.cat([rest[name], torch.ones(64, 24)])
    save_file(rest, folder / "trained.safetensors", metadata={"format": "pt"})
    opened = import_parts(ImportSettings(the_parts.onevision, tmp_path / "checkpoint", the_parts.sam, (folder,))).opened
    assert opened.config.language.vocabulary == published.VOCABULARY + 64
    assert load(tmp_path / "checkpoint").language(input_ids=torch.tensor([[500]])).logits.shape[-1] == published.VOCABULARY + 64
    del rest["language.lm_head.weight"]
    save_file(rest, folder / "trained.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[448, 24\], expected \[512, 24\].*give both as they were trained"):
        import_parts(ImportSettings(the_parts.onevision, tmp_path / "other", the_parts.sam, (folder,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "got one with use_dora; merge it with peft"),
        ({"bias": "all"}, "got one with bias = all"),
        ({"peft_type": "IA3"}, "got one with IA3"),
        ({"init_lora_weights": "pissa_niter_16"}, "got one with init_lora_weights = pissa_niter_16; merge it with peft"),
        ({"init_lora_weights": "olora"}, "got one with init_lora_weights = olora"),
        ({"alora_invocation_tokens": [5, 6]}, "got one with alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "got one with layer_replication"),
    ],
)
def test_an_adapter_that_no_weight_can_take_up_is_refused(a_copy: Path, change: dict[str, object], message: str) -> None:
    path = a_copy / "trained" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        import_parts(ImportSettings(a_copy / "onevision", a_copy / "new", a_copy / "sam_vit_mini.pth", (a_copy / "trained",)))


def test_an_adapter_that_does_not_fit_its_configuration_is_told_by_itself(a_copy: Path) -> None:
    assert contents(a_copy / "trained").problems == []
    in_json("trained/adapter_config.json", r=8)(a_copy)
    (problem,) = contents(a_copy / "trained").problems
    assert "expected adapters of rank 8" in problem
