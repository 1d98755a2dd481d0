"""agvas-import: parts in their published layouts make the model that their own libraries compute, and nothing goes unaccounted for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from conftest import picture
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration, Qwen2ForCausalLM, SamModel

from agvas import AGVAS, CheckpointError, load, save
from agvas.checkpoint import open_checkpoint, weight_files
from agvas.config import ablated
from agvas.contents import contents
from agvas.import_cli import main
from agvas.importing import ImportSettings, import_parts
from agvas.lora import read_settings
from agvas.training.adaptation import Adaptation, LoRASettings, TrainedParts
from benchmarks.deepspeed_equivalence import difference_of_import

BASE, ADAPTER = "onevision/model.safetensors", "trained/adapter_model.safetensors"
UP = "language_model.model.layers.1.mlp.up_proj.weight"
TABLES = ("language.model.embed_tokens.weight", "language.lm_head.weight")
TARGETS = ("q_proj", "v_proj", "down_proj")
TRAINED = TrainedParts(lora=LoRASettings(rank=3, alpha=7, targets=TARGETS))


class Published:
    """The parts of one AG-VAS, written once; do not write into them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.onevision, self.sam = folder, folder / "onevision", folder / "sam_vit_mini.pth"
        self.theirs = published.onevision(self.onevision)
        self.their_sam: SamModel = published.sam()
        published.write_sam_pth(self.their_sam, self.sam)
        self.their_sam.save_pretrained(folder / "sam_model")
        self.start = folder / "start"
        import_parts(ImportSettings(self.onevision, self.start, self.sam, untrained=5))
        adaptation = Adaptation(load(self.start), TRAINED, 0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adaptation.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.trained = folder / "trained"
        adaptation.save(self.trained)
        self.state = {f"model.{name}": tensor.clone() for name, tensor in adaptation.model.state_dict().items()}  # of the Objective
        self.merged: AGVAS = adaptation.merge()
        self.checkpoint = folder / "checkpoint"
        import_parts(ImportSettings(self.onevision, self.checkpoint, self.sam, (self.trained,)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def imported(parts: Published) -> AGVAS:
    return load(parts.checkpoint)


@pytest.fixture
def copy(parts: Published, tmp_path: Path) -> Path:
    """The checkpoint and its parts, to be damaged."""
    return Path(shutil.copytree(parts.folder, tmp_path / "copy"))


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def same_tensors(found: AGVAS, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


# What is computed is what the parts' own libraries compute


@torch.no_grad()
def test_the_tower_s_features_are_transformers_hidden_states(parts: Published) -> None:
    """hidden_states[-1] is the last layer's output, before post_layernorm (whose weights would change it here)."""
    ours = load(parts.start).semantic_encoder
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(parts.onevision).eval().model
    features, embeddings = ours(images(45))
    output = theirs.vision_tower(images(45), output_hidden_states=True)
    expected = output.hidden_states[-1]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.last_hidden_state, expected, atol=1e-2)
    torch.testing.assert_close(embeddings, theirs.multi_modal_projector(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_language_model_s_logits_are_the_base_s(parts: Published) -> None:
    ids = torch.arange(5, 40)[None]
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(parts.onevision).eval()
    torch.testing.assert_close(load(parts.start).language(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def _in_memory(name: str) -> str:
    """As in the module: transformers 4.52 to 4.57 saved some LLaVAs so."""
    if "lm_head" in name:
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model', 'language_model')}"


def _with_vision_model(name: str) -> str:
    """As published: transformers before 5 had another module in the tower."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("prefixed", [_in_memory, _with_vision_model])
def test_older_and_newer_prefixes_are_the_same_base(parts: Published, prefixed: Callable[[str], str], tmp_path: Path) -> None:
    base = Path(shutil.copytree(parts.onevision, tmp_path / "base"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(base.glob("model*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (base / "model.safetensors.index.json").unlink()
    save_file({prefixed(name): tensor for name, tensor in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    import_parts(ImportSettings(base, tmp_path / "checkpoint", parts.sam, (parts.trained,)))
    same_tensors(load(tmp_path / "checkpoint"), parts.merged.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("given", ["sam_vit_mini.pth", "sam_model", "sam_model/model.safetensors"])
def test_sam_s_embeddings_are_transformers_from_either_layout(parts: Published, given: str, tmp_path: Path) -> None:
    import_parts(ImportSettings(parts.onevision, tmp_path / "start", parts.folder / given, untrained=0))
    model = load(tmp_path / "start")
    assert (model.config.pixel.window, model.config.pixel.global_layers, model.config.pixel.heads) == (3, (1,), 2)
    expected = parts.their_sam.vision_encoder(images(56)).last_hidden_state
    torch.testing.assert_close(model.pixel_encoder(images(56)).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_llava_15_takes_the_last_layer_but_one_without_the_class_token(parts: Published, tmp_path: Path) -> None:
    published.llava_15(tmp_path / "llava")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    import_parts(ImportSettings(tmp_path / "llava", tmp_path / "start", parts.sam, untrained=0))
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


def test_a_tied_head_is_the_table_and_stays_it(parts: Published, tmp_path: Path) -> None:
    """LLaVA-OneVision 0.5B."""
    theirs = published.onevision(tmp_path / "tied", tied=True)
    opened = import_parts(ImportSettings(tmp_path / "tied", tmp_path / "start", parts.sam, untrained=0)).opened
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
    import_parts(ImportSettings(tmp_path / "tied", tmp_path / "both", parts.sam, (tmp_path / "trained",)))
    assert torch.equal(load(tmp_path / "both").language.lm_head.weight, 2 * theirs.lm_head.weight)
    # The same over the base as imported before.
    import_parts(ImportSettings(tmp_path / "start", tmp_path / "again", None, (tmp_path / "trained",)))
    model = load(tmp_path / "again")
    assert model.config.language.tied_head and torch.equal(model.language.lm_head.weight, 2 * theirs.lm_head.weight)


# What was trained goes over the base


def test_the_checkpoint_is_the_merged_model_bit_for_bit(parts: Published, imported: AGVAS) -> None:
    assert imported.config == parts.merged.config
    same_tensors(imported, parts.merged.state_dict())
    expected, found = parts.merged.segment(picture()), imported.segment(picture())
    assert found.answer_ids == expected.answer_ids
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-6)


def test_merged_weights_are_peft_s_own(parts: Published, imported: AGVAS) -> None:
    """peft puts the adapter on the base as transformers loads it."""
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(parts.onevision)
    theirs = Qwen2ForCausalLM(whole.config.text_config)
    theirs.model.load_state_dict(whole.model.language_model.state_dict())
    merged = PeftModel.from_pretrained(theirs, str(parts.trained)).merge_and_unload().state_dict()
    changed = [name for name in merged if any(f".{target}.weight" in name for target in TARGETS)]
    assert len(changed) == 3 * len(TARGETS)
    for name in changed:
        assert torch.equal(imported.language.state_dict()[name], merged[name]), name
        assert not torch.equal(merged[name], load(parts.start).language.state_dict()[name])


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_of_the_whole_llava_in_peft_s_names_is_merged_as_peft_merges_it(
    parts: Published, stabilised: bool, tmp_path: Path
) -> None:
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(parts.onevision)
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
    import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (tmp_path / "adapter",)))
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
def test_the_layers_that_have_adapters_are_peft_s(parts: Published, settings: dict[str, object], tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=2, **settings)  # type: ignore[arg-type]
    config.save_pretrained(str(tmp_path))
    found = read_settings(tmp_path / "adapter_config.json")
    for name, module in parts.merged.language.named_modules():
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
    parts: Published, targets: object, gone: str, tmp_path: Path
) -> None:
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(parts.onevision)
    get_peft_model(whole, LoraConfig(r=2, lora_alpha=2, target_modules=targets)).save_pretrained(str(tmp_path / "adapter"))  # type: ignore[arg-type]
    settings = ImportSettings(parts.start, tmp_path / "checkpoint", None, (tmp_path / "adapter",))
    import_parts(settings)
    _without("adapter/adapter_model.safetensors", re.escape(gone))(tmp_path)
    with pytest.raises(CheckpointError, match=rf"lacks the adapters of a layer that adapter_config.json names \({gone}\)"):
        import_parts(settings)


@pytest.mark.parametrize("rest", [TrainedParts(lora=None), TrainedParts(lora=None, frozen=("language.",)), TrainedParts(frozen=TABLES)])
def test_a_training_without_lora_or_with_frozen_parts_is_whole(parts: Published, rest: TrainedParts, tmp_path: Path) -> None:
    adaptation = Adaptation(load(parts.start), rest, 0)
    adaptation.save(tmp_path / "trained")
    done = import_parts(ImportSettings(parts.onevision, tmp_path / "checkpoint", parts.sam, (tmp_path / "trained",)))
    assert done.notes == ()
    same_tensors(load(tmp_path / "checkpoint"), adaptation.merge().state_dict())


def test_what_is_the_base_s_is_said_where_nothing_tells_whether_it_was_trained(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(copy / "onevision"), "--sam", str(copy / "sam_vit_mini.pth"), "--trained", str(copy / "trained")]
    _removed("trained/trained.json")(copy)
    assert main([*arguments, "--output", str(copy / "new")]) == 0 and "the base's" not in capsys.readouterr().out
    _removed("trained/adapter_config.json", ADAPTER)(copy)
    assert main([*arguments, "--output", str(copy / "new")]) == 0
    said = capsys.readouterr().out
    assert "note: the language model's layers are the base's: no trained part has any, or adapters; where it was trained with LoRA" in said
    _trained_without(TABLES[1])(copy)
    assert main([*arguments, "--output", str(copy / "new")]) == 0
    said = capsys.readouterr().out
    assert "note: language.lm_head.weight: the base's, for no trained part has it; where it was trained, copy that part again" in said


def test_an_adapter_on_a_16_bit_base_is_not_rounded_away(parts: Published, tmp_path: Path) -> None:
    published.onevision(tmp_path / "half", dtype=torch.bfloat16)
    opened = import_parts(ImportSettings(tmp_path / "half", tmp_path / "checkpoint", parts.sam, (parts.trained,))).opened
    name = "language.model.layers.1.self_attn.q_proj.weight"
    merged, plain = opened.tensors[name], opened.tensors[name.replace("q_proj", "k_proj")]
    assert (merged.dtype, merged.span, plain.dtype) == (torch.float32, None, torch.bfloat16)
    factors = load_file(parts.trained / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    base = parts.theirs.state_dict()[name.replace("language.model", "model.language_model")].to(torch.bfloat16)
    exact = base.double() + 7 / 3 * (factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double())
    torch.testing.assert_close(merged.read().double(), exact, atol=1e-6, rtol=1e-6)


def test_bytes_that_can_be_used_as_they_stand_say_where_they_are(parts: Published) -> None:
    opened = open_checkpoint(parts.checkpoint)
    for name in ("pixel_encoder.layers.2.attn.qkv.weight", "semantic_encoder.projector.linear_1.weight", "spam.query.weight"):
        tensor = opened.tensors[name]
        assert tensor.span is not None
        with open(tensor.span.file, "rb") as file:
            file.seek(tensor.span.offset)
            stored = np.frombuffer(file.read(tensor.span.length), np.float32).reshape(tensor.shape)
        assert np.array_equal(stored, tensor.read().numpy()), name


def test_embeddings_that_training_resized_make_the_vocabulary(parts: Published, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts.trained, tmp_path / "trained"))
    rest = load_file(folder / "trained.safetensors")
    for name in ("language.model.embed_tokens.weight", "language.lm_head.weight"):
        rest[name] = torch.cat([rest[name], torch.ones(64, 24)])
    save_file(rest, folder / "trained.safetensors", metadata={"format": "pt"})
    opened = import_parts(ImportSettings(parts.onevision, tmp_path / "checkpoint", parts.sam, (folder,))).opened
    assert opened.config.language.vocabulary == published.VOCABULARY + 64
    assert load(tmp_path / "checkpoint").language(input_ids=torch.tensor([[500]])).logits.shape[-1] == published.VOCABULARY + 64
    del rest["language.lm_head.weight"]
    save_file(rest, folder / "trained.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[448, 24\], expected \[512, 24\].*give both as they were trained"):
        import_parts(ImportSettings(parts.onevision, tmp_path / "other", parts.sam, (folder,)))


# Training states


def deepspeed_state(parts: Published, folder: Path) -> Path:
    """As DeepSpeed 0.19 saves ZeRO 2 through accelerate: looked at on a run of its own."""
    step = folder / "state" / "pytorch_model"
    step.mkdir(parents=True)
    (folder / "state" / "latest").write_text("pytorch_model")
    shapes = [{name: tensor.shape for name, tensor in parts.state.items() if "lora_" in name}]
    states = {"module": parts.state, "buffer_names": [], "optimizer": None, "param_shapes": shapes, "ds_version": "0.19.8"}
    torch.save(states, step / "mp_rank_00_model_states.pt")
    settings = {"parts": {"lora": {"rank": 3, "alpha": 7, "targets": list(TARGETS)}}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "state"


@pytest.mark.parametrize("within", ["", "pytorch_model"])
def test_a_run_that_deepspeed_saved_is_read_without_running_code(parts: Published, within: str, tmp_path: Path) -> None:
    state = deepspeed_state(parts, tmp_path)
    import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (state / within,)))
    same_tensors(load(tmp_path / "checkpoint"), parts.merged.state_dict())


def test_a_deepspeed_state_in_16_bit_says_where_the_finer_weights_are(parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(parts, tmp_path)
    done = import_parts(ImportSettings(parts.start, tmp_path / "whole", None, (state,)))
    assert not any("16-bit" in note for note in done.notes)
    halves = {name: tensor.bfloat16() for name, tensor in parts.state.items()}
    torch.save({"module": halves}, state / "pytorch_model" / "mp_rank_00_model_states.pt")
    done = import_parts(ImportSettings(parts.start, tmp_path / "half", None, (state,)))
    assert any("holds 16-bit weights" in note and "zero_to_fp32.py" in note for note in done.notes)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_what_zero_to_fp32_writes_is_read(parts: Published, form: str, tmp_path: Path) -> None:
    deepspeed_state(parts, tmp_path)
    merged = tmp_path / "merged"
    merged.mkdir()
    if form == "model.safetensors":
        save_file(parts.state, merged / form, metadata={"format": "pt"})
    elif form == "pytorch_model.bin":
        torch.save(parts.state, merged / form)
    else:
        places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(parts.state)}
        for shard in set(places.values()):
            torch.save({name: tensor for name, tensor in parts.state.items() if places[name] == shard}, merged / shard)
        (merged / form).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    import_parts(ImportSettings(parts.onevision, tmp_path / "checkpoint", parts.sam, (merged,), config=parts.trained / "config.json"))
    same_tensors(load(tmp_path / "checkpoint"), parts.merged.state_dict())


class Foreign:
    """Stands for an object of another library in a pickle."""


def test_a_state_with_objects_in_it_says_what_to_run(parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(parts, tmp_path)
    torch.save({"module": parts.state, "loss_scaler": Foreign()}, state / "pytorch_model" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*Foreign\).*zero_to_fp32.py . merged --safe_serialization"):
        import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (state,)))


def test_zero_stage_3_says_what_to_run(parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(parts, tmp_path)
    whole = state / "pytorch_model" / "mp_rank_00_model_states.pt"
    whole.rename(whole.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt"))
    with pytest.raises(CheckpointError, match="ZeRO stage 3, whose weights are in pieces; run `python zero_to_fp32.py"):
        import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (state,)))


@pytest.mark.parametrize(
    ("within", "lora", "message"),
    [
        ("layers.2.mlp.down_proj.lora_", {}, r"a layer that settings.json names \(model.language.model.layers.2.mlp.down_proj\): copy"),
        ("nothing", {"rank": 4}, "expected adapters of rank 4, as .*settings.json says, got rank 3; give the settings.json that was"),
    ],
)
def test_a_state_s_adapters_are_those_of_its_run(
    parts: Published, within: str, lora: dict[str, object], message: str, tmp_path: Path
) -> None:
    state = deepspeed_state(parts, tmp_path)
    torch.save(
        {"module": {name: tensor for name, tensor in parts.state.items() if within not in name}},
        state / "pytorch_model" / "mp_rank_00_model_states.pt",
    )
    settings = {"rank": 3, "alpha": 7, "targets": list(TARGETS)} | lora
    (tmp_path / "settings.json").write_text(json.dumps({"parts": {"lora": settings}}))
    with pytest.raises(CheckpointError, match=message):
        import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (state,)))


def test_the_state_of_a_run_is_the_checkpoint_it_left(parts: Published, tmp_path: Path) -> None:
    """By the measure of benchmarks/deepspeed_equivalence.py, which takes a state that DeepSpeed wrote."""
    deepspeed_state(parts, tmp_path)
    save(parts.merged, tmp_path / "checkpoint")
    assert difference_of_import(parts.start, tmp_path) == 0
    other = load(parts.checkpoint)
    with torch.no_grad():
        other.mask_decoder.queries += 0.25
    save(other, tmp_path / "checkpoint")
    assert difference_of_import(parts.start, tmp_path) == pytest.approx(0.25, abs=1e-5)


def test_adapters_whose_scale_nothing_says_are_refused(parts: Published, tmp_path: Path) -> None:
    save_file(parts.state, tmp_path / "state.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds adapters and nothing says their scale; put peft's adapter_config.json"):
        import_parts(ImportSettings(parts.start, tmp_path / "checkpoint", None, (tmp_path / "state.safetensors",)))


# Configuration


def test_pictures_are_normalised_as_the_base_s_processor_says(parts: Published) -> None:
    """The processor class's defaults are CLIP's."""
    preprocessing = open_checkpoint(parts.start).config.preprocessing
    assert preprocessing.semantic_mean == (127.5, 63.75, 31.875)
    assert preprocessing.semantic_std == (127.5, 102.0, 76.5)
    assert (preprocessing.pixel_size, preprocessing.semantic_size) == (56, 45)


def test_the_config_is_the_base_s_own(parts: Published) -> None:
    language = open_checkpoint(parts.start).config.language
    assert (language.rope_theta, language.norm_epsilon, language.heads, language.key_value_heads) == (1_000_000.0, 1e-6, 6, 2)
    assert (language.vocabulary, language.max_positions, language.tied_head) == (published.VOCABULARY, 512, False)


def test_anchors_are_added_behind_the_base_s_tokens(parts: Published) -> None:
    before = Tokenizer.from_file(str(parts.onevision / "tokenizer.json")).get_vocab_size()
    tokenizer = open_checkpoint(parts.start).tokenizer
    assert [tokenizer.token_to_id(anchor) for anchor in ("[NOR]", "[ANO]", "[SEG]")] == [before, before + 1, before + 2]
    assert tokenizer.encode("a[SEG]b", add_special_tokens=False).ids.count(before + 2) == 1


def test_without_a_config_the_shapes_tell_and_the_rest_is_said_to_be_assumed(parts: Published, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts.trained, tmp_path / "trained"))
    (folder / "config.json").unlink()
    done = import_parts(ImportSettings(parts.onevision, tmp_path / "checkpoint", parts.sam, (folder,)))
    assert any("spam.heads = 8" in note for note in done.notes)
    same_tensors(load(tmp_path / "checkpoint"), parts.merged.state_dict())


@pytest.mark.parametrize(("field", "value"), [("language.heads", 12), ("language.rope_theta", 10.0), ("pixel.heads", 3)])
def test_a_config_of_another_base_is_refused_though_every_shape_fits(parts: Published, field: str, value: float, tmp_path: Path) -> None:
    fields = json.loads((parts.trained / "config.json").read_text())
    part, name = field.split(".")
    fields[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = ImportSettings(parts.onevision, tmp_path / "out", parts.sam, (parts.trained,), config=tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=f"does not belong to this base and pixel encoder: {field} is {value}"):
        import_parts(settings)
    assert not (tmp_path / "out").exists()


def _in_config(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        fields = json.loads((folder / "onevision" / "config.json").read_text())
        change(fields)
        (folder / "onevision" / "config.json").write_text(json.dumps(fields))

    return apply


def _changed(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """One safetensors file of the parts, or the shards of the base as one file, with other tensors in it."""

    def apply(folder: Path) -> None:
        path = folder / file
        state: dict[str, Tensor] = {}
        for shard in sorted(path.parent.glob("model-*.safetensors")) or [path]:
            state |= load_file(shard)
            shard.unlink()
        (path.parent / "model.safetensors.index.json").unlink(missing_ok=True)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return apply


def _without(file: str, *patterns: str) -> Callable[[Path], None]:
    def change(state: dict[str, Tensor]) -> None:
        gone = [name for name in state if any(re.search(pattern, name) for pattern in patterns)]
        assert gone
        for name in gone:
            del state[name]

    return _changed(file, change)


def _trained_without(*names: str) -> Callable[[Path], None]:
    return _without("trained/trained.safetensors", *names)


def _trained_with(name: str) -> Callable[[Path], None]:
    return _changed("trained/trained.safetensors", lambda state: state.update({name: torch.zeros(5)}))


def _in_sam(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = torch.load(folder / "sam_vit_mini.pth")
        change(state)
        torch.save(state, folder / "sam_vit_mini.pth")

    return apply


def _in_json(file: str, **fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))

    return apply


def _removed(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


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
        (_removed("trained/adapter_config.json"), "adapter_config.json cannot be read as peft's"),
        (_removed("trained/adapter_config.json", ADAPTER), r"trained lacks adapter_config.json, adapter_model.*its trained.json names"),
        (
            _without(ADAPTER, r"layers\.0\..*q_proj"),
            r"trained lacks the adapters of a layer that adapter_config.json names \(model.layers.0.self_attn.q_proj\): copy it again",
        ),
        (
            _without(ADAPTER, "q_proj", "v_proj", r"layers\.[02]"),
            r"lacks the adapters of 8 layers .*\(model.layers.0.mlp.down_proj, model.layers.0.self_attn.q_proj, .* and 5 more\)",
        ),
        (_without(ADAPTER, "lora_"), "adapter_model.safetensors: expected the adapters that adapter_config.json tells of, got none; copy"),
        (
            _in_json("trained/adapter_config.json", r=8),
            r"model.layers.0.mlp.down_proj, .* and 6 more: expected adapters of rank 8, as trained/adapter_config.json says, got rank 3",
        ),
        (_in_json("trained/adapter_config.json", rank_pattern={"2.self_attn.v_proj": 4}), "layers.2.self_attn.v_proj: .* of rank 4"),
        (_in_json("trained/adapter_config.json", target_modules="model.*("), "adapter_config.json cannot be read as peft's"),
        (_in_json("trained/adapter_config.json", modules_to_save=["lm_head"]), "lacks lm_head, which adapter_config.json names in mod"),
        (_trained_without(*TABLES), "lacks language.lm_head.weight, language.model.embed_tokens.weight, which its trained.json names"),
        (_trained_without(TABLES[1]), "trained lacks language.lm_head.weight, which its trained.json names: copy the whole folder again"),
        (
            _all(_trained_without(*TABLES), _in_json("trained/trained.json", tensors=None)),
            "trained.json cannot be read as what agvas-train leaves",
        ),
        (  # as agvas-train wrote it before
            _all(_trained_without(*TABLES), lambda folder: (folder / "trained/trained.json").write_text('{"parts": ["language", "spam"]}')),
            "trained lacks language, which its trained.json names",
        ),
        (
            _without(BASE, UP),
            rf"the parts do not fit together: missing language.model.layers.1.mlp.up_proj.weight \[37, 24\] "
            rf"\({UP} of onevision: copy every file of it again\)\n$",
        ),
        (
            _changed(BASE, lambda state: state.update({UP: torch.zeros(37, 20)})),
            rf": language.model.layers.1.mlp.up_proj.weight is \[37, 20\], expected \[37, 24\] \({UP} of onevision: it is of another model",
        ),
        (
            _changed(BASE, lambda state: state.update({UP.replace("1", "7"): torch.zeros(37, 24)})),
            rf": unexpected language.model.layers.7.mlp.up_proj.weight \[37, 24\] \({UP.replace('1', '7')} of onevision: it is of another",
        ),
        (_changed(BASE, lambda state: state.update(other=torch.zeros(3))), r"unexpected other in onevision \(nothing here is called so"),
        (
            _in_sam(lambda state: state.pop("image_encoder.blocks.1.mlp.lin1.bias")),
            r"layers.1.mlp.lin1.bias \[23\] \(image_encoder.blocks.1.mlp.lin1.bias of sam_vit_mini.pth: copy the whole file again\)",
        ),
        (
            _in_sam(lambda state: state.update({"image_encoder.neck.2.weight": torch.zeros(3)})),
            r"neck.conv2.weight is \[3\], .*\(image_encoder.neck.2.weight of sam_vit_mini.pth: it is of another model, give the part that",
        ),
        (
            _changed(BASE, _renamed),
            r"onevision has the names of LLaVA's own code \(model\..*, expected Hugging Face's layout; give the same base in .*llava-hf",
        ),
        (_with_tokens, rf"tokenizer.json has ids up to \d+, the vocabulary {published.VOCABULARY} rows \(give the tokenizer of"),
        (_trained_without("spam.query.bias"), r"missing spam.query.bias \[256\] \(it was trained"),
        (_trained_without("mask_decoder.frequencies"), r"missing mask_decoder.frequencies \[2, 16\]"),
        (_trained_with("spam.extra"), r"unexpected spam.extra \[5\]"),
        (_trained_with("other.extra"), "unexpected other.extra in .*trained"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    copy: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(copy)
    arguments = ["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained", "--output", "new"]
    before = sorted(path.name for path in copy.iterdir())
    monkeypatch.chdir(copy)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("agvas-import: ") and re.search(message, error), error
    assert sorted(path.name for path in copy.iterdir()) == before


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
def test_an_adapter_that_no_weight_can_take_up_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    path = copy / "trained" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        import_parts(ImportSettings(copy / "onevision", copy / "new", copy / "sam_vit_mini.pth", (copy / "trained",)))


def test_an_adapter_that_does_not_fit_its_configuration_is_told_by_itself(copy: Path) -> None:
    assert contents(copy / "trained").problems == []
    _in_json("trained/adapter_config.json", r=8)(copy)
    (problem,) = contents(copy / "trained").problems
    assert "expected adapters of rank 8" in problem


# The folder


def test_a_checkpoint_moves_together_with_its_parts(
    copy: Path, parts: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert main(["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained", "--output", "moving", "--json"]) == 0
    monkeypatch.chdir(parts.folder)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["problems"] == [] and [part["role"] for part in told["parts"]] == ["base", "pixel encoder", "trained"]
    assert sum(path.stat().st_size for path in (copy / "moving").iterdir()) < 100_000
    moved = copy.rename(copy.with_name("elsewhere"))
    same_tensors(load(moved / "moving"), parts.merged.state_dict())


def test_a_part_that_was_moved_away_is_named(copy: Path) -> None:
    text = (copy / "checkpoint" / "parts.json").read_text().replace("sam_vit_mini.pth", "gone.pth")
    (copy / "checkpoint" / "parts.json").write_text(text)
    with pytest.raises(CheckpointError, match="parts.json: pixel_encoder: .*gone.pth is not there; correct the path"):
        load(copy / "checkpoint")


def test_a_folder_of_something_else_is_not_written_over(parts: Published, tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(CheckpointError, match="exists and was not written by agvas-import"):
        import_parts(ImportSettings(parts.onevision, tmp_path, parts.sam, (parts.trained,)))


@pytest.mark.parametrize("within", [".", "trained"])
def test_parts_are_not_written_over_by_what_is_made_of_them(parts: Published, tmp_path: Path, within: str) -> None:
    import_parts(ImportSettings(parts.onevision, tmp_path / "start", parts.sam, untrained=0))
    (tmp_path / "start" / "trained").mkdir()
    before = {path.name: path.stat().st_size for path in (tmp_path / "start").iterdir()}
    settings = ImportSettings(tmp_path / "start", tmp_path / "start", None)
    if within != ".":
        settings = ImportSettings(parts.onevision, tmp_path / "start", parts.sam, (tmp_path / "start" / within,))
    with pytest.raises(CheckpointError, match="start would replace .*choose another --output"):
        import_parts(settings)
    assert {path.name: path.stat().st_size for path in (tmp_path / "start").iterdir()} == before


def test_a_base_that_is_a_file_is_asked_for_as_a_folder(parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder .*got a file; are --base and --pixel-encoder swapped"):
        import_parts(ImportSettings(parts.sam, tmp_path / "out", parts.onevision, untrained=0))
    with pytest.raises(CheckpointError, match="expected a folder .*got a file; give the folder that holds"):
        import_parts(ImportSettings(parts.sam, tmp_path / "out", untrained=0))
    assert not list(tmp_path.iterdir())


def test_parts_without_a_training_say_what_to_give(parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no part has a mask decoder; give what a training left .*or --untrained"):
        import_parts(ImportSettings(parts.onevision, tmp_path / "out", parts.sam))
    assert not list(tmp_path.iterdir())


def test_a_single_anchors_training_is_imported_with_that_anchor_alone(parts: Published, tmp_path: Path) -> None:
    config = ablated(load(parts.start).config, "single-anchor")
    (tmp_path / "ablated.json").write_text(config.to_json())
    import_parts(ImportSettings(parts.onevision, tmp_path / "start", parts.sam, untrained=0, config=tmp_path / "ablated.json"))
    model = load(tmp_path / "start")
    state = tmp_path / "run" / "state" / "step"
    state.mkdir(parents=True)
    (state.parent / "latest").write_text("step")
    torch.save({"module": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}, state / "mp_rank_00_model_states.pt")
    found = import_parts(ImportSettings(parts.onevision, tmp_path / "stopped", parts.sam, (state.parent,))).opened.config
    assert found.mask_decoder.roles == config.mask_decoder.roles == ("segment",)
    assert found.prompts.anchors == ("[SEG]",) and found.prompts.answer == config.prompts.answer


def test_anchors_and_roles_that_differ_in_number_are_no_checkpoint(parts: Published, copy: Path) -> None:
    path = copy / "start" / "config.json"
    fields = json.loads(path.read_text())
    fields["mask_decoder"]["roles"] = ["segment"]
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="prompts.anchors: expected one for each of mask_decoder.roles"):
        load(copy / "start")


def test_a_checkpoint_that_names_itself_as_its_base_is_told(copy: Path) -> None:
    path = copy / "checkpoint" / "parts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "../checkpoint"}))
    with pytest.raises(CheckpointError, match="base: expected another checkpoint, got this one"):
        load(copy / "checkpoint")


def test_an_output_behind_a_linked_folder_finds_its_parts(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "deep" / "real").mkdir(parents=True)
    (copy / "link").symlink_to(copy / "deep" / "real", target_is_directory=True)
    monkeypatch.chdir(copy)
    arguments = ["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained"]
    assert main([*arguments, "--output", "link/new"]) == 0
    assert load(copy / "deep" / "real" / "new").config == load(copy / "checkpoint").config


def test_the_files_of_a_base_in_parts_are_its_own_and_those_it_names(parts: Published, tmp_path: Path) -> None:
    import_parts(ImportSettings(parts.onevision, tmp_path / "start", parts.sam, untrained=0))
    import_parts(ImportSettings(tmp_path / "start", tmp_path / "both", None, (parts.trained,)))
    files = {path.resolve() for path in weight_files(tmp_path / "both")}
    assert {path.resolve() for path in weight_files(tmp_path / "start")} < files
    assert {parts.sam.resolve(), *(path.resolve() for path in parts.onevision.glob("*.safetensors"))} < files


@pytest.mark.parametrize("what", ["onevision", "trained"])
def test_a_part_given_as_a_checkpoint_says_how_to_import_it(parts: Published, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"agvas-import --base .*{what}"):
        load(parts.folder / what)


def test_random_parts_are_made_only_where_there_are_none(parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hold SPAM or a mask decoder already"):
        import_parts(ImportSettings(parts.onevision, tmp_path / "out", parts.sam, (parts.trained,), untrained=0))


def test_a_checkpoint_in_shards_is_loaded(parts: Published, tmp_path: Path) -> None:
    save(parts.merged, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{1 + index % 3:05}-of-00003.safetensors" for index, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: tensor for name, tensor in state.items() if places[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    same_tensors(load(tmp_path), parts.merged.state_dict())
    some = next(iter(places))
    index.write_text(json.dumps({"weight_map": {name: shard for name, shard in places.items() if name != some}}))
    with pytest.raises(CheckpointError, match=f"do not belong together: {some}"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {some: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected a file beside it"):
        load(tmp_path)


@pytest.mark.parametrize("option", ["--base", "--pixel-encoder", "--trained"])
def test_a_part_that_is_not_there_is_named_as_it_was_given(option: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--base": "onevision", "--pixel-encoder": "sam_vit_mini.pth", "--trained": "trained"}
    given = {name: str(copy / ("nowhere" if name == option else path)) for name, path in given.items()}
    assert main([*(text for pair in given.items() for text in pair), "--output", str(copy / "new")]) == 2
    assert capsys.readouterr().err == f"agvas-import: {option} {copy / 'nowhere'}: no such file or folder; correct the path\n"
    assert not (copy / "new").exists()
