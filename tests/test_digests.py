"""sha256 of files: what is read once and remembered, when it is not, and what counts where the two differ."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import digests
from engines.digests import remembered_sha256, sha256_of
from engines.tensorrt_cache import hash_of
from runtime.bundle import Bundle


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not be two seconds old to be remembered."""
    monkeypatch.setattr(digests, "TICK_NS", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []

    def reading(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(digests, "sha256_of", reading)
    return names


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begin as a new process does, which has read nothing yet."""
    return lambda: monkeypatch.setattr(digests, "_read", {})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "spam.data"
    path.write_bytes(b"weights")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_and_by_no_later_process(
    settled: None, reads: list[str], restart: Callable[[], None], weights: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "sha256.json"
    for _ in range(3):
        assert remembered_sha256(weights, memory) == sha256(b"weights")
        restart()
    assert reads == ["spam.data"]


def test_a_file_that_was_altered_is_read_again_though_size_and_time_are_kept(
    settled: None, restart: Callable[[], None], weights: Path, tmp_path: Path
) -> None:
    memory, before = tmp_path / "sha256.json", weights.stat()
    remembered_sha256(weights, memory)
    restart()
    weights.write_bytes(b"altered")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert remembered_sha256(weights, memory) == sha256(b"altered")
    other = tmp_path / "other"
    other.write_bytes(b"another")
    os.replace(other, weights)
    assert remembered_sha256(weights, memory) == sha256(b"another")


def test_a_file_that_was_written_just_now_is_not_remembered(reads: list[str], weights: Path, tmp_path: Path) -> None:
    memory = tmp_path / "sha256.json"
    os.utime(weights, ns=(0, 0))  # a copy that keeps its times: its status is young all the same
    for _ in range(2):
        assert remembered_sha256(weights, memory) == sha256(b"weights")
    assert reads == ["spam.data"] * 2 and not memory.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    settled: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(content: bytes = b"") -> Any:
        weights.write_bytes(b"altered")
        return hashlib.new("sha256", content)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("engines.digests.hashlib.sha256", changing)
        remembered_sha256(weights, tmp_path / "sha256.json")
    assert not (tmp_path / "sha256.json").exists() and not digests._read.get(str(weights))


def test_what_is_read_counts_more_than_what_was_remembered(
    settled: None, restart: Callable[[], None], weights: Path, tmp_path: Path
) -> None:
    """As after an alteration that the system does not tell of."""
    memory = tmp_path / "sha256.json"
    remembered_sha256(weights, memory)
    kept = json.loads(memory.read_text())
    kept[str(weights)]["sha256"] = sha256(b"what it was")
    memory.write_text(json.dumps(kept))
    restart()
    assert remembered_sha256(weights, memory) == sha256(b"what it was")
    assert sha256_of(weights) == remembered_sha256(weights, memory) == sha256(b"weights")
    restart()
    assert remembered_sha256(weights, memory) == sha256(b"weights"), "put right for the next process"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"NAME": 1}', '{"NAME": {"state": STATE}}', '{"NAME": {"state": STATE, "sha256": 1}}'])
def test_a_damaged_memory_is_none(content: str, settled: None, restart: Callable[[], None], weights: Path, tmp_path: Path) -> None:
    memory = tmp_path / "sha256.json"
    memory.write_text(content.replace("NAME", str(weights)).replace("STATE", str(list(digests._state(weights)))))
    assert remembered_sha256(weights, memory) == sha256(b"weights")
    restart()
    assert json.loads(memory.read_text())[str(weights)]["sha256"] == sha256(b"weights")


def test_files_that_are_gone_are_forgotten_and_a_memory_that_cannot_be_written_is_no_error(
    settled: None, weights: Path, tmp_path: Path
) -> None:
    memory, gone = tmp_path / "sha256.json", tmp_path / "gone"
    gone.write_bytes(b"weights")
    remembered_sha256(gone, memory)
    gone.unlink()
    remembered_sha256(weights, memory)
    assert list(json.loads(memory.read_text())) == [str(weights)]
    assert remembered_sha256(weights, weights / "sha256.json") == sha256(b"weights")


def test_an_engine_opens_by_what_the_bundle_has_just_checked(
    settled: None, reads: list[str], restart: Callable[[], None], copy_of_bundle: Callable[[], Path]
) -> None:
    bundle = Bundle(copy_of_bundle())
    for _ in range(2):
        assert hash_of(bundle.graph("spam")) == bundle.graph_hash("spam") and reads == []
        restart()
        bundle = Bundle(bundle.folder, check_hashes=False)
