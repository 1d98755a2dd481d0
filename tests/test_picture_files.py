"""Of folders and patterns their pictures are found, in one order, and what is left out is told."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import ImageError
from runtime.images import read_image
from runtime.picture_files import find_images


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "c.tiff", "deep/d.bmp", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not opened here")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def names(paths):
    return [path.name for path in paths]


def test_a_folder_gives_its_pictures_sorted_and_its_subfolders_only_when_asked(folder):
    assert names(find_images([str(folder)])) == ["a.JPG", "b.png", "c.tiff"]
    assert names(find_images([folder], recursive=True)) == ["a.JPG", "b.png", "c.tiff", "d.bmp"]


def test_hidden_folders_are_left_out_and_one_that_is_named_is_looked_through(folder):
    thumbnails = folder / ".thumbnails"
    for name in ("deep/.cache/g.png", "deep/.cache/below/h.webp", ".thumbnails/e.png", ".thumbnails/deep/f.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not opened here")
    assert names(find_images(folder, recursive=True)) == ["a.JPG", "b.png", "c.tiff", "d.bmp"]
    assert names(find_images(thumbnails, recursive=True)) == ["f.png", "e.png"]
    assert names(find_images(f"{folder}/**/*.png")) == ["b.png"]


def test_pictures_of_a_kind_that_is_not_read_are_told_of(folder):
    for name in ("d.webp", "e.WEBP", "f.heic", ".g.webp"):
        (folder / name).write_bytes(b"not opened here")
    with pytest.warns(UserWarning, match=r"left out 1 \.heic, 2 \.webp: PNG"):
        assert names(find_images(folder)) == ["a.JPG", "b.png", "c.tiff"]


def test_patterns_are_expanded_sorted(folder):
    assert names(find_images([f"{folder}/[ab].*"])) == ["a.JPG", "b.png"]
    assert names(find_images([f"{folder}/**/*.bmp"])) == ["d.bmp"]


def test_inputs_keep_their_order_and_nothing_is_listed_twice(folder, monkeypatch):
    monkeypatch.chdir(folder)
    inputs = ["c.tiff", "./c.tiff", ".", str(folder / "b.png"), "*.png"]
    assert names(find_images(inputs)) == ["c.tiff", "a.JPG", "b.png"]


def test_a_link_to_a_picture_is_a_picture_of_its_own(folder):
    (folder / "link.png").symlink_to(folder / "b.png")
    assert names(find_images([folder])) == ["a.JPG", "b.png", "c.tiff", "link.png"]


def test_a_link_that_leads_nowhere_is_listed_and_its_picture_missed(folder):
    (folder / "gone.png").symlink_to(folder / "moved.png")
    (path,) = [path for path in find_images([folder]) if path.name == "gone.png"]
    with pytest.raises(ImageError, match="no such file"):
        read_image(path)


def test_a_named_file_is_listed_whatever_its_suffix_and_brackets_in_a_name_are_no_pattern(folder):
    (folder / "part[1].dat").write_bytes(b"x")
    assert names(find_images([str(folder / "part[1].dat")])) == ["part[1].dat"]


def test_a_single_path_is_not_taken_apart_into_letters(folder):
    assert names(find_images(str(folder))) == ["a.JPG", "b.png", "c.tiff"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["absent.png"], "no such file"),
        ([""], "empty string"),
        (["*.gif"], "match this pattern"),
        (["*.txt"], "match this pattern"),
        (["bare"], "in this folder"),
        ([], "none"),
    ],
)
def test_inputs_that_give_no_picture_are_refused(folder, monkeypatch, inputs, words):
    (folder / "bare").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ImageError, match=words):
        find_images(inputs)


def test_masks_and_results_beside_their_pictures_are_no_pictures(tmp_path):
    for name in ("a.png", "a_mask.png", "b.jpg", "b_map.png", "b_overlay.png", "road_map.png", "c_mask.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.warns(UserWarning, match="left out 3 that lie beside the pictures they are of, such as a_mask.png"):
        found = find_images(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.jpg", "c_mask.png", "road_map.png"]
    with pytest.warns(UserWarning, match="left out 1 "):
        assert [path.name for path in find_images(str(tmp_path / "[ac]*.png"))] == ["a.png", "c_mask.png"]
    assert find_images(tmp_path / "a_mask.png") == [tmp_path / "a_mask.png"]


def test_what_agvas_segment_writes_beside_its_pictures_is_no_picture(tmp_path):
    """Of several instructions, and of pictures that share a stem."""
    given = ["a.jpg", "a.png", "b.png", "c__1.png"]
    results = ["a.jpg_mask.png", "a.png_overlay.png", "a.png__2_map.png", "b__1_mask.png", "b__12_overlay.png", "c__1_mask.png"]
    others = ["d__1_mask.png", "b__x_mask.png", "a.bmp_mask.png"]
    for name in (*given, *results, *others):
        (tmp_path / name).write_bytes(b"not opened here")
    with pytest.warns(UserWarning, match="left out 6 that lie beside"):
        assert names(find_images(tmp_path)) == sorted([*given, *others])


def test_a_folder_that_cannot_be_opened_is_refused_and_one_below_is_told(folder, monkeypatch):
    """The tests may run as root, whom no permission stops."""
    listed, scanned = os.listdir, os.scandir

    def closed(name, function):
        if Path(name).name == shut:
            raise PermissionError(13, "Permission denied", str(name))
        return function(name)

    monkeypatch.setattr(os, "listdir", lambda name: closed(name, listed))
    monkeypatch.setattr(os, "scandir", lambda name: closed(name, scanned))
    shut = folder.name
    for recursive in (False, True):
        with pytest.raises(ImageError, match=r"expected a folder that can be read, got .*Permission denied.*; check its permissions"):
            find_images(folder, recursive=recursive)
    shut = "deep"
    assert names(find_images(folder)) == ["a.JPG", "b.png", "c.tiff"]
    (folder / "old.gif").mkdir()
    shut = "old.gif"
    with pytest.warns(UserWarning, match="left out what is in .*old.gif: expected a folder that can be read"):
        find_images(folder, recursive=True)
    shut = "deep"
    with pytest.warns(UserWarning, match="left out what is in .*deep: expected a folder that can be read, got .*Permission denied"):
        assert names(find_images(folder, recursive=True)) == ["a.JPG", "b.png", "c.tiff"]


def test_a_folder_without_pictures_says_what_to_name_and_no_other_commands_option(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match="the folder that they lie in, or its subfolders too, where the command has --recursive$"):
        find_images([tmp_path])
