"""A call with a deadline: the same result where it is in time, and a word in time where it is not."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture

from engines import EngineError, EngineFailed
from runtime import Segmenter
from runtime.deadline import Step, Worker
from runtime.errors import AgvasError, DeadlineMissed, ImageError, RequestError
from runtime.pipeline import NotFinite

AMPLE = 60.0  # seconds: of a machine however busy
SHORT = 0.05
ENOUGH = 1.0  # to reach a step that is held, on a machine however busy


@pytest.fixture
def segmenter(tiny_bundle: Path) -> Segmenter:
    return Segmenter(tiny_bundle, engine="onnxruntime")


class Held:
    """An engine's call that goes on until it is let go."""

    def __init__(self, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, step: str = "look") -> None:
        self.let_go, self.calls = threading.Event(), 0
        chain: Any = segmenter._chain
        real: Callable[..., Any] = getattr(chain, step)

        def held(*arguments: Any) -> Any:
            self.calls += 1
            assert self.let_go.wait(AMPLE)
            return real(*arguments)

        monkeypatch.setattr(chain, step, held)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "agvas-deadline"]


def eventually(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + AMPLE
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_in_time_it_is_the_call_without_one(segmenter: Segmenter) -> None:
    for seed in range(3):
        ours, plain = segmenter(picture(seed), deadline=AMPLE), segmenter(picture(seed))
        np.testing.assert_array_equal(ours.anomaly_map, plain.anomaly_map)
        assert (ours.text, ours.score) == (plain.text, plain.score)
    pieces: list[str] = []
    assert "".join(pieces) == "" and segmenter(picture(), on_text=pieces.append, deadline=AMPLE).text == "".join(pieces)


@pytest.mark.parametrize(
    ("step", "words"), [("prepare", "reading and resizing the picture"), ("look", "looking at the picture"), ("answer", "answering")]
)
def test_too_late_is_told_in_time_with_the_step(step: str, words: str, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(segmenter, monkeypatch, step)
    started = time.monotonic()
    with pytest.raises(DeadlineMissed, match=rf"within 1000 ms, got none by then \(the call was {words}\); treat the part as NG") as missed:
        segmenter(picture(), deadline=ENOUGH)
    assert ENOUGH <= time.monotonic() - started < AMPLE / 2
    assert missed.value.step == words and missed.value.seconds == ENOUGH
    assert isinstance(missed.value, AgvasError) and isinstance(missed.value, TimeoutError)
    held.let_go.set()
    assert segmenter(picture(), deadline=AMPLE).anchors_found  # and the line goes on


def test_late_calls_do_not_pile_up(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(segmenter, monkeypatch)
    answered = Held(segmenter, monkeypatch, "answer")
    answered.let_go.set()
    with pytest.raises(DeadlineMissed, match="looking at the picture"):
        segmenter(picture(), deadline=ENOUGH)
    for _ in range(3):
        with pytest.raises(DeadlineMissed, match="waiting for its turn"):
            segmenter(picture(), deadline=SHORT)
    held.let_go.set()
    segmenter(picture(), deadline=AMPLE)
    assert held.calls == 2, "those that were late before they began are left out"
    assert answered.calls == 1, "the late one ends before its next step"


def test_a_late_answer_is_not_written_on(segmenter: Segmenter) -> None:
    said, late = [], threading.Event()

    def slow(piece: str) -> None:
        said.append(piece)
        assert late.wait(AMPLE)

    with pytest.raises(DeadlineMissed, match="answering"):
        segmenter(picture(), instruction="Segment the scratch.", on_text=slow, deadline=1.0)
    late.set()
    assert segmenter(picture(), deadline=AMPLE).text
    assert len(said) == 1


def test_what_a_late_stage_says_is_not_told(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    said, late = list[str](), threading.Event()
    language: Any = segmenter._chain.stages["language"]  # type: ignore[attr-defined]

    def held(feeds: Any, real: Callable[..., Any] = language.run) -> Any:
        assert late.wait(AMPLE)
        return real(feeds)

    monkeypatch.setattr(language, "run", held)
    with pytest.raises(DeadlineMissed, match="answering"):
        segmenter(picture(), instruction="Segment the scratch.", on_text=said.append, deadline=ENOUGH)
    late.set()
    segmenter(picture(), deadline=AMPLE)
    assert not said


def test_a_late_call_ends_before_its_next_tile(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, late, seen = Segmenter(tiny_bundle, engine="onnxruntime", tile=64, tile_overlap=0), threading.Event(), list[int]()
    decoder: Any = segmenter._chain.pipeline.stages["mask_decoder"]  # type: ignore[attr-defined]

    def held(feeds: Any, real: Callable[..., Any] = decoder.run) -> Any:
        seen.append(1)
        assert late.wait(AMPLE)
        return real(feeds)

    monkeypatch.setattr(decoder, "run", held)
    with pytest.raises(DeadlineMissed, match="answering"):
        segmenter(picture(0, 128, 128), deadline=ENOUGH)
    assert len(seen) == 1
    late.set()
    segmenter(picture(0, 64, 64), deadline=AMPLE)
    assert len(seen) == 2


def test_a_process_that_ends_waits_for_the_stage_that_runs_and_begins_no_other() -> None:
    """Else the engine would come back to an interpreter half gone, and abort."""
    code = """
import queue, threading, time
from runtime.deadline import Worker, calling_back, computing
from runtime.errors import DeadlineMissed

def work(step):
    with computing():
        time.sleep(1)
        print("ended", flush=True)
    with computing():
        print("another", flush=True)

def blocked(step):
    with calling_back():
        queue.Queue().get()  # for the main thread, say

workers = [Worker(), Worker()]
for worker, late in ((workers[0], work), (workers[0], lambda step: print("queued", flush=True)), (workers[1], blocked)):
    try:
        worker.call(late, 0.1)
    except DeadlineMissed:
        print("missed", flush=True)
del worker, workers
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=AMPLE, cwd=Path(__file__).parents[1])
    assert (run.returncode, run.stderr, run.stdout.split()) == (0, "", ["missed", "missed", "missed", "ended"])


def test_a_process_that_ends_waits_for_an_engine_to_be_let_go_and_not_for_ever_for_a_read() -> None:
    """A late call's thread may hold the last of a closed segmenter, whose engines are taken down where it drops them."""
    code = """
import threading, time
from runtime import deadline
from runtime.errors import DeadlineMissed

deadline.PATIENCE = 2

class Engine:
    def __del__(self):
        time.sleep(0.5)
        print("gone", flush=True)

def late(engine):
    def work(step):
        time.sleep(0.3)
        engine.seen = True
    return work

for work in (late(Engine()), lambda step: time.sleep(600)):
    try:
        deadline.Worker().call(work, 0.1)
    except DeadlineMissed:
        print("missed", flush=True)
    del work
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=AMPLE, cwd=Path(__file__).parents[1])
    assert (run.returncode, run.stderr, run.stdout.split()) == (0, "", ["missed", "missed", "gone"])


def test_what_is_over_holds_no_picture(segmenter: Segmenter) -> None:
    class Frame(np.ndarray):
        """Can be watched."""

    def watched() -> weakref.ref[Any]:
        frame = picture().view(Frame)
        with pytest.raises(RequestError):
            worker.call(lambda step: segmenter.request(mode=str(frame.shape)), AMPLE)
        return weakref.ref(frame)

    worker = Worker()
    gc.collect()
    gc.disable()
    try:
        gone = watched()
        assert eventually(lambda: gone() is None)
    finally:
        gc.enable()


def test_every_error_crosses_processes() -> None:
    """A pool's worker that raised what cannot be read back would leave its parent waiting for ever."""
    errors: list[type[Exception]] = [AgvasError, EngineError]
    for kind in errors:
        errors += kind.__subclasses__()
    special: dict[type[Exception], tuple[Any, ...]] = {DeadlineMissed: (0.1, "answering"), NotFinite: ("words", {"logits": np.zeros(1)})}
    for kind in errors:
        error = kind(*special.get(kind, ("words",)))
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error)
    assert {DeadlineMissed, NotFinite} < set(errors)


def test_errors_are_the_calls_own(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="nothing.png"):
        segmenter(tmp_path / "nothing.png", deadline=AMPLE)
    with pytest.raises(RequestError, match="mode: expected one of"):
        segmenter(picture(), mode="describe", deadline=AMPLE)

    def broken(*_: Any) -> Any:
        raise EngineFailed("the engine is broken")

    monkeypatch.setattr(segmenter._chain, "look", broken)
    with pytest.raises(EngineFailed, match="broken"):
        segmenter(picture(), deadline=AMPLE)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300, 10**400, "0.1", True])
def test_what_is_no_time_is_refused(seconds: Any, segmenter: Segmenter) -> None:
    with pytest.raises(RequestError, match=r"deadline: expected a number of seconds, above 0 and up to 9e\+09, got"):
        segmenter(picture(), deadline=seconds)


@pytest.mark.parametrize("seconds", [np.float32(AMPLE), np.int64(AMPLE), Fraction(AMPLE)])
def test_a_number_of_any_library_is_a_time(seconds: Any, segmenter: Segmenter) -> None:
    assert segmenter(picture(), deadline=seconds).anchors_found


def test_all_run_in_one_thread_that_goes_with_the_segmenter(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    assert eventually(lambda: not workers())
    segmenter, seen = Segmenter(tiny_bundle, engine="onnxruntime"), set[int]()
    chain: Any = segmenter._chain

    def look(*arguments: Any, real: Callable[..., Any] = chain.look) -> Any:
        seen.add(threading.get_ident())
        return real(*arguments)

    monkeypatch.setattr(chain, "look", look)
    assert not workers(), "nothing is begun before it is asked for"
    for seed in range(3):
        segmenter(picture(seed), deadline=AMPLE)
    assert seen == {workers()[0].ident} and len(workers()) == 1
    segmenter.close()
    assert eventually(lambda: not workers())
    with pytest.raises(RequestError, match="close"):
        segmenter(picture(), deadline=AMPLE)
    monkeypatch.undo()
    another = Segmenter(tiny_bundle, engine="onnxruntime")
    another(picture(), deadline=AMPLE)
    del another, chain, look
    gc.collect()
    assert eventually(lambda: not workers())


def test_ctrl_c_while_waiting_ends_the_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, steps, let_go = Worker(), list[str](), threading.Event()

    def work(step: Step) -> None:
        step("first")
        steps.append("first")
        assert let_go.wait(AMPLE)
        step("second")
        steps.append("second")

    assert worker.call(lambda step: "begun", AMPLE) == "begun"
    real, main = threading.Event.wait, threading.get_ident()

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.get_ident() == main and event is not let_go:
            assert eventually(lambda: bool(steps))
            raise KeyboardInterrupt
        return real(event, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.call(work, AMPLE)
    let_go.set()
    assert worker.call(lambda step: "next", AMPLE) == "next"
    assert steps == ["first"]


def test_a_thread_that_is_gone_is_begun_again() -> None:
    """A forked process has the object and no thread: a call there must not wait for one that never comes."""
    worker = Worker()
    assert worker.call(lambda step: 1, AMPLE) == 1
    assert worker._thread is not None
    worker._thread.jobs.put(None)  # ends the thread, as a fork does for its child
    assert eventually(lambda: worker._thread is None or not worker._thread.is_alive())
    assert worker.call(lambda step: 2, AMPLE) == 2
