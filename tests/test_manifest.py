"""Manifest data sets, read and refused: every error names the file and line, and says what to do."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.manifest import read_manifest

HEIGHT, WIDTH = 11, 17


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def anomalous_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:5, 3:10] = 255
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One anomalous image with a mask, one normal image without."""
    root = tmp_path / "bolts"
    write_image(root / "images/bad.png")
    write_image(root / "images/good.png")
    write_mask(root / "masks/bad.png", anomalous_mask())
    write_manifest(root, "images/bad.png,masks/bad.png,1", "images/good.png,,0")
    return root


def write_manifest(root: Path, *lines: str, header: str = "image,mask,label") -> None:
    (root / "manifest.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def refused(root: Path, line: int | None = 2) -> DatasetError:
    with pytest.raises(DatasetError) as raised:
        read_manifest(root)
    error = raised.value
    assert error.file == root / "manifest.csv" and error.line == line
    assert str(root / "manifest.csv") in str(error) and error.expected in str(error) and error.found in str(error)
    assert str(error).endswith(error.remedy) and error.remedy
    assert "\n" not in str(error)
    return error


def test_a_manifest_gives_its_items_in_order_with_paths_and_the_folders_name_as_category(folder: Path) -> None:
    bad, good = read_manifest(folder)
    assert (bad.image, bad.mask) == (folder / "images/bad.png", folder / "masks/bad.png")
    assert bad.is_anomalous and not good.is_anomalous and good.mask is None
    assert {bad.category, good.category} == {"bolts"}
    assert (bad.kind, bad.split, bad.text) == (None, None, None)
    assert (bad.line, good.line) == (2, 3)


def test_optional_columns_are_read_in_any_order_and_unknown_ones_ignored(folder: Path) -> None:
    header = "mask_fraction,class,label,text,split,kind,mask,image"
    write_manifest(folder, '0.5,screw,1,"a scratch, deep",test,scratch,masks/bad.png,images/bad.png', header=header)
    (item,) = read_manifest(folder)
    assert (item.category, item.kind, item.split, item.text) == ("screw", "scratch", "test", "a scratch, deep")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(folder: Path) -> None:
    (folder / "manifest.csv").write_text("image,mask,label\r\n\r\nimages/good.png,,0\r\n", encoding="utf-8-sig")
    (item,) = read_manifest(folder)
    assert item.line == 3


def test_a_mask_is_read_as_bool_and_a_normal_image_without_one_is_all_false(folder: Path) -> None:
    bad, good = read_manifest(folder)
    truth = bad.read_mask(HEIGHT, WIDTH)
    assert truth.dtype == np.bool_ and (truth == (anomalous_mask() == 255)).all()
    empty = good.read_mask(HEIGHT, WIDTH)
    assert empty.dtype == np.bool_ and empty.shape == (HEIGHT, WIDTH) and not empty.any()


def test_a_one_bit_mask_is_read_as_well(folder: Path) -> None:
    Image.fromarray(anomalous_mask()).convert("1").save(folder / "masks/bad.png")
    assert read_manifest(folder)[0].read_mask(HEIGHT, WIDTH).sum() == 21


def test_a_missing_manifest_or_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path, None).found
    assert "no folder" in refused(tmp_path / "nowhere", None).found


def test_missing_columns_are_named(folder: Path) -> None:
    write_manifest(folder, "images/good.png,0", header="image,label")
    assert "without mask" in refused(folder, 1).found


def test_a_semicolon_as_separator_is_refused_with_the_remedy(folder: Path) -> None:
    write_manifest(folder, "images/good.png;;0", header="image;mask;label")
    assert "comma" in refused(folder, 1).remedy


def test_a_manifest_without_images_is_refused(folder: Path) -> None:
    write_manifest(folder)
    refused(folder, None)


def test_a_line_with_too_few_or_too_many_cells_is_refused(folder: Path) -> None:
    write_manifest(folder, "images/good.png,0")
    assert refused(folder).found == "2"
    write_manifest(folder, "images/good.png,,0,a, b")
    assert "quote" in refused(folder).remedy


def test_a_missing_image_or_mask_file_is_refused_with_its_path(folder: Path) -> None:
    write_manifest(folder, "images/good.png,,0", "images/gone.png,,0")
    assert str(folder / "images/gone.png") in refused(folder, 3).found
    write_manifest(folder, "images/bad.png,masks/gone.png,1")
    assert str(folder / "masks/gone.png") in refused(folder).found


@pytest.mark.parametrize("label", ["2", "", "good", "1.0", "-1"])
def test_a_label_other_than_0_and_1_is_refused(folder: Path, label: str) -> None:
    write_manifest(folder, f"images/bad.png,masks/bad.png,{label}")
    assert refused(folder).found == repr(label)


def test_an_anomalous_image_without_a_mask_is_refused(folder: Path) -> None:
    write_manifest(folder, "images/bad.png,,1")
    assert "mask for label 1" in refused(folder).expected


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("path", ["../secret.png", "images/../../secret.png", "ABSOLUTE"])
def test_a_path_that_leaves_the_folder_is_refused_though_the_file_exists(folder: Path, path: str, column: int) -> None:
    write_image(folder.parent / "secret.png")
    cells = ["images/bad.png", "masks/bad.png", "1"]
    cells[column] = path.replace("ABSOLUTE", str(folder.parent / "secret.png"))
    write_manifest(folder, ",".join(cells))
    assert "inside the folder" in refused(folder).expected


def test_a_path_that_turns_round_inside_the_folder_is_fine(folder: Path) -> None:
    write_manifest(folder, "masks/../images/good.png,,0")
    assert read_manifest(folder)[0].image == folder / "images/good.png"


def test_a_mask_of_another_size_is_refused_when_the_manifest_is_read(folder: Path) -> None:
    write_mask(folder / "masks/bad.png", anomalous_mask().T.copy())
    error = refused(folder)
    assert f"{HEIGHT} x {WIDTH}" in error.expected and f"{WIDTH} x {HEIGHT}" in error.found


def test_a_mask_of_another_size_than_the_decoded_image_is_refused_when_it_is_read(folder: Path) -> None:
    with pytest.raises(DatasetError, match=f"expected a mask of {WIDTH} x {HEIGHT}.*found {HEIGHT} x {WIDTH}"):
        read_manifest(folder)[0].read_mask(WIDTH, HEIGHT)


def test_an_image_that_its_exif_tag_turns_may_have_a_mask_of_the_turned_size(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images/turned.jpg", exif=exif)
    write_manifest(folder, "images/turned.jpg,masks/bad.png,1")
    (item,) = read_manifest(folder)
    assert item.shapes() == [(WIDTH, HEIGHT), (HEIGHT, WIDTH)]
    assert item.read_mask(HEIGHT, WIDTH).any()


def test_a_file_that_is_no_image_is_refused(folder: Path) -> None:
    (folder / "images/bad.png").write_text("not a picture")
    assert "bad.png" in refused(folder).found


@pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
def test_a_picture_that_the_line_would_not_read_is_refused_when_the_manifest_is_read(folder: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images/bad.png", format="WEBP")
    error = refused(folder)
    assert "PNG, JPEG, BMP, TIFF or PNM" in error.expected and str(folder / "images/bad.png") in error.found and "as PNG" in error.remedy


@pytest.mark.parametrize("kept", [10, 0], ids=["a broken chunk", "broken data"])
def test_a_damaged_mask_is_named_with_its_line(folder: Path, kept: int) -> None:
    """Of a broken chunk Pillow raises SyntaxError."""
    path = folder / "masks/bad.png"
    path.write_bytes(damaged_png(path.read_bytes(), kept))
    with pytest.raises(DatasetError, match=r"line 2: expected a readable mask, found .*masks.bad\.png .*; write it again as PNG"):
        read_manifest(folder)[0].read_mask(HEIGHT, WIDTH)


def damaged_png(whole: bytes, kept: int) -> bytes:
    """With a whole header, and `kept` bytes of its pixels (none: bytes of the right number that are no pixels)."""
    begin = whole.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", whole[begin : begin + 4])
    pixels = whole[begin + 8 : begin + 8 + length][:kept]
    if not kept:
        return whole[: begin + 8] + b"\xff" * length + whole[begin + 8 + length :]
    body = b"IDAT" + pixels
    chunk = struct.pack(">I", len(pixels)) + body + struct.pack(">I", zlib.crc32(body))
    return whole[:begin] + chunk + struct.pack(">I", length - kept) + b"\0\0\0\0" + whole[begin + 8 + kept :]


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (anomalous_mask() // 255, "found 1 in"),
        (np.stack([anomalous_mask()] * 3, axis=-1), "mode RGB"),
        (np.zeros_like(anomalous_mask()), "only 0"),
    ],
    ids=["zero and one", "three channels", "empty though anomalous"],
)
def test_a_mask_with_other_contents_is_refused_when_it_is_read(folder: Path, mask: np.ndarray, found: str) -> None:
    write_mask(folder / "masks/bad.png", mask)
    with pytest.raises(DatasetError, match=found) as raised:
        read_manifest(folder)[0].read_mask(HEIGHT, WIDTH)
    assert raised.value.line == 2


def test_a_normal_image_whose_mask_has_anomalous_pixels_is_refused(folder: Path) -> None:
    write_manifest(folder, "images/bad.png,masks/bad.png,0")
    with pytest.raises(DatasetError, match="expected no anomalous pixel.*found 21 in"):
        read_manifest(folder)[0].read_mask(HEIGHT, WIDTH)
