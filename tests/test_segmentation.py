"""A result judges, outlines, paints and saves its mask; outlines are held to slow oracles that share no code."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from runtime.errors import AgvasError, OutputError, RequestError, choose
from runtime.masking import MaskRule
from runtime.segmentation import Segmentation

HEIGHT, WIDTH = 5, 7


def segmentation(mask=None, **changes) -> Segmentation:
    """A result whose map is 0.9 in the mask and 0.1 outside, over a picture of noise."""
    if mask is None:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[1:3, 2:5] = True
    mask = np.asarray(mask, bool)
    fields = {
        "mask": mask,
        "anomaly_map": np.where(mask, 0.9, 0.1).astype(np.float32),
        "score": 0.9,
        "is_anomalous": bool(mask.any()),
        "text": "Sure, it is [NOR][ANO][SEG].",
        "instruction": "Please segment the anomalies in this image.",
        "mode": "direct",
        "answer_verified": True,
        "anchor_groups": 1,
        "truncated": False,
        "rule": MaskRule(0.5),
        "timings": {"language": 12.5, "total": 20.0},
        "image": np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), np.uint8),
    }
    return Segmentation(**{**fields, **changes})


# Outlines


def even_odd(rings, height, width) -> np.ndarray:
    """Slow oracle: a pixel is inside where a ray from its centre to the left crosses an odd number of edges."""
    inside = np.zeros((height, width), bool)
    for y, x in product(range(height), range(width)):
        crossings = 0
        for ring in rings:
            for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
                crossings += x0 == x1 and x0 <= x and min(y0, y1) <= y < max(y0, y1)
        inside[y, x] = crossings % 2
    return inside


def components(mask, diagonals: bool) -> list[frozenset[tuple[int, int]]]:
    """Slow oracle: sets of (y, x) that hang together, by breadth-first search."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * diagonals
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        queue = deque([left.pop()])
        member = set(queue)
        while queue:
            y, x = queue.popleft()
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            member |= near
            queue.extend(near)
        found.append(frozenset(member))
    return found


def signed_area(ring) -> float:
    """Positive for a ring that runs clockwise on screen (y points down)."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True)) / 2


def check_polygons(mask) -> None:
    mask = np.asarray(mask, bool)
    polygons = segmentation(mask).polygons()
    rings = [ring for polygon in polygons for ring in polygon]
    np.testing.assert_array_equal(even_odd(rings, *mask.shape), mask)
    # Each polygon is one 4-connected component, holes included.
    outlined = [frozenset(map(tuple, np.argwhere(even_odd(polygon, *mask.shape)).tolist())) for polygon in polygons]
    assert sorted(map(sorted, outlined)) == sorted(map(sorted, components(mask, diagonals=False)))
    for polygon, pixels in zip(polygons, outlined, strict=True):
        # A component's holes are the 8-connected regions of everything else that do not reach the border.
        others = np.pad(np.ones(mask.shape, bool), 1, constant_values=True)
        for y, x in pixels:
            others[y + 1, x + 1] = False
        assert len(polygon) == len(components(others, diagonals=True))
        assert signed_area(polygon[0]) > 0 and all(signed_area(hole) < 0 for hole in polygon[1:])
    for ring in rings:
        assert len(ring) >= 4 and all(type(number) is int for corner in ring for number in corner)
        for (x0, y0), (x1, y1), (_, y2) in zip(ring, ring[1:] + ring[:1], ring[2:] + ring[:2], strict=True):
            assert (x0 == x1) != (y0 == y1) and (x0 == x1) == (y1 == y2), "three corners on one line"


def test_every_mask_of_three_by_three_pixels_is_outlined_exactly():
    for bits in range(512):
        check_polygons([[bits >> 3 * row + column & 1 for column in range(3)] for row in range(3)])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_random_masks_are_outlined_exactly(share):
    generator = np.random.default_rng(int(100 * share))
    for shape in ((11, 13), (17, 5), (1, 19), (19, 1)):
        check_polygons(generator.random(shape) < share)


def test_rings_within_rings_belong_to_their_own_components():
    y, x = np.mgrid[:15, :17]
    check_polygons(np.maximum(abs(y - 7), abs(x - 8)) % 2 == 0)
    check_polygons((y + x) % 2 == 0)


def test_a_pixel_is_outlined_by_its_four_corners_and_a_frame_by_two_rings():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2, 3] = True
    assert segmentation(mask).polygons() == [[[(3, 2), (4, 2), (4, 3), (3, 3)]]]
    frame = np.ones((HEIGHT, WIDTH), bool)
    frame[1:4, 1:6] = False
    [[outer, hole]] = segmentation(frame).polygons()
    assert set(outer) == {(0, 0), (7, 0), (7, 5), (0, 5)} and set(hole) == {(1, 1), (6, 1), (6, 4), (1, 4)}


def test_an_empty_mask_has_no_polygons_and_a_full_one_a_single_ring():
    assert segmentation(np.zeros((HEIGHT, WIDTH))).polygons() == []
    assert segmentation(np.ones((HEIGHT, WIDTH))).polygons() == [[[(0, 0), (7, 0), (7, 5), (0, 5)]]]


def test_a_megapixel_mask_with_hundreds_of_components_is_outlined_within_a_line_s_patience():
    y, x = np.mgrid[:1000, :1000]
    mask = (y % 50 - 25) ** 2 + (x % 50 - 25) ** 2 < 20**2
    result = segmentation(mask)

    def spent() -> float:
        start = time.process_time()
        assert len(result.polygons()) == 400
        return time.process_time() - start

    # Measured 15 ms on one core; its own time and the best of five, so that a busy machine does not decide.
    assert min(spent() for _ in range(5)) < 0.1


# Verdicts


def test_another_threshold_judges_the_same_map_again():
    result = segmentation()
    low, high = result.with_threshold(0.05), result.with_threshold(0.95)
    assert low.mask.all() and low.is_anomalous and low.threshold == 0.05
    assert not high.mask.any() and not high.is_anomalous
    np.testing.assert_array_equal(high.with_threshold(0.5).mask, result.mask)
    assert high.anomaly_map is result.anomaly_map and high.image is result.image and high.score == result.score
    assert result.mask.any() and result.threshold == 0.5


def test_a_relative_threshold_changes_what_a_mask_holds_and_not_the_verdict():
    result = segmentation(anomaly_map=np.linspace(0.1, 0.9, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH))
    grown = result.with_threshold(relative_threshold=0.4)
    np.testing.assert_array_equal(grown.mask, result.anomaly_map > np.float32(0.36))
    assert (grown.is_anomalous, grown.threshold, grown.rule.relative_threshold) == (True, 0.5, 0.4)
    assert not grown.with_threshold(0.95).mask.any()
    assert grown.with_threshold(0.6).rule == MaskRule(0.6, 0.4)


def test_a_pixel_at_the_threshold_is_normal_also_when_the_threshold_is_no_float32():
    result = segmentation(anomaly_map=np.full((HEIGHT, WIDTH), 0.3, np.float32))
    assert not result.with_threshold(0.3).is_anomalous
    assert not result.with_threshold(np.float64(0.3)).is_anomalous


def test_without_anchors_the_mask_stays_empty_at_any_threshold():
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    result = segmentation(nothing, anomaly_map=nothing.astype(np.float32), anchor_groups=0)
    assert not result.with_threshold(0).is_anomalous


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", True])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(RequestError, match=r"0\.\.1"):
        segmentation().with_threshold(threshold)


def test_a_region_is_judged_alone():
    """A score of 0.9 lies outside: what the region holds is its own maximum, and its mask its own share of that."""
    anomaly_map = np.full((HEIGHT, WIDTH), 0.1, np.float32)
    anomaly_map[0, 0], anomaly_map[2, 2], anomaly_map[2, 3] = 0.9, 0.6, 0.4
    result = segmentation(anomaly_map > 0.5, anomaly_map=anomaly_map, rule=MaskRule(0.5, 0.5))
    region = np.zeros((HEIGHT, WIDTH), np.uint8)
    region[1:4, 1:5] = 255
    inside = result.within(region)
    assert inside.score == np.float32(0.6) and inside.is_anomalous
    assert {tuple(pixel) for pixel in np.argwhere(inside.mask)} == {(2, 2), (2, 3)}
    np.testing.assert_array_equal(inside.anomaly_map, np.where(region, anomaly_map, 0))
    assert inside.region_share == 12 / 35 and inside.to_json()["region_share"] == 12 / 35
    assert inside.text == result.text and inside.image is result.image and result.score == 0.9
    elsewhere = np.zeros((HEIGHT, WIDTH), bool)
    elsewhere[3:] = True
    assert not result.within(elsewhere).is_anomalous
    assert np.array_equal(result.within(region // 255).mask, inside.mask) and np.array_equal(result.within(region > 0).mask, inside.mask)
    assert result.within(elsewhere).with_threshold(0.05).area == elsewhere.sum()


def test_a_region_of_one_tone_is_told_where_the_picture_was_kept():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    image[:, :40] //= 20
    left = np.zeros((60, 80), bool)
    left[:, :40] = True
    result = segmentation(np.zeros((60, 80), bool), image=image, warnings=("a file of several pictures",))
    assert result.within(~left).warnings == ("a file of several pictures",)
    kept, (first, second) = result.warnings, result.within(left).warnings
    assert (first,) == kept and "99 in 100 of the region's pixels below level 20" in second
    assert result.within(left).to_json()["warnings"] == [first, second]
    assert replace(result, image=None).within(left).warnings == kept


def test_regions_of_a_region_are_what_lies_in_both_and_never_nothing():
    """Judged one after the other on the result of the one before, two parts of a picture would both be OK."""
    result = segmentation()
    top = np.zeros((HEIGHT, WIDTH), bool)
    top[:2] = True
    left = np.zeros((HEIGHT, WIDTH), bool)
    left[:, :3] = True
    both = result.within(top).within(left)
    assert both.region_share == 6 / 35 and both.area == 1
    assert both.with_threshold(0.95).region_share == 6 / 35
    with pytest.raises(RequestError, match="lies outside it"):
        result.within(top).within(~top)


def test_an_overlay_is_darker_outside_the_region():
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[2:, :] = True
    result = segmentation().within(region)
    painted = np.asarray(result.overlay())
    np.testing.assert_array_equal(painted[:2], result.image[:2] // 3)
    np.testing.assert_array_equal(painted[region & ~result.mask], result.image[region & ~result.mask])


def test_boxes_are_around_each_component():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[0, 0] = mask[1:4, 2:4] = mask[3, 4] = mask[4, 6] = True
    assert segmentation(mask).boxes() == [(0, 0, 1, 1), (2, 1, 3, 3), (6, 4, 1, 1)]
    assert segmentation(np.zeros((HEIGHT, WIDTH), bool)).boxes() == []


def test_a_region_gives_no_verdict_where_there_is_none():
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    result = segmentation(nothing, anomaly_map=nothing.astype(np.float32), anchor_groups=0)
    assert not result.within(~nothing).anchors_found


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.ones((WIDTH, HEIGHT), bool), r"expected the picture's size, 7 × 5, got 5 × 7"),
        (np.ones((HEIGHT, WIDTH)), r"got float64 \[5, 7\]; convert it, as with \(region > 0\)"),
        (np.ones((HEIGHT, WIDTH, 3), np.uint8), r"got uint8 \[5, 7, 3\]; .* take one channel"),
        ("region.png", "got the path region.png; read it with read_region"),
        (np.zeros((HEIGHT, WIDTH), bool), "at least one pixel to look at"),
        (np.full((HEIGHT, WIDTH), 200, np.uint8), "got the level 200;"),
        (np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3, "got the level 2;"),
        (np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 2 * 254 + 1, "either 1 or 255 where to look, got both;"),
        (np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH), "got the level 2, and 32 more;"),
    ],
)
def test_a_region_that_does_not_fit_is_refused(region, message):
    with pytest.raises(RequestError, match=message):
        segmentation().within(region)


def test_a_map_with_nan_is_refused_instead_of_passing_as_normal():
    poisoned = np.full((HEIGHT, WIDTH), 0.1, np.float32)
    poisoned[2, 2] = np.nan
    with pytest.raises(ValueError, match="anomaly_map.*nan"):
        segmentation(anomaly_map=poisoned)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mask": np.zeros((HEIGHT, WIDTH), np.uint8)}, "mask"),
        ({"mask": np.zeros((0, WIDTH), bool)}, "mask"),
        ({"anomaly_map": np.zeros((HEIGHT, WIDTH))}, "anomaly_map"),
        ({"anomaly_map": np.zeros((WIDTH, HEIGHT), np.float32)}, "anomaly_map"),
        ({"anomaly_map": np.full((HEIGHT, WIDTH), 1.5, np.float32)}, "anomaly_map"),
        ({"image": np.zeros((HEIGHT, WIDTH), np.uint8)}, "image"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(changes, name):
    with pytest.raises(ValueError, match=f"{name}: expected .* got "):
        replace(segmentation(), **changes)


def test_a_result_cannot_be_changed_and_its_repr_holds_no_arrays():
    result = segmentation()
    with pytest.raises(FrozenInstanceError):
        result.score = 0.1
    assert "array" not in repr(result) and "score=0.9" in repr(result)


# JSON


def test_json_holds_the_keys_of_the_command_line_and_only_plain_values():
    result = segmentation(score=np.float32(0.75), is_anomalous=np.bool_(True), timings={"total": np.float64(20)})
    record = json.loads(json.dumps(result.to_json()))
    assert record == {
        "score": 0.75,
        "is_anomalous": True,
        "mask": None,
        "area": 6,
        "text": "Sure, it is [NOR][ANO][SEG].",
        "instruction": "Please segment the anomalies in this image.",
        "mode": "direct",
        "answer_verified": True,
        "anchors_found": True,
        "anchor_groups": 1,
        "truncated": False,
        "threshold": 0.5,
        "relative_threshold": 1.0,
        "tiles": 1,
        "region_share": 1.0,
        "warnings": [],
        "boxes": [[2, 1, 3, 2]],
        "width": WIDTH,
        "height": HEIGHT,
        "timings_ms": {"total": 20.0},
    }
    record = json.loads(json.dumps(result.to_json(polygons=True)))
    assert record["polygons"] == [[[[2, 1], [5, 1], [5, 3], [2, 3]]]]


# Overlay


def test_an_overlay_tints_the_mask_and_leaves_the_rest_and_the_picture_itself_alone():
    result = segmentation()
    before = result.image.copy()
    painted = np.asarray(result.overlay(alpha=0.25, color=(200, 0, 100), outline=False))
    np.testing.assert_array_equal(painted[~result.mask], before[~result.mask])
    np.testing.assert_allclose(
        painted[result.mask], 0.75 * before[result.mask] + 0.25 * np.array([200, 0, 100]), atol=0.51
    )
    np.testing.assert_array_equal(result.image, before)


def test_an_overlay_s_outline_is_the_mask_s_outermost_pixels():
    mask = np.zeros((9, 11), bool)
    mask[2:7, 3:9] = True
    mask[0, 0] = True
    painted = np.asarray(segmentation(mask).overlay(alpha=0, color=(255, 0, 64)))
    edge = mask.copy()
    edge[3:6, 4:8] = False
    np.testing.assert_array_equal((painted == (255, 0, 64)).all(axis=2), edge)


@pytest.mark.parametrize(
    "arguments", [{"alpha": 1.5}, {"alpha": float("nan")}, {"color": (256, 0, 0)}, {"color": (1, 2)}, {"color": "red"}]
)
def test_an_overlay_refuses_what_is_no_share_or_colour(arguments):
    with pytest.raises(RequestError, match="overlay: expected .* got "):
        segmentation().overlay(**arguments)


def test_an_overlay_without_the_picture_is_refused_and_nothing_is_written(tmp_path):
    result = segmentation(image=None)
    with pytest.raises(RequestError, match="keep the image"):
        result.overlay()
    with pytest.raises(RequestError, match="keep the image"):
        result.save(tmp_path / "out", "part", overlay=True)
    assert not (tmp_path / "out").exists()


# Files


def test_saved_files_hold_the_mask_and_the_overlay(tmp_path):
    result = segmentation()
    paths = result.save(tmp_path / "new" / "folder", "part.7", overlay=True)
    assert paths == {
        "mask": tmp_path / "new" / "folder" / "part.7_mask.png",
        "overlay": tmp_path / "new" / "folder" / "part.7_overlay.png",
    }
    with Image.open(paths["mask"]) as mask, Image.open(paths["overlay"]) as overlay:
        assert mask.mode == "L"
        np.testing.assert_array_equal(np.asarray(mask), result.mask * 255)
        np.testing.assert_array_equal(np.asarray(overlay), np.asarray(result.overlay()))
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["part.7_mask.png", "part.7_overlay.png"]
    assert list(result.save(tmp_path, "part")) == ["mask"]


@pytest.mark.parametrize("stem", ["", ".", "..", "../part", "folder/part", "part\0"])
def test_a_stem_that_would_leave_the_folder_is_refused(tmp_path, stem):
    with pytest.raises(RequestError, match="stem"):
        segmentation().save(tmp_path / "out", stem)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_is_told_as_the_requests_and_leaves_no_scraps(tmp_path):
    longest = "x" * (255 - len("_mask.png"))
    assert segmentation().save(tmp_path, longest)["mask"].exists()
    with pytest.raises(RequestError, match="expected a name that the file system takes, got one of 256 bytes; rename the picture"):
        segmentation().save(tmp_path / "more", longest + "x")
    assert not list((tmp_path / "more").iterdir())


def test_an_unwritable_place_is_an_output_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file: expected a folder to write to, got a file"):
        segmentation().save(tmp_path / "file", "part")
    (tmp_path / "part_mask.png").mkdir()
    with pytest.raises(OutputError, match="part_mask.png.*permissions") as caught:
        segmentation().save(tmp_path, "part")
    assert isinstance(caught.value, OSError) and isinstance(caught.value, AgvasError)
    assert sorted(os.listdir(tmp_path)) == ["file", "part_mask.png"]


def test_a_full_disk_is_told_apart_and_leaves_the_older_mask_and_no_scraps(tmp_path, monkeypatch):
    older = segmentation().save(tmp_path, "part")["mask"].read_bytes()

    def open_on_a_full_disk(path, mode):
        def write(data):
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return nullcontext(SimpleNamespace(write=write))

    monkeypatch.setattr("runtime.writing.open", open_on_a_full_disk, raising=False)
    with pytest.raises(OutputError, match="full disk.*free some space"):
        segmentation(np.ones((HEIGHT, WIDTH))).save(tmp_path, "part")
    assert os.listdir(tmp_path) == ["part_mask.png"]
    assert (tmp_path / "part_mask.png").read_bytes() == older


# Choices


def test_a_choice_names_all_valid_values_and_the_nearest_one():
    engines = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
    assert choose("engine", "tensorrt", engines) == "tensorrt"
    with pytest.raises(RequestError, match=f"engine: expected one of {', '.join(engines)}; got 'TensorTR'") as caught:
        choose("engine", "TensorTR", engines, "agvas-segment --help lists them")
    assert "'tensorrt'?" in str(caught.value) and str(caught.value).endswith("agvas-segment --help lists them")
    with pytest.raises(RequestError) as caught:
        choose("engine", None, engines)
    assert "did you mean" not in str(caught.value) and "got None" in str(caught.value)


@pytest.mark.parametrize(("value", "options"), [("fp16", ("graph", "bf16", "int8")), ("int4", ("float", "int8", "gptq4"))])
def test_another_precision_is_no_misspelling(value: str, options: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        choose("--precision", value, options)
    assert f"got '{value}'" in str(caught.value) and "did you mean" not in str(caught.value)
