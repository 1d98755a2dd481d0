"""SAM's windowed layers in an export: what transformers' layers compute, without products over the filling of windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionLayer

from agvas.config import PixelEncoderConfig
from agvas.encoders import pixel_encoder
from export.adapters import WindowLayer, without_padded_products

# A grid of 10 in windows of 4: 144 places for 100 tokens, in layers 0 and 2; layer 1 attends globally.
CONFIG = PixelEncoderConfig(80, 8, 32, 3, 4, 64, 4, (1,), output_width=16)
PLACES, TOKENS = 144, 100


def encoder(config: PixelEncoderConfig = CONFIG) -> SamVisionEncoder:
    torch.manual_seed(0)
    made = pixel_encoder(config).eval()
    for parameter in made.parameters():  # biases and relative positions too, which begin as zeros
        parameter.data.normal_(std=0.3)
    return made


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stem", ["linear", "convolutional"])
@torch.inference_mode()
def test_it_computes_what_sam_does_and_leaves_the_encoder_as_it_was(stem: str, batch: int) -> None:
    theirs = encoder(dataclasses.replace(CONFIG, stem=stem))
    ours = without_padded_products(theirs)
    assert [type(layer) for layer in ours.layers] == [WindowLayer, SamVisionLayer, WindowLayer]
    assert {type(layer) for layer in theirs.layers} == {SamVisionLayer}
    picture = torch.randn(batch, 3, 80, 80)
    wanted, found = theirs(picture).last_hidden_state, ours(picture).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_weights_are_shared_under_the_same_names() -> None:
    theirs = encoder()
    ours = dict(without_padded_products(theirs).named_parameters())
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    assert all(ours[name] is parameter for name, parameter in theirs.named_parameters())


@torch.inference_mode()
def test_the_filling_of_windows_costs_no_products_with_weights() -> None:
    picture, theirs = torch.randn(1, 3, 80, 80), encoder()
    work = []
    for one in (theirs, without_padded_products(theirs)):
        with FlopCounterMode(display=False) as counter:
            one(picture)
        work.append(counter.get_total_flops())
    a_token = 2 * 4 * CONFIG.width**2  # queries, keys, values and the way out, each as wide as the layer
    assert work[0] - work[1] == 2 * (PLACES - TOKENS) * a_token


def test_windows_that_divide_the_grid_are_left_to_sam() -> None:
    exact = encoder(dataclasses.replace(CONFIG, window=5))
    assert without_padded_products(exact) is exact
