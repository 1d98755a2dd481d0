"""Pictures in, pictures out: the encoders' inputs against slow rules and published processors, and the way back."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from agvas.config import nano, ov_7b, tiny
from runtime import preprocess
from runtime.preprocess import Frame, frame_of

SIZES = [(41, 67), (67, 41), (56, 56), (1, 1), (1, 4000), (4000, 1), (3, 200), (112, 56), (57, 113), (500, 333)]
SETTINGS = tiny().preprocessing


def sam_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """ResizeLongestSide.get_preprocess_shape of facebookresearch/segment-anything, utils/transforms.py."""
    scale = long_side * 1.0 / max(height, width)
    new_height, new_width = height * scale, width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


@pytest.mark.parametrize("side", [56, 224, 1024])
def test_the_longest_side_rule_is_sams(side: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 3000, (200, 2))] + SIZES
    for height, width in sizes:
        frame = frame_of(height, width, side)
        rows, columns = sam_shape(height, width, side)
        # SAM leaves no row of a picture thinner than half a pixel; ours keeps one.
        assert (frame.resized_height, frame.resized_width) == (max(1, rows), max(1, columns))
        assert (frame.height, frame.width, frame.padded_size) == (height, width, side)
        assert max(frame.resized_height, frame.resized_width) == side


@pytest.mark.parametrize(("height", "width"), [(56, 31), (17, 56), (56, 56)])
def test_a_picture_of_the_right_size_is_normalised_pixel_by_pixel(height: int, width: int) -> None:
    image = picture(1, height, width)
    got, frame = preprocess.pixel_image(Image.fromarray(image), SETTINGS)
    expected = np.zeros((3, 56, 56))
    for row in range(height):
        for column in range(width):
            for channel in range(3):
                mean, std = SETTINGS.pixel_mean[channel], SETTINGS.pixel_std[channel]
                expected[channel, row, column] = (float(image[row, column, channel]) - mean) / std
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-6)  # fp32 multiplies by a rounded reciprocal
    assert frame == Frame(height, width, height, width, 56)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_padding_is_zero_after_normalisation_and_the_picture_is_not(height: int, width: int) -> None:
    image = np.full((height, width, 3), 255, np.uint8)
    got, frame = preprocess.pixel_image(Image.fromarray(image), SETTINGS)
    assert got.shape == (3, 56, 56)
    inside = np.zeros((56, 56), bool)
    inside[: frame.resized_height, : frame.resized_width] = True
    assert (got[:, ~inside] == 0).all()
    assert (got[:, inside] > 2).all()  # white is more than two deviations above each mean


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_semantic_image_is_the_whole_picture_squashed(height: int, width: int) -> None:
    image = picture(2, height, width)
    got = preprocess.semantic_image(Image.fromarray(image), SETTINGS)
    assert got.shape == (3, 45, 45)
    assert got.dtype == np.float32
    squashed = np.asarray(Image.fromarray(image).resize((45, 45), Image.Resampling.BICUBIC), np.float64)
    np.testing.assert_allclose(got, ((squashed - 127.5) / 127.5).transpose(2, 0, 1), atol=2e-6)


def test_a_picture_is_never_changed_and_need_not_be_contiguous_or_writable() -> None:
    image = picture(3)
    before = image.copy()
    image.flags.writeable = False
    for view in (image, image[::-1, ::-1], image[..., ::-1], image.transpose(1, 0, 2)):
        straight = np.ascontiguousarray(view)
        got, expected = preprocess.encoder_images(view, SETTINGS), preprocess.encoder_images(straight, SETTINGS)
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("settings", [SETTINGS, nano().preprocessing], ids=["tiny", "nano"])
def test_inputs_agree_with_the_published_image_processors(
    settings: preprocess.Preprocessing, height: int, width: int
) -> None:
    """transformers' Pillow processors, which import without torchvision."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    if 0 in sam_shape(height, width, settings.pixel_size):
        height, width = (2 * side if side == 1 else side // 50 for side in (height, width))  # SAM's has no row left to resize to
    image = picture(4, height, width)
    side, small = settings.pixel_size, settings.semantic_size
    sam = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    expected = np.asarray(sam(image, return_tensors="np", input_data_format="channels_last")["pixel_values"])
    np.testing.assert_allclose(preprocess.pixel_image(Image.fromarray(image), settings)[0], expected[0], atol=3e-6)
    siglip = SiglipImageProcessorPil(size={"height": small, "width": small})
    expected = np.asarray(siglip(image, return_tensors="np", input_data_format="channels_last")["pixel_values"])
    np.testing.assert_allclose(preprocess.semantic_image(Image.fromarray(image), settings), expected[0], atol=3e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_both_images_made_at_once_are_the_two_made_alone(height: int, width: int) -> None:
    image = picture(5, height, width)
    pixel, semantic, frame = preprocess.encoder_images(image, SETTINGS)
    alone, its_frame = preprocess.pixel_image(Image.fromarray(image), SETTINGS)
    np.testing.assert_array_equal(pixel, alone)
    np.testing.assert_array_equal(semantic, preprocess.semantic_image(Image.fromarray(image), SETTINGS))
    assert frame == its_frame


def test_the_statistics_are_the_published_ones() -> None:
    for config in (ov_7b(), nano(), tiny()):
        settings = config.preprocessing
        np.testing.assert_allclose(np.array(settings.pixel_mean) / 255, [0.485, 0.456, 0.406], atol=1e-9)
        np.testing.assert_allclose(np.array(settings.pixel_std) / 255, [0.229, 0.224, 0.225], atol=1e-9)
        assert set(settings.semantic_mean) == set(settings.semantic_std) == {127.5}
        assert (settings.pixel_size, settings.semantic_size) == (config.pixel.image_size, config.semantic.image_size)


def cells_of(frame: Frame, side: int) -> tuple[float, float]:
    """Rows and columns of a map of `side` cells that the picture covers, in fractions of a cell."""
    return frame.resized_height * side / frame.padded_size, frame.resized_width * side / frame.padded_size


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("axis", [0, 1])
def test_half_of_the_frame_comes_back_as_half_of_the_picture(height: int, width: int, axis: int) -> None:
    side = 28
    frame = frame_of(height, width, 56)
    covered = cells_of(frame, side)[axis]
    steps = np.clip(np.arange(1, side + 1) - covered / 2, 0, 1).astype(np.float32)  # share of each cell in the second half
    half = np.broadcast_to(steps[:, None] if axis == 0 else steps, (side, side)).copy()
    got = preprocess.restore(half, frame)
    assert got.shape == (height, width)
    assert got.dtype == np.float32
    length = (height, width)[axis]
    along = got.mean(axis=1 - axis)
    assert np.ptp(got, axis=1 - axis).max() < 1e-5  # nothing changes across the other axis
    blur = 1.5 * max(1.0, length / covered)  # bilinear: one cell to each side, and a half for the split cell
    centres = np.arange(length) + 0.5
    assert (along[centres < length / 2 - blur] < 1e-5).all()
    assert (along[centres > length / 2 + blur] > 1 - 1e-5).all()
    assert (np.diff(along) > -1e-6).all()
    if covered >= 3 and length >= 3:
        assert along.mean() == pytest.approx(0.5, abs=0.02)  # the edge has not moved


@pytest.mark.parametrize(("height", "width"), [(41, 67), (67, 41), (500, 333)])
def test_a_point_of_the_picture_lies_where_its_cell_was(height: int, width: int) -> None:
    """Against a slow rule: the map's cell (r, c) is centred on the picture's pixel ((r + ½) H / rows, (c + ½) W / columns)."""
    side = 28
    frame = frame_of(height, width, 56)
    rows, columns = cells_of(frame, side)
    for row, column in [(1, 1), (3, 11), (int(rows) - 2, int(columns) - 2), (2, int(columns) - 2)]:
        point = np.zeros((side, side), np.float32)
        point[row, column] = 1
        got = preprocess.restore(point, frame)
        y, x = ((got.sum(axis=axis) * (np.arange(length) + 0.5)).sum() / got.sum() for axis, length in ((1, height), (0, width)))
        assert y == pytest.approx((row + 0.5) * height / rows, abs=0.1)
        assert x == pytest.approx((column + 0.5) * width / columns, abs=0.1)


@pytest.mark.parametrize("side", [28, 128, 25])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (480, 640), (719, 1283), (1283, 719), (500, 1001), (3000, 170), (30, 31)])
def test_the_way_back_is_pillows_to_the_bit(height: int, width: int, side: int) -> None:
    """The oracle is one resize by Pillow of the same box."""
    for padded_size in (56, 512):
        frame = frame_of(height, width, padded_size)
        rows, columns = cells_of(frame, side)
        anomaly_map = np.random.default_rng(height * side).random((side, side), np.float32)
        inside = Image.fromarray(anomaly_map[: int(np.ceil(rows)), : int(np.ceil(columns))])
        expected = np.asarray(inside.resize((width, height), Image.Resampling.BILINEAR, box=(0.0, 0.0, columns, rows)))
        np.testing.assert_array_equal(preprocess.restore(anomaly_map, frame), expected)


@pytest.mark.parametrize("side", [28, 14, 56, 25])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_nothing_of_the_padding_bleeds_into_the_picture(height: int, width: int, side: int) -> None:
    frame = frame_of(height, width, 56)
    rows, columns = (int(np.ceil(cells)) for cells in cells_of(frame, side))
    padded = np.full((side, side), 1e30, np.float32)
    padded[:rows, :columns] = 0.25
    np.testing.assert_allclose(preprocess.restore(padded, frame), 0.25, atol=1e-6)
    padded[padded > 1] = np.nan
    np.testing.assert_allclose(preprocess.restore(padded, frame), 0.25, atol=1e-6)


@pytest.mark.parametrize("side", [28, 56])
def test_a_map_in_range_stays_in_range(side: int) -> None:
    rng = np.random.default_rng(5)
    for height, width in SIZES:
        got = preprocess.restore(rng.random((side, side), np.float32), frame_of(height, width, 56))
        assert got.shape == (height, width)
        assert 0 <= got.min() <= got.max() <= 1


def test_a_map_as_fine_as_the_picture_comes_back_unchanged() -> None:
    settings = dataclasses.replace(SETTINGS, pixel_size=56)
    image = picture(6, 33, 56)
    _, frame = preprocess.pixel_image(Image.fromarray(image), settings)
    fine = np.random.default_rng(7).random((56, 56), np.float32)
    np.testing.assert_array_equal(preprocess.restore(fine, frame), fine[:33])


def test_a_thread_that_outlives_the_main_one_gets_the_same_inputs() -> None:
    """Python's pools take no work once the main thread has ended; a line's own threads may go on."""
    code = """
import threading
import numpy as np
from runtime.preprocess import Preprocessing, encoder_images
settings = Preprocessing(56, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 42, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
image = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)
wanted = encoder_images(image, settings)
def late():
    threading.main_thread().join()
    ours = encoder_images(image, settings)
    print(np.array_equal(ours[0], wanted[0]), np.array_equal(ours[1], wanted[1]), ours[2] == wanted[2])
threading.Thread(target=late).start()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True True True\n", "")
