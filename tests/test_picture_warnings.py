"""What may have spoiled a picture's verdict is told with it, and no good picture is warned of."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from runtime import Segmenter
from runtime.images import PictureWarning


@pytest.fixture(scope="module")
def segmenter(tiny_bundle: Path) -> Segmenter:
    return Segmenter(tiny_bundle, engine="onnxruntime")


def noise(level: float, deviation: float, height: int = 120, width: int = 160) -> np.ndarray:
    """uint8 RGB of one level and a sensor's noise."""
    rng = np.random.default_rng(0)
    return np.clip(np.rint(level + rng.normal(0, deviation, (height, width, 3))), 0, 255).astype(np.uint8)


def vignette() -> np.ndarray:
    """2 in the corners to 14 in the middle."""
    y, x = np.mgrid[-1:1:120j, -1:1:160j]
    return np.repeat((14 - 6 * (x * x + y * y)).astype(np.uint8)[..., None], 3, axis=2)


def stamped() -> np.ndarray:
    """Black with a thin white line, as of a time stamp."""
    image = np.zeros((200, 220, 3), np.uint8)
    image[20] = 255
    return image


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (noise(0, 1), "of one tone"),
        (noise(2, 4), "99 in 100 of its pixels below level 20 of 255"),
        (noise(250, 2), "99 in 100 of its pixels above level 243 of 255"),
        (vignette(), "99 in 100 of its pixels below level 20 of 255"),
        (stamped(), "99 in 100 of its pixels below level 20 of 255"),
        (noise(128, 0.4), "of one tone, levels"),
        (noise(128, 3), None),  # smooth and good
        (noise(30, 2), None),
        (noise(235, 1.5), None),
        (picture(0, 120, 160), None),
    ],
    ids=["black", "dark", "blown out", "vignette", "stamped", "grey", "smooth", "dim", "bright", "part"],
)
def test_a_frame_that_shows_nothing_is_told_in_its_result(segmenter: Segmenter, frame: np.ndarray, words: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        told = segmenter(frame).warnings
    assert told == () if words is None else words in told[0] and "look at lamp, lens and camera" in told[0] and len(told) == 1


def test_a_region_that_shows_nothing_is_told_whatever_lies_around_it(tiny_bundle: Path, segmenter: Segmenter) -> None:
    frame = picture(0, 120, 160)
    dead, small = np.zeros((120, 160), bool), np.zeros((120, 160), bool)
    dead[30:90, 40:140] = True
    small[33:37, 41:45] = True
    frame[dead] = noise(4, 3)[dead]
    whole = segmenter(frame)
    assert whole.warnings == () and whole.within(~dead).warnings == ()
    for region in (dead, small):
        with pytest.warns(PictureWarning, match="99 in 100 of the region's pixels below level 20"):
            (told,) = Segmenter(tiny_bundle, "onnxruntime", region=region)(frame).warnings
        assert whole.within(region).warnings == (told,)
        assert whole.within(region).with_threshold(0.1).warnings == (told,)


def test_warnings_belong_to_their_picture_and_are_warned_of_as_before(segmenter: Segmenter, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 4096, (40, 50)).astype(np.uint16)).save(tmp_path / "dim.png")
    first = Image.fromarray(picture(1))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[first])
    with pytest.warns(PictureWarning) as caught:
        dim, pages, narrow, good = (
            segmenter(source) for source in (tmp_path / "dim.png", tmp_path / "pages.tif", picture(2, 3, 200), picture(3))
        )
    found = [*dim.warnings, *pages.warnings, *narrow.warnings]
    assert [str(warning.message) for warning in caught] == found and len(found) == 3
    assert "16-bit" in dim.warnings[0] and "several pictures" in pages.warnings[0] and "200 × 3 pixels" in narrow.warnings[0]
    assert good.warnings == ()
    assert dim.to_json()["warnings"] == list(dim.warnings) and good.to_json()["warnings"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        inspection = segmenter.inspect(tmp_path / "pages.tif")
    assert inspection.ask().warnings == inspection.ask("Find rust.").warnings == pages.warnings


@pytest.mark.parametrize("name", ["part.png", "part.pbm", "part.tif"])
def test_a_picture_of_one_bit_is_told_and_a_region_of_one_bit_is_not(
    tiny_bundle: Path, segmenter: Segmenter, tmp_path: Path, name: str
) -> None:
    bits = Image.fromarray(picture(0, 120, 160)).convert("1")  # dithered
    bits.save(tmp_path / name)
    for source in (tmp_path / name, bits):
        with pytest.warns(PictureWarning, match="a picture of 1 bit"):
            (told,) = segmenter(source).warnings
        assert "give the frame in 8-bit grey or colour" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error", PictureWarning)
        assert segmenter(bits.convert("L")).warnings == (), "what an 8-bit picture holds is not looked at"
        station = Segmenter(tiny_bundle, "onnxruntime", region=tmp_path / name)
        assert station(picture(0, 120, 160)).warnings == ()


def test_threads_tell_their_own_pictures_warnings(segmenter: Segmenter) -> None:
    frames, told = [picture(0, 60, 70), noise(0, 1, 60, 70), picture(1, 3, 200)], dict[int, list[int]]()

    def work(index: int) -> None:
        told[index] = [len(segmenter(frames[index]).warnings) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert told == {0: [0] * 5, 1: [1] * 5, 2: [1] * 5}
