"""agvas-eval, the command: data sets in; table, JSON, lines and sheets out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
from judged_parts import perfect, rows_of, write_dataset, write_mvtec
from PIL import Image

from benchmarks import accuracy, evaluation
from benchmarks.accuracy import evaluate_datasets, main, read_datasets
from benchmarks.datasets import Judged
from benchmarks.evaluation import Prediction
from benchmarks.predictors import Predictor


@pytest.mark.parametrize("device", ["foo", "mps", "meta", "cuda:0"])
def test_a_checkpoints_device_that_is_not_there_is_one_line_and_2(
    parts: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([str(parts), "--checkpoint", "nano", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agvas-eval: device: expected ") and f"got {device}" in line.replace("'", "")


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


def test_a_full_disk_is_told_with_the_file_after_the_table(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parts), "--baseline", "constant", "--output", "/dev/full"]) == 2
    captured = capsys.readouterr()
    assert "AP" in captured.out and "/dev/full: expected a file that can be written" in captured.err and "free some space" in captured.err


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
        ["--checkpoint", "nano", "--threads", "2"],
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


def test_what_auto_does_first_is_told(
    parts: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.selection.CPU_CANDIDATES", (("onnxruntime", "graph"),))
    told = f"agvas-eval: opening {tiny_bundle}; on a new machine, engine auto first measures the engines that are installed"
    for engine, tells in (([], True), (["--engine", "onnxruntime"], False)):
        assert main([str(parts), "--bundle", str(tiny_bundle), "--limit", "1", *engine]) == 0
        assert (told in capsys.readouterr().err.splitlines()) is tells


def test_a_bundles_threads_are_the_segmenters(parts: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parts), "--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "-1"]) == 2
    assert capsys.readouterr().err == "agvas-eval: threads: expected 0 (the engine's choice) or more, got -1\n"


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
