"""The work that planning counts with is the work that torch counts, and the devices' floors follow from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import new_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agvas import AGVAS
from agvas.checkpoint import load
from agvas.config import ov_7b
from agvas.stem import CONTEXTS, CONTRASTS
from benchmarks import work
from export.adapters import ADAPTERS, PixelEncoderStage, axis_sizes, example_inputs
from runtime.contract import STAGES

TOKENS, ROWS = 37, 5


def counted(model: AGVAS, stage: str) -> int:
    sizes = axis_sizes(model.config)
    inputs = example_inputs(stage, sizes, {"B": 1, "N": TOKENS, "K": 0, "R": ROWS})
    with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]), torch.inference_mode():
        adapter = ADAPTERS[stage](model).eval()
        (adapter.for_graph() if isinstance(adapter, PixelEncoderStage) else adapter)(*inputs)
    constant = 2 * model.config.pixel.grid**2 * model.config.pixel.output_width if stage == "mask_decoder" else 0  # its positions
    return int(counter.get_total_flops()) - constant


def formula(model: AGVAS, stage: str) -> int:
    text = TOKENS - 2 * model.config.semantic.tokens
    return work.stage_work(model.config, text, ROWS)[stage].flops


@pytest.fixture(scope="module")
def models() -> dict[str, AGVAS]:
    return {"tiny": new_tiny(), "nano": load("nano")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_a_stage_has_the_flops_that_torch_counts(models: dict[str, AGVAS], name: str, stage: str) -> None:
    assert formula(models[name], stage) == pytest.approx(counted(models[name], stage), rel=1e-9)


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_the_weights_counted_are_the_models_but_for_biases_norms_and_tables(models: dict[str, AGVAS], name: str) -> None:
    model = models[name]
    for stage, listed in {"pixel_encoder": work.pixel_encoder, "semantic_encoder": work.semantic_encoder, "spam": work.spam}.items():
        parameters = getattr(model, stage).named_parameters()
        matrices = sum(p.numel() for n, p in parameters if p.dim() > 1 and "pos" not in n and "position" not in n)
        assert sum(product.parameters for product in listed(model.config)) == matrices, stage
    layers = [p for n, p in model.language.named_parameters() if p.dim() > 1 and "embed" not in n]
    assert sum(product.parameters for product in work.language_pass(model.config, TOKENS, ROWS)) == sum(p.numel() for p in layers)


def test_the_papers_model_costs_what_its_parts_are_known_to_cost() -> None:
    """SAM ViT-H 5.96 TFLOP (2.98 TMAC, Kirillov et al. 2023), SigLIP so400m at 384 px 0.67, Qwen2-7B at 1,536 tokens 20.5.

    Of SAM's, products of weights with the 804 tokens that fill its windows up are not computed here (export.adapters.WindowLayer).
    """
    filling = 28 * 804 * 2 * 4 * 1280**2 / 1e12
    found = work.stage_work(ov_7b())
    tera = {name: stage.flops / 1e12 for name, stage in found.items()}
    assert tera["pixel_encoder"] == pytest.approx(5.96 - filling, rel=0.01)
    assert tera["semantic_encoder"] == pytest.approx(0.67, rel=0.05)
    assert tera["language"] == pytest.approx(20.5, rel=0.05)
    assert tera["spam"] + tera["mask_decoder"] < 0.3
    assert found["pixel_encoder"].parameters == pytest.approx(637e6, rel=0.02)


def test_the_stems_constants_are_the_stems() -> None:
    assert (work.STEM_CONTRASTS, work.STEM_CONTEXTS) == (CONTRASTS, CONTEXTS)


def test_an_ablation_without_spam_has_no_such_stage_and_fewer_tokens() -> None:
    whole, without = ov_7b(), dataclasses.replace(ov_7b(), spam=None)
    assert "spam" not in work.stage_work(without)
    assert work.stage_work(without)["language"].flops < 0.6 * work.stage_work(whole)["language"].flops
