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


def test_the_script_ends_with_an_environment_over_the_systems_tensorrt_and_the_next_commands(tmp_path: Path) -> None:
    """Its programs are stubs: what is installed how, in which order, is told by them."""
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3\n")
    asked = tmp_path / "asked"
    inner = f"""#!/bin/sh
echo "venv: $*" >> {asked}
case "$*" in *capability_here*) echo 8.7;; esac"""
    python = f"""case "$*" in
    "-c import ensurepip") ;;
    *__version__*) echo 10.3.0;;
    "-m venv "*) echo "system: $*" >> {asked}; mkdir -p "$4/bin"; cat > "$4/bin/python" <<'INNER'
{inner}
INNER
        chmod +x "$4/bin/python";;
    *) exec {sys.executable} "$@";;
esac"""
    finished = run(tmp_path, uname="echo aarch64", python3_10=python)
    assert (finished.returncode, finished.stderr) == (0, "")
    made, upgraded, installed, *_ = asked.read_text().splitlines()
    assert made == f"system: -m venv --system-site-packages {tmp_path / 'venv'}"
    assert upgraded == "venv: -m pip install --quiet --upgrade pip"
    assert installed == f"venv: -m pip install --quiet {ROOT}[cuda] cuda-bindings>=12.6,<13"
    assert finished.stdout.startswith("TensorRT 10.3.0, compute capability 8.7. Copy a bundle here")
    for command in ("build", "segment"):
        assert f"{tmp_path / 'venv'}/bin/agvas-{command} " in finished.stdout


def in_container(tmp_path: Path, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command with what the Dockerfile copies, without the rest of this checkout."""
    for folder in ("engines", "runtime"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    code = f"import sys; sys.path[:] = [p for p in sys.path if p]; from runtime.cli import {command} as c; sys.exit(c.main(sys.argv[1:]))"
    start = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(start, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)


def test_a_container_with_engines_and_runtime_alone_has_the_commands(tmp_path: Path) -> None:
    text = (ROOT / "engines" / "jetson" / "Dockerfile").read_text()
    assert [line.split()[1] for line in text.splitlines() if line.startswith("COPY ") and "toml" not in line] == ["engines", "runtime"]
    for command in ("build", "verify", "segment"):
        finished = in_container(tmp_path, command, "--help")
        assert finished.returncode == 0 and "usage: agvas" in finished.stdout, finished.stderr


def test_bisecting_in_the_container_is_told_where_it_can_be_done(tmp_path: Path, tiny_bundle: Path) -> None:
    finished = in_container(tmp_path, "verify", "--bundle", tiny_bundle, "--engine", "tensorrt", "--device", "cuda:0", "--bisect")
    assert finished.returncode == 2
    assert "--bisect: expected export/bisect.py beside the runtime, found none in" in finished.stderr
    assert "in the environment that engines/jetson/setup.sh makes" in finished.stderr and "No module" not in finished.stderr
