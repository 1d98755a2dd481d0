"""Tiles: they cover a picture once, each gives what it gives alone, and a picture that fits is what it was without them."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from engines import EngineFailed
from runtime import Segmenter
from runtime import tiling as tiling_module
from runtime.errors import ImageError, RequestError
from runtime.pipeline import Trace
from runtime.preprocess import frame_of, lost_detail
from runtime.tiling import TiledPipeline, Tiling

LARGE = picture(5, 150, 230)


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path) -> Segmenter:
    return Segmenter(tiny_bundle, engine="onnxruntime")


@pytest.fixture
def tiled(tiny_bundle: Path) -> Segmenter:
    return Segmenter(tiny_bundle, engine="onnxruntime", tile=64, tile_overlap=16)


@pytest.mark.parametrize(("side", "overlap"), [(64, 0), (64, None), (64, 32), (100, 7), (65, 31)])
def test_the_kept_parts_cover_an_axis_once_with_context_on_both_sides(side: int, overlap: int | None) -> None:
    tiling = Tiling(side, overlap)
    shared = side // 8 if overlap is None else overlap
    for length in (1, side - 1, side, side + 1, 2 * side - shared, 2 * side - shared + 1, 777):
        spans = tiling.spans(length)
        assert spans[0].kept_from == 0 and spans[-1].kept_to == length
        for span in spans:
            assert 0 <= span.start <= span.kept_from < span.kept_to <= span.end <= length
            assert span.end - span.start == min(side, length)
        for left, right in itertools.pairwise(spans):
            assert left.kept_to == right.kept_from
            assert left.end - right.start >= shared
            assert abs((left.end - left.kept_to) - (right.kept_from - right.start)) <= 1  # the seam is the overlap's middle


def test_no_more_tiles_than_needed() -> None:
    assert len(Tiling(100, 20).spans(100)) == 1
    assert len(Tiling(100, 20).spans(180)) == 2
    assert len(Tiling(100, 20).spans(181)) == 3


def test_each_part_of_the_map_is_what_its_tile_gives_alone(whole: Segmenter, tiled: Segmenter) -> None:
    result = tiled(LARGE)
    tiles = Tiling(64, 16).tiles(150, 230)
    assert result.tiles == len(tiles) == 3 * 5
    highest = 0.0
    for rows, columns in tiles:
        alone = whole(np.ascontiguousarray(LARGE[rows.start : rows.end, columns.start : columns.end])).anomaly_map
        top, left = rows.start, columns.start
        kept = alone[rows.kept_from - top : rows.kept_to - top, columns.kept_from - left : columns.kept_to - left]
        np.testing.assert_array_equal(result.anomaly_map[rows.kept_from : rows.kept_to, columns.kept_from : columns.kept_to], kept)
        highest = max(highest, float(kept.max()))
    assert result.score == highest
    np.testing.assert_array_equal(result.mask, result.rule.mask(result.anomaly_map))
    assert not np.array_equal(result.anomaly_map, whole(LARGE).anomaly_map)


def test_times_are_the_tiles_sums(whole: Segmenter, tiled: Segmenter) -> None:
    timings = tiled(LARGE).timings
    assert timings.keys() == whole(LARGE).timings.keys()
    stages = sum(spent for name, spent in timings.items() if name != "total")
    assert stages <= timings["total"] * 1.0001
    assert timings["pixel_encoder"] > 0


def test_a_picture_that_fits_is_one_tile(whole: Segmenter, tiled: Segmenter) -> None:
    small = picture(1, 41, 64)
    np.testing.assert_array_equal(tiled(small).anomaly_map, whole(small).anomaly_map)
    assert tiled(small).tiles == 1
    said: list[str] = []
    tiled(small, on_text=said.append)
    assert "".join(said) == whole(small).text


def test_a_stream_and_further_questions_are_tiled_too(tiled: Segmenter) -> None:
    first = tiled(LARGE)
    (streamed,) = tiled.stream([LARGE])
    np.testing.assert_array_equal(streamed.get().anomaly_map, first.anomaly_map)
    inspection = tiled.inspect(LARGE)
    np.testing.assert_array_equal(inspection.ask().anomaly_map, first.anomaly_map)
    again = inspection.ask()
    np.testing.assert_array_equal(again.anomaly_map, first.anomaly_map)
    assert "pixel_encoder" not in again.timings  # what the encoders saw was kept


def test_tiles_keep_no_keys_and_values(tiled: Segmenter) -> None:
    chain = tiled._chain
    assert isinstance(chain, TiledPipeline)
    vision = chain.look(chain.prepare(LARGE))
    chain.answer(vision, tiled.request())
    assert all(tile.past() is None for tile in vision.visions)


def test_of_many_tiles_the_later_ones_are_looked_at_anew_and_give_the_same(
    tiled: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the frame."""
    every = tiled.inspect(LARGE)
    monkeypatch.setattr(tiling_module, "KEPT", 4)
    few = tiled.inspect(LARGE)
    assert (len(every._vision.visions), len(few._vision.visions)) == (15, 4)
    for result in (few.ask(), few.ask()):
        np.testing.assert_array_equal(result.anomaly_map, every.ask().anomaly_map)
        assert result.timings["pixel_encoder"] > 0


def test_a_tile_without_anchors_leaves_the_picture_without_a_verdict(tiled: Segmenter) -> None:
    chain = tiled._chain
    assert isinstance(chain, TiledPipeline)
    answer, calls = chain.pipeline.answer, itertools.count()

    def one_without(*arguments: object) -> Trace:
        trace = answer(*arguments)  # type: ignore[arg-type]
        if next(calls) == 3:
            return dataclasses.replace(trace, answer=trace.answer[:2], anchor_states=None, anomaly_map=np.zeros_like(trace.anomaly_map))
        return trace

    chain.pipeline.answer = one_without  # type: ignore[method-assign, assignment]
    result = tiled(LARGE, "Segment it.")
    assert not result.anchors_found and not result.is_anomalous and result.score == 0
    assert "[SEG]" not in result.text


def test_the_text_is_that_of_the_tile_with_the_highest_map(tiled: Segmenter) -> None:
    chain = tiled._chain
    assert isinstance(chain, TiledPipeline)
    answer, maps = chain.pipeline.answer, []

    def numbered(*arguments: object) -> Trace:
        trace = answer(*arguments)  # type: ignore[arg-type]
        maps.append(trace.anomaly_map)
        return dataclasses.replace(trace, answer=(len(maps), *trace.answer), verified=len(maps) != 2)

    chain.pipeline.answer = numbered  # type: ignore[method-assign, assignment]
    vision = chain.look(chain.prepare(LARGE))
    trace = chain.answer(vision, tiled.request())
    kept = [
        one[rows.kept_from - rows.start : rows.kept_to - rows.start, columns.kept_from - columns.start : columns.kept_to - columns.start]
        for one, (rows, columns) in zip(maps, vision.tiles, strict=True)
    ]
    assert trace.answer[0] == 1 + int(np.argmax([part.max() for part in kept]))
    assert trace.verified is False


def test_tiles_outside_a_region_are_not_computed(tiny_bundle: Path, tiled: Segmenter) -> None:
    region = np.zeros(LARGE.shape[:2], bool)
    region[60:80, 10:120] = True
    stationed = Segmenter(tiny_bundle, engine="onnxruntime", tile=64, tile_overlap=16, region=region)
    seen, whole = stationed(LARGE), tiled(LARGE)
    touched = [
        (rows, columns)
        for rows, columns in Tiling(64, 16).tiles(150, 230)
        if rows.kept_from < 80 and rows.kept_to > 60 and columns.kept_from < 120 and columns.kept_to > 10
    ]
    assert 1 < seen.tiles == len(touched) < whole.tiles
    expected = whole.within(region)
    np.testing.assert_array_equal(seen.anomaly_map, expected.anomaly_map)
    np.testing.assert_array_equal(seen.mask, expected.mask)
    assert (seen.score, seen.region_share) == (expected.score, expected.region_share)
    (streamed,) = stationed.stream([LARGE])
    np.testing.assert_array_equal(streamed.result.anomaly_map, expected.anomaly_map)


def test_the_text_is_never_that_of_what_lies_outside_the_region(tiled: Segmenter) -> None:
    """The highest map of a tile may lie in the part of it that is not looked at."""
    region = np.zeros(LARGE.shape[:2], bool)
    region[:40, :] = True
    chain = TiledPipeline(tiled._pipeline, Tiling(64, 16), region)
    answer, numbers = chain.pipeline.answer, itertools.count(1)

    def numbered(*arguments: object) -> Trace:
        trace, number = answer(*arguments), next(numbers)  # type: ignore[arg-type]
        anomaly_map = np.full_like(trace.anomaly_map, 0.1 * number)
        if number == 1:
            anomaly_map[41:] = 1
        return dataclasses.replace(trace, answer=(number, *trace.answer), anomaly_map=anomaly_map)

    chain.pipeline.answer = numbered  # type: ignore[method-assign, assignment]
    try:
        trace = chain.answer(chain.look(chain.prepare(LARGE)), tiled.request())
    finally:
        del chain.pipeline.answer  # type: ignore[attr-defined]
    assert trace.tiles == 5 and trace.answer[0] == 5


def test_a_regions_file_is_read_and_pictures_of_another_size_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    region = np.zeros(LARGE.shape[:2], np.uint8)
    region[5:20, 5:20] = 255
    Image.fromarray(region).save(tmp_path / "region.png")
    Image.fromarray(LARGE[:, :200]).save(tmp_path / "part.png")
    stationed = Segmenter(tiny_bundle, engine="onnxruntime", region=tmp_path / "region.png")
    np.testing.assert_array_equal(stationed.region, region > 0)
    assert stationed(LARGE).region_share == (region > 0).mean()
    with pytest.raises(ImageError, match=r"part\.png: the region is 230 × 150 pixels, this picture 200 × 150"):
        stationed(tmp_path / "part.png")
    outcome = next(iter(stationed.stream([tmp_path / "part.png"])))
    assert isinstance(outcome.error, ImageError)


def test_one_tile_of_a_large_picture_fills_its_part_of_the_map(tiny_bundle: Path, whole: Segmenter) -> None:
    region = np.zeros(LARGE.shape[:2], bool)
    region[5:20, 5:20] = True
    said: list[str] = []
    result = Segmenter(tiny_bundle, engine="onnxruntime", tile=64, tile_overlap=16, region=region)(LARGE, on_text=said.append)
    rows, columns = Tiling(64, 16).tiles(150, 230)[0]
    alone = whole(LARGE[rows.start : rows.end, columns.start : columns.end])
    assert result.tiles == 1 and "".join(said) == result.text
    np.testing.assert_array_equal(result.anomaly_map[5:20, 5:20], alone.anomaly_map[5:20, 5:20])
    assert np.count_nonzero(result.anomaly_map) <= 15 * 15


def test_a_map_out_of_range_in_one_tile_is_an_engines_failure(tiled: Segmenter) -> None:
    decoder, decoded = tiled._pipeline.stages["mask_decoder"], itertools.count()

    class Spoilt:
        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = decoder.run(feeds)
            return {"anomaly_map": outputs["anomaly_map"] * np.float32(np.nan if next(decoded) == 7 else 1)}

    tiled._pipeline.stages = {**tiled._pipeline.stages, "mask_decoder": Spoilt()}
    with pytest.raises(EngineFailed, match="NaN or infinity"):
        tiled(LARGE)


def test_texts_of_several_tiles_are_not_streamed(tiled: Segmenter) -> None:
    with pytest.raises(RequestError, match=r"on_text: expected a picture in one piece, got 15 tiles"):
        tiled(LARGE, on_text=lambda piece: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 63}, "tile: expected a side of 64 pixels at least, got 63"),
        ({"tile": 100, "tile_overlap": 51}, "tile_overlap: expected 0 to 50 pixels"),
        ({"tile": 100, "tile_overlap": -1}, "tile_overlap: expected 0 to 50 pixels"),
        ({"tile_overlap": 10}, "tile_overlap: expected tile beside it"),
        ({"tile": 1000.0}, "tile: expected a whole number, got 1000.0"),
        ({"tile": "1000"}, "tile: expected a whole number, got '1000'"),
        ({"tile": 1000, "tile_overlap": 0.1}, "tile_overlap: expected a whole number, got 0.1"),
        ({"threads": "2"}, "threads: expected a whole number"),
        ({"pixel_limit": None}, "pixel_limit: expected a whole number"),
        ({"low_memory": "no"}, "low_memory: expected True or False, got 'no'"),
        ({"check_hashes": "no"}, "check_hashes: expected True or False, got 'no'"),
        ({"remeasure": 0}, "remeasure: expected True or False, got 0"),
        ({"device": 0}, "device: expected cpu or cuda:N"),
    ],
)
def test_bad_tiles_are_refused_before_the_bundle_is_opened(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Segmenter(tmp_path / "no bundle", "onnxruntime", **settings)  # type: ignore[arg-type]


def test_a_picture_of_very_many_tiles_is_told_before_it_begins(tiled: Segmenter) -> None:
    assert isinstance(tiled._chain, TiledPipeline)
    with pytest.warns(UserWarning, match=r"2400 × 2400 pixels in tiles of \d+ is \d{3,} inferences"):
        tiled._chain.prepare(np.zeros((2400, 2400, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiled._chain.prepare(np.zeros((200, 200, 3), np.uint8))


def test_a_frame_that_is_shown_much_smaller_is_told() -> None:
    assert lost_detail(frame_of(1500, 2048, 512)) == ()
    assert "where defects of less than 9 of its pixels" in lost_detail(frame_of(1500, 2100, 512))[0]
    (words,) = lost_detail(frame_of(6000, 8000, 512))
    assert re.search(r"seen at 512 × 384, where defects of less than 32 of its pixels .* --tile", words)
