"""A stream gives what single calls give, in order, keeps going after a bad picture, and leaves nothing behind when it is closed."""

from __future__ import annotations

import gc
import io
import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from engines import EngineFailed
from runtime import Segmenter
from runtime import segmenter as segmenter_module
from runtime.errors import ImageError, RequestError
from runtime.images import PictureWarning
from runtime.stream import in_steps


@pytest.fixture(scope="module")
def segmenter(tiny_bundle: Path) -> Segmenter:
    return Segmenter(tiny_bundle, engine="onnxruntime")


def ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("agvas-")}


def vanished(seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while ours() and time.monotonic() < end:
        time.sleep(0.01)
    return not ours()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_results_are_those_of_single_calls_in_the_pictures_order(segmenter: Segmenter, depth: int) -> None:
    images = [picture(seed, 30 + 9 * seed, 80 - 7 * seed) for seed in range(6)]
    streamed = list(segmenter.stream(images, depth=depth))
    assert [one.index for one in streamed] == list(range(6))
    for one, image in zip(streamed, images):
        alone = segmenter(image)
        np.testing.assert_array_equal(one.get().mask, alone.mask)
        np.testing.assert_array_equal(one.get().anomaly_map, alone.anomaly_map)
        assert one.get().text == alone.text
        assert one.get().timings.keys() == alone.timings.keys()
    assert vanished()


@pytest.mark.parametrize("one", [picture(), picture()[..., 0], "parts.png", Path("parts.png"), Image.fromarray(picture()), b"\x89PNG"])
def test_one_picture_is_no_stream(segmenter: Segmenter, one: Any) -> None:
    """An array would be taken row by row, a path letter by letter."""
    with pytest.raises(RequestError, match="images: expected several pictures, got one"):
        segmenter.stream(one)


def test_a_batch_is_streamed_picture_by_picture(segmenter: Segmenter) -> None:
    batch = np.stack([picture(0), picture(1)])
    for one, image in zip(segmenter.stream(batch), batch, strict=True):
        np.testing.assert_array_equal(one.get().anomaly_map, segmenter(image).anomaly_map)


def test_a_picture_that_looks_into_a_buffer_is_judged_as_it_was_given(segmenter: Segmenter) -> None:
    frames = [picture(seed)[..., 0].copy() for seed in range(5)]
    buffer = np.zeros_like(frames[0])

    def camera() -> Iterator[Any]:
        for frame in frames:
            buffer[:] = frame
            yield Image.frombuffer("L", buffer.shape[::-1], buffer.data, "raw", "L", 0, 1)
            buffer[:] = 0

    for one, frame in zip(segmenter.stream(camera()), frames, strict=True):
        np.testing.assert_array_equal(one.get().anomaly_map, segmenter(frame).anomaly_map)


def test_a_picture_that_is_drawn_into_or_turns_its_pages_is_judged_as_it_was_given(segmenter: Segmenter, tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(seed)) for seed in range(5)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])

    def drawn() -> Iterator[Image.Image]:
        one = Image.new("RGB", frames[0].size)
        for frame in frames:
            one.paste(frame)
            yield one

    def turned() -> Iterator[Image.Image]:
        with Image.open(tmp_path / "pages.tif") as pages:
            for page in range(len(frames)):
                pages.seek(page)
                yield pages

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        for given in (drawn(), turned()):
            for one, frame in zip(segmenter.stream(given), frames, strict=True):
                np.testing.assert_array_equal(one.get().anomaly_map, segmenter(frame).anomaly_map)


@pytest.mark.parametrize("form", [np.asarray, bytearray, memoryview])
def test_a_buffer_that_is_written_again_is_judged_as_it_was_given(form: Any, segmenter: Segmenter) -> None:
    frames = [picture(seed) for seed in range(5)]
    if form is not np.asarray:
        frames = [np.frombuffer(encoded(frame), np.uint8) for frame in frames]
    longest = max(len(frame) for frame in frames)
    buffer = np.zeros((longest, *frames[0].shape[1:]), np.uint8)

    def camera() -> Iterator[Any]:
        for frame in frames:
            buffer[: len(frame)] = frame
            yield buffer if form is np.asarray else form(buffer.data)
            buffer[:] = 0

    for one, frame in zip(segmenter.stream(camera()), frames, strict=True):
        whole = frame if form is np.asarray else frame.tobytes()
        np.testing.assert_array_equal(one.get().anomaly_map, segmenter(whole).anomaly_map)


def encoded(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "BMP")  # of one length for all
    return file.getvalue()


def test_a_bad_picture_gives_its_error_in_its_place(segmenter: Segmenter, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    first, second, third = segmenter.stream([picture(0), bad, picture(1)])
    assert first.error is None and third.error is None and third.result is not None
    assert isinstance(second.error, ImageError) and second.result is None
    assert str(bad) in str(second.error)
    with pytest.raises(ImageError):
        second.get()


def test_a_map_out_of_range_and_a_picture_too_large_give_their_errors_in_their_places(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = Segmenter(tiny_bundle, engine="onnxruntime")
    decoder, decoded = segmenter._pipeline.stages["mask_decoder"], itertools.count()
    read, given = segmenter_module.rgb_and_words, itertools.count()

    class Spoilt:
        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: output + 1.5 * (next(decoded) == 0) for name, output in decoder.run(feeds).items() if name == "anomaly_map"}

    def large(image: np.ndarray, *, pixel_limit: int) -> tuple[np.ndarray, tuple[str, ...]]:
        if next(given) == 1:
            raise MemoryError
        return read(image, pixel_limit=pixel_limit)

    segmenter._pipeline.stages = {**segmenter._pipeline.stages, "mask_decoder": Spoilt()}
    monkeypatch.setattr(segmenter_module, "rgb_and_words", large)
    wrong, too_large, last = segmenter.stream([picture()] * 3)
    assert isinstance(wrong.error, EngineFailed) and "expected probabilities in 0..1" in str(wrong.error)
    assert isinstance(too_large.error, MemoryError)
    assert last.error is None and last.result is not None


def test_an_error_of_the_source_comes_after_the_results_before_it(segmenter: Segmenter) -> None:
    def camera() -> Iterator[np.ndarray]:
        yield picture(0)
        yield picture(1)
        raise OSError("the camera was unplugged")

    seen = []
    with pytest.raises(OSError, match="unplugged"):
        for one in segmenter.stream(camera()):
            seen.append(one.get())
    assert len(seen) == 2
    assert vanished()


def test_a_wrong_request_is_refused_before_a_picture_is_read(segmenter: Segmenter) -> None:
    def camera() -> Iterator[np.ndarray]:
        raise AssertionError("read")
        yield picture(0)

    with pytest.raises(RequestError, match="mode"):
        segmenter.stream(camera(), mode="dirct")
    with pytest.raises(RequestError, match="depth"):
        segmenter.stream(camera(), depth=0)
    for depth in ("a", 1.5, None, True):
        with pytest.raises(RequestError, match=f"depth: expected a whole number, got {depth!r}"):
            segmenter.stream(camera(), depth=depth)  # type: ignore[arg-type]
    for nothing in (5, None):
        with pytest.raises(RequestError, match=f"images: expected several pictures, got {nothing}; give a list"):
            segmenter.stream(nothing)  # type: ignore[arg-type]


def test_what_can_be_counted_through_is_a_stream(segmenter: Segmenter) -> None:
    class Folder:
        def __getitem__(self, index: int) -> np.ndarray:
            return [picture(0), picture(1)][index]

    assert len(list(segmenter.stream(Folder()))) == 2  # type: ignore[arg-type]


def test_each_result_has_the_warnings_of_its_own_picture(segmenter: Segmenter) -> None:
    frames = [picture(0), np.zeros((60, 70, 3), np.uint8), picture(1), picture(2, 3, 200)]
    with pytest.warns(PictureWarning):
        told = [one.get().warnings for one in segmenter.stream(frames)]
    assert [len(words) for words in told] == [0, 1, 0, 1]
    assert "of one tone" in told[1][0] and "200 × 3 pixels" in told[3][0]


def test_no_more_than_depth_items_are_on_their_way() -> None:
    given = 0
    done = 0
    most = 0

    def source() -> Iterator[int]:
        nonlocal given, most
        for number in range(40):
            given += 1
            most = max(most, given - done)
            yield number

    for value, error in in_steps(source(), (lambda x: x, lambda x: x + 1), (), depth=3):
        time.sleep(0.002)  # a consumer slower than the source
        done += 1
        assert error is None and value == done
    assert done == 40
    assert most <= 5  # three under way, the one that is being consumed, and the one the source holds in its hand


def test_steps_of_neighbours_overlap() -> None:
    meeting = threading.Barrier(2, timeout=5)

    def first(item: int) -> int:
        if item > 0:
            meeting.wait()
        return item

    def second(item: int) -> int:
        if item < 9:
            meeting.wait()  # opens when the next item is in the first step at the same time
        return item

    assert [value for value, _ in in_steps(range(10), (first, second), ())] == list(range(10))


def test_closing_early_stops_reading_and_frees_the_threads() -> None:
    closed = threading.Event()
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        try:
            while True:
                read += 1
                yield read
        finally:
            closed.set()

    stream = in_steps(endless(), (lambda x: x,), (), depth=2)
    assert next(stream) == (1, None)
    stream.close()
    assert closed.wait(2)
    after = read
    assert vanished()
    assert read == after <= 4


def test_a_stream_abandoned_in_a_cycle_does_not_hold_up_the_garbage_collector() -> None:
    """It may run in a thread that a step has just started and waits for: each would wait for the other."""
    running, release = threading.Event(), threading.Event()

    def step(item: int) -> int:
        if item:
            running.set()
            release.wait(60)
        return item

    stream = in_steps(range(3), (step,), (), depth=2)
    assert next(stream) == (0, None) and running.wait(60)
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    del stream, cycle
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join(30)
    waits = collector.is_alive()
    release.set()
    collector.join(30)
    assert not waits


def test_collecting_while_the_interpreter_ends_says_nothing() -> None:
    """The collector calls this package then, too, when its modules have been emptied."""
    code = (
        "import gc, runtime.stream as stream\n"
        "gc.set_threshold(1)\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        lists = [[] for _ in range(5000)]\n"
        "        more = [[each] for each in lists]\n"
        "late = Late()\n"
        "late.itself = late\n"
        "stream.kept = Late()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr[:500]) == (0, "")


def test_closing_early_closes_a_generator_and_no_camera_of_the_callers() -> None:
    class Camera:
        closed = False

        def __iter__(self) -> Iterator[int]:
            return iter(range(100))

        def close(self) -> None:
            self.closed = True

    camera = Camera()
    frames = (frame for frame in camera)  # held here, so that it is not closed by being dropped
    for source in (camera, frames):
        stream = in_steps(source, (lambda x: x,), (), depth=2)
        assert next(stream) == (0, None)
        stream.close()
        assert vanished()
    assert not camera.closed
    assert frames.gi_frame is None


def test_a_source_that_never_gives_another_item_does_not_hold_up_closing() -> None:
    plugged = threading.Event()

    def camera() -> Iterator[int]:
        yield 1
        plugged.wait(10)
        yield 2

    stream = in_steps(camera(), (lambda x: x,), ())
    assert next(stream) == (1, None)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 1
    plugged.set()
    assert vanished()


def test_a_result_comes_while_the_source_waits_for_its_next_picture() -> None:
    plugged = threading.Event()

    def camera() -> Iterator[int]:
        yield 1
        plugged.wait(10)

    stream = in_steps(camera(), (lambda x: x,), (), depth=4)
    started = time.monotonic()
    assert next(stream) == (1, None)
    assert time.monotonic() - started < 1
    plugged.set()
    assert list(stream) == []


def test_an_error_that_is_no_pictures_own_ends_the_stream() -> None:
    def broken(item: int) -> int:
        if item == 2:
            raise ZeroDivisionError("a bug")
        return item

    stream = in_steps(range(5), (broken,), (ValueError,))
    assert [next(stream), next(stream)] == [(0, None), (1, None)]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert vanished()


def test_a_stream_goes_on_in_a_thread_that_outlives_the_main_one() -> None:
    """Python's pools take no work once the main thread has ended; what fails then still fails in its place."""
    code = """
import threading
from runtime.stream import in_steps
def source():
    yield from (1, 2)
    threading.main_thread().join()
    yield from (0, 4)
def late():
    results = in_steps(source(), (lambda x: 12 // x, lambda x: -x), (ZeroDivisionError,))
    print([(value, type(error).__name__) for value, error in results])
    print(list(in_steps((1, 2), (lambda x: x + 1,), ())))
threading.Thread(target=late).start()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    told = "[(-12, 'NoneType'), (-6, 'NoneType'), (None, 'ZeroDivisionError'), (-3, 'NoneType')]\n[(2, None), (3, None)]\n"
    assert (done.stdout, done.stderr) == (told, "")
