"""What the command lines have in common: streams, bars, help and what an installation lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_picture

from runtime.cli import segment, verify
from runtime.cli.common import Progress


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_changes_nothing_that_a_command_does(closed: str, tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m runtime.cli.segment {photos} --bundle {tiny_bundle} --engine onnxruntime"
    line = f"{command} --output {tmp_path / 'out'} {closed}"
    done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("*_mask.png"))


@pytest.mark.parametrize("module", ["runtime.cli.segment", "runtime.cli.verify"])
def test_help_loads_neither_torch_nor_an_engine(module: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']\nfrom {module} import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'cv2', 'skimage'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--bundle" in done.stdout and "Exit codes" in done.stdout


@pytest.mark.parametrize("main", [segment.main, verify.main])
def test_a_long_run_shows_a_bar_on_stderr_even_in_a_log(
    main: Callable[[list[str]], int],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(9):
        save_picture(tmp_path / "many" / f"{index}.png", index)
    inputs = [str(tmp_path / "many")] if main is segment.main else ["--images", str(tmp_path / "many")]
    assert main([*inputs, "--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--json"]) == 0
    captured = capsys.readouterr()
    assert "pictures:" in captured.err and "9/9" in captured.err
    for line in captured.out.splitlines():
        json.loads(line)


# What an installation for the line alone lacks


@pytest.mark.parametrize(
    ("command", "module", "extra", "arguments"),
    [
        ("agvas-train", "agvas.training.cli", "train", []),
        ("agvas-export", "export.cli", "export", []),
        ("agvas-eval", "benchmarks.accuracy", "train", [".", "--checkpoint", "nano"]),
    ],
)
def test_a_command_that_needs_torch_says_which_extra_has_it(
    command: str, module: str, extra: str, arguments: list[str], tmp_path: Path
) -> None:
    save_picture(tmp_path / "one.png")
    (tmp_path / "manifest.csv").write_text("image,mask,label\none.png,,0\n")
    code = f"import sys; sys.modules['torch'] = None; from {module} import main; sys.exit(main({arguments}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f'{command}: torch is not installed; pip install "agvas[{extra}]"\n')


def test_a_named_engine_is_not_measured_again(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--remeasure"]) == 2
    assert "--remeasure: expected --engine auto, got onnxruntime" in capsys.readouterr().err


def test_in_a_log_each_drawing_of_a_bar_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for done in range(1, 13):
            progress("pictures", done, 12)
        progress.step_aside()
        print("note", file=sys.stderr)
    lines = capfd.readouterr().err.splitlines()
    assert "note" in lines and "\r" not in "".join(lines)
    assert [line for line in lines if line != "note"] and all(line.startswith("pictures:") for line in lines if line != "note")
