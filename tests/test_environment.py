"""What a result says that it was measured on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.environment import UNKNOWN, environment, revision


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_is_told_by_its_commit_and_whether_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    (tmp_path / "result.json").write_text("{}")  # what a measurement writes is no change of what was measured
    assert revision(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert revision(tmp_path)["dirty"] is True
    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert revision(installed) == {"commit": UNKNOWN, "dirty": None}, "the checkout around it is another project's"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    assert revision(tmp_path)["commit"] == UNKNOWN, "no repository"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert revision()["commit"] == UNKNOWN


def test_every_environment_has_it() -> None:
    assert environment().keys() >= {"commit", "dirty", "processor", "packages"}
