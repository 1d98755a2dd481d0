"""Calls that answer in time: with what was found, or with the word that it came too late.

An engine at work cannot be broken off. A call with a deadline therefore runs in a thread of its own, always the same one (an engine may
keep a context and memory for each thread), and its caller waits no longer than was agreed. What comes later is dropped; a call whose
caller has gone ends before its next step, so that late ones do not pile up.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from runtime.errors import DeadlineMissed, RequestError

T = TypeVar("T")
Step = Callable[[str], None]


class _CallerGone(BaseException):
    """Ends a call that nobody waits for any longer; no engine or callback takes it for an error of its own."""


@dataclass(eq=False)
class _Job:
    work: Callable[[Step], Any]
    step: str = "waiting for an earlier call to end"
    value: Any = None
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)  # the caller

    def go_on(self, step: str) -> None:
        if self.gone.is_set():
            raise _CallerGone
        self.step = step

    def run(self) -> None:
        try:
            self.go_on("beginning")
            self.value = self.work(self.go_on)
        except BaseException as error:  # the caller's, who waits for it
            self.error = error
        self.ended.set()


def check_deadline(seconds: object) -> float:
    """Raises RequestError where it is no time above 0, in seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= threading.TIMEOUT_MAX:
        raise RequestError(f"deadline: expected seconds above 0, got {seconds!r}; 0.1 is a tenth of a second")
    return float(seconds)


class Worker:
    """One thread for calls with a deadline, begun with the first of them; it ends with this object."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        self._thread: threading.Thread | None = None

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
        self._queue().put(job)
        try:
            in_time = job.ended.wait(max(0.0, until - time.monotonic()))
        except BaseException:  # Ctrl-C, say
            job.gone.set()
            raise
        if not in_time:
            job.gone.set()
            raise DeadlineMissed(seconds, job.step)
        if job.error is not None:
            raise job.error
        return job.value  # type: ignore[no-any-return]

    def _queue(self) -> queue.SimpleQueue[_Job | None]:
        with self._starting:
            # A forked process has the object and no thread.
            if self._jobs is None or self._thread is None or not self._thread.is_alive():
                self._jobs = queue.SimpleQueue()
                self._thread = threading.Thread(target=_work_on, args=(self._jobs,), name="agvas-deadline", daemon=True)
                self._thread.start()
                weakref.finalize(self, self._jobs.put, None)
            return self._jobs


def _work_on(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # its picture and result are the caller's, who may be done with them long before the next one comes
