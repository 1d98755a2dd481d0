"""Every picture a line may meet is read by one fixed rule; every bad one is refused with the reason and the remedy."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime.errors import AgvasError, ImageError
from runtime.images import PIXEL_LIMIT, PictureWarning, as_rgb, read_image

HEIGHT, WIDTH = 5, 7


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    # A production log must not fill with Pillow's warnings, and none may stand for an error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the samples of a 16-bit picture")  # ours, once: it has a test of its own
        yield


@pytest.fixture
def colours() -> np.ndarray:
    """uint8 [5, 7, 3] without two equal rows, columns or channels."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def refusal(source, **limits) -> str:
    with pytest.raises(ImageError) as caught:
        as_rgb(source, **limits)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, AgvasError)
    message = str(caught.value)
    assert "expected" in message and "got" in message and ";" in message, message
    return message


def same(read: np.ndarray, expected: np.ndarray) -> None:
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, expected)


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def grey_of(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, axis=-1).astype(np.uint8)


# What is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_a_colour_file_is_read_as_it_was_written(tmp_path, colours, suffix):
    Image.fromarray(colours).save(tmp_path / f"part.{suffix}")
    same(read_image(tmp_path / f"part.{suffix}"), colours)
    same(as_rgb(str(tmp_path / f"part.{suffix}")), colours)


def test_a_jpeg_is_read_as_pillow_decodes_it(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "part.jpg")
    same(read_image(tmp_path / "part.jpg"), np.asarray(Image.open(tmp_path / "part.jpg")))


def test_the_content_decides_and_not_the_suffix(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "part.jpg", "PNG")
    same(read_image(tmp_path / "part.jpg"), colours)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_exif_orientation_is_applied_once_for_files_and_pil_images(tmp_path, colours, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(colours).save(path, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    same(read_image(path), upright)
    same(as_rgb(Image.open(path)), upright)
    if orientation == 6:
        same(read_image(path), np.rot90(colours, -1))


def test_an_orientation_is_applied_to_16_bit_grey_too(tmp_path):
    samples = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) << 8
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(samples).save(tmp_path / "part.png", exif=exif)
    same(read_image(tmp_path / "part.png"), grey_of(np.rot90(samples >> 8)))


def test_8_bit_grey_and_1_bit_are_repeated_in_three_channels(tmp_path, colours):
    grey = colours[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    same(read_image(tmp_path / "grey.png"), grey_of(grey))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    with pytest.warns(PictureWarning, match="a picture of 1 bit"):
        same(read_image(tmp_path / "bits.png"), grey_of((grey > 127) * 255))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_16_bit_grey_is_scaled_by_its_full_range_whatever_values_it_holds(tmp_path, suffix, top):
    samples = np.linspace(0, top, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    # Older Pillow writes PGM only from mode I.
    Image.fromarray(samples.astype(np.int32) if suffix == "pgm" else samples).save(tmp_path / f"part.{suffix}")
    same(read_image(tmp_path / f"part.{suffix}"), grey_of(samples >> 8))


def test_16_bit_samples_of_a_12_bit_camera_are_warned_of(tmp_path):
    path = tmp_path / "part.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 4095, np.uint16)).save(path)
    with pytest.warns(UserWarning, match="samples of a 16-bit picture all lie below 16384"):
        read_image(path)
    for fine in (0, 1 << 14, 65535):  # nothing at all is black, whatever the bits
        Image.fromarray(np.full((HEIGHT, WIDTH), fine, np.uint16)).save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_image(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm", "with alpha.png"])
def test_16_bit_colour_of_a_12_bit_camera_is_warned_of_too(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    for top, told in ((255, True), (4095, True), (16383, True), (65535, False)):
        samples = np.random.default_rng(3).integers(0, top + 1, (HEIGHT, WIDTH, 4 if "alpha" in suffix else 3)).astype(np.uint16)
        samples[0, 0] = top
        samples[..., 3:] = 65535  # opaque: alpha says nothing about the camera
        if suffix == "ppm":
            path.write_bytes(b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + samples.astype(">u2").tobytes())
        else:
            cv2.imwrite(str(path), samples)
        for source in (path, path.read_bytes(), Image.open(path)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                as_rgb(source)
            words = [str(warning.message) for warning in caught]
            # Pillow rounds PPMs: the last level of the lowest quarter becomes the first of the next.
            assert ["all lie below 16384" in text for text in words] == [True] * (told and (suffix, top) != ("ppm", 16383)), (source, top)


def test_8_bit_colour_is_never_told_to_be_of_16(colours):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("png", "tiff", "ppm", "bmp"):
            stream = io.BytesIO()
            Image.fromarray(colours // 5).save(stream, kind)
            same(as_rgb(stream.getvalue()), colours // 5)


def test_big_endian_16_bit_and_mode_i_follow_the_same_rule():
    samples = np.array([[0, 255, 256, 65535]], np.uint16)
    big_endian = Image.frombytes("I;16B", (4, 1), samples.astype(">u2").tobytes())
    same(as_rgb(big_endian), grey_of(samples >> 8))
    same(as_rgb(Image.fromarray(samples.astype(np.int32))), grey_of(samples >> 8))


def test_16_bit_colour_follows_the_same_rule(tmp_path):
    samples = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(">u2")
    (tmp_path / "part.ppm").write_bytes(b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + samples.tobytes())
    # Pillow scales 16-bit PPM by 255 / 65535 and rounds, at most one level from the shift.
    assert np.abs(read_image(tmp_path / "part.ppm").astype(int) - (samples >> 8)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_the_colours_under_it_are_kept(tmp_path, colours, mode):
    channels = 3 if mode == "RGBA" else 1
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:, :3] = 128
    Image.fromarray(np.concatenate([colours[..., :channels], alpha], axis=2)).save(tmp_path / "part.png")
    assert mode_of(tmp_path / "part.png") == mode
    same(read_image(tmp_path / "part.png"), colours if channels == 3 else grey_of(colours[..., 0]))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])], ids=["opaque", "one colour", "levels"])
def test_a_palette_gives_its_colours_with_and_without_transparency(tmp_path, transparency):
    palette = np.array([[10, 20, 30], [200, 100, 50], [1, 2, 3]], np.uint8)
    indices = np.random.default_rng(2).integers(0, 3, (HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "part.png", **({} if transparency is None else {"transparency": transparency}))
    assert mode_of(tmp_path / "part.png") == "P"
    same(read_image(tmp_path / "part.png"), palette[indices])


def test_a_palette_with_alpha_gives_its_colours():
    image = Image.new("PA", (2, 1))
    image.putpalette([9, 8, 7, 90, 80, 70])
    image.putpixel((0, 0), (1, 0))
    same(as_rgb(image), np.array([[[90, 80, 70], [9, 8, 7]]]))


def test_a_cmyk_jpeg_keeps_its_colour(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).convert("CMYK").save(tmp_path / "part.jpg", quality=100)
    read = read_image(tmp_path / "part.jpg").astype(int)
    assert np.abs(read - (255, 0, 0)).max() < 8


def test_of_several_frames_a_file_gives_the_first_and_a_pil_image_the_one_it_stands_at(tmp_path, colours):
    first, second = Image.fromarray(colours), Image.fromarray(255 - colours)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match="several pictures .*: the first alone is judged"):
        same(read_image(tmp_path / "stack.tif"), colours)
    first.save(tmp_path / "single.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(read_image(tmp_path / "single.tif"), colours)
    with Image.open(tmp_path / "stack.tif") as stack:
        stack.seek(1)
        same(as_rgb(stack), 255 - colours)


@pytest.mark.parametrize("kind", ["gif", "tiff"])
def test_a_pil_image_that_stands_at_the_first_of_several_frames_is_warned_of(colours, kind):
    stream = io.BytesIO()
    frames = [Image.fromarray(np.broadcast_to(np.uint8(level), (HEIGHT, WIDTH))) for level in (10, 90, 200)]
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    with Image.open(stream) as stack:
        for _ in range(2):  # it stands there still
            with pytest.warns(UserWarning, match="a PIL image of several frames stands at its first"):
                same(as_rgb(stack), grey_of(np.full((HEIGHT, WIDTH), 10)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(as_rgb(stack.copy()), grey_of(np.full((HEIGHT, WIDTH), 10)))
            for frame in (1, 2):  # chosen: all are judged where a program goes through them
                stack.seek(frame)
                assert abs(int(as_rgb(stack)[0, 0, 0]) - (10, 90, 200)[frame]) <= 1


def test_a_phones_jpeg_with_a_preview_behind_is_one_picture(colours):
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "mpo", save_all=True, append_images=[Image.fromarray(255 - colours)])
    as_rgb(Image.open(stream))
    as_rgb(stream.getvalue())


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_tiny_and_thin_pictures_are_accepted(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "thin.png")
    assert read_image(tmp_path / "thin.png").shape == (size[1], size[0], 3)
    assert as_rgb(np.zeros((size[1], size[0], 3), np.uint8)).shape == (size[1], size[0], 3)


# Files that are refused


def test_a_missing_file_an_empty_path_and_a_folder_are_told_apart(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.png")
    assert "empty string" in refusal("")
    assert "a folder" in refusal(tmp_path)
    assert "null" in refusal("part\0.png")
    assert "too long" in refusal("x" * 5000)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "camera.png")
    assert "pipe" in refusal(tmp_path / "camera.png")


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "part.png").write_bytes(b"x")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr("runtime.images.open", denied, raising=False)
    assert "permissions" in refusal(tmp_path / "part.png")


def test_an_empty_file_and_a_text_file_called_png_are_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert "0 bytes" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert "begins with b'not a picture'" in refusal(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "ppm"])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, suffix):
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: int(len(whole) * share)])
        assert str(path) in refusal(path)


def test_damaged_bytes_never_raise_anything_but_an_image_error(tmp_path, colours):
    generator = np.random.default_rng(4)
    for suffix in ("png", "jpg", "bmp", "tif", "ppm"):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        Image.fromarray(colours).save(stream, kind, **({"exif": exif} if kind in ("png", "jpeg", "tiff") else {}))
        for _ in range(100):
            damaged = np.frombuffer(stream.getvalue(), np.uint8).copy()
            damaged[generator.integers(2, len(damaged), 3)] = generator.integers(0, 256, 3)
            (tmp_path / "part").write_bytes(damaged.tobytes())
            try:
                read = read_image(tmp_path / "part", pixel_limit=1_000_000)
            except ImageError:
                continue
            assert read.dtype == np.uint8 and read.shape[2] == 3


def png(width: int, height: int) -> bytes:
    """A PNG whose header says width × height and whose data end at once."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_460, 14_000, 100_000])  # just over the limit; where Pillow warns; where it raises
def test_a_picture_beyond_the_pixel_limit_is_refused_from_its_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    message = refusal(tmp_path / "bomb.png")
    assert str(PIXEL_LIMIT) in message and str(side * side) in message and "pixel_limit" in message


def test_the_pixel_limit_can_be_moved_and_holds_for_every_source(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "part.png")
    pixels = HEIGHT * WIDTH
    for source in (tmp_path / "part.png", Image.fromarray(colours), colours):
        same(as_rgb(source, pixel_limit=pixels), colours)
        assert f"at most {pixels - 1}" in refusal(source, pixel_limit=pixels - 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("guard", [10, 30])  # 35 pixels: Pillow would raise, Pillow would warn
def test_pillows_own_limit_neither_warns_nor_raises_and_is_left_as_found(
    tmp_path, colours, monkeypatch, suffix, guard
):
    Image.fromarray(colours).save(tmp_path / f"part.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", guard)
    same(read_image(tmp_path / f"part.{suffix}"), colours)
    assert Image.MAX_IMAGE_PIXELS == guard


def test_a_picture_without_pixels_is_refused(tmp_path):
    (tmp_path / "flat.png").write_bytes(png(0, 5))
    assert "no pixels" in refusal(tmp_path / "flat.png")
    assert "0 × 5" in refusal(Image.new("RGB", (0, 5)))


def test_float_pictures_are_refused_because_their_range_is_unknown(tmp_path):
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)).save(tmp_path / "float.tif")
    assert "'F'" in refusal(tmp_path / "float.tif")
    assert "'LAB'" in refusal(Image.new("LAB", (WIDTH, HEIGHT)))


@pytest.mark.parametrize("sample", [-1, 65536])
def test_32_bit_integers_beyond_16_bits_are_refused(sample):
    message = refusal(Image.fromarray(np.array([[0, sample]], np.int32)))
    assert str(sample) in message and "65535" in message


@pytest.mark.parametrize(("tag", "value"), [(262, 0), (263, 1)], ids=["white is zero", "unsaid"])
def test_a_16_bit_tiff_that_does_not_say_black_is_zero_is_refused_instead_of_inverted(tmp_path, tag, value):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(tmp_path / "part.tif")
    content = (tmp_path / "part.tif").read_bytes()
    black_is_zero = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert content.count(black_is_zero) == 1
    (tmp_path / "part.tif").write_bytes(content.replace(black_is_zero, struct.pack("<HHIHH", tag, 3, 1, value, 0)))
    assert "PhotometricInterpretation" in refusal(tmp_path / "part.tif")


def test_a_closed_pil_image_is_refused(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "part.png")
    image = Image.open(tmp_path / "part.png")
    image.close()
    assert "closed" in refusal(image)


# Arrays


def test_a_contiguous_rgb_array_is_passed_on_and_others_are_made_contiguous(colours):
    assert as_rgb(colours) is colours or np.shares_memory(as_rgb(colours), colours)
    same(as_rgb(colours[..., ::-1]), colours[..., ::-1].copy())
    same(as_rgb(colours[::2, 1:]), colours[::2, 1:].copy())


def test_grey_arrays_are_repeated(colours):
    same(as_rgb(colours[..., 0]), grey_of(colours[..., 0]))
    same(as_rgb(colours[..., :1]), grey_of(colours[..., 0]))


def test_the_last_axis_decides_so_a_picture_of_three_rows_is_no_mistake():
    assert as_rgb(np.zeros((3, WIDTH, 3), np.uint8)).shape == (3, WIDTH, 3)


def test_a_path_a_pil_image_and_an_array_of_one_picture_are_read_alike(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "part.png")
    for source in (tmp_path / "part.png", Image.open(tmp_path / "part.png"), colours):
        same(as_rgb(source), colours)


def test_a_masked_array_is_refused_for_its_mask_would_be_lost(colours):
    assert "pass .filled(0)" in refusal(np.ma.masked_array(colours, colours > 9))


def test_float_arrays_are_refused_and_the_message_says_whether_they_hold_nan(colours):
    picture = colours.astype(np.float32) / 255
    assert "float32 [5, 7, 3]; values are never guessed" in refusal(picture)
    picture[0, 0, :2] = np.nan
    assert "with 2 NaN" in refusal(picture)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((5, 7, 3), np.uint16), ("uint16", "12 bits (Mono12) pass (array >> 4)", "10 bits >> 2", "full-range 16 bits >> 8")),
        (np.zeros((5, 7, 3), np.int64), ("int64", "0..255 already, array.astype(np.uint8)", ">> 4")),
        (np.zeros((5, 7), bool), ("bool", "* 255")),
        (np.zeros((2, 5, 7, 3), np.uint8), ("[2, 5, 7, 3]", "one picture")),
        (np.zeros(7, np.uint8), ("[7]", "array.tobytes()")),
        (np.zeros((3, 5, 7), np.uint8), ("channels-first", "np.moveaxis(array, 0, -1)")),
        (np.zeros((5, 7, 4), np.uint8), ("[5, 7, 4]", "array[..., :3]")),
        (np.zeros((5, 7, 2), np.uint8), ("[5, 7, 2]", "red, green and blue")),
        (np.zeros((0, 7, 3), np.uint8), ("[0, 7, 3]", "at least one pixel")),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else "",
)
def test_other_arrays_are_refused_with_what_to_do(array, words):
    message = refusal(array)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("source", [None, [[1, 2]], b"bytes", 3])
def test_anything_else_is_refused_by_its_type(source):
    assert type(source).__name__ in refusal(source)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        (io.BytesIO(b"x"), "pass its content, .getvalue()"),
        (io.BufferedReader(io.BytesIO(b"x")), ".read() of a file opened as binary"),
        (None, "imread and imdecode give None"),
        ([[1, 2]], "np.asarray"),
        (b"raw pixels", "pass its pixels as a uint8 array"),
        (b"", "got 0 bytes"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_holds_a_picture_in_another_way_is_refused_with_what_to_pass(source, remedy):
    assert remedy in refusal(source)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_a_picture_encoded_in_memory_is_read_as_its_file_is(tmp_path, colours, form):
    for kind, settings in (("png", {}), ("jpeg", {"exif": _turned()}), ("tiff", {}), ("bmp", {})):
        Image.fromarray(colours).save(tmp_path / "part", kind, **settings)
        content = (tmp_path / "part").read_bytes()
        same(as_rgb(form(content)), read_image(tmp_path / "part"))
        assert f"encoded picture ({form.__name__}): expected a" in refusal(form(content[: len(content) // 2]))
    assert "at most 4 pixels" in refusal(form(content), pixel_limit=4)
    same(as_rgb(memoryview(content + content)[: len(content)]), colours)
    same(as_rgb(memoryview(bytes(byte for pair in zip(content, content) for byte in pair))[::2]), colours)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_tiff_of_32_bit_integers_is_refused(tmp_path):
    Image.fromarray(np.full((6, 8), 200, np.int32)).save(tmp_path / "part.tif")
    assert "integers of 32" in refusal(tmp_path / "part.tif")


def test_signed_bytes_are_not_taken_for_a_cameras_sixteen_bits():
    with pytest.raises(ImageError, match="no negative levels") as error:
        as_rgb(np.zeros((4, 5, 3), np.int8))
    assert ">>" not in str(error.value)
    with pytest.raises(ImageError, match=">> 4"):
        as_rgb(np.zeros((4, 5, 3), np.int16))


def test_of_files_changed_on_the_way_png_is_refused_as_its_page_says(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(content, "PNG")
    damaged = bytearray(content.getvalue())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 4096] = bytes(4096)
    with pytest.raises(ImageError, match="truncated, damaged"):
        as_rgb(bytes(damaged))
