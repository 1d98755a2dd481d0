"""The commands that report on training: a run's curves, and variants trained alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from benchmarks import training_curves, variants


def log(path: Path, losses: dict[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(losses.values())))
    lines = [
        {"step": 10 * n, "seconds": n, "images_per_second": 8.0 + n % 3, "processes": 2, "norm": 1.0, "rate": 0.1}
        | {name: values[n] for name, values in losses.items()}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_means_over_a_twentieth_of_the_run(tmp_path: Path) -> None:
    falling = [4.0 - 0.1 * n for n in range(40)]
    log(tmp_path / "run" / "log.jsonl", {"text": falling, "mask": [1.0] * 40})
    log(tmp_path / "run" / "pretraining" / "log.jsonl", {"mask": falling})
    output = tmp_path / "curves.json"
    assert training_curves.main(["--run", str(tmp_path / "run"), "--output", str(output)]) == 0
    phases = json.loads(output.read_text())["phases"]
    assert phases["tuning"]["steps"] == 391 and phases["tuning"]["images_per_second"] == 9.0
    assert phases["tuning"]["losses"]["mask"] == [[20 * n + 10, 1.0] for n in range(20)]
    assert phases["pixel pretraining"]["losses"]["mask"][0] == [10, pytest.approx(3.95)]
    assert phases["tuning"]["losses"].keys() == {"text", "mask"}
    drawn = np.asarray(Image.open(output.with_suffix(".png")))
    assert drawn.shape == (260, 1280, 3)
    assert (drawn[:, :640] == training_curves.COLOURS[0]).all(axis=2).sum() > 300  # a line across the panel


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training_curves.main(["--run", str(tmp_path), "--output", str(tmp_path / "x.json")]) == 2
    assert str(tmp_path) in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_seeds_and_ablations_are_trained_and_measured_alike(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(picture(0)).save(data / "bad.png")
    Image.fromarray(picture(1)).save(data / "good.png")
    Image.fromarray(np.where(picture(0).mean(axis=2) > 200, 255, 0).astype(np.uint8)).save(data / "mask.png")
    (data / "manifest.csv").write_text("image,mask,label\nbad.png,mask.png,1\ngood.png,,0\n")
    output = tmp_path / "variants.json"
    arguments = ["--work", str(tmp_path / "work"), "--config", "tiny", "--steps", "2", "--pretraining-steps", "2", "--samples", "8"]
    arguments += ["--seeds", "0", "1", "--ablations", "no-spam", "--workers", "0", "--output", str(output), str(data)]
    assert variants.main(arguments) == 0
    result = json.loads(output.read_text())
    assert result["variants"].keys() == {"seed-0", "seed-1", "no-spam"}
    assert all(0 <= run["mean"]["ap"] <= 1 for run in result["variants"].values())
    aps = [result["variants"][f"seed-{seed}"]["mean"]["ap"] for seed in (0, 1)]
    assert result["seeds"]["ap"][0] == pytest.approx(np.mean(aps))
    pretrained = [(tmp_path / "work" / name / "pretraining" / "state.safetensors").read_bytes() for name in ("seed-0", "no-spam", "seed-1")]
    assert pretrained[0] == pretrained[1] != pretrained[2]
