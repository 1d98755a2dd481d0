"""The Jetson's set-up without a Jetson: the script refuses other machines, and the container needs no more than it copies."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "engines" / "jetson" / "setup.sh"


def run(tmp_path: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """The script with these programs in place of the system's."""
    for name, text in programs.items():
        path = tmp_path / "bin" / name.replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "AGVAS_TEGRA_RELEASE": str(tmp_path / "release")}
    return subprocess.run(["bash", str(SCRIPT), str(tmp_path / "venv")], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="may be a Jetson")
def test_another_machine_is_told_what_it_needs_instead(tmp_path: Path) -> None:
    finished = run(tmp_path)
    assert finished.returncode == 1
    assert f'found {platform.machine()}; on a PC: pip install "agvas[tensorrt-rtx]"' in finished.stderr
    assert not (tmp_path / "venv").exists()


def test_another_release_a_missing_or_an_old_tensorrt_are_told_with_the_command(tmp_path: Path) -> None:
    jetson = {"uname": "echo aarch64"}
    assert "found none; flash JetPack 6.2" in run(tmp_path, **jetson).stderr
    (tmp_path / "release").write_text("# R35 (release), REVISION: 4.1\n")
    assert "expected Jetson Linux R36 (JetPack 6), found: # R35" in run(tmp_path, **jetson).stderr
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3\n")
    without = f'case "$*" in *tensorrt*) exit 1;; esac; exec {sys.executable} "$@"'
    assert "sudo apt install nvidia-jetpack python3-libnvinfer" in run(tmp_path, **jetson, python3_10=without).stderr
    old = f'case "$*" in *tensorrt*) echo 8.6.2; exit;; esac; exec {sys.executable} "$@"'
    finished = run(tmp_path, **jetson, python3_10=old)
    assert finished.returncode == 1 and "expected TensorRT 10.3 or newer, found 8.6.2" in finished.stderr
    assert not (tmp_path / "venv").exists()


def test_a_container_with_engines_and_runtime_alone_has_the_commands(tmp_path: Path) -> None:
    """What the Dockerfile copies imports without the rest of this checkout."""
    for folder in ("engines", "runtime"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    text = (ROOT / "engines" / "jetson" / "Dockerfile").read_text()
    assert [line.split()[1] for line in text.splitlines() if line.startswith("COPY ") and "toml" not in line] == ["engines", "runtime"]
    for command in ("build", "verify", "segment"):
        code = f"import sys; sys.path[:] = [p for p in sys.path if p]; from runtime.cli import {command}; {command}.main(['--help'])"
        finished = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
        )
        assert finished.returncode == 0 and "usage: agvas" in finished.stdout, finished.stderr
