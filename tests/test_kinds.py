"""Every kind of encoder and language model that a config may name: transformers' own computation, and the same from its exported graph."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import published
import pytest
import torch
from conftest import new_tiny
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
)

from agvas import AGVAS, load, save
from agvas.checkpoint import open_checkpoint
from agvas.config import AGVASConfig, tiny
from agvas.importing import ImportSettings, import_parts
from agvas.training.adaptation import Adaptation, TrainedParts
from engines import open_engine
from export.adapters import axis_sizes, example_inputs
from export.onnx_writer import export_stage, stage_module, write
from export.stage_weights import all_weights, stage_weights
from runtime.contract import STAGES

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def vit(kind: str) -> nn.Module:
    """As published: SigLIP with its text model beside it, DINOv2 gated, DINOv3 with registers and gated."""
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=56, intermediate_size=20))
    if kind == "siglip":
        text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
        return SiglipModel(SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 56, "intermediate_size": 20}))
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZES, image_size=56, mlp_ratio=2))
    if kind == "dinov2-gated":
        return Dinov2Model(Dinov2Config(**SIZES, image_size=56, mlp_ratio=2, use_swiglu_ffn=True))
    gated = {"use_gated_mlp": True, "hidden_act": "silu"} if kind == "dinov3-gated" else {}
    return DINOv3ViTModel(DINOv3ViTConfig(**SIZES, image_size=24, intermediate_size=20, num_register_tokens=4, **gated))


KINDS = ("clip", "siglip", "dinov2", "dinov2-gated", "dinov3", "dinov3-gated")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llava"
    published.llava_15(folder)
    return folder


def same_from_graph(checkpoint: Path, stage: str) -> None:
    """onnxruntime over the stage as it is exported, weights read from the parts as they are written, against the loaded model."""
    model, opened = load(checkpoint), open_checkpoint(checkpoint)
    skeleton, sizes = opened.skeleton(), axis_sizes(opened.config)
    weights = stage_weights(all_weights(opened), skeleton, stage)
    write(export_stage(stage_module(skeleton, stage), stage, sizes, weights), checkpoint / "graph", stage)
    inputs = example_inputs(stage, sizes, {"B": 1, "N": 7, "K": 3, "R": 2}, seed=5)  # other sizes than those of the export
    with torch.no_grad():
        expected: tuple[Tensor, ...] = stage_module(model, stage)(*inputs)
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(STAGES[stage].inputs, inputs, strict=True)}
    found = open_engine(checkpoint / "graph" / f"{stage}.onnx", STAGES[stage], "onnxruntime").run(feeds)
    for spec, tensor in zip(STAGES[stage].outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found[spec.name]), tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_in_sams_place_is_transformers_from_its_published_folder_and_exports(kind: str, base: Path, tmp_path: Path) -> None:
    theirs = vit(kind).eval()
    published.spread(theirs, 9)
    theirs.save_pretrained(tmp_path / "vit")
    published.write_processor(tmp_path / "vit")
    size = 56 if kind.startswith("dinov3") else None  # the others tell theirs
    import_parts(ImportSettings(base, tmp_path / "start", tmp_path / "vit", untrained=0, pixel_size=size))
    model = load(tmp_path / "start")
    assert model.config.pixel.kind == kind.partition("-")[0] and model.config.pixel.grid == 7
    assert model.config.preprocessing.pixel_mean == (127.5, 63.75, 31.875)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    again = AutoModel.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad():
        expected = getattr(again, "vision_model", again)(images).last_hidden_state
        found = model.pixel_encoder.backbone(images).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        embeddings = model.pixel_encoder(images).last_hidden_state
        patches = expected[:, -49:].unflatten(1, (7, 7))
        torch.testing.assert_close(embeddings, model.pixel_encoder.neck(patches), atol=1e-5, rtol=1e-5)
    same_from_graph(tmp_path / "start", "pixel_encoder")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA 1.5 with SAM's own file and an adapter, put together."""
    folder = tmp_path_factory.mktemp("trained")
    published.write_sam_pth(published.sam(), folder / "sam.pth")
    import_parts(ImportSettings(base, folder / "start", folder / "sam.pth", untrained=0))
    adaptation = Adaptation(load(folder / "start"), TrainedParts(), 0)
    with torch.no_grad():
        for name, parameter in adaptation.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adaptation.save(folder / "trained")
    import_parts(ImportSettings(base, folder / "checkpoint", folder / "sam.pth", (folder / "trained",)))
    return folder / "checkpoint"


@pytest.mark.parametrize("stage", STAGES)
def test_llava_15_exports_through_the_same_stages(stage: str, trained: Path) -> None:
    same_from_graph(trained, stage)


def test_a_tied_language_model_exports_with_its_head(tmp_path: Path) -> None:
    config = tiny()
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, tied_head=True))
    save(AGVAS(config, new_tiny().tokenizer), tmp_path)
    same_from_graph(tmp_path, "language")


@pytest.mark.parametrize("part", ["pixel", "semantic", "language"])
def test_a_kind_that_is_none_is_refused_by_name(part: str) -> None:
    fields = json.loads(tiny().to_json())
    fields[part]["kind"] = "other"
    with pytest.raises(ValueError, match=f"{part}.kind: expected one of .*, got 'other'"):
        AGVASConfig.from_json(json.dumps(fields))


def test_a_config_from_before_there_were_kinds_means_what_it_did() -> None:
    fields = json.loads(tiny().to_json())
    for part, names in (("pixel", ("kind", "registers", "gated")), ("semantic", ("kind",)), ("language", ("kind",))):
        for name in names:
            del fields[part][name]
    assert AGVASConfig.from_json(json.dumps(fields)) == tiny()
