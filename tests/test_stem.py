"""The convolutional stem: what it computes, that the ViT behind it starts silent, and that folding its norms changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch

from agvas.config import PixelEncoderConfig, tiny
from agvas.encoders import pixel_encoder
from agvas.stem import CONTRASTS, NEIGHBOURHOODS, ConvolutionalStem, StemmedVisionEncoder, from_neighbours, share_inside
from engines import open_engine
from export.adapters import PixelEncoderStage, axis_sizes
from export.onnx_writer import export_stage, write
from export.passes import lower_precision
from runtime.contract import STAGES
from runtime.parity import relative_error

CONFIG = dataclasses.replace(tiny().pixel, stem="convolutional")


def stemmed(seed: int = 0) -> StemmedVisionEncoder:
    """As after training: norms have seen data and the ViT is heard."""
    torch.manual_seed(seed)
    encoder = pixel_encoder(CONFIG)
    assert isinstance(encoder, StemmedVisionEncoder)
    torch.nn.init.ones_(encoder.neck.layer_norm2.weight)
    torch.nn.init.normal_(encoder.pos_embed)
    for _ in range(5):
        encoder.train()(torch.randn(4, 3, 56, 56))
    return encoder.eval()


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def test_a_pixel_is_compared_with_the_pixels_around_it_inside_the_picture() -> None:
    picture = torch.randn(1, 2, 11, 13)
    inside = torch.zeros(1, 1, 11, 13)
    inside[..., :8, :] = 1
    got = from_neighbours(picture * inside, inside, 5)
    for row in range(11):
        for column in range(13):
            around = picture[:, :, max(0, row - 2) : min(8, row + 3), max(0, column - 2) : column + 3]
            expected = picture[:, :, row, column] - around.mean(dim=(2, 3)) if row < 8 else torch.zeros(1, 2)
            torch.testing.assert_close(got[:, :, row, column], expected, atol=2e-5, rtol=0)  # 1e-6 against division by zero


def test_contrast_is_the_distance_from_the_neighbourhood_in_the_pictures_own_units() -> None:
    stem = ConvolutionalStem(patch_size=8, width=16, outputs=16)
    picture = image()[:1]
    cells = torch.nn.functional.avg_pool2d(picture, 2)  # a quarter of the patch
    everywhere = torch.ones(1, 1, 28, 28)
    colour = from_neighbours(cells, everywhere, NEIGHBOURHOODS[0])
    grey = from_neighbours(cells.mean(dim=1, keepdim=True), everywhere, NEIGHBOURHOODS[1])
    wide = from_neighbours(cells.mean(dim=1, keepdim=True), everywhere, NEIGHBOURHOODS[2])
    whole = cells.mean(dim=1, keepdim=True) - cells.mean()
    unit = (colour.abs() + 0.02).log().mean().exp()
    got = stem.contrast(picture)
    assert got.shape == (1, CONTRASTS, 28, 28)
    pixels = picture.mean(dim=1, keepdim=True).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # [1, 1, 28, 28, 4], a cell's pixels
    around = cells.mean(dim=1, keepdim=True) - grey
    darkest, brightest = pixels.amin(dim=4) - around, pixels.amax(dim=4) - around
    expected = torch.cat([colour, grey, wide, darkest, brightest, whole], dim=1) / unit
    torch.testing.assert_close(got[:, :8], expected, atol=1e-4, rtol=1e-4)


def test_a_line_thinner_than_a_cell_stands_out_by_its_darkest_pixel() -> None:
    stem = ConvolutionalStem(patch_size=16, width=16, outputs=16)
    picture = 0.02 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(2)) + 0.5
    picture[:, :, :, 61] -= 1.0
    got = stem.contrast(picture)[0]
    mean, darkest = got[3, 16, 15].abs(), got[5, 16, 15].abs()
    assert darkest > 3 * mean
    assert got[5, 16, 5].abs() < 0.2 * darkest


def test_the_last_channel_tells_how_near_a_border_is() -> None:
    picture = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    picture[..., 32:] = 0  # 28 x 16 cells inside, all of which every square of 65 covers
    share = ConvolutionalStem(patch_size=8, width=16, outputs=16).contrast(picture)[0, -1]
    torch.testing.assert_close(share[:, :16], torch.full((28, 16), 28 * 16 / 65**2))
    assert not share[:, 16:].any()
    middle, corner = share_inside(torch.ones(1, 1, 28, 28), 9, beyond=True)[0, 0, (14, 0), (14, 0)].tolist()
    assert (middle, corner) == (pytest.approx(1), pytest.approx(25 / 81))


def test_zeros_beyond_the_picture_are_counted_along_rows_alone(tmp_path: Path) -> None:
    """onnxruntime 1.21 to 1.24 count them wrongly below the lower end of a column, and answer without an error."""

    class Share(torch.nn.Module):
        def forward(self, inside: torch.Tensor) -> torch.Tensor:
            return share_inside(inside, 5, beyond=True)

    inside = torch.zeros(1, 1, 8, 8)
    inside[:, :, 2:, :6] = 1
    torch.onnx.export(Share().eval(), (inside,), str(tmp_path / "share.onnx"), input_names=["inside"], opset_version=20, dynamo=True)
    pools = [node for node in ir.load(tmp_path / "share.onnx").graph if node.op_type == "AveragePool"]
    counting = [node for node in pools if "count_include_pad" in node.attributes and node.attributes["count_include_pad"].as_int()]
    assert len(counting) == 2 and all(list(node.attributes["kernel_shape"].as_ints()) == [1, 5] for node in counting)
    rows = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6])
    columns = torch.tensor([0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    torch.testing.assert_close(Share()(inside)[0, 0], rows[:, None] * columns[None, :])


def test_padding_has_no_contrast_and_gives_none_to_the_picture_beside_it() -> None:
    stem = ConvolutionalStem(patch_size=8, width=16, outputs=16)
    flat = torch.full((1, 3, 56, 56), 0.7)
    flat[..., 32:] = 0
    assert stem.contrast(flat)[:, :-1].abs().max() < 1e-3
    padded, other = image(), image()
    padded[..., 32:], other[..., 32:] = 0, other[..., :24]
    got = stem.contrast(padded)
    assert not got[..., 16:].any()
    assert got[..., :16].abs().mean() == pytest.approx(stem.contrast(other)[..., :16].abs().mean().item(), rel=0.1)


def test_a_darker_or_flatter_picture_has_the_same_contrast() -> None:
    stem = ConvolutionalStem(patch_size=8, width=16, outputs=16)
    first, other = stem.contrast(image()), stem.contrast(0.5 * image() - 1.3)
    torch.testing.assert_close(first, other, atol=0.2, rtol=0.1)  # but for the floor that keeps blank pictures blank


def test_a_large_defect_hardly_changes_the_unit_of_what_lies_around_it() -> None:
    stem = ConvolutionalStem(patch_size=8, width=16, outputs=16)
    faint = 0.1 * image()
    striped = faint.clone()
    striped[..., 20:30] += 3  # a sixth of the picture, thirty times the texture
    away = (..., slice(0, 3), slice(None), slice(21, 28))  # beyond the stripe's neighbourhood
    lost = stem.contrast(faint)[away].abs().mean() / stem.contrast(striped)[away].abs().mean()
    colours = [from_neighbours(torch.nn.functional.avg_pool2d(x, 2), torch.ones(2, 1, 28, 28), 9) for x in (faint, striped)]
    plain_mean = colours[1].abs().mean() / colours[0].abs().mean()
    assert 1 < lost < plain_mean / 2


def test_one_pictures_contrast_does_not_depend_on_the_batch_it_came_in() -> None:
    stem = ConvolutionalStem(patch_size=8, width=16, outputs=16)
    pair = image() * torch.tensor([1.0, 9.0])[:, None, None, None]
    torch.testing.assert_close(stem.contrast(pair)[:1], stem.contrast(pair[:1]))


def test_a_new_encoder_says_what_its_stem_says_and_nothing_else() -> None:
    torch.manual_seed(0)
    encoder = pixel_encoder(CONFIG).eval()
    assert isinstance(encoder, StemmedVisionEncoder)
    with torch.no_grad():
        got = encoder(image()).last_hidden_state
        assert got.shape == (2, CONFIG.output_width, 7, 7)
        torch.testing.assert_close(got, encoder.patch_embed(image())[1], atol=1e-6, rtol=0)


def test_the_vit_is_heard_once_its_last_norm_is_not_zero() -> None:
    encoder = stemmed()
    with torch.no_grad():
        assert not torch.allclose(encoder(image()).last_hidden_state, encoder.patch_embed(image())[1], atol=0.1)


def test_folding_the_norms_into_the_convolutions_changes_no_output() -> None:
    encoder = stemmed()
    with torch.no_grad():
        before = encoder(image()).last_hidden_state
        encoder.patch_embed.fold()
        encoder.patch_embed.fold()  # twice is once
        after = encoder(image()).last_hidden_state
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "conv"}, "stem: expected"),
        ({"stem": "convolutional", "patch_size": 14, "image_size": 56}, "patch size that 8 divides, got 14"),
    ],
)
def test_a_stem_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixel_encoder(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


def test_sams_own_patch_embedding_is_what_a_config_without_a_stem_means() -> None:
    assert PixelEncoderConfig(56, 8, 12, 2, 2, 23, 3, (1,)).stem == "linear"
    assert not isinstance(pixel_encoder(tiny().pixel), StemmedVisionEncoder)


# --- exported ---


@pytest.fixture(scope="module")
def exported() -> tuple[StemmedVisionEncoder, ir.Model]:
    encoder = stemmed()
    stage = PixelEncoderStage(SimpleNamespace(pixel_encoder=encoder))  # type: ignore[arg-type]
    config = dataclasses.replace(tiny(), pixel=CONFIG)
    return encoder, export_stage(stage, "pixel_encoder", axis_sizes(config))


# A sixteen-bit type keeps 11 (fp16) or 8 (bf16) bits: rounded layer after layer, measured 2e-3 and 1e-2.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("contrast", [1.0, 0.02])
def test_the_exported_stem_gives_the_reference_even_on_a_faint_picture(
    exported: tuple[StemmedVisionEncoder, ir.Model], tmp_path: Path, precision: str, tolerance: float, contrast: float
) -> None:
    encoder, model = exported
    model = ir.from_proto(ir.to_proto(model))
    if precision != "fp32":
        lower_precision(model, precision)
    assert not [node.op_type for node in model.graph if node.op_type == "BatchNormalization"]
    write(model, tmp_path, "pixel_encoder")
    pictures = 1.5 + contrast * image()  # bright: what bf16 rounds away here is half of the faint picture's contrast
    with torch.no_grad():
        expected = encoder(pictures).last_hidden_state.numpy()
    engine = open_engine(tmp_path / "pixel_encoder.onnx", STAGES["pixel_encoder"], "openvino" if precision == "bf16" else "onnxruntime")
    got = engine.run({"pixel_image": pictures.numpy()})["pixel_embeddings"]
    error = relative_error(got, expected)
    assert error <= tolerance, error
    assert [name for name, _ in encoder.named_modules() if name.endswith("detail.1")]  # the reference keeps its norms
