"""agvas-eval on generated data: hand-counted metrics through `evaluate`, the baselines, and the command."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomllib
from PIL import Image

import agvas.checkpoint
from agvas.training.sources.manifest import Item, read_manifest
from benchmarks import accuracy, baselines, contact_sheet, evaluation, predictors
from benchmarks.accuracy import evaluate_datasets, main, read_datasets
from benchmarks.contact_sheet import ContactSheet
from benchmarks.datasets import Judged
from benchmarks.evaluation import Observation, Prediction, evaluate
from benchmarks.metrics import PixelScores
from benchmarks.predictors import Predictor, Question, Source, open_predictor, read_normal_text
from runtime.masking import MaskRule

HEIGHT, WIDTH = 11, 17
HEADER = "image,mask,label,class,split"


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:6, 3:13] = True  # 40 of 187 pixels
    return mask


def write_dataset(root: Path, *rows: tuple[str, int, str, str]) -> Path:
    """Rows of (name, label, class, split); anomalous images are white where anomalous, and grey elsewhere."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    lines = [HEADER]
    for name, label, category, split in rows:
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        if label:
            pixels[truth()] = 255
            Image.fromarray(truth().astype(np.uint8) * 255).save(root / f"masks/{name}.png")
        Image.fromarray(pixels).save(root / f"images/{name}.png")
        lines.append(f"images/{name}.png,{f'masks/{name}.png' if label else ''},{label},{category},{split}")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two categories, interleaved; the second has no normal image."""
    return write_dataset(
        tmp_path / "parts",
        ("a", 1, "bolt", "test"),
        ("b", 1, "nut", "test"),
        ("c", 0, "bolt", "train"),
        ("d", 1, "bolt", "test"),
        ("e", 0, "bolt", "test"),
    )


def perfect(item: Judged) -> Prediction:
    with Image.open(item.image) as opened:
        mask = np.asarray(opened)[..., 0] == 255
    return Prediction(mask.astype(np.float32), mask, float(mask.any()))


def says(anomaly_map: Any, mask: Any, score: Any = 0.5) -> Callable[[Judged], Prediction]:
    return lambda item: Prediction(anomaly_map, mask, score)


def test_a_perfect_prediction_scores_one_in_everything(parts: Path) -> None:
    result = evaluate(read_manifest(parts), perfect)
    bolt = result["categories"]["bolt"]
    for name in evaluation.METRICS:
        assert bolt[name] == 1.0
    assert (bolt["images"], bolt["normal_images"], bolt["ap_error"]) == (4, 2, 0.0)


def test_predicting_nothing_scores_the_share_of_pixels_and_empties_every_normal(parts: Path) -> None:
    nothing = says(np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), bool))
    bolt = evaluate(read_manifest(parts), nothing)["categories"]["bolt"]
    share = 80 / (4 * 187)  # pooled over the category, normal images included
    assert bolt["ap"] == pytest.approx(share)
    assert bolt["f1_max"] == pytest.approx(2 * share / (1 + share))
    assert (bolt["iou_anomalous"], bolt["found_anomalous"], bolt["empty_normal"], bolt["image_auroc"]) == (0.0, 0.0, 1.0, 0.5)


def test_a_region_leaves_out_what_lies_outside_it_as_if_the_pictures_ended_there(tmp_path: Path) -> None:
    """Judged in a rectangle, metrics are those of the rectangle cut out, and a defect beside it is none."""
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 0, "", "")))
    rows, columns = np.flatnonzero(truth().any(1)), np.flatnonzero(truth().any(0))
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[: rows[1] + 1, : columns[2] + 1] = True  # holds a corner of the defect
    maps = {name: np.random.default_rng(seed).random((HEIGHT, WIDTH), np.float32) for seed, name in enumerate("abc")}

    def predict(item: Judged) -> Prediction:
        anomaly_map = np.where(region, maps[item.image.stem], np.float32(0))
        return Prediction(anomaly_map, anomaly_map > 0.5, float(anomaly_map.max()))

    seen: list[evaluation.Observation] = []
    metrics = evaluate(items, predict, observers=[seen.append], region=region)["categories"]["set"]
    pixels = PixelScores(regions=True)
    for name in "abc":
        cut = np.ix_(region.any(1), region.any(0))
        pixels.add(maps[name][cut], (truth() if name != "c" else np.zeros_like(truth()))[cut])
    assert (metrics["ap"], metrics["aupro"], metrics["f1_max"]) == (pixels.average_precision(), pixels.aupro(), pixels.f1_max())
    assert [one.is_anomalous for one in seen] == [True, True, False]

    beside = ~truth()
    metrics = evaluate(items, says(np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), bool)), region=beside)["mean"]
    assert (metrics["normal_images"], metrics["empty_normal"], metrics["ap"]) == (3, 1.0, None)


def test_pixels_are_pooled_over_images_before_they_are_ranked(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", "")))

    def faint_then_strong(item: Judged) -> Prediction:
        """Each image ranks its own pixels perfectly, but a's anomaly is fainter than b's background."""
        faint = item.image.name == "a.png"
        values = np.where(truth(), 0.2 if faint else 0.9, 0.1 if faint else 0.5).astype(np.float32)
        return Prediction(values, truth(), 1.0)

    metrics = evaluate(items, faint_then_strong)["categories"]["set"]
    assert metrics["ap"] == pytest.approx(0.5 * 1.0 + 0.5 * 80 / (80 + 147))
    assert metrics["iou_anomalous"] == 1.0


def test_iou_is_a_mean_over_anomalous_images_and_not_over_pixels(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 0, "", "")))

    def predict(item: Judged) -> Prediction:
        mask = np.ones((HEIGHT, WIDTH), bool) if item.image.name in ("b.png", "c.png") else truth()
        return Prediction(truth().astype(np.float32), mask, 0.0)

    metrics = evaluate(items, predict)["categories"]["set"]
    assert metrics["iou_anomalous"] == pytest.approx((1 + 40 / 187) / 2)
    assert (metrics["found_anomalous"], metrics["empty_normal"]) == (1.0, 0.0)


def test_found_is_a_share_of_the_anomalous_pictures_wherever_the_mask_lies(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 1, "", ""), ("d", 0, "", "")))

    def predict(item: Judged) -> Prediction:
        mask = np.zeros((HEIGHT, WIDTH), bool) if item.image.name == "b.png" else ~truth()
        return Prediction(truth().astype(np.float32), mask, 0.0)

    metrics = evaluate(items, predict)["categories"]["set"]
    assert (metrics["iou_anomalous"], metrics["found_anomalous"]) == (0.0, pytest.approx(2 / 3))


def test_undefined_metrics_are_none_and_left_out_of_the_mean(parts: Path) -> None:
    result = evaluate(read_manifest(parts), perfect)
    nut = result["categories"]["nut"]
    assert nut["empty_normal"] is nut["image_auroc"] is None and nut["ap"] == 1.0
    assert result["mean"]["empty_normal"] == 1.0
    assert result["mean"]["images"] == 5
    normals = [item for item in read_manifest(parts) if not item.is_anomalous]
    bolt = evaluate(normals, perfect)["categories"]["bolt"]
    assert bolt["ap"] is bolt["f1_max"] is bolt["iou_anomalous"] is bolt["found_anomalous"] is bolt["ap_error"] is None
    assert bolt["empty_normal"] == 1.0


def test_the_mean_weighs_categories_alike_whatever_their_number_of_images(parts: Path) -> None:
    def only_bolts(item: Judged) -> Prediction:
        said = perfect(item)
        return said._replace(mask=said.mask & (item.image.name != "b.png"))

    mean = evaluate(read_manifest(parts), only_bolts)["mean"]
    assert mean["iou_anomalous"] == 0.5  # bolt 1 (two images), nut 0 (one image)


def test_progress_sees_every_item_once_and_category_by_category(parts: Path) -> None:
    seen: list[str] = []

    def watch(items: Sequence[Item]) -> Iterable[Item]:
        assert len(items) == 5
        for item in items:
            seen.append(item.category)
            yield item

    evaluate(read_manifest(parts), perfect, progress=watch)
    assert seen == ["bolt"] * 4 + ["nut"]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (says(np.zeros((7, 5), np.float32), np.zeros((7, 5), bool)), r"expected \[11, 17\] as the image, got \[7, 5\]"),
        (says(np.zeros((1, 11, 17), np.float32), np.zeros((11, 17), bool)), r"expected \[H, W\]"),
        (says(np.zeros((11, 17), np.float32), np.zeros((17, 11), bool)), r"mask: expected bool \[11, 17\]"),
        (says(np.zeros((11, 17), np.float32), np.zeros((11, 17), np.uint8)), "got uint8"),
        (says(np.full((11, 17), 7, np.float32), np.zeros((11, 17), bool)), "values from 7 to 7"),
        (says(np.full((11, 17), np.nan, np.float32), np.zeros((11, 17), bool)), "187 NaN of 187"),
        (says(np.zeros((11, 17), np.float32), np.zeros((11, 17), bool), math.nan), "score: expected a finite"),
    ],
)
def test_a_bad_prediction_is_refused_naming_its_image(parts: Path, prediction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(read_manifest(parts), prediction)
    assert str(parts / "images/a.png") in str(raised.value)


@pytest.mark.parametrize("device", ["foo", "mps", "meta", "cuda:0"])
def test_a_checkpoints_device_that_is_not_there_is_one_line_and_2(
    parts: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(parts), "--checkpoint", "nano", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agvas-eval: device: expected ") and f"got {device}" in line.replace("'", "")


def test_no_items_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], perfect)


def test_a_limit_takes_images_evenly_spaced_and_a_split_only_its_own(parts: Path) -> None:
    def count(**settings: Any) -> list[str]:
        seen: list[str] = []

        def predict(item: Judged) -> Prediction:
            seen.append(item.image.stem)
            return perfect(item)

        evaluate_datasets(read_datasets([("manifest", parts)], **settings), predict)
        return sorted(seen)

    assert count() == list("abcde")
    assert count(limit=9) == list("abcde")
    assert count(limit=2) == ["a", "c"]
    assert count(split="train") == ["c"]
    with pytest.raises(ValueError, match="split val, found test, train"):
        count(split="val")


def test_every_data_set_is_read_before_a_model_is_opened(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_early(*_: Any) -> None:
        raise AssertionError("the model was opened although a data set is missing")

    monkeypatch.setattr(accuracy, "open_predictor", too_early)
    assert main([str(parts), str(tmp_path / "nowhere"), "--bundle", "any"]) == 2
    assert "nowhere" in capsys.readouterr().err


# The command, with a fake model in the place of the real ones.


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(perfect, {"kind": "bundle", "name": "any"}))


@pytest.mark.usefixtures("fake_model")
def test_the_last_line_for_one_data_set_is_its_json(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parts), "--bundle", "any", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["dataset"] == "parts"
    assert set(result["categories"]) == {"bolt", "nut"}
    keys = {"ap", "f1_max", "iou_anomalous", "empty_normal", "images", "image_auroc"}
    assert keys <= set(result["categories"]["nut"]) and keys <= set(result["mean"])
    assert result["categories"]["nut"]["empty_normal"] is None


@pytest.mark.usefixtures("fake_model")
def test_several_data_sets_print_one_table_a_line_each_and_the_mean_last(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path / "other", ("a", 1, "", ""))
    output = tmp_path / "result.json"
    assert main([str(parts), str(other), "--bundle", "any", "--json", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["dataset"] for line in lines[-3:-1]] == ["parts", "other"]
    summary = json.loads(lines[-1])
    assert all(part["judged"] == {"kind": "bundle", "name": "any"} == summary["judged"] for part in summary["datasets"])
    assert [part["dataset"] for part in summary["datasets"]] == ["parts", "other"]
    assert summary["mean"]["ap"] == 1.0 and summary["mean"]["images"] == 6
    assert json.loads(output.read_text()) == summary
    assert sum(line.startswith("|--") for line in lines) == 1


def test_what_may_have_spoiled_a_picture_is_told_with_its_name_once(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warns(item: Judged) -> Prediction:
        warnings.warn("all dark", stacklevel=1)
        return perfect(item)

    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(warns, {}))
    assert main([str(parts), "--bundle", "any"]) == 0
    assert capsys.readouterr().err == f"agvas-eval: warning: {parts / 'images/a.png'}: all dark (told once)\n"


@pytest.mark.usefixtures("fake_model")
@pytest.mark.parametrize("layout", ["good", "folder"])
def test_pictures_of_a_kind_that_is_not_read_are_left_out_aloud(
    parts: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.webp", "y.WEBP", "z.heic", ".hidden.webp"):
        (parts / "images" / name).write_bytes(b"")
    assert main(["--dataset", layout, "--root", str(parts / "images"), "--bundle", "any"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"agvas-eval: warning: {parts / 'images'}: left out 1 .heic, 2 .webp: PNG, ") and "save them as PNG" in line


def test_a_damaged_good_part_ends_the_run_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:1500])
    assert main(["--dataset", "good", "--root", str(tmp_path), "--baseline", "constant"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"agvas-eval: {tmp_path / 'b.jpg'}: expected a whole JPEG picture")


def test_a_folder_of_pictures_given_as_a_data_set_is_told_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--baseline", "constant"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: expected a manifest.csv in it" in line and f"--dataset good --root {tmp_path}" in line


@pytest.mark.parametrize("layout", ["good", "folder"])
def test_a_folder_of_yours_that_holds_no_picture_is_no_data_set_to_unpack(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for root, remedy in ((tmp_path, "put pictures there (.bmp, "), (tmp_path / "nowhere", "name a folder of pictures")):
        assert main(["--dataset", layout, "--root", str(root), "--baseline", "constant"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"agvas-eval: {root}: expected ") and remedy in line and "unpack" not in line


@pytest.mark.usefixtures("fake_model")
def test_without_json_only_the_table_is_printed(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parts), "--bundle", "any"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all((line.startswith("|") and line.endswith("|")) or " good pictures " in line for line in lines)
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_a_baseline_runs_from_the_files_to_the_json(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parts), "--baseline", "median", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["judged"]["name"], result["settings"]["mode"]) == ("median", None)
    assert result["versions"]["packages"]["numpy"] == np.__version__
    bolt = result["categories"]["bolt"]
    assert (bolt["empty_normal"], bolt["image_auroc"]) == (1.0, 1.0)  # normal images are plain grey


def test_bad_data_ends_with_2_and_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--baseline", "constant", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("agvas-eval: ") and "manifest.csv" in printed.err


@pytest.mark.parametrize(
    "extra",
    [
        ["--baseline", "mean"],
        ["--baseline", "constant", "--engine", "onnxruntime"],
        ["--checkpoint", "nano", "--engine", "onnxruntime"],
        ["--baseline", "constant", "--device", "cuda:0"],
        ["--baseline", "constant", "--output", "/no/such/folder/result.json"],
    ],
)
def test_settings_that_cannot_be_followed_are_refused_and_not_ignored(
    parts: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(parts), *extra]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "extra",
    [[], ["--baseline", "constant", "--bundle", "b"], ["--bundle", "b", "--limit", "0"]],
)
def test_bad_arguments_end_with_2(parts: Path, extra: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([str(parts), *extra])
    assert raised.value.code == 2


def test_exactly_one_source_of_predictions_is_asked_for() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Source()
    with pytest.raises(ValueError, match="exactly one"):
        Source(bundle=Path("b"), baseline="constant")


INSTRUCTIONS = {"direct": "Segment.", "describe-then-segment-plus": "Describe."}


@dataclass(frozen=True)
class FakeDecoder:
    threshold: float = 0.5
    relative_threshold: float = 1.0
    fusion_weight: float = 0.5

    @property
    def mask_rule(self) -> MaskRule:
        return MaskRule(self.threshold, self.relative_threshold)


@dataclass(frozen=True)
class FakeConfig:
    name: str = "fake"
    mask_decoder: FakeDecoder = FakeDecoder()
    prompts: Any = field(default_factory=lambda: SimpleNamespace(instructions=INSTRUCTIONS))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_mvtec(root: Path) -> Path:
    """Two categories; `bolt` has a normal image, `nut` a faint anomaly besides the plain one."""
    for category, kind, name, level in (
        ("bolt", "good", "0", None),
        ("bolt", "cut", "0", 255),
        ("nut", "cut", "0", 255),
        ("nut", "cut", "1", 91),
    ):
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        (root / category / "test" / kind).mkdir(parents=True, exist_ok=True)
        if level is not None:
            pixels[truth()] = level
            (root / category / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(truth().astype(np.uint8) * 255).save(root / category / "ground_truth" / kind / f"{name}_mask.png")
        Image.fromarray(pixels).save(root / category / "test" / kind / f"{name}.png")
    return root


@pytest.mark.usefixtures("fake_model")
def test_published_layouts_and_manifests_are_judged_in_one_run(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mvtec(tmp_path / "set")
    table_path = tmp_path / "images.csv"
    published = ["--dataset", "mvtec", "--root", str(root), "--dataset", "mvtec", "--root", str(root / "nut")]
    assert main([str(parts), *published, "--bundle", "any", "--json", "--csv", str(table_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second, third, summary = (json.loads(line) for line in lines[-4:])
    assert [first["dataset"], second["dataset"], third["dataset"]] == ["parts", "mvtec", "mvtec 2"]
    assert second["mean"]["iou_anomalous"] == (1 + (1 + 0) / 2) / 2  # macro over categories; the faint one is not found
    assert second["conventions"]["aupro_limit"] == 0.3 and second["settings"]["mode"] == "direct"
    assert set(third["categories"]) == {"nut"} and len(summary["datasets"]) == 3
    rows = rows_of(table_path)
    assert [row["dataset"] for row in rows] == ["parts"] * 5 + ["mvtec"] * 4 + ["mvtec 2"] * 2
    faint = rows[8]
    seconds = float(faint.pop("seconds"))
    assert 0 <= seconds < 60
    share = 40 / 187
    assert faint == {
        "dataset": "mvtec",
        "image": "nut/test/cut/1.png",
        "label": "1",
        "category": "nut",
        "kind": "cut",
        "score": "0.000000",
        "area": "0",
        "iou": "0.000000",
        "ap": f"{share:.6f}",
        "text": "",
    }
    normal = next(row for row in rows if row["dataset"] == "mvtec" and row["kind"] == "good")
    assert (normal["label"], normal["iou"], normal["ap"], normal["image"]) == ("0", "", "", "bolt/test/good/0.png")


@pytest.mark.usefixtures("fake_model")
def test_the_papers_form_is_per_cent_in_threes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mvtec(tmp_path / "set")
    assert main(["--dataset", "mvtec", "--root", str(root), "--bundle", "any", "--paper"]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0][3:] == ["(AP, F1-max, IoU anomalous) %", "empty normal %"]
    assert lines[2] == ["mvtec", "bolt", "2", "(100.0, 100.0, 100.0)", "100.0"]
    ap = 0.5 + 0.5 * 80 / 374  # nut: half of the positives alone on top, the rest with everything
    assert lines[3] == ["mvtec", "nut", "2", f"({100 * ap:.1f}, {100 * 2 / 3:.1f}, 50.0)", "-"]
    assert lines[4][:2] == ["mvtec", "mean"] and lines[4][4] == "100.0"


def test_a_folder_of_pictures_without_masks_gives_lines_and_no_metrics(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sheets = tmp_path / "images.csv", tmp_path / "sheets" / "new"
    arguments = ["--dataset", "folder", "--root", str(parts / "images"), "--baseline", "median", "--json"]
    assert main([*arguments, "--csv", str(path), "--overlays", str(sheets)]) == 0
    lines = capsys.readouterr().out.splitlines()
    mean = json.loads(lines[-1])["mean"]
    assert any("nothing is known of these pictures: give masks, or --dataset good" in line for line in lines)
    assert mean["images"] == 5 and all(mean[name] is None for name in evaluation.METRICS)
    assert [(row["image"], row["label"], row["iou"]) for row in rows_of(path)] == [(f"{name}.png", "", "") for name in "abcde"]
    assert [file.name for file in sheets.iterdir()] == ["images.png"]


def test_an_interrupted_run_keeps_its_lines_and_says_where(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, judged = tmp_path / "images.csv.partial", []

    def stopped_at_the_third(item: Judged) -> Prediction:
        if len(judged) == 2:
            assert len(rows_of(path)) == 2, "a line must be in the file before the next picture is begun"
            raise KeyboardInterrupt
        judged.append(item)
        return perfect(item)

    command = [str(parts), "--bundle", "any", "--csv", str(tmp_path / "images.csv")]
    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(stopped_at_the_third, {}))
    assert main(command) == 130
    assert capsys.readouterr().err == f"agvas-eval: interrupted; the images judged so far are in {path}\n"
    assert [row["image"] for row in rows_of(path)] == ["images/a.png", "images/c.png"]
    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(perfect, {}))
    assert main(command) == 0, "the same command again is in nobody's way"
    assert not path.exists() and len(rows_of(tmp_path / "images.csv")) == 5
    capsys.readouterr()
    assert main(command) == 2
    assert "exists; move it away" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "images.csv")) == 5


def test_a_picture_that_ends_the_run_leaves_the_lines_before_it(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_at_c(item: Judged) -> Prediction:
        if item.image.stem == "c":
            raise ValueError(f"{item.image}: damaged")
        return perfect(item)

    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(fails_at_c, {}))
    assert main([str(parts), "--bundle", "any", "--csv", str(tmp_path / "images.csv")]) == 2
    assert capsys.readouterr().err.endswith(f"c.png: damaged; the images judged so far are in {tmp_path / 'images.csv.partial'}\n")
    assert len(rows_of(tmp_path / "images.csv.partial")) == 1


def test_a_run_that_judged_nothing_leaves_no_table(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(item: Judged) -> Prediction:
        raise ValueError("mode is not one this model was trained for")

    monkeypatch.setattr(accuracy, "open_predictor", lambda *_: Predictor(fails, {}))
    assert main([str(parts), "--bundle", "any", "--csv", str(tmp_path / "images.csv")]) == 2
    assert not list(tmp_path.glob("images.csv*"))


@pytest.mark.usefixtures("fake_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one data set"),
        (["--dataset", "mvtec"], "1 and 0; give a --root for each"),
        (["--dataset", "mvtec", "--root", "nowhere"], "nowhere: expected a folder, found nothing"),
        (["--dataset", "mvtec", "--root", ".", "--split", "train"], "without splits"),
        (["--dataset", "manifest", "--root", ".", "--normal-text", "It is round."], "only describe-then-segment-plus"),
        (["--dataset", "mvtex", "--root", "."], "--dataset: expected one of mvtec, ksdd2"),
        (["--dataset", "mvtex", "--root", "."], "did you mean 'mvtec'?"),
        (["--dataset", "mvtec", "--root", ".", "--mode", "segment-and-explain"], "did you mean 'segment-then-explain'?"),
        (["--dataset", "manifest", "--root", ".", "--csv", "no/such/folder/images.csv"], "existing folder"),
    ],
)
def test_what_the_command_cannot_follow_is_one_line_and_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--bundle", "any"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_real_model_is_asked_in_the_mode_it_has_and_says_which_it_lacks(
    parts: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "images.csv"
    given = [str(parts), "--checkpoint", str(tiny_checkpoint), "--limit", "1", "--json", "--csv", str(path)]
    assert main([*given, "--mode", "segment-then-explain"]) == 2
    assert "mode 'segment-then-explain' is not one this model was trained for" in capsys.readouterr().err
    assert main([*given, "--threshold", "1", "--relative-threshold", "0.5", "--fusion-weight", "0.25"]) == 0
    settings = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert (settings["threshold"], settings["relative_threshold"], settings["fusion_weight"]) == (1, 0.5, 0.25)
    (row,) = rows_of(path)
    assert row["text"] == "Sure, it is [NOR][ANO][SEG]." and row["area"] == "0"


def test_a_real_bundle_is_judged_like_its_checkpoint(
    parts: Path, tiny_checkpoint: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    means, judged = [], []
    for source in (["--checkpoint", str(tiny_checkpoint)], ["--bundle", str(tiny_bundle), "--engine", "onnxruntime"]):
        assert main([str(parts), *source, "--threshold", "0.4", "--json"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert str(tiny_bundle.parent) not in line and str(tiny_checkpoint.parent) not in line
        means.append(json.loads(line)["mean"])
        judged.append(json.loads(line)["judged"])
    assert [(told["kind"], told["name"], told["model"], told["threshold"]) for told in judged] == [
        ("checkpoint", "tiny", "tiny", 0.4),
        ("bundle", "tiny-fp32", "tiny", 0.4),
    ]
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    assert judged[1]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest() and judged[1]["engine"] == "onnxruntime"
    for name in evaluation.METRICS:
        assert means[0][name] == pytest.approx(means[1][name], abs=0.01)


def test_the_fusion_weight_changes_a_real_models_map(parts: Path, tiny_checkpoint: Path) -> None:
    (item, *_) = read_manifest(parts)
    maps = [open_predictor(Source(checkpoint=str(tiny_checkpoint), fusion_weight=weight))(item).anomaly_map for weight in (0.0, 0.5, 1.0)]
    assert np.abs(maps[0] - maps[2]).max() > 1e-3
    assert np.allclose((maps[0] + maps[2]) / 2, maps[1], atol=1e-5)  # resampling is linear


# The contact sheet.


def observed(parts: Path, ious: Sequence[float | None]) -> list[Observation]:
    """Of the same picture with another IoU each; the order is the caption's score."""
    (item, *_) = read_manifest(parts)
    said = perfect(item)
    return [Observation(item, said._replace(score=float(order)), True, truth(), iou, iou, 0.0) for order, iou in enumerate(ious)]


def shown(sheet: ContactSheet) -> tuple[list[int], ...]:
    return tuple([row.order for row in rows] for rows in (sheet._best, sheet._worst, sheet._drawn))


def test_a_sheet_keeps_the_best_the_worst_and_a_fair_draw(parts: Path) -> None:
    ious = [0.5, None, 0.9, 0.1, 0.9, 0.3, None, 0.0, 0.7] * 3
    drawn = []
    for _ in range(2):
        sheet = ContactSheet("parts", parts, rows=3)
        for seen in observed(parts, ious):
            sheet.add(seen)
        best, worst, random_rows = shown(sheet)
        assert best == [2, 4, 11] and worst == [7, 16, 25]
        assert len(set(random_rows)) == 3
        drawn.append((random_rows, sheet.image().tobytes()))
    assert drawn[0] == drawn[1], "the same pictures must give the same sheet"


@pytest.mark.parametrize(
    ("ious", "best", "worst", "drawn"),
    [
        ([0.5], [0], [], []),
        ([0.5, None], [0], [], [1]),
        ([0.1, 0.9, 0.5], [1, 2], [0], []),
        ([0.0, 0.0, 0.0], [0, 1], [2], []),
    ],
)
def test_a_small_sets_picture_stands_on_its_sheet_once(
    parts: Path, ious: list[float | None], best: list[int], worst: list[int], drawn: list[int]
) -> None:
    sheet = ContactSheet("parts", parts, rows=3)
    for seen in observed(parts, ious):
        sheet.add(seen)
    rows = {name: [row.order for row in rows] for name, rows in sheet._parts()}
    expected = {"best IoU": best, "worst IoU": worst, "drawn at random": drawn}
    assert rows == {name: orders for name, orders in expected.items() if orders}


def test_a_sheet_shows_picture_truth_map_and_mask_side_by_side(parts: Path, tmp_path: Path) -> None:
    sheet = ContactSheet("parts", parts, rows=1)
    (item, *_) = read_manifest(parts)
    heat = np.zeros((HEIGHT, WIDTH), np.float32)
    heat[:, :9] = 1 / 3
    left = np.zeros((HEIGHT, WIDTH), bool)
    left[:, :9] = True
    sheet.add(Observation(item, Prediction(heat, left, 0.5), None, None, None, None, 0.0))
    sheet.save(tmp_path / "parts.png")
    assert [file.name for file in tmp_path.glob("parts.png*")] == ["parts.png"]
    with Image.open(tmp_path / "parts.png") as saved:
        pixels = np.asarray(saved)
    assert pixels.shape[1] == contact_sheet.WIDTH
    middle = 2 * contact_sheet.LINE + contact_sheet.LINE + contact_sheet.GAP + contact_sheet.LINE + contact_sheet.SIDE // 2
    lefts = [contact_sheet.GAP + column * (contact_sheet.SIDE + contact_sheet.GAP) for column in range(4)]

    def at(column: int, share: float) -> list[int]:
        return [int(level) for level in pixels[middle, lefts[column] + int(share * contact_sheet.SIDE)]]

    assert at(0, 0.9) == [90, 90, 90] and at(0, 0.5) == [255, 255, 255]  # the anomaly is white in the picture
    assert at(1, 0.5) == [48, 48, 48]  # nothing is known
    assert at(2, 0.25) == [255, 0, 0] and at(2, 0.75) == [0, 0, 0]
    assert at(3, 0.25) == [255, 255, 255] and at(3, 0.75) == [0, 0, 0]


def test_a_defect_thinner_than_a_thumbnails_pixel_does_not_vanish() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[501] = True
    thumbnail = np.asarray(contact_sheet._thumbnail(contact_sheet._black_and_white(mask)))
    assert thumbnail.shape == (contact_sheet.SIDE, contact_sheet.SIDE, 3) and thumbnail.max() > 30


class FakeModel:
    """Stands for runtime.Segmenter and for agvas's model: one object, asked in two ways."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        self.given, self.settings, self.overshoot = given, settings, np.float32(5e-5)
        self.asked: list[tuple[Any, ...]] = []
        told = {"model": "fake", "precision": {"spam": "fp16"}, "lmm": "float", "fusion_weight": 0.5}
        manifest = SimpleNamespace(prompts=SimpleNamespace(instructions=INSTRUCTIONS), **told)
        self.bundle = SimpleNamespace(manifest=manifest, folder=given[0], id="0a")
        self.engine, self.inference_precision, self.device = "openvino", "bf16", settings.get("device")
        self.rule = MaskRule(0.5, 0.8).changed(settings.get("threshold"), settings.get("relative_threshold"))
        self.config, self.mask_decoder = FakeConfig(), SimpleNamespace(fusion_weight=0.5)
        self.region = None

    def to(self, device: str) -> FakeModel:
        self.settings["device"] = device
        return self

    def parameters(self) -> Any:
        return iter([SimpleNamespace(dtype="torch.float32")])

    def segment(self, image: np.ndarray, *asked: Any) -> SimpleNamespace:
        self.asked.append(asked)
        mask = image[..., 0] == 255
        return SimpleNamespace(anomaly_map=mask.astype(np.float32) + self.overshoot, mask=mask, score=np.float32(0.25), text="said")

    def __call__(self, path: Path, *asked: Any, max_new_tokens: int | None = None) -> SimpleNamespace:
        with Image.open(path) as opened:
            return self.segment(np.asarray(opened), *asked)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """The models opened so far, by modules that stand in the place of runtime and agvas, on a machine with two GPUs."""
    models: list[FakeModel] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def make(*given: Any, **settings: Any) -> FakeModel:
        models.append(FakeModel(*given, **settings))
        return models[-1]

    images = SimpleNamespace(read_image=lambda path: np.asarray(Image.open(path)))
    monkeypatch.setitem(sys.modules, "runtime", SimpleNamespace(Segmenter=make))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "runtime.images", images)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "agvas", SimpleNamespace(load=make))  # type: ignore[arg-type]
    return models


def test_a_bundle_gets_the_settings_that_were_asked_for(opened: list[FakeModel]) -> None:
    open_predictor(Source(bundle=Path("b")))
    given = {"threshold": 0.2, "relative_threshold": 0.4, "tile": 500, "tile_overlap": 60, "region": "r.png"}
    none = dict.fromkeys(given)
    open_predictor(Source(bundle=Path("b"), engine="openvino", device="cuda:1", inference_precision="bf16", **given))
    assert [model.given for model in opened] == [(Path("b"),)] * 2
    assert [model.settings for model in opened] == [
        {"engine": "auto", "device": "cpu", "inference_precision": None, **none},
        {"engine": "openvino", "device": "cuda:1", "inference_precision": "bf16", **given},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "nano", "inference_precision": "bf16"}, "only a bundle has one, got bf16"),
        ({"bundle": Path("b"), "fusion_weight": 0.3}, "only a checkpoint's"),
        ({"baseline": "median", "threshold": 0.3}, "^threshold: a baseline's is fixed"),
        ({"baseline": "median", "relative_threshold": 0.3}, "^relative threshold: a baseline's is fixed.*--relative-threshold"),
        ({"bundle": Path("b"), "relative_threshold": -0.1}, "relative threshold: expected a number in 0..1, got -0.1; 1 is"),
        ({"checkpoint": "nano", "tile": 500}, "^tile: only a bundle sees pictures in tiles, got 500; leave --tile out"),
        ({"checkpoint": "nano", "region": "r.png"}, "^region: only a bundle judges one, got r.png; leave --region out"),
        ({"baseline": "median", "tile_overlap": 5}, "^tile overlap: only a bundle.*leave --tile-overlap out"),
        ({"baseline": "medium"}, "did you mean 'median'"),
        ({"checkpoint": "nano", "threshold": 1.5}, "threshold: expected a number in 0..1, got 1.5"),
        ({"checkpoint": "nano", "fusion_weight": -1.0}, "fusion weight: expected a number in 0..1"),
    ],
)
def test_a_setting_that_its_source_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_a_checkpoints_threshold_and_fusion_weight_can_be_swept(opened: list[FakeModel]) -> None:
    open_predictor(Source(checkpoint="nano", threshold=0.2, relative_threshold=0.4, fusion_weight=0.9))
    (model,) = opened
    assert model.config.mask_decoder == FakeDecoder(threshold=0.2, relative_threshold=0.4, fusion_weight=0.9)
    assert model.mask_decoder.fusion_weight == 0.9


def test_what_was_judged_is_told_with_the_settings_that_were_used_and_without_paths(opened: list[FakeModel], tmp_path: Path) -> None:
    """`auto` chose an engine, and a threshold that was not given is the model's own."""
    bundle = open_predictor(Source(bundle=tmp_path / "line-3")).judged
    assert bundle == {
        "kind": "bundle",
        "name": "line-3",
        "manifest_sha256": "0a",
        "model": "fake",
        "precision": {"spam": "fp16"},
        "lmm": "float",
        "engine": "openvino",
        "inference_precision": "bf16",
        "device": "cpu",
        "threshold": 0.5,
        "relative_threshold": 0.8,
        "fusion_weight": 0.5,
    }
    checkpoint = open_predictor(Source(checkpoint="nano", threshold=0.2)).judged
    weights = (Path(agvas.checkpoint.__file__).parent / "nano" / "model.safetensors").read_bytes()
    assert checkpoint == {
        "kind": "checkpoint",
        "name": "nano",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": "fake",
        "engine": "torch",
        "inference_precision": "float32",
        "device": "cpu",
        "threshold": 0.2,
        "relative_threshold": 1.0,
        "fusion_weight": 0.5,
    }
    baseline = open_predictor(Source(baseline="median")).judged
    assert baseline == {
        "kind": "baseline",
        "name": "median",
        "engine": None,
        "inference_precision": None,
        "device": "cpu",
        "threshold": 0.5,
        "relative_threshold": None,
        "fusion_weight": None,
    }


@pytest.mark.parametrize("source", [Source(bundle=Path("b")), Source(checkpoint="nano")])
def test_every_picture_is_asked_the_question(parts: Path, opened: list[FakeModel], source: Source) -> None:
    evaluate(read_manifest(parts)[:1], open_predictor(source))
    evaluate(read_manifest(parts)[:1], open_predictor(source, Question("segment-then-explain", "Where is rust?")))
    plus = Question("describe-then-segment-plus", normal_text={"bolt": "A bolt is straight. ", "nut": "A nut is round."})
    evaluate(read_manifest(parts)[:2], open_predictor(source, plus))
    assert [model.asked for model in opened] == [
        [(None, "direct")],
        [("Where is rust?", "segment-then-explain")],
        [("A bolt is straight. Describe.", plus.mode), ("A nut is round. Describe.", plus.mode)],
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "guess"}, "expected one of direct"),
        ({"mode": "describe-then-segment-plus"}, "got none; give one"),
        ({"normal_text": "It is round."}, "only describe-then-segment-plus takes it"),
    ],
)
def test_a_question_that_no_mode_takes_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Question(**settings)


def test_normal_texts_are_read_from_a_file_and_lacking_categories_named(tmp_path: Path) -> None:
    path = tmp_path / "normal.json"
    path.write_text('{"bolt": "A bolt is straight."}')
    texts = read_normal_text(str(path))
    assert texts == {"bolt": "A bolt is straight."}
    assert read_normal_text("It is round.") == "It is round."
    for wrong, named in ((str(tmp_path / "normal.txt"), "got the path"), (str(tmp_path), "got the path"), ("gone.json", "gone.json")):
        with pytest.raises(ValueError, match=f"--normal-text: expected .*{named}"):
            read_normal_text(wrong)
    with pytest.raises(ValueError, match="got none for gear, nut"):
        Question("describe-then-segment-plus", normal_text=texts).check(["nut", "bolt", "gear"])
    for content in ("[1]", '{"bolt": 3}', '{"bolt": " "}', "bolt"):
        path.write_text(content)
        with pytest.raises(ValueError, match="normal.json"):
            read_normal_text(str(path))


@pytest.mark.parametrize("source", [Source(bundle=Path("b"), device="cpu"), Source(checkpoint="nano", device="cuda:0")])
def test_a_models_map_that_leaves_0_to_1_by_rounding_is_judged_and_one_that_leaves_it_by_more_refused(
    parts: Path, opened: list[FakeModel], source: Source
) -> None:
    predict = open_predictor(source)
    (model,) = opened
    assert model.settings.get("device") == source.device
    assert evaluate(read_manifest(parts), predict)["mean"]["ap"] == 1.0
    model.overshoot = np.float32(0.01)
    with pytest.raises(ValueError, match="to 1.01"):
        evaluate(read_manifest(parts), predict)


def test_help_loads_neither_torch_nor_opencv() -> None:
    code = (
        "import sys\n"
        "from benchmarks.accuracy import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'cv2', 'onnx', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    root = Path(accuracy.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stderr.strip() == "[]" and "--baseline" in run.stdout


def run_with_only(packages: set[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """agvas-eval where nothing but the standard library, ours and these packages can be imported."""
    code = (
        "import sys\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] not in sys.stdlib_module_names | {packages | {'agvas', 'benchmarks', 'engines', 'runtime'}!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "from benchmarks.accuracy import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(accuracy.__file__).parents[1])


DEPENDENCIES = {"numpy", "PIL", "tokenizers", "tqdm"}  # the package's own, without any extra


def test_a_bundle_is_judged_with_what_the_runtime_and_one_engine_need(parts: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    outputs = ["--csv", str(tmp_path / "images.csv"), "--overlays", str(tmp_path / "sheets"), "--output", str(tmp_path / "all.json")]
    arguments = [str(parts), "--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--limit", "1", *outputs]
    done = run_with_only(DEPENDENCIES | {"onnxruntime"}, arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "all.json").read_text())["mean"]["images"] == 1


def test_a_baseline_without_opencv_names_the_extra_that_has_it(parts: Path) -> None:
    done = run_with_only(DEPENDENCIES, [str(parts), "--baseline", "median"])
    assert (done.returncode, done.stderr) == (2, 'agvas-eval: cv2 is not installed; pip install "agvas[eval]"\n')
    extras = tomllib.loads((Path(accuracy.__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(need.startswith("opencv-python-headless") for need in extras["eval"])


# The baselines.


def test_the_command_offers_every_baseline() -> None:
    assert predictors.BASELINES == baselines.BASELINES


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("shape", [(53, 71), (401, 307), (3, 5), (1, 1), (7, 900)])
def test_every_baseline_gives_a_float32_map_of_the_images_size_within_0_and_1(name: baselines.Baseline, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(19).integers(0, 256, (*shape, 3), dtype=np.uint8)
    anomaly_map = baselines.anomaly_map(name, image)
    assert anomaly_map.dtype == np.float32 and anomaly_map.shape == shape
    assert anomaly_map.min() >= 0.0 and anomaly_map.max() <= 1.0


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("grey", [0, 90, 255])
def test_a_uniform_image_is_normal_for_every_baseline(name: baselines.Baseline, grey: int) -> None:
    rounding = 1e-6  # the Gaussian's weights add up to 1 in float32 only nearly
    assert baselines.anomaly_map(name, np.full((53, 71, 3), grey, np.uint8)).max() < rounding


@pytest.mark.parametrize("side", [101, 503])  # below and above the size that is reduced
def test_the_median_map_is_the_distance_in_grey_levels_over_128(side: int) -> None:
    image = np.full((side, side, 3), 90, np.uint8)
    image[40:46, 20:60] = 90 + 64
    image[70, 10:90] = 90 - 32  # a scratch one pixel thin
    anomaly_map = baselines.median_map(image)
    assert anomaly_map[43, 40] == 0.5 and anomaly_map[70, 50] == 0.25 and anomaly_map[5, 5] == 0.0


def test_the_gradient_map_of_a_ramp_is_its_slope_over_64() -> None:
    image = np.repeat((np.arange(60, dtype=np.uint8) * 4)[None, :, None], 40, axis=0).repeat(3, axis=2)
    for ramp in (image, image.transpose(1, 0, 2).copy()):
        assert baselines.gradient_map(ramp)[20, 20] == pytest.approx(4 / 64, rel=1e-3)


def test_a_baseline_refuses_what_is_not_uint8_rgb() -> None:
    with pytest.raises(ValueError, match=r"got float64 \[5, 7, 3\]"):
        baselines.median_map(np.zeros((5, 7, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got uint8 \[5, 7\]"):
        baselines.gradient_map(np.zeros((5, 7), np.uint8))
    with pytest.raises(ValueError, match="expected one of constant"):
        baselines.anomaly_map("mean", np.zeros((5, 7, 3), np.uint8))  # type: ignore[arg-type]
