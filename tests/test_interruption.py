"""Ctrl-C and termination wait where they would lose something, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agvas.interruption import held_back, terminated_as_interrupted


def press(number: signal.Signals) -> None:
    """What Python does when a signal has come. A real one can end a process in which a library has a stack of its own for signals."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


def test_what_comes_inside_waits_for_the_end_and_the_handler_is_as_before() -> None:
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), held_back() as held:
        press(signal.SIGINT)
        reached = held.asked
    assert reached and signal.getsignal(signal.SIGINT) is before


def test_a_second_one_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    reached = 0
    with pytest.raises(KeyboardInterrupt), held_back("this"):
        press(signal.SIGINT)
        reached = 1
        press(signal.SIGINT)
        reached = 2
    assert reached == 1 and capsys.readouterr().err.count("stopping after this; once more to stop at once") == 1


def test_an_error_that_it_brought_about_is_not_told_in_its_place() -> None:
    with pytest.raises(KeyboardInterrupt), held_back():
        press(signal.SIGINT)
        raise RuntimeError("FakeTensorMode")


def test_errors_of_their_own_pass() -> None:
    with pytest.raises(RuntimeError, match="own"), held_back():
        raise RuntimeError("own")


def test_a_termination_waits_only_where_it_is_taken_for_an_interruption() -> None:
    with terminated_as_interrupted(), pytest.raises(KeyboardInterrupt), held_back():
        press(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_outside_the_main_thread_nothing_is_touched() -> None:
    seen: list[object] = []

    def work() -> None:
        with terminated_as_interrupted(), held_back() as held:
            seen.append((held.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.SIG_DFL)]


EXPORT = """
import os, signal, sys, weakref
import torch
from export.cli import main

export = torch.onnx.export

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # what Python raises here it throws away

def exporting(*arguments, **named):
    lost = Lost()
    del lost
    return export(*arguments, **named)

torch.onnx.export = exporting
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_where_python_would_lose_it_ends_an_export_all_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--lmm", "float", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "out" / "bundle")]
    done = subprocess.run([sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "interrupted; no bundle was written" in done.stderr, done.stderr
    assert "stopping after the graph of" in done.stderr and not list((tmp_path / "out").iterdir())
