"""The published layouts, in miniature: what is read, how masks are taken, and what each kind of damage is called."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_manifest import damaged_png

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.mvtec import read_mvtec
from benchmarks.datasets import LAYOUTS, READERS_HELP, Judged, Picture, read_dataset

HEIGHT, WIDTH = 11, 17


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:6, 3:13] = True
    return mask


def put(path: Path, pixels: np.ndarray | None = None) -> Path:
    """A picture, grey unless said otherwise; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8) if pixels is None else pixels).save(path)
    return path


def put_mask(path: Path, anomalous: bool = True, low: int = 0, high: int = 255) -> Path:
    return put(path, np.where(truth() & anomalous, high, low).astype(np.uint8))


def mvtec(root: Path) -> Path:
    for category, kinds in (("bottle", ("broken", "contamination")), ("carpet", ("hole",))):
        put(root / category / "test" / "good" / "000.png")
        put(root / category / "train" / "good" / "000.png")
        for kind in kinds:
            for name in ("000", "001"):
                put(root / category / "test" / kind / f"{name}.png")
                put_mask(root / category / "ground_truth" / kind / f"{name}_mask.png")
        (root / category / "license.txt").write_text("words")
    return root


def ksdd2(root: Path) -> Path:
    for split, names in (("train", ("10000",)), ("test", ("20000", "20001", "20002"))):
        for name in names:
            put(root / split / f"{name}.png")
            put_mask(root / split / f"{name}_GT.png", anomalous=name == "20001")
    return root


def rsdd(root: Path) -> Path:
    for kind in ("Type-I", "Type-II"):
        for name in ("rail_1", "rail_2"):
            put(root / f"{kind} RSDDs dataset" / "Rail surface images" / f"{name}.jpg")
            put_mask(root / f"{kind} RSDDs dataset" / "GroundTruth" / f"{name}.jpg")
    return root


def isic(root: Path) -> Path:
    for part in ("Test", "Training"):
        put(root / f"ISIC2018_Task1-2_{part}_Input" / f"ISIC_{part}.jpg")
        put_mask(root / f"ISIC2018_Task1_{part}_GroundTruth" / f"ISIC_{part}_segmentation.png")
        (root / f"ISIC2018_Task1-2_{part}_Input" / "ATTRIBUTION.txt").write_text("words")
    return root


def polyps(root: Path) -> Path:
    for name in ("1", "2"):
        put(root / "images" / f"{name}.png")
        put_mask(root / "masks" / f"{name}.png", low=3, high=250)
    return root


def folder(root: Path) -> Path:
    for name in ("a", "b", "c"):
        put(root / f"{name}.jpg")
    put_mask(root / "masks" / "a.png")
    put_mask(root / "masks" / "b.png", anomalous=False)
    return root


def good(root: Path) -> Path:
    for name in ("a", "b"):
        put(root / f"{name}.jpg")
    return root


def manifest(root: Path) -> Path:
    put(root / "a.png")
    put_mask(root / "a_mask.png")
    (root / "manifest.csv").write_text("image,mask,label,class,split\na.png,a_mask.png,1,bolt,test\n")
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "mvtec": mvtec,
    "ksdd2": ksdd2,
    "rsdd": rsdd,
    "isic": isic,
    "colondb": polyps,
    "clinicdb": polyps,
    "folder": folder,
    "good": good,
    "manifest": manifest,
}


def summary(pictures: list[Judged]) -> list[tuple[str, bool | None, str, str | None]]:
    return [(picture.image.stem, picture.is_anomalous, picture.category, picture.kind) for picture in pictures]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_anomalous_picture_its_mask(layout: str, tmp_path: Path) -> None:
    pictures = read_dataset(layout, MAKERS[layout](tmp_path / "set"))
    assert any(picture.is_anomalous for picture in pictures) or layout == "good"
    for picture in pictures:
        assert picture.shapes() == [(HEIGHT, WIDTH)]
        assert np.array_equal(picture.read_mask(HEIGHT, WIDTH), truth() & bool(picture.is_anomalous))


def test_the_help_says_something_of_every_layout() -> None:
    assert re.findall(r"^  (\w+)  ", READERS_HELP, re.MULTILINE) == list(LAYOUTS)


def test_mvtec_has_categories_and_kinds_and_takes_one_category_too(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "mvtec")
    pictures = read_dataset("mvtec", root)
    assert summary(pictures) == [
        *[(name, True, "bottle", kind) for kind in ("broken", "contamination") for name in ("000", "001")],
        ("000", False, "bottle", "good"),
        ("000", False, "carpet", "good"),
        *[(name, True, "carpet", "hole") for name in ("000", "001")],
    ]
    assert summary(read_dataset("mvtec", root / "carpet")) == summary(pictures)[5:]


def test_ksdd2_knows_normal_pictures_by_their_black_masks(tmp_path: Path) -> None:
    root = ksdd2(tmp_path / "set")
    assert [(name, label) for name, label, _, _ in summary(read_dataset("ksdd2", root))] == [
        ("20000", False),
        ("20001", True),
        ("20002", False),
    ]
    assert [picture.image.stem for picture in read_dataset("ksdd2", root, "train")] == ["10000"]


def test_the_copies_in_ksdd2s_train_are_left_out_with_a_warning_and_no_other_file_is(tmp_path: Path) -> None:
    root = ksdd2(tmp_path / "set")
    put(root / "train/10301.png")
    put_mask(root / "train/10301_GT.png", anomalous=True)
    put(root / "train/10301 (copy).png")
    put_mask(root / "train/10301_GT (copy).png")
    with pytest.warns(UserWarning, match=r"train: left out 10301 \(copy\)\.png and 10301_GT \(copy\)\.png"):
        assert [picture.image.stem for picture in read_dataset("ksdd2", root, "train")] == ["10000", "10301"]
    put(root / "train/10302 (copy).png")
    with pytest.warns(UserWarning), pytest.raises(DatasetError, match=r"10302 \(copy\)\.png: expected its mask"):
        read_dataset("ksdd2", root, "train")


def test_rsdd_pools_both_types_and_takes_one_of_them(tmp_path: Path) -> None:
    root = rsdd(tmp_path / "set")
    assert {picture.category for picture in read_dataset("rsdd", root)} == {"rail"}
    assert [picture.kind for picture in read_dataset("rsdd", root)] == ["Type-I", "Type-I", "Type-II", "Type-II"]
    assert len(read_dataset("rsdd", root / "Type-II RSDDs dataset")) == 2


@pytest.mark.parametrize(
    ("images", "masks", "ending"),
    [
        ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth", "_segmentation"),
        ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth", "_Segmentation"),
    ],
)
def test_isic_is_read_in_every_years_folders(images: str, masks: str, ending: str, tmp_path: Path) -> None:
    put(tmp_path / images / "ISIC_0000003.jpg")
    put(tmp_path / images / "ISIC_0000003_superpixels.png")
    put_mask(tmp_path / masks / f"ISIC_0000003{ending}.png")
    assert [picture.image.name for picture in read_dataset("isic", tmp_path)] == ["ISIC_0000003.jpg"]
    isic(tmp_path)
    with pytest.raises(DatasetError, match="name a folder that holds one of them"):
        read_dataset("isic", tmp_path)
    assert [picture.image.stem for picture in read_dataset("isic", isic(tmp_path / "2018"), "train")] == ["ISIC_Training"]


def test_polyps_are_read_from_the_original_folders_too_with_other_suffixes(tmp_path: Path) -> None:
    put(tmp_path / "Original" / "1.tif")
    put_mask(tmp_path / "Ground Truth" / "1.png")
    (picture,) = read_dataset("clinicdb", tmp_path)
    assert picture.image.name == "1.tif" and picture.read_mask(HEIGHT, WIDTH).any()


def test_a_smoothed_mask_counts_above_127_and_elsewhere_only_0_and_255_are_taken(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[0, :4] = (1, 127, 128, 255)
    mask = put(tmp_path / "mask.png", values)
    image = put(tmp_path / "image.png")
    smoothed = Picture(image, mask, True, "colon", smoothed=True).read_mask(HEIGHT, WIDTH)
    assert smoothed[0, :4].tolist() == [False, False, True, True] and smoothed.sum() == 2
    with pytest.raises(DatasetError, match="mask.png: expected a mask of 0 and 255, found 1, 127, 128; write"):
        Picture(image, mask, True, "skin").read_mask(HEIGHT, WIDTH)


def test_a_grey_mask_may_be_stored_as_colours_and_a_coloured_one_is_refused(tmp_path: Path) -> None:
    grey = np.repeat(truth()[:, :, None].astype(np.uint8) * 255, 3, axis=2)
    image = put(tmp_path / "image.png")
    assert np.array_equal(Picture(image, put(tmp_path / "rgb.png", grey), True, "skin").read_mask(HEIGHT, WIDTH), truth())
    Image.fromarray(truth()).save(tmp_path / "bits.png")
    assert np.array_equal(Picture(image, tmp_path / "bits.png", True, "skin").read_mask(HEIGHT, WIDTH), truth())
    red = put(tmp_path / "red.png", grey * np.array([1, 0, 0], np.uint8))
    for smoothed in (False, True):
        with pytest.raises(DatasetError, match="expected a grey mask, found colours, 255 levels apart"):
            Picture(image, red, True, "skin", smoothed=smoothed).read_mask(HEIGHT, WIDTH)
    deep = put(tmp_path / "deep.png", truth().astype(np.uint16) * 65535)
    with pytest.raises(DatasetError, match="mode I;16"):
        Picture(image, deep, True, "skin").read_mask(HEIGHT, WIDTH)


def test_masks_beside_their_pictures_are_their_masks(tmp_path: Path) -> None:
    for name in ("bad.png", "good.png"):
        Image.new("RGB", (8, 6), (90, 80, 70)).save(tmp_path / name)
    Image.fromarray(np.eye(6, 8, dtype=np.uint8) * 255).save(tmp_path / "bad_mask.png")
    bad, good = read_dataset("folder", tmp_path)
    assert (bad.image.name, bad.is_anomalous, bad.read_mask(6, 8).sum()) == ("bad.png", True, 6)
    assert (good.image.name, good.is_anomalous) == ("good.png", False)
    with pytest.raises(DatasetError, match=r"bad_mask.png.*a mask beside its picture.*--dataset folder"):
        read_dataset("good", tmp_path)


def test_a_folder_without_masks_claims_nothing_and_one_with_masks_labels_every_picture(tmp_path: Path) -> None:
    root = folder(tmp_path / "line")
    assert summary(read_dataset("folder", root)) == [("a", True, "line", None), ("b", False, "line", None), ("c", False, "line", None)]
    shutil.rmtree(root / "masks")
    assert {picture.is_anomalous for picture in read_dataset("folder", root)} == {None}
    (root / "images").mkdir()
    put(root / "images" / "d.png")
    assert [picture.image.name for picture in read_dataset("folder", root)] == ["d.png"]


def test_masks_that_agvas_segment_wrote_are_taken(tmp_path: Path) -> None:
    root = folder(tmp_path / "line")
    for name in ("a", "b"):
        (root / "masks" / f"{name}.png").rename(root / "masks" / f"{name}_mask.png")
    assert [picture.is_anomalous for picture in read_dataset("folder", root)] == [True, False, False]


def test_an_mvtec_set_is_the_same_to_training_and_stricter_here_where_a_figure_would_move(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "set")
    ours, learned = read_dataset("mvtec", root), read_mvtec(root, "test")
    assert [(item.image, item.is_anomalous, item.category) for item in ours] == [
        (item.image, item.is_anomalous, item.category) for item in learned
    ]
    truths = [{item.image: item.read_mask(HEIGHT, WIDTH) for item in items} for items in (ours, learned)]
    assert all(np.array_equal(mask, truths[1][image]) for image, mask in truths[0].items())

    put_mask(root / "carpet/ground_truth/hole/000_mask.png", high=3)  # a number for each kind, say
    (first, *_) = (item for item in read_dataset("mvtec", root) if item.category == "carpet" and item.is_anomalous)
    with pytest.raises(DatasetError, match="000_mask.png: expected a mask of 0 and 255, found 3"):
        first.read_mask(HEIGHT, WIDTH)
    put_mask(root / "carpet/ground_truth/hole/002_mask.png")
    with pytest.raises(DatasetError, match="002_mask.png: expected its picture"):
        read_dataset("mvtec", root)
    again = read_mvtec(root, "test")
    assert summary(again) == summary(learned)
    assert all(np.array_equal(item.read_mask(HEIGHT, WIDTH), truths[1][item.image]) for item in again)


def test_good_parts_are_normal_throughout(tmp_path: Path) -> None:
    assert summary(read_dataset("good", good(tmp_path / "line"))) == [("a", False, "line", None), ("b", False, "line", None)]


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "mvtec: a mask is missing": ("mvtec", lambda r: (r / "bottle/ground_truth/broken/001_mask.png").unlink(), "broken/001.png"),
    "mvtec: a picture is missing": ("mvtec", lambda r: (r / "bottle/test/broken/001.png").unlink(), "001_mask.png: expected its picture"),
    "mvtec: a kind's masks are missing": ("mvtec", lambda r: shutil.rmtree(r / "carpet/ground_truth/hole"), "ground_truth/hole: expected"),
    "mvtec: a kind's pictures are missing": ("mvtec", lambda r: shutil.rmtree(r / "carpet/test/hole"), "found hole more"),
    "mvtec: a folder is no category": ("mvtec", lambda r: (r / "extra").mkdir(), "extra/test: expected a folder"),
    "mvtec: nothing inside": ("mvtec", lambda r: (shutil.rmtree(r), r.mkdir()), "a folder for each category"),
    "mvtec: a mask of another name": ("mvtec", lambda r: put_mask(r / "carpet/ground_truth/hole/002.png"), "ends in _mask"),
    "ksdd2: a mask is missing": ("ksdd2", lambda r: (r / "test/20001_GT.png").unlink(), "20001.png: expected its mask 20001_GT"),
    "ksdd2: no test folder": ("ksdd2", lambda r: shutil.rmtree(r / "test"), "the layout ksdd2, a folder test"),
    "mvtec: no category": ("mvtec", lambda r: [shutil.rmtree(r / c / "test") for c in ("bottle", "carpet")], "found bottle, carpet; name"),
    "rsdd: no type": ("rsdd", lambda r: [shutil.rmtree(path) for path in r.iterdir()], "the layout rsdd"),
    "ksdd2: a damaged mask": (
        "ksdd2",
        lambda r: (r / "test/20001_GT.png").write_bytes(b"\x89PNG"),
        "20001_GT.png: expected a readable mask",
    ),
    "ksdd2: a mask with a broken chunk": (
        "ksdd2",
        lambda r: (r / "test/20001_GT.png").write_bytes(damaged_png((r / "test/20001_GT.png").read_bytes(), 10)),
        "20001_GT.png: expected a readable mask",
    ),
    "rsdd: one type lacks its masks": (
        "rsdd",
        lambda r: shutil.rmtree(r / "Type-II RSDDs dataset/GroundTruth"),
        "Type-II RSDDs dataset/Ground",
    ),
    "isic: other folders": (
        "isic",
        lambda r: (r / "ISIC2018_Task1-2_Test_Input").rename(r / "Test"),
        "ISIC2018_Task1-2_Test_Input: expected a",
    ),
    "colondb: no folders": ("colondb", lambda r: [shutil.rmtree(r / name) for name in ("images", "masks")], "images and masks or Original"),
    "colondb: a mask of another size": ("colondb", lambda r: put_mask_of(r / "masks/2.png", 7, 5), "2.png: expected a mask of 11 x 17"),
    "clinicdb: a damaged picture": ("clinicdb", lambda r: (r / "images/1.png").write_bytes(b"no"), "1.png: expected an image"),
    "clinicdb: two pictures of one name": ("clinicdb", lambda r: put(r / "images/1.jpg"), "found 1.jpg too"),
    "clinicdb: no pictures": ("clinicdb", lambda r: [path.unlink() for path in (r / "images").iterdir()], "images: expected pictures"),
    "folder: a mask without a picture": ("folder", lambda r: put_mask(r / "masks/z.png"), "z.png: expected its picture"),
    "folder: grey levels in a mask": (
        "folder",
        lambda r: put_mask(r / "masks/a.png", high=1),
        "a.png: expected a mask of 0 and 255, found 1",
    ),
    "folder: missing": ("folder", shutil.rmtree, "expected a folder, found nothing"),
    "manifest: missing": ("manifest", lambda r: (r / "manifest.csv").unlink(), "manifest.csv"),
}


def put_mask_of(path: Path, height: int, width: int) -> Path:
    return put(path, np.full((height, width), 255, np.uint8))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_file_before_anything_is_evaluated(damage: str, tmp_path: Path) -> None:
    layout, harm, message = DAMAGES[damage]
    root = MAKERS[layout](tmp_path / "set")
    read_dataset(layout, root)  # whole before
    harm(root)
    with pytest.raises(DatasetError) as raised:
        read_dataset(layout, root)
    assert message in str(raised.value) and str(root) in str(raised.value)


@pytest.mark.parametrize("layout", ["mvtec", "ksdd2", "rsdd", "isic", "colondb", "clinicdb"])
def test_a_manifest_that_is_named_as_another_layout_is_told_its_own(layout: str, tmp_path: Path) -> None:
    for name in ("photos", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "manifest.csv").write_text("image,mask,label\n")
    with pytest.raises(DatasetError, match=r"found photos, pictures and manifest\.csv; give --dataset manifest") as raised:
        read_dataset(layout, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: expected the ")


def test_a_mask_that_contradicts_its_layout_is_found_when_it_is_read(tmp_path: Path) -> None:
    root = polyps(tmp_path / "set")
    put_mask(root / "masks" / "2.png", anomalous=False)
    pictures = read_dataset("colondb", root)
    with pytest.raises(DatasetError, match="2.png: expected anomalous pixels, found none"):
        pictures[1].read_mask(HEIGHT, WIDTH)
    root = ksdd2(tmp_path / "other")
    normal = read_dataset("ksdd2", root)[0]
    put_mask(root / "test" / "20000_GT.png")
    with pytest.raises(DatasetError, match="20000_GT.png: expected no anomalous pixel, found 40"):
        normal.read_mask(HEIGHT, WIDTH)
    with pytest.raises(DatasetError, match="expected a mask of 17 x 11"):
        pictures[0].read_mask(WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ("imagenet", None, "expected one of mvtec"),
        ("mvtex", None, "did you mean 'mvtec'"),
        ("mvtec", "train", "without splits"),
        ("ksdd2", "val", "train and test, got val"),
        ("isic", "val", "train, validation, test, got val"),
    ],
)
def test_a_layout_or_split_that_does_not_exist_is_refused(layout: str, split: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataset(layout, tmp_path, split)
