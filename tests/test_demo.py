"""The demo through main()."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import demo


def test_the_demo_leaves_bundle_masks_overlays_and_summary(
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True) and 0)
    output = tmp_path / "demo"
    assert demo.main([str(photos), "--output", str(output), "--count", "4"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["verify"]["passed"] is True
    assert ["true_iou" in record for record in summary["images"]] == [True] * 2 + [False] * 5
    assert summary["latency_ms"]["calls"] >= 20
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p90"]
    assert 0 <= summary["mean_true_iou"] <= 1
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 256 and sheet.height > 4 * 256  # two pictures of four cells a row
    for record in summary["images"]:
        assert Path(record["mask"]).parent == output / "masks" and Path(record["mask"]).is_file()
        assert Path(record["overlay"]).parent == output / "overlays" and Path(record["overlay"]).is_file()
    told = capsys.readouterr().out
    assert "contact_sheet.png" in told and f"NG: a score above {summary['threshold']:g}" in told
    # Again, smaller: nothing of the first is left beside the new summary.
    assert demo.main(["--output", str(output), "--count", "1"]) == 0
    assert len(list((output / "masks").iterdir())) == len(list((output / "overlays").iterdir())) == 1


def test_the_demo_ends_with_an_error_when_export_or_verification_fails(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: 2)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 2
    monkeypatch.setattr(demo, "_export", lambda bundle: shutil.copytree(tiny_bundle, bundle) and 0)
    monkeypatch.setattr(demo, "verify_bundle", lambda *_, **__: {"passed": False, "failures": ["flips"]})
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    assert "verification failed: flips" in capsys.readouterr().err


def test_the_demo_leaves_a_folder_of_other_files_alone(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: pytest.fail("must not start"))
    assert demo.main(["--output", str(photos)]) == 2
    assert "expected an earlier demo or an empty folder" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 3


def test_a_second_demo_takes_the_first_ones_bundle_until_the_code_is_another(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []

    def export(bundle: Path) -> int:
        exported.append(bundle)
        shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True)
        return 0

    monkeypatch.setattr(demo, "_export", export)
    run = ["--output", str(tmp_path / "demo"), "--count", "1"]
    assert [demo.main(run), demo.main(run)] == [0, 0] and len(exported) == 1
    (tmp_path / "demo" / "bundle" / "tokenizer.json").write_text("{}")
    assert demo.main(run) == 0 and len(exported) == 2
    monkeypatch.setattr(demo, "_made_of", lambda: "of other code")
    assert demo.main(run) == 0 and len(exported) == 3


@pytest.mark.parametrize("at", ["_export", "measure_latency"])
def test_an_interrupted_second_demo_leaves_the_first_ones_results(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True) and 0)
    output = tmp_path / "demo"
    assert demo.main(["--output", str(output), "--count", "2"]) == 0
    results = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, at, interrupt)
    monkeypatch.setattr(demo, "_made_of", lambda: "of other code")
    if at == "measure_latency":
        monkeypatch.setattr(demo, "_export", lambda bundle: 0)  # the very same bundle again
    assert demo.main(["--output", str(output), "--count", "1"]) == 130
    assert {path: path.read_bytes() for path in results if path.name != demo.MADE_OF} == {
        path: content for path, content in results.items() if path.name != demo.MADE_OF
    }
