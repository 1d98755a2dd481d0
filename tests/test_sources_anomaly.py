"""Published anomaly sets in miniature: each layout is written by its published names, read, and its masks compared pixel by pixel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomaly_sets import (
    HEIGHT,
    WIDTH,
    mask_file,
    picture,
    truth,
    write_goods,
    write_leaper,
    write_leaper_set,
    write_real_iad,
    write_real_iad_set,
)
from PIL import Image

from agvas.training.sources.crackforest import read_crackforest
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.gc10 import read_gc10
from agvas.training.sources.instruct import read_instruct
from agvas.training.sources.mvtec import read_mvtec
from agvas.training.sources.pictures import picture_size, read_indices, read_nonzero, read_picture
from agvas.training.sources.real_iad import read_real_iad
from agvas.training.sources.zju_leaper import read_zju_leaper


def same(mask: np.ndarray, expected: np.ndarray) -> bool:
    return bool(mask.dtype == np.bool_ and mask.shape == expected.shape and (mask == expected).all())


# The layout of MVTec AD: GoodsAD, DTD-Synthetic, MIAD


@pytest.fixture
def goods(tmp_path: Path) -> Path:
    return write_goods(tmp_path / "GoodsAD")


def test_an_mvtec_layout_gives_classes_kinds_and_masks_of_either_name(goods: Path) -> None:
    images = read_mvtec(goods)
    assert [(image.category, image.kind, image.split, image.is_anomalous) for image in images] == [
        ("Woven_001", None, "train", False),
        ("Woven_001", "bad", "test", True),
        ("drink_can", None, "train", False),
        ("drink_can", None, "test", False),
        ("drink_can", "opened", "test", True),
    ]
    for image in images:
        assert same(image.read_mask(HEIGHT, WIDTH), truth() if image.is_anomalous else np.zeros((HEIGHT, WIDTH), bool))


def test_a_split_of_an_mvtec_layout_takes_only_its_pictures(goods: Path) -> None:
    assert {image.split for image in read_mvtec(goods, "test")} == {"test"}
    with pytest.raises(DatasetError, match="split validation"):
        read_mvtec(goods, "validation")


def test_an_anomaly_without_a_mask_is_refused_when_the_set_is_read(goods: Path) -> None:
    (goods / "drink_can/ground_truth/opened/001003.png").unlink()
    with pytest.raises(DatasetError, match="001003.jpg: expected its mask 001003_mask.png or 001003.png"):
        read_mvtec(goods)


def test_a_folder_inside_a_class_is_refused_with_the_remedy(goods: Path) -> None:
    with pytest.raises(DatasetError, match="give the folder that holds the classes"):
        read_mvtec(goods / "drink_can")


def test_anomalous_pictures_below_train_are_refused(goods: Path) -> None:
    picture(goods / "drink_can/train/opened/1.jpg")
    with pytest.raises(DatasetError, match="expected only good below train, found opened"):
        read_mvtec(goods)


def test_a_mask_of_another_size_names_mask_and_image(goods: Path) -> None:
    mask_file(goods / "drink_can/ground_truth/opened/001003.png", mask=truth().T)
    image = read_mvtec(goods)[-1]
    with pytest.raises(DatasetError, match=r"opened/001003\.png: expected a mask of 11 x 17 .*found 17 x 11"):
        image.read_mask(HEIGHT, WIDTH)


def test_a_mask_without_an_anomalous_pixel_or_in_jpeg_is_refused(goods: Path) -> None:
    path = goods / "drink_can/ground_truth/opened/001003.png"
    image = read_mvtec(goods)[-1]
    mask_file(path, value=0)
    with pytest.raises(DatasetError, match="expected anomalous pixels, found none"):
        image.read_mask(HEIGHT, WIDTH)
    Image.fromarray(truth().astype(np.uint8) * 255).save(path, format="JPEG")
    with pytest.raises(DatasetError, match="lossless"):
        image.read_mask(HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "I;16"])
def test_any_non_zero_value_is_anomalous_in_every_mode_that_sets_are_published_in(goods: Path, mode: str) -> None:
    path, mask = goods / "drink_can/ground_truth/opened/001003.png", truth()
    if mode == "I;16":
        Image.fromarray(mask.astype(np.uint16) * 256).save(path)  # its low byte is 0
    elif mode in ("RGB", "RGBA"):
        colours = np.zeros((HEIGHT, WIDTH, len(mode)), np.uint8)
        colours[mask, 2] = 1  # blue 1 is grey 0
        colours[..., 3:] = 255
        Image.fromarray(colours).save(path)
    elif mode == "P":
        indexed = Image.fromarray(mask.astype(np.uint8)).convert("P")
        indexed.putpalette([0, 0, 0, 128, 0, 0])
        indexed.save(path)
    else:
        Image.fromarray(mask).convert("1").save(path)
    assert same(read_mvtec(goods)[-1].read_mask(HEIGHT, WIDTH), mask)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for read in (read_mvtec, read_real_iad, read_crackforest, read_gc10, read_zju_leaper):
        with pytest.raises(DatasetError, match=r"nowhere.*no such folder"):
            read(tmp_path / "nowhere")


# Real-IAD


@pytest.fixture
def real_iad(tmp_path: Path) -> Path:
    return write_real_iad_set(tmp_path / "Real-IAD")


def test_real_iad_is_read_by_its_json_with_the_defect_in_words(real_iad: Path) -> None:
    images, remarks = read_real_iad(real_iad)
    assert [(image.image.name, image.kind, image.split) for image in images] == [
        ("a_OK_C1.jpg", None, "train"),
        ("b_OK_C1.jpg", None, "test"),
        ("c_NG_C1.jpg", "scratch", "test"),
    ]
    assert {image.category for image in images} == {"audiojack"}
    assert same(images[2].read_mask(HEIGHT, WIDTH), truth()) and not images[0].read_mask(HEIGHT, WIDTH).any()
    assert len(read_real_iad(real_iad, split="train")[0]) == 1 and not remarks


def test_real_iad_takes_the_nested_json_folder_where_it_exists_and_the_one_that_is_given(real_iad: Path) -> None:
    write_real_iad(real_iad, "realiad_jsons/realiad_jsons", anomaly_class="AK")
    assert read_real_iad(real_iad)[0][2].kind == "pit"
    write_real_iad(real_iad, "realiad_jsons_sv", anomaly_class="own kind")
    assert read_real_iad(real_iad, annotations="realiad_jsons_sv")[0][2].kind == "own kind"


@pytest.mark.parametrize("mask", [None, ""])
def test_an_anomalous_picture_of_real_iad_without_a_mask_is_left_out_and_not_taken_for_normal(real_iad: Path, mask: str | None) -> None:
    write_real_iad(real_iad, mask_path=mask)
    images, remarks = read_real_iad(real_iad)
    assert [image.image.name for image in images] == ["a_OK_C1.jpg", "b_OK_C1.jpg"]
    assert remarks == ["1 anomalous pictures without a mask left out, the first c_NG_C1.jpg"]


def test_a_broken_real_iad_file_names_file_entry_and_line(real_iad: Path) -> None:
    file = write_real_iad(real_iad, mask_path="NG/HS/S0003/gone.png")
    with pytest.raises(DatasetError, match=r"audiojack\.json: expected the file of test\[1\].*gone\.png"):
        read_real_iad(real_iad)
    write_real_iad(real_iad, mask_path=3)
    with pytest.raises(DatasetError, match=r"expected text as 'mask_path' of test\[1\], found 3"):
        read_real_iad(real_iad)
    file.write_text('{"meta": {\n"prefix": ')
    with pytest.raises(DatasetError, match=r"audiojack\.json, line 2: expected JSON") as raised:
        read_real_iad(real_iad)
    assert raised.value.line == 2


# CrackForest


@pytest.fixture
def crackforest(tmp_path: Path) -> Path:
    scipy_io = pytest.importorskip("scipy.io")
    root = tmp_path / "CrackForest-dataset"
    (root / "groundTruth").mkdir(parents=True)
    for name in ("001", "002", "003"):
        picture(root / f"image/{name}.jpg")
    labels = np.ones((HEIGHT, WIDTH), np.uint16)
    labels[2:5, 3:10] = 2
    labels[7, 7] = 3
    for name in ("001", "002"):
        boundaries = np.zeros((HEIGHT, WIDTH), bool)
        scipy_io.savemat(root / f"groundTruth/{name}.mat", {"groundTruth": {"Segmentation": labels, "Boundaries": boundaries}})
    return root


def test_crackforest_takes_every_label_above_road_and_says_which_pictures_have_no_truth(crackforest: Path) -> None:
    images, remarks = read_crackforest(crackforest)
    assert [image.image.name for image in images] == ["001.jpg", "002.jpg"] and all(image.is_anomalous for image in images)
    expected = truth()
    expected[7, 7] = True
    assert same(images[1].read_mask(HEIGHT, WIDTH), expected)
    assert remarks == ["1 pictures without groundTruth/NAME.mat left out"]


def test_crackforest_truth_of_another_size_or_form_is_refused(crackforest: Path) -> None:
    image = read_crackforest(crackforest)[0][0]
    with pytest.raises(DatasetError, match="found 11 x 17"):
        image.read_mask(WIDTH, HEIGHT)
    pytest.importorskip("scipy.io").savemat(image.mask, {"other": 1})
    with pytest.raises(DatasetError, match=r"001\.mat: expected groundTruth\.Segmentation.*no groundTruth"):
        image.read_mask(HEIGHT, WIDTH)
    image.mask.write_bytes(b"not a mat file")
    with pytest.raises(DatasetError, match=r"001\.mat: expected a MATLAB file"):
        image.read_mask(HEIGHT, WIDTH)


def test_crackforest_without_scipy_says_what_it_needs(crackforest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = read_crackforest(crackforest)[0][0]
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match=r'001\.mat: MATLAB files need scipy.*pip install "agvas') as raised:
        image.read_mask(HEIGHT, WIDTH)
    assert raised.value.name == "scipy"


# GC10-DET


def boxes_file(path: Path, *boxes: tuple[str, int, int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x, y, x2, y2 in boxes
    )
    path.write_text(f"<annotation>{objects}</annotation>")


@pytest.fixture(params=["lable", "label/label"])
def gc10(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The release's folders and the copy's."""
    root = tmp_path / "GC10-DET"
    picture(root / "1/img_01.jpg")
    picture(root / "3/img_01.jpg")  # the same picture under its second defect
    picture(root / "2/img_02.jpg")
    boxes_file(root / request.param / "img_01.xml", ("1_chongkong", 3, 2, 10, 5), ("3_yueyawan", 12, 6, 18, 12), ("3_yueyawan", 0, 0, 2, 1))
    return root


def test_gc10_boxes_are_filled_and_a_picture_in_two_folders_is_one(gc10: Path) -> None:
    (image,), remarks = read_gc10(gc10)
    expected = truth()
    expected[6:11, 12:17] = True  # reached one pixel out of the picture
    expected[0, 0:2] = True
    assert same(image.read_mask(HEIGHT, WIDTH), expected)
    assert image.kind == "punching hole and crescent gap" and image.is_anomalous
    assert remarks == ["1 pictures without boxes left out"]


@pytest.mark.parametrize(
    ("box", "found"),
    [
        (("1_chongkong", 3, 2, 19, 5), "x 3..19"),
        (("1_chongkong", 3, 2, 3, 5), "x 3..3"),
        (("1_chongkong", 9, 2, 3, 5), "x 9..3"),
        (("11_new", 3, 2, 9, 5), "'11_new'"),
    ],
    ids=["outside", "without width", "reversed", "unknown defect"],
)
def test_a_box_that_cannot_be_is_refused_when_the_set_is_read(gc10: Path, box: tuple[str, int, int, int, int], found: str) -> None:
    file = next(gc10.rglob("img_01.xml"))
    boxes_file(file, box)
    with pytest.raises(DatasetError, match=found) as raised:
        read_gc10(gc10)
    assert raised.value.file == file


def test_the_object_of_no_defect_that_the_release_has_is_left_out_with_a_remark(gc10: Path) -> None:
    """Its box, too, which need not be one."""
    boxes_file(next(gc10.rglob("img_01.xml")), ("d", 3, 2, 3, 99), ("1_chongkong", 3, 2, 10, 5))
    (image,), remarks = read_gc10(gc10)
    assert image.kind == "punching hole" and same(image.read_mask(HEIGHT, WIDTH), truth())
    assert remarks == ["1 pictures without boxes left out", "1 objects named 'd' left out, the first in img_01.xml"]


def test_broken_xml_and_different_pictures_of_one_name_are_refused(gc10: Path) -> None:
    file = next(gc10.rglob("img_01.xml"))
    file.write_text("<annotation><object>")
    with pytest.raises(DatasetError, match=r"img_01\.xml: expected Pascal-VOC XML"):
        read_gc10(gc10)
    picture(gc10 / "3/img_01.jpg", height=300, width=300)
    with pytest.raises(DatasetError, match="a file of another size"):
        read_gc10(gc10)


# ZJU-Leaper


@pytest.fixture
def leaper(tmp_path: Path) -> Path:
    return write_leaper_set(tmp_path / "ZJU-Leaper")


def test_zju_leaper_is_read_by_its_lists(leaper: Path) -> None:
    images = read_zju_leaper(leaper)
    assert [(image.image.name, image.is_anomalous, image.split) for image in images] == [
        ("000001.jpg", False, "train"),
        ("000002.jpg", False, "test"),
        ("000003.jpg", True, "train"),
    ]
    assert same(images[2].read_mask(HEIGHT, WIDTH), truth()) and not images[0].read_mask(HEIGHT, WIDTH).any()
    (of_group,) = read_zju_leaper(leaper, "ImageSets/Groups/group1.json")
    assert of_group.image == leaper / "Images/000003.jpg"
    assert len(read_zju_leaper(leaper, split="test")) == 1


def test_zju_leaper_names_a_number_without_picture_or_mask(leaper: Path) -> None:
    write_leaper(leaper / "ImageSets/total.json", ["000009"], [], [])
    with pytest.raises(DatasetError, match=r"total\.json: expected the file of normal\.train 000009.*000009\.jpg"):
        read_zju_leaper(leaper)
    write_leaper(leaper / "ImageSets/total.json", [], [], ["000001"])
    with pytest.raises(DatasetError, match=r"defect\.train 000001.*masks/000001\.png"):
        read_zju_leaper(leaper)


# Anomaly-Instruct


def described(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "image": "../pictures/a.png",
        "mask": "../pictures/a_mask.png",
        "class": "bolt",
        "kind": "scratch",
        "expectation": "A bolt is smooth.",
        "observation": "A scratch runs along the head.",
        "diagnosis": "The coating is broken.",
        "summary": "Against the smooth head [NOR], a scratch [ANO] is to be segmented [SEG].",
        "explanation": "The scratch breaks the coating.",
        "model": "ignored",
    }
    return record | changes


def write_instruct(tmp_path: Path, *records: dict[str, Any]) -> Path:
    picture(tmp_path / "pictures/a.png")
    mask_file(tmp_path / "pictures/a_mask.png")
    file = tmp_path / "instruct/instruct.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", encoding="utf-8")
    return file


def test_described_pictures_are_read_with_their_five_fields_and_paths_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    file = write_instruct(tmp_path, described(explanation="It breaks\u2028the coating."), described(mask=None, kind=None))
    (bad, good), remarks = read_instruct(file)
    assert not remarks
    assert bad.description.summary == described()["summary"] and bad.description.expectation == "A bolt is smooth."
    assert bad.description.explanation == "It breaks\u2028the coating."
    assert (bad.picture.category, bad.picture.kind) == ("bolt", "scratch")
    assert same(bad.picture.read_mask(HEIGHT, WIDTH), truth())
    assert not good.picture.is_anomalous and good.picture.kind is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"summary": "A scratch [ANO][NOR][SEG]."}, r"found \[ANO\], \[NOR\], \[SEG\]"),
        ({"summary": "A scratch [NOR][ANO]."}, r"found \[NOR\], \[ANO\]"),
        ({"summary": "[NOR][ANO][SEG][SEG]"}, r"once each"),
        ({"summary": "[NOR][ANO][SEG]<|im_end|>"}, "im_end"),
        ({"observation": "See [SEG]."}, "expected observation without control tokens"),
        ({"diagnosis": " "}, "expected diagnosis with words"),
        ({"explanation": 3}, "'explanation'"),
        ({"image": "../pictures/gone.png"}, "gone.png"),
        ({"mask": "../pictures/gone.png"}, "gone.png"),
        ({"image": "/pictures/a.png"}, "relative"),
    ],
)
def test_a_record_that_cannot_be_used_names_the_line(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    file = write_instruct(tmp_path, described(), described(**changes))
    with pytest.raises(DatasetError, match=found) as raised:
        read_instruct(file)
    assert (raised.value.file, raised.value.line) == (file, 3)


def test_a_missing_key_a_broken_line_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    record = described()
    del record["mask"]
    with pytest.raises(DatasetError, match="expected 'mask' in the record"):
        read_instruct(write_instruct(tmp_path, record))
    file = write_instruct(tmp_path, described())
    file.write_text('{"image": ')
    with pytest.raises(DatasetError, match="line 1: expected one JSON object a line"):
        read_instruct(file)
    file.write_text("\n")
    with pytest.raises(DatasetError, match="at least one record"):
        read_instruct(file)


# Pictures


def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255  # upper left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png")
    assert turned.shape == (6, 4, 3) and turned[0, 3].tolist() == [255, 255, 255] and turned.sum() == 3 * 255


def test_pictures_of_other_modes_become_rgb_by_the_rules_of_the_runtime(tmp_path: Path) -> None:
    from runtime.images import read_image

    rng = np.random.default_rng(0)
    arrays = {
        "grey16": rng.integers(0, 65536, (5, 7), dtype=np.uint16),
        "alpha": rng.integers(0, 256, (5, 7, 4), dtype=np.uint8),
        "grey": rng.integers(0, 256, (5, 7), dtype=np.uint8),
    }
    for name, array in arrays.items():
        path = tmp_path / f"{name}.png"
        Image.fromarray(array).save(path)
        read = read_picture(path)
        assert read.dtype == np.uint8 and (read == read_image(path)).all()


def test_a_gif_by_the_name_of_jpg_is_learned_from_by_its_first_frame_and_is_no_mask(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour).quantize() for colour in ((10, 20, 30), (200, 0, 0))]
    path = tmp_path / "19579.jpg"
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    read = read_picture(path)
    assert read.shape == (HEIGHT, WIDTH, 3) and (read == (10, 20, 30)).all()
    for refused in (read_nonzero, read_indices, picture_size):
        with pytest.raises(DatasetError, match=r"19579\.jpg: expected a picture that decodes"):
            refused(path)


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "cut.png", 200, 200)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"cut\.png: expected a picture that decodes"):
        read_picture(path)
    with pytest.raises(DatasetError, match="no such file"):
        read_picture(tmp_path / "gone.png")
