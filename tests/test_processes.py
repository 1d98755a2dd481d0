"""Processes of one run whose machines share no disk: each has a working folder of its own here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import SETTINGS, Learner, Noise, assert_same, make_batch

from agvas.training.loop import run
from agvas.training.processes import check_shared, once_a_machine

STEADY = replace(SETTINGS, steps=5, micro_batch=2)
MACHINE = """
import os, sys, torch
sys.path[:0] = sys.argv[1:3]
from test_processes import learned
from agvas.training.processes import from_main
try:
    learned("other", {"process": int(os.environ["RANK"])})
except ValueError as error:
    print(error)
try:
    from_main(lambda: open("nowhere"))
except OSError as error:
    print(error)
torch.save(learned("run"), "weights.pt")
"""


def learned(folder: Path | str, facts: dict[str, Any] | None = None, source: Noise | None = None) -> dict[str, torch.Tensor]:
    """Without dropout, whose random numbers are a process's own."""
    module = Learner()
    module.layers[2].p = 0.0
    run(module, module.groups(), source or Noise(), make_batch, STEADY, Path(folder), workers=0, facts=facts)
    return module.state_dict()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Two machines that went on with a run of which the first has the state: their folders and what they printed."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    with pytest.raises(KeyboardInterrupt):
        learned(folders[0] / "run", source=Noise(3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", MACHINE, str(Path(__file__).parent), str(Path(__file__).parents[1])]
    started = [
        subprocess.Popen(command, cwd=folder, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank, folder in enumerate(folders)
    ]
    printed = []
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err[-2000:]
            printed.append(out)
    finally:
        for process in started:
            process.kill()
    return list(zip(folders, printed))


def test_a_run_goes_on_where_the_main_process_has_its_state(machines: list[tuple[Path, str]], tmp_path: Path) -> None:
    whole = learned(tmp_path)
    moved = ~torch.eq(whole["layers.1.weight"], Learner().state_dict()["layers.1.weight"])
    assert moved.any()
    for folder, _ in machines:
        weights = torch.load(folder / "weights.pt")
        seen = weights.pop("seen"), whole["seen"]  # a process counts its own samples; the main one's are kept
        assert seen[0] < seen[1]
        assert_same(weights, {name: tensor for name, tensor in whole.items() if name != "seen"}, tolerance=2e-6)
    assert not (machines[1][0] / "run" / "state.safetensors").exists()


def test_processes_with_other_settings_all_stop(machines: list[tuple[Path, str]]) -> None:
    for _, printed in machines:
        told = "same settings and data in all processes, got in process 0, and there in process 1: process 0, there 1; give the same"
        assert told in printed


def test_what_fails_in_the_main_process_fails_in_all(machines: list[tuple[Path, str]]) -> None:
    assert all("No such file or directory: 'nowhere'" in printed for _, printed in machines)


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.json").touch()
    check_shared(tmp_path / "settings.json")
    monkeypatch.setattr("agvas.training.processes.gather_object", lambda own: [*own, False])
    with pytest.raises(ValueError, match=r"folder that all processes share.*process 1 does not see settings\.json; give a folder"):
        check_shared(tmp_path / "settings.json")


def test_alone_work_is_done_once() -> None:
    calls: list[int] = []
    assert once_a_machine(lambda: calls.append(1) or len(calls)) == 1
