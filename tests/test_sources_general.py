"""General segmentation, referring expressions and conversations in miniature, in their published layouts."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agvas.training.sources.catalogue import SourceSettings, read_source
from agvas.training.sources.coco import read_coco
from agvas.training.sources.conversations import read_conversations
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.index_masks import read_ade20k, read_coco_stuff
from agvas.training.sources.manifest import read_phrases, read_split
from agvas.training.sources.plain_pickle import read_plain_pickle
from agvas.training.sources.referring import read_referring

HEIGHT, WIDTH = 11, 17
RECTANGLE = [3, 2, 10, 2, 10, 5, 3, 5]  # columns 3..9, rows 2..4
TRIANGLE = [12, 6, 12, 6]


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 20, 30)).save(path)
    return path


def rectangle() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:5, 3:10] = True
    return mask


def blob() -> np.ndarray:
    """Something no polygon gives."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[7:9, 1:4] = mask[10, 16] = mask[0, 0] = True
    return mask


def counts_of(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths by definition: column by column, zeros first."""
    counts, current = [0], False
    for value in mask.T.ravel():
        if value != current:
            counts.append(0)
            current = bool(value)
        counts[-1] += 1
    return counts


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": counts_of(mask)}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    return {"size": list(mask.shape), "counts": coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()}


def same(mask: np.ndarray, expected: np.ndarray) -> bool:
    return bool(mask.dtype == np.bool_ and mask.shape == expected.shape and (mask == expected).all())


def draws(record: Any, times: int = 40) -> dict[str, np.ndarray]:
    """What many generators draw of a record, by name."""
    drawn = [record.draw(HEIGHT, WIDTH, np.random.default_rng(seed)) for seed in range(times)]
    return {name: mask for name, mask in drawn}


# COCO's JSON


def annotation(key: int, segmentation: Any, category: int = 1, image: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": key, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0} | more


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(*annotations: Any, **changes: Any) -> tuple[Path, Path]:
        images = tmp_path / "train2017"
        for name in ("000000000007.jpg", "000000000009.jpg"):
            picture(images / name)
        size = {"height": HEIGHT, "width": WIDTH}
        content = {
            "images": [{"id": 9, "file_name": "000000000009.jpg"} | size, {"id": 7, "file_name": "000000000007.jpg"} | size],
            "annotations": list(annotations),
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "mug_(drinkware):inner_side"}],
        } | changes
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(content))
        return file, images

    return write


@pytest.mark.parametrize("form", ["polygon", "uncompressed", "compressed"])
def test_polygons_and_both_run_length_encodings_give_their_masks(write_coco: Callable[..., Any], form: str) -> None:
    mask = rectangle() if form == "polygon" else blob()
    segmentation = {"polygon": [RECTANGLE], "uncompressed": uncompressed(mask), "compressed": compressed(mask)}[form]
    (image,), _ = read_coco(*write_coco(annotation(1, segmentation)))
    ((name, drawn),) = draws(image, 3).items()
    assert name == "the dog" and same(drawn, mask)


def test_masks_without_pycocotools_say_what_they_need(write_coco: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (image,), _ = read_coco(*write_coco(annotation(1, [RECTANGLE])))
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match=r'annotations\.json: COCO masks need pycocotools.*pip install "agvas') as raised:
        draws(image)
    assert raised.value.name == "pycocotools"


def test_a_class_is_the_union_of_its_annotations_and_the_classes_present_are_drawn(write_coco: Callable[..., Any]) -> None:
    records, remarks = read_coco(
        *write_coco(annotation(5, uncompressed(blob())), annotation(3, [RECTANGLE]), annotation(4, [RECTANGLE], category=2))
    )
    drawn = draws(records[0])
    assert set(drawn) == {"the dog", "the mug inner side", "the inner side of the mug"}
    assert same(drawn["the dog"], rectangle() | blob()) and same(drawn["the mug inner side"], rectangle())
    assert remarks == ["1 images without annotations left out"]


def test_a_draw_depends_on_the_generator_and_not_on_the_order_of_the_file(write_coco: Callable[..., Any]) -> None:
    entries = [annotation(5, uncompressed(blob())), annotation(3, [RECTANGLE], category=2)]
    first, again = (read_coco(*write_coco(*order))[0][0] for order in (entries, entries[::-1]))
    for seed in range(10):
        one, two = (record.draw(HEIGHT, WIDTH, np.random.default_rng(seed)) for record in (first, again))
        assert one is not None and two is not None and one[0] == two[0] and same(one[1], two[1])


def test_images_come_by_id(write_coco: Callable[..., Any]) -> None:
    records, remarks = read_coco(*write_coco(annotation(1, [RECTANGLE], image=9), annotation(2, [RECTANGLE], image=7)))
    assert [record.image.name for record in records] == ["000000000007.jpg", "000000000009.jpg"] and not remarks


def test_polygons_of_fewer_than_three_corners_are_left_out_and_counted(write_coco: Callable[..., Any]) -> None:
    entries = [annotation(1, [RECTANGLE, TRIANGLE]), annotation(2, [TRIANGLE], image=9), annotation(3, [], image=9)]
    records, remarks = read_coco(*write_coco(*entries))
    assert len(records) == 1 and same(draws(records[0], 1)["the dog"], rectangle())
    assert remarks == [
        "2 polygons of fewer than three corners left out",
        "2 annotations without a shape left out",
        "1 images without annotations left out",
    ]


def test_a_polygon_may_round_out_of_its_image_by_a_pixel(write_coco: Callable[..., Any]) -> None:
    (image,), _ = read_coco(*write_coco(annotation(1, [[3, 2, 17.4, 2, 17.4, 5, 3, 5]])))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[2:5, 3:] = True
    assert same(draws(image, 1)["the dog"], expected)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (annotation(12, [[3, 2, 4, 2, 4]]), "a polygon x, y, x, y, ... in annotation 12"),
        (annotation(12, [["a", 2, 4, 2, 4, 5]]), "a polygon x, y, x, y, ... in annotation 12"),
        (annotation(12, [[3, 2, float("nan"), 2, 4, 5]]), "a polygon x, y, x, y, ... in annotation 12"),
        (annotation(12, {"size": [WIDTH, HEIGHT], "counts": [187]}), r"size \[11, 17\] .* found \[17, 11\]"),
        (annotation(12, {"size": [HEIGHT, WIDTH], "counts": [5, 6]}), "counts that sum to 187"),
        (annotation(12, {"size": [HEIGHT, WIDTH], "counts": 3}), "counts as a list or an ASCII string"),
        (annotation(12, None), "polygons or a run-length encoding"),
        (annotation(12, [RECTANGLE], category=3), "category_id of the file's categories in annotation 12, found 3"),
        (annotation(12, [RECTANGLE], image=8), "image_id of the file's images in annotation 12, found 8"),
        ({"id": 12}, "'image_id' in annotation 12, found id"),
        ([], r"an object as annotations\[0\]"),
    ],
)
def test_an_annotation_that_cannot_be_is_refused_when_the_file_is_read(write_coco: Callable[..., Any], entry: Any, expected: str) -> None:
    file, images = write_coco(entry)
    with pytest.raises(DatasetError, match=expected) as raised:
        read_coco(file, images)
    assert raised.value.file == file


OUTSIDE = [3, 2, 40, 2, 10, 5]


def test_a_polygon_far_out_of_its_image_leaves_its_class_out_of_that_image_alone(write_coco: Callable[..., Any]) -> None:
    """Not the annotation alone: the other dog would be taught as the only one."""
    dogs = [annotation(1, [RECTANGLE]), annotation(2, [OUTSIDE]), annotation(4, [RECTANGLE], image=9)]
    records, remarks = read_coco(*write_coco(*dogs, annotation(3, [RECTANGLE], category=2)))
    assert [set(draws(record)) for record in records] == [{"the mug inner side", "the inner side of the mug"}, {"the dog"}]
    found = "x 3..40, y 2..5 of 17 x 11 (width x height) in annotation 2"
    assert remarks == [f"1 annotations that reach out of their images left out, the first with {found}"]
    records, remarks = read_coco(*write_coco(*dogs))
    assert [record.image.name for record in records] == ["000000000009.jpg"] and remarks[-1] == "1 images without annotations left out"


@pytest.mark.parametrize(("sound", "outside"), [(3, 2), (297, 4)])
def test_many_polygons_out_of_their_images_are_another_releases(write_coco: Callable[..., Any], sound: int, outside: int) -> None:
    """One in a hundred is a mistake, and so is a single one."""
    entries = [annotation(n, [RECTANGLE], image=9) for n in range(sound)]
    faulty = [annotation(sound + n, [OUTSIDE]) for n in range(outside)]
    with pytest.raises(DatasetError, match=f"x 3..40.* in annotation {sound}, and so in {outside} of {sound + outside} annotations; take"):
        read_coco(*write_coco(*entries, *faulty))
    _, remarks = read_coco(*write_coco(*entries, *faulty[:-1]))
    assert remarks[0].startswith(f"{outside - 1} annotations that reach out of their images left out")


def test_a_broken_file_a_missing_image_and_a_class_with_a_control_token_are_refused(write_coco: Callable[..., Any]) -> None:
    file, images = write_coco(annotation(1, [RECTANGLE]), categories=[{"id": 1, "name": "<|im_start|>"}])
    with pytest.raises(DatasetError, match="name of category 1 without control tokens"):
        read_coco(file, images)
    file, images = write_coco(annotation(1, [RECTANGLE]))
    (images / "000000000007.jpg").unlink()
    with pytest.raises(DatasetError, match=r"the file of image 7, found no file .*000000000007\.jpg"):
        read_coco(file, images)
    file.write_text(file.read_text()[:50])
    with pytest.raises(DatasetError, match=r"annotations\.json, line 1: expected JSON"):
        read_coco(file, images)
    with pytest.raises(DatasetError, match="no such folder"):
        read_coco(file, images / "nowhere")


def test_an_image_of_another_size_than_the_file_says_is_refused_when_it_is_drawn(write_coco: Callable[..., Any]) -> None:
    (image,), _ = read_coco(*write_coco(annotation(1, [RECTANGLE])))
    with pytest.raises(DatasetError, match="expected a mask of 22 x 17 .*found 11 x 17"):
        image.draw(2 * HEIGHT, WIDTH, np.random.default_rng(0))


@pytest.mark.parametrize(("file", "images"), [("annotations/train/train.json", "images/train"), ("train.json", "train")])
def test_partimagenet_is_read_where_its_release_has_it_and_unpacked_flat(
    tmp_path: Path, write_coco: Callable[..., Any], file: str, images: str
) -> None:
    written, _ = write_coco(annotation(1, [RECTANGLE]))
    root = tmp_path / "PartImageNet"
    picture(root / images / "000000000007.jpg")
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    written.rename(root / file)
    (record,), _ = read_source("general", SourceSettings("partimagenet", str(root)))
    assert record.image == root / images / "000000000007.jpg"


def test_partimagenet_that_is_nowhere_is_missed_where_its_release_has_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"images.train: expected a folder"):
        read_source("general", SourceSettings("partimagenet", str(tmp_path)))


# Masks of class indices


def index_mask(path: Path, background: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    indices = np.full((HEIGHT, WIDTH), background, np.uint8)
    indices[rectangle()] = 1
    indices[blob()] = 3
    Image.fromarray(indices).save(path)
    return path


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    picture(root / "images/training/ADE_train_00000001.jpg")
    index_mask(root / "annotations/training/ADE_train_00000001.png", 0)
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall", "3\t0.0878\t8265\t796\tfloor, flooring"]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def stuff(tmp_path: Path) -> Path:
    root = tmp_path / "cocostuff"
    picture(root / "images/train2017/000000000009.jpg")
    index_mask(root / "annotations/train2017/000000000009.png", 255)
    (root / "labels.txt").write_text("0: unlabeled\n1: person\n2: bicycle\n3: wall-other\n4: sky\n")
    return root


def test_ade20k_counts_classes_from_one_and_leaves_other_out(ade: Path) -> None:
    (image,), remarks = read_ade20k(ade)
    drawn = draws(image)
    assert set(drawn) == {"the wall", "the floor"} and not remarks
    assert same(drawn["the wall"], rectangle()) and same(drawn["the floor"], blob())


def test_ade20ks_table_is_read_with_the_blanks_that_the_release_has_behind_its_cells(ade: Path) -> None:
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1 \t0.1576 \t11664\t1172\tbed ", "3\t0.0878\t8265\t796\tsofa, couch, lounge "]
    (ade / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    assert set(draws(read_ade20k(ade)[0][0])) == {"the bed", "the sofa"}


def test_coco_stuff_counts_pixels_from_zero_and_names_from_one(stuff: Path) -> None:
    (image,), _ = read_coco_stuff(stuff)
    drawn = draws(image)
    assert set(drawn) == {"the bicycle", "the sky"}
    assert same(drawn["the bicycle"], rectangle()) and same(drawn["the sky"], blob())


def test_coco_stuff_classes_with_a_hyphen_are_left_alone(stuff: Path) -> None:
    (stuff / "labels.txt").write_text("0: unlabeled\n1: person\n2: wall-other\n4: sky\n")
    assert set(draws(read_coco_stuff(stuff)[0][0])) == {"the sky"}


def test_an_image_without_a_class_draws_nothing(ade: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(ade / "annotations/training/ADE_train_00000001.png")
    assert read_ade20k(ade)[0][0].draw(HEIGHT, WIDTH, np.random.default_rng(0)) is None


def test_class_masks_that_do_not_fit_are_refused(ade: Path) -> None:
    (image,), _ = read_ade20k(ade)
    rng = np.random.default_rng(0)
    with pytest.raises(DatasetError, match="found 11 x 17"):
        image.draw(WIDTH, HEIGHT, rng)
    Image.fromarray(np.full((HEIGHT, WIDTH), 2, np.uint8)).save(image.mask)
    with pytest.raises(DatasetError, match=r"expected class indices of 1\.\.3, found 2"):
        image.draw(HEIGHT, WIDTH, rng)
    Image.new("RGB", (WIDTH, HEIGHT)).save(image.mask)
    with pytest.raises(DatasetError, match="one channel of class indices, found mode RGB"):
        image.draw(HEIGHT, WIDTH, rng)


def test_a_set_with_a_part_missing_is_refused(ade: Path, stuff: Path) -> None:
    with pytest.raises(DatasetError, match=r"annotations.validation.*no such folder"):
        (ade / "images/validation").mkdir()
        read_ade20k(ade, "validation")
    (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\nx\tsky\n")
    with pytest.raises(DatasetError, match=r"objectInfo150\.txt, line 3"):
        read_ade20k(ade)
    (ade / "objectInfo150.txt").write_text("wall\n")
    with pytest.raises(DatasetError, match="columns Idx and Name"):
        read_ade20k(ade)
    (stuff / "labels.txt").write_text("0: unlabeled\nperson\n")
    with pytest.raises(DatasetError, match=r"labels\.txt, line 2"):
        read_coco_stuff(stuff)
    (stuff / "labels.txt").unlink()
    with pytest.raises(DatasetError, match=r"labels\.txt: .*no such file"):
        read_coco_stuff(stuff)
    (ade / "images/training/ADE_train_00000001.jpg").unlink()
    (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(DatasetError, match=r"its image, found no file .*ADE_train_00000001\.jpg"):
        read_ade20k(ade)


# Referring expressions


def reference(**changes: Any) -> dict[str, Any]:
    sentences = [{"sent_id": 0, "sent": "the dog on the left", "tokens": ["the"], "raw": "x"}, {"sent_id": 1, "sent": "brown dog"}]
    return {"ref_id": 3, "ann_id": 1, "image_id": 7, "category_id": 1, "split": "train", "sentences": sentences} | changes


@pytest.fixture
def refer(tmp_path: Path) -> Path:
    root = tmp_path / "refer_seg"
    picture(root / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg")
    picture(root / "images/saiapr_tc-12/00/images/25.jpg")
    size = {"height": HEIGHT, "width": WIDTH}
    for name, file, segmentation in (
        ("refcoco", "COCO_train2014_000000000007.jpg", [RECTANGLE]),
        ("refclef", "00/images/25.jpg", [compressed(blob()), compressed(rectangle())]),
    ):
        instances = {
            "images": [{"id": 7, "file_name": file} | size],
            "annotations": [annotation(1, segmentation), annotation(2, [TRIANGLE])],
            "categories": [{"id": 1, "name": "dog"}],
        }
        (root / name).mkdir()
        (root / name / "instances.json").write_text(json.dumps(instances))
        write_refs(root / name / "refs(unc).p", reference(), reference(ref_id=4, split="val"))
    return root


def write_refs(file: Path, *references: dict[str, Any], protocol: int = 2) -> None:
    file.write_bytes(pickle.dumps(list(references), protocol=protocol))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_references_are_read_from_the_published_pickle_of_every_protocol(refer: Path, protocol: int) -> None:
    write_refs(refer / "refcoco/refs(unc).p", reference(), protocol=protocol)
    (record,), _ = read_referring(refer, "refcoco")
    drawn = draws(record)
    assert set(drawn) == {"the dog on the left", "brown dog"}
    assert all(same(mask, rectangle()) for mask in drawn.values())


def test_refclef_lists_of_encodings_are_united_and_splits_kept_apart(refer: Path) -> None:
    (record,), _ = read_referring(refer, "refclef")
    assert same(draws(record, 1).popitem()[1], rectangle() | blob())
    assert len(read_referring(refer, "refclef", split="val")[0]) == 1
    with pytest.raises(DatasetError, match="references of split testA, found train, val"):
        read_referring(refer, "refclef", split="testA")


def test_the_same_list_as_json_is_read_as_well(refer: Path) -> None:
    (refer / "refcoco/refs.json").write_text(json.dumps([reference(ann_id=2), reference(ref_id=9)]))
    records, remarks = read_referring(refer, "refcoco", annotations="refs.json")
    assert len(records) == 1
    assert remarks == ["1 polygons of fewer than three corners left out", "1 annotations without a shape left out"]


def test_an_object_that_reaches_out_of_its_image_is_not_referred_to(refer: Path) -> None:
    file = refer / "refcoco/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"] = [OUTSIDE]
    file.write_text(json.dumps(content))
    write_refs(refer / "refcoco/refs(unc).p", reference(), reference(ref_id=4, ann_id=2))
    (record,), remarks = read_referring(refer, "refcoco")
    assert same(draws(record, 1).popitem()[1], rectangle())
    assert len(remarks) == 1 and remarks[0].startswith("1 annotations that reach out of their images left out")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ann_id": 99}, r"an ann_id of .*instances\.json in refs\[0\], found 99"),
        ({"image_id": 8}, r"the image of annotation 1 \(7\) in refs\[0\]"),
        ({"sentences": []}, r"sentences in refs\[0\], found none"),
        ({"sentences": [{"sent": "the [SEG]"}]}, r"a sentence of refs\[0\] without control tokens, found \[SEG\]"),
        ({"ref_id": "3"}, "an integer as 'ref_id'"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(refer: Path, changes: dict[str, Any], expected: str) -> None:
    write_refs(refer / "refcoco/refs(unc).p", reference(**changes))
    with pytest.raises(DatasetError, match=expected):
        read_referring(refer, "refcoco")


class Malicious:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_runs_nothing(refer: Path, tmp_path: Path, protocol: int) -> None:
    import os

    trace = tmp_path / "trace"
    payload = [reference(), Malicious(os.mkdir, str(trace))]
    file = refer / "refcoco/refs(unc).p"
    file.write_bytes(pickle.dumps(payload, protocol=protocol))
    with pytest.raises(DatasetError, match=r"refs\(unc\)\.p: .*found a look-up of .*mkdir"):
        read_referring(refer, "refcoco")
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists()  # the payload is a real one


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "look-up of builtins.eval"),
        (b"(S'1'\nibuiltins\neval\n.", "look-up of builtins.eval"),  # INST
        (b"(cbuiltins\neval\nS'1'\no.", "look-up of builtins.eval"),  # OBJ
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "look-up of builtins.eval"),  # STACK_GLOBAL
        (b"ccollections\nOrderedDict\n.", "look-up of collections.OrderedDict"),
        (b"P1\n.", "persistent id"),
        (b"\x80\x02\x82\x01.", "unregistered extension"),
        (b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a.", "bytearray"),
        (b"(lp0\nS'a'", "EOFError|truncated"),
        (b"no pickle", "UnpicklingError"),
        (b"", "EOFError"),
    ],
)
def test_every_way_to_ask_for_more_than_data_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    file = tmp_path / "refs.p"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=found):
        read_plain_pickle(file)


def test_plain_data_of_any_depth_comes_through_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "refs.p"
    shared: list[Any] = ["\u00e9", 1, 2.5, None, True]
    value = {"a": [shared, shared], (1, 2): {"deep": [[["x"]]]}}
    file.write_bytes(pickle.dumps(value))
    assert read_plain_pickle(file) == value
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    file.write_bytes(pickle.dumps(cyclic))
    assert len(read_plain_pickle(file)) == 1


# A manifest's phrases


def write_manifest(root: Path, *lines: str) -> Path:
    picture(root / "a.png")
    Image.fromarray(rectangle().astype(np.uint8) * 255).save(root / "a_mask.png")
    (root / "manifest.csv").write_text("image,mask,label,split,text\n" + "\n".join(lines) + "\n")
    return root


def test_a_manifests_text_is_the_referring_phrase_of_its_mask(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "phrases", "a.png,a_mask.png,1,train,the man in red", "a.png,a_mask.png,1,test,the dog")
    (record,) = read_phrases(root, "train")
    ((name, mask),) = draws(record, 2).items()
    assert name == "the man in red" and same(mask, rectangle())
    assert len(read_split(root)) == 2
    with pytest.raises(DatasetError, match="images of split val, found test, train"):
        read_split(root, "val")


@pytest.mark.parametrize(
    ("line", "found"),
    [("a.png,a_mask.png,1,,", "no text"), ("a.png,,0,,the dog", "label 0"), ("a.png,a_mask.png,1,,the [ANO] dog", r"\[ANO\]")],
)
def test_a_manifest_line_without_phrase_or_mask_is_refused_as_general_segmentation(tmp_path: Path, line: str, found: str) -> None:
    with pytest.raises(DatasetError, match=f"line 2: .*found {found}"):
        read_phrases(write_manifest(tmp_path / "phrases", line))


# Conversations


def conversation(*values: str, **changes: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": "000000000007", "image": "000000000007.jpg", "conversations": turns} | changes


def write_conversations(tmp_path: Path, *records: Any) -> tuple[Path, Path]:
    picture(tmp_path / "train2017/000000000007.jpg")
    file = tmp_path / "llava_instruct_150k.json"
    file.write_text(json.dumps(list(records)))
    return file, tmp_path / "train2017"


def test_a_turn_is_drawn_and_the_pictures_place_is_taken_out_of_the_question(tmp_path: Path) -> None:
    record = conversation("<image>\nWhat is it?", "A dog.", "Is it brown?\n", " Yes. ")
    (read,) = read_conversations(*write_conversations(tmp_path, record))
    drawn = {read.draw(np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {("What is it?", "A dog."), ("Is it brown?", "Yes.")}
    (read,) = read_conversations(*write_conversations(tmp_path, conversation("What is it?\n<image>", "A dog.")))
    assert read.turns == (("What is it?", "A dog."),)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (conversation("Hi<|im_end|>", "A dog."), r"a question of record 1 without control tokens, found <\|im_end\|>"),
        (conversation("Hi", "[SEG]"), r"an answer of record 1 without control tokens, found \[SEG\]"),
        (conversation("Hi", "<image>"), "an answer of record 1 without control tokens"),
        (conversation("<image>", "A dog."), "a question of record 1 with words"),
        (conversation("Hi"), "human and gpt in turn, ending with gpt, in record 1, found human"),
        (conversation(), "found no turns"),
        (conversation("Hi", "A dog.", image="gone.jpg"), r"the file of record 1, found no file .*gone\.jpg"),
        ({"id": "1", "conversations": []}, "'image' in record 1"),
    ],
)
def test_a_conversation_that_cannot_be_used_names_file_and_record(tmp_path: Path, record: Any, expected: str) -> None:
    file, images = write_conversations(tmp_path, conversation("Hi", "A dog."), record)
    with pytest.raises(DatasetError, match=expected) as raised:
        read_conversations(file, images)
    assert raised.value.file == file
