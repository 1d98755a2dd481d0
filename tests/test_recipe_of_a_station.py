"""Recipes of a station: what was set up once is what runs, and nothing else runs under its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from benchmarks import accuracy
from runtime import Recipe, Segmenter
from runtime.cli import segment
from runtime.errors import BundleMissing, ImageError, OutputError, RequestError
from runtime.recipe import OF_REQUEST, OF_SEGMENTER

SIDE = 96


@pytest.fixture
def station(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder with a bundle, a region and a picture beside each other."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, : SIDE // 2] = 255
    Image.fromarray(region).save(tmp_path / "region.png")
    Image.fromarray(picture(3, SIDE, SIDE)).save(tmp_path / "part.png")
    return tmp_path


def recipe_of(station: Path, **settings: Any) -> Recipe:
    return Recipe(str(station / "bundle"), engine="onnxruntime", threads=1, **settings)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    def run(*arguments: str | Path) -> tuple[int, list[str], str]:
        code = segment.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def test_every_setting_of_a_segmenter_and_its_calls_is_a_recipes() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == {"bundle", *OF_SEGMENTER, *OF_REQUEST, "manifest_sha256", "region_sha256", "path", "sha256"}
    initial = set(Segmenter.__init__.__annotations__) - {"return", "check_hashes", "remeasure"}  # of one opening, not of a station
    assert {"bundle", *OF_SEGMENTER} == initial
    called = set(Segmenter.__call__.__annotations__) - {"return", "image", "on_text", "deadline"}
    assert {*OF_REQUEST} == called


def test_what_was_saved_is_what_runs(station: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe_of(station, threshold=0.2, relative_threshold=0.7, region=str(station / "region.png"), instruction="Segment the dents.")
    (station / "recipes").mkdir()
    made.write(station / "recipes" / "three.json")
    moved = station.parent / "moved"
    station.rename(moved)  # as a whole: paths are told from the recipe's folder
    monkeypatch.chdir(moved)
    for path in (moved / "recipes" / "three.json", Path("recipes/three.json")):
        recipe = Recipe.read(path)
        assert recipe.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        segmenter = recipe.open()
        ours = segmenter(moved / "part.png", **recipe.request)
        plain = Segmenter(moved / "bundle", "onnxruntime", threshold=0.2, relative_threshold=0.7, region=moved / "region.png")
        wanted = plain(moved / "part.png", "Segment the dents.")
        np.testing.assert_array_equal(ours.mask, wanted.mask)
        assert ours.mask.any() and not ours.mask[:, SIDE // 2 :].any()
        assert (ours.instruction, segmenter.rule, segmenter.engine) == (wanted.instruction, plain.rule, "onnxruntime")


def test_a_recipe_is_for_its_own_bundle_and_region(station: Path, copy_of_bundle: Callable[[], Path]) -> None:
    recipe_of(station, region=str(station / "region.png")).write(station / "three.json")
    region = np.asarray(Image.open(station / "region.png")).copy()
    Image.fromarray(255 - region).save(station / "region.png")
    with pytest.raises(RequestError, match="region it was made for"):
        Recipe.read(station / "three.json").open()
    (station / "region.png").unlink()
    with pytest.raises(ImageError, match="put it back"):
        Recipe.read(station / "three.json").open()
    Image.fromarray(region).save(station / "region.png", compress_level=6)
    other = json.loads((station / "three.json").read_text()) | {"manifest_sha256": "0" * 64, "region_sha256": None}
    (station / "other.json").write_text(json.dumps(other))
    with pytest.raises(RequestError, match="whose scores its threshold says nothing about"):
        Recipe.read(station / "other.json").open()
    (station / "other.json").write_text(json.dumps(other | {"manifest_sha256": None}))
    assert Recipe.read(station / "other.json").open().region is not None, "null: any bundle and region"
    shutil.rmtree(station / "bundle")
    for name in ("other.json", "three.json"):
        with pytest.raises(BundleMissing):
            Recipe.read(station / name).check()


def test_a_recipe_by_a_link_and_a_bundle_by_dots_are_found(station: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (station / "deep" / "folder").mkdir(parents=True)
    (station / "elsewhere").mkdir()
    (station / "elsewhere" / "link").symlink_to(station / "deep" / "folder")
    dotted = station / "elsewhere" / "link" / ".." / ".." / "bundle"  # of the folder behind the link
    for bundle in (str(dotted), f"{station / 'bundle'}/", str(station / "bundle" / ".")):
        Recipe(bundle, engine="onnxruntime").write(station / "three.json")
        Recipe.read(station / "three.json").check()
    (station / "elsewhere" / "current.json").symlink_to(station / "three.json")
    Recipe.read(station / "elsewhere" / "current.json").check()
    told = json.loads((station / "three.json").read_text())
    (station / "upper.json").write_text(json.dumps(told | {"manifest_sha256": told["manifest_sha256"].upper()}))
    Recipe.read(station / "upper.json").check()
    monkeypatch.chdir(station / "bundle")
    Recipe(".", engine="onnxruntime").write(station / "three.json")
    assert json.loads((station / "three.json").read_text())["bundle"] == "bundle"


def test_a_station_that_no_part_could_be_judged_by_does_not_open(station: Path, run: Any) -> None:
    recipe_of(station).write(station / "three.json")
    told = json.loads((station / "three.json").read_text())
    (station / "three.json").write_text(json.dumps(told | {"mode": "direkt"}))
    with pytest.raises(RequestError, match="did you mean 'direct'"):
        Recipe.read(station / "three.json").open()
    (station / "three.json").write_text(json.dumps(told | {"threshold": 2}))
    code, lines, errors = run(station / "part.png", "--recipe", station / "three.json")
    assert (code, lines) == (2, [])
    assert errors.startswith(f"agvas-segment: {station / 'three.json'}: threshold: expected a number in 0..1, got 2")
    (station / "three.json").write_text(json.dumps(told | {"tile_overlap": 8}))
    _, _, errors = run(station / "part.png", "--recipe", station / "three.json")
    assert errors.startswith(f"agvas-segment: {station / 'three.json'}: tile_overlap: expected tile beside it")
    (station / "three.json").write_text(json.dumps(told | {"threads": 1_000_000}))
    with pytest.raises(RequestError, match="threads: expected .* at most, 64 a processor, got 1000000"):
        Recipe.read(station / "three.json").open()
    with pytest.raises(ImageError, match="expected its region at"):
        recipe_of(station, region=str(station / "nowhere.png")).write(station / "four.json")


def test_a_bundle_by_a_link_may_be_set_anew(station: Path) -> None:
    (station / "current").symlink_to("bundle")
    (station / "deep" / "folder").mkdir(parents=True)
    (station / "short").symlink_to(station / "deep" / "folder")
    Recipe(str(station / "current"), engine="onnxruntime").write(station / "short" / "three.json")
    told = json.loads((station / "deep" / "folder" / "three.json").read_text())
    assert told["bundle"] == "../../current"
    for path in ("short", "deep/folder"):
        Recipe.read(station / path / "three.json").check()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "expected a recipe"),
        ("[]", 'JSON with "recipe": 1, got none'),
        ('{"bundle": "b"}', 'JSON with "recipe": 1, got none'),
        ('{"recipe": 2, "bundle": "b"}', 'JSON with "recipe": 1, got "recipe": 2'),
        ("[" * 100_000, "expected a recipe"),
        ('{"recipe": true, "bundle": "b"}', 'JSON with "recipe": 1, got "recipe": True'),
        ('{"recipe": 1, "bundle": "b", "threshold": 0.93, "threshold": 0.99}', "'threshold' twice"),
        ('{"recipe": 1, "bundle": "b"}', "manifest_sha256: expected the sha256 of its bundle, got none; write null"),
        ('{"recipe": 1, "bundle": "b", "manifest_sha256": null, "region": "r.png"}', "region_sha256: expected the sha256 of its region"),
        ('{"recipe": 1, "bundle": "b", "manifest_sha256": null, "region_sha256": "0"}', "region: expected the one of this region_sha256"),
        ('{"recipe": 1, "bundle": "b", "manifest_sha256": "abc"}', "manifest_sha256: expected a sha256, 64 hexadecimal digits, got 'abc'"),
        (" " * 1_000_001, "more than 1,000,000 bytes"),
        ('{"recipe": 1}', "bundle: expected the bundle's folder"),
        ('{"recipe": 1, "bundle": ""}', "bundle: expected the bundle's folder"),
        ('{"recipe": 1, "bundle": "b", "treshold": 0.5}', "got 'treshold'; did you mean 'threshold'?"),
        ('{"recipe": 1, "bundle": "b", "threshold": "0.5"}', "threshold: expected a number or null, got '0.5'"),
        ('{"recipe": 1, "bundle": "b", "threads": true}', "threads: expected a whole number, got True"),
        ('{"recipe": 1, "bundle": "b", "low_memory": 1}', "low_memory: expected true or false, got 1"),
        ('{"recipe": 1, "bundle": "b", "mode": null}', "mode: expected text, got None"),
        ('{"recipe": 1, "bundle": "b", "sha256": "0"}', "got 'sha256'"),
    ],
)
def test_what_is_no_recipe_is_told(content: str, words: str, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "three.json"
    path.write_text(content)
    with pytest.raises(RequestError) as error:
        Recipe.read(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)
    code, lines, errors = run(tmp_path, "--recipe", path)
    assert (code, lines) == (2, []) and words in errors


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "three.json", tmp_path, Path("/dev/zero"), "", None, 5):
        with pytest.raises(RequestError, match="--save-recipe writes"):
            Recipe.read(path)  # type: ignore[arg-type]


# agvas-segment


def test_the_command_saves_and_follows_one(station: Path, run: Any) -> None:
    settings = ("--bundle", station / "bundle", "--engine", "onnxruntime", "--threshold", "0.2", "--region", station / "region.png")
    asked = ("--instruction", "Segment the dents.", "--tile", "64", "--threads", "1")
    code, (line,), errors = run(station / "part.png", *settings, *asked, "--json", "--save-recipe", station / "three.json")
    assert code == 0 and f"saved {station / 'three.json'}" in errors
    recipe = Recipe.read(station / "three.json")
    assert (recipe.threshold, recipe.tile, recipe.threads, recipe.instruction) == (0.2, 64, 1, "Segment the dents.")
    code, (again,), _ = run(station / "part.png", "--recipe", station / "three.json", "--json")
    first, second = json.loads(line), json.loads(again)
    assert second.pop("recipe_sha256") == recipe.sha256 and "recipe_sha256" not in first
    for name in ("time", "timings_ms"):
        del first[name], second[name]
    assert code == 0 and first == second and second["tiles"] > 1 and second["region_share"] == 0.5


def test_settings_beside_a_recipe_are_refused(station: Path, run: Any) -> None:
    recipe_of(station, threshold=0.2).write(station / "three.json")
    given: list[tuple[Any, ...]] = [("--threshold", 0.2), ("--threads", 0), ("--bundle", station / "bundle"), ("--save-recipe", "x")]
    for option, *value in (*given, ("--low-memory",), ("--instruction", "Segment the dents.")):
        code, lines, errors = run(station / "part.png", "--recipe", station / "three.json", option, *value)
        assert (code, lines) == (2, []) and f"{option}: expected the recipe's settings alone" in errors
    code, _, _ = run(station / "part.png", "--recipe", station / "three.json", "--output", station / "out", "--overlay", "--quiet")
    assert code == 0 and (station / "out" / "part_overlay.png").exists(), "what is written, and where, is the run's"


def test_a_recipe_for_another_bundle_gives_no_verdict(station: Path, run: Any) -> None:
    recipe_of(station).write(station / "three.json")
    told = json.loads((station / "three.json").read_text()) | {"manifest_sha256": "1" * 64}
    (station / "three.json").write_text(json.dumps(told))
    code, lines, errors = run(station / "part.png", "--recipe", station / "three.json")
    assert (code, lines) == (2, []) and f"{station / 'three.json'}: expected the bundle it was made for" in errors
    shutil.rmtree(station / "bundle")
    code, lines, errors = run(station / "part.png", "--recipe", station / "three.json")
    assert (code, lines) == (2, []) and f"agvas-segment: {station / 'three.json'}: " in errors and "is not a folder" in errors


def test_what_cannot_be_a_recipe_is_not_saved(station: Path, run: Any) -> None:
    base = (station / "part.png", "--bundle", station / "bundle", "--engine", "onnxruntime")
    code, lines, errors = run(*base, "--instruction", "a", "--instruction", "b", "--save-recipe", station / "three.json")
    assert (code, lines) == (2, []) and "--save-recipe: expected one --instruction" in errors
    for place in (station, station / "nowhere" / "three.json"):
        code, lines, errors = run(*base, "--save-recipe", place)
        words = "expected a file, got a folder" if place is station else "make that folder"
        assert (code, lines) == (2, []) and words in errors
    code, lines, _ = run(*base, "--mode", "segment-then-explain", "--save-recipe", station / "three.json")
    assert (code, lines) == (2, []), "tiny answers in direct mode alone"
    assert not (station / "three.json").exists()


def test_an_older_recipe_stays_where_a_new_one_cannot_be_written(station: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_of(station, threshold=0.2).write(station / "three.json")
    before = (station / "three.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="full disk"):
        recipe_of(station, threshold=0.3).write(station / "three.json")
    assert (station / "three.json").read_bytes() == before
    assert {path.name for path in station.iterdir()} == {"bundle", "region.png", "part.png", "three.json"}


def test_a_station_is_evaluated_as_it_runs(station: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_of(station, threshold=0.2, region=str(station / "region.png"), instruction="Segment the dents.").write(station / "three.json")
    recipe = Recipe.read(station / "three.json")
    (station / "set" / "masks").mkdir(parents=True)
    shutil.copy(station / "part.png", station / "set" / "part.png")
    truth = np.zeros((SIDE, SIDE), np.uint8)
    truth[:10, :10] = 255
    Image.fromarray(truth).save(station / "set" / "masks" / "part.png")
    asked = ["--dataset", "folder", "--root", str(station / "set"), "--recipe", str(station / "three.json"), "--json"]
    assert accuracy.main(asked) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    mask = recipe.open()(station / "part.png", **recipe.request).mask
    assert mask.any()
    assert told["mean"]["iou_anomalous"] == pytest.approx((mask & (truth > 0)).sum() / (mask | (truth > 0)).sum())
    assert told["judged"]["recipe_sha256"] == recipe.sha256
    assert (told["judged"]["threshold"], told["judged"]["engine"]) == (0.2, "onnxruntime")
    assert (told["settings"]["instruction"], told["settings"]["region_share"]) == ("Segment the dents.", 0.5)
    beside = (("--threshold", "0.2"), ("--tile", "64"), ("--threads", "0"), ("--instruction", "Segment the dents."), ("--mode", "direct"))
    recipe_of(station, threshold=0.2, max_new_tokens=2).write(station / "cut.json")
    assert told["mean"]["found_anomalous"] == 1
    assert accuracy.main([*asked[:5], str(station / "cut.json"), "--json"]) == 0
    cut = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cut["mean"]["found_anomalous"] == 0, "an answer cut before its anchors has no mask"
    for option, value in beside:
        assert accuracy.main([*asked, option, value]) == 2
        assert f"{option}: expected the recipe's settings alone" in capsys.readouterr().err
    (station / "region.png").write_bytes(b"another")
    assert accuracy.main(asked) == 2
    assert "expected the region it was made for" in capsys.readouterr().err
