"""Calls that answer in time: with what was found, or with the word that it came too late.

An engine at work cannot be broken off. A call with a deadline therefore runs in a thread of its own, always the same one (an engine may
keep a context and memory for each thread), and its caller waits no longer than was agreed. What comes later is dropped; a call whose
caller has gone ends before its next stage (`computing`), so that late ones do not pile up. A process that ends waits for the thread: an
engine that came back, or was let go, in an interpreter half gone would abort.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

from runtime.errors import DeadlineMissed, RequestError

T = TypeVar("T")
Step = Callable[[str], None]

PATIENCE = 5.0  # seconds that an ending process waits for what is no stage: reading may hang for ever, as on a share that is gone

_leaving = threading.Event()  # the process ends
_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()

class _CallerGone(BaseException):
    """Ends a call that nobody waits for any longer; no engine or callback takes it for an error of its own."""


@dataclass(eq=False)
class _Job:
    work: Callable[[Step], Any]
    step: str = "waiting for its turn"
    value: Any = None
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)  # the caller

    def begin(self, step: str) -> None:
        go_on()
        self.step = step

    def run(self) -> None:
        try:
            self.begin("beginning")
            self.value = self.work(self.begin)
        except _CallerGone:
            return
        except BaseException as error:  # the caller's, who waits for it
            self.error = error
        self.ended.set()


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Around each stage: in a thread of ours `go_on`, and a process that ends waits for it as long as it takes."""
    with _at("stage"):
        go_on()
        yield


@contextlib.contextmanager
def calling_back() -> Iterator[None]:
    """Around the caller's own code: `go_on`, and a process that ends does not wait for it, which may wait for the main thread."""
    with _at("callback"):
        go_on()
        yield


@contextlib.contextmanager
def _at(part: str) -> Iterator[None]:
    thread = threading.current_thread()
    if not isinstance(thread, _Thread):
        yield
        return
    before, thread.at = thread.at, part
    try:
        yield
    finally:
        thread.at = before


def go_on() -> None:
    """Ends the call that this thread is at where nobody waits for it any longer. Elsewhere nothing happens."""
    thread = threading.current_thread()
    if isinstance(thread, _Thread) and thread.job is not None and (thread.job.gone.is_set() or _leaving.is_set()):
        raise _CallerGone


def check_deadline(seconds: object) -> float:
    """Raises RequestError where it is no time above 0, in seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        raise RequestError(
            f"deadline: expected a number of seconds, above 0 and up to {threading.TIMEOUT_MAX:.0e}, got {seconds!r}; 0.1 is a tenth of a "
            "second, None waits as long as it takes"
        )
    return float(seconds)


class _Thread(threading.Thread):
    """Does jobs until it is given None."""

    def __init__(self) -> None:
        super().__init__(name="agvas-deadline", daemon=True)
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.job: _Job | None = None
        self.at = ""  # "stage" or "callback", see _leave
        self.start()
        _threads.add(self)

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            self.job = job
            job.run()
            self.job = job = None  # its picture and result are the caller's, who may be done with them long before the next one comes


@atexit.register
def _leave() -> None:
    _leaving.set()
    for thread in list(_threads):
        thread.jobs.put(None)
    until = time.monotonic() + PATIENCE
    for thread in list(_threads):
        while thread.is_alive() and thread.at != "callback" and (thread.at == "stage" or time.monotonic() < until):
            thread.join(0.01)


class Worker:
    """One thread for calls with a deadline, begun with the first of them; it ends with this object."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._thread: _Thread | None = None

    def call(self, work: Callable[[Step], T], seconds: float) -> T:
        """What `work` returns or raises, if it does so in time.

        Args:
            work: takes a function that it calls with the name of each step before it begins that step.
            seconds: from now.

        Raises:
            DeadlineMissed: neither in time; it says at which step the work was.
        """
        until = time.monotonic() + seconds
        job = _Job(work)
        self._begun().jobs.put(job)
        try:
            in_time = job.ended.wait(max(0.0, until - time.monotonic()))
        except BaseException:  # Ctrl-C, say
            job.gone.set()
            raise
        if not in_time:
            job.gone.set()
            raise DeadlineMissed(seconds, job.step)
        error, job.error = job.error, None
        if error is None:
            return job.value  # type: ignore[no-any-return]
        try:
            raise error
        finally:
            del error  # or it would hold itself, by this frame, and with it the picture

    def _begun(self) -> _Thread:
        with self._starting:
            # A forked process has the object and no thread.
            if self._thread is None or not self._thread.is_alive():
                self._thread = _Thread()
                weakref.finalize(self, self._thread.jobs.put, None)
            return self._thread
