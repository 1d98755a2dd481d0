"""Many pictures through the stages at once: while one is answered, the next is looked at and the one after is read.

A picture's steps run in order, each step in a thread of its own, so that results come in the order of the pictures and an engine sees one
picture at a time. At most `depth` pictures are on their way: a fast camera waits, memory stays bounded. It knows nothing of what
the steps do; a picture that fails takes none of the others with it.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from runtime.segmentation import Segmentation

DEPTH = 4  # pictures on their way: one in each of three steps, and one that waits


# Compared by identity, as results are.
@dataclass(frozen=True, eq=False)
class Streamed:
    """What became of one picture of a stream.

    Attributes:
        index: of the picture in the stream, from 0.
        result: None where it failed.
        error: why; None where it did not.
    """

    index: int
    result: Segmentation | None
    error: Exception | None

    def get(self) -> Segmentation:
        """The result; raises the picture's own error where it failed."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def in_steps(
    source: Iterable[Any],
    steps: Sequence[Callable[[Any], Any]],
    expected: tuple[type[Exception], ...],
    depth: int = DEPTH,
    take: Callable[[Any], Any] = lambda item: item,
) -> Generator[tuple[Any, Exception | None], None, None]:
    """(last step's value, None) or (None, error) for each item, in order.

    The source is read in a thread of its own, ahead of the results. Where it raises, that error comes after the results of what it gave
    before. A consumer that stops early (break, close) waits for the steps that are running and for nothing else; a source that was
    waiting for its next item ends when that comes. A generator is closed then, in the source's thread, so that what it opened is let go
    (its `finally`); any other source, a camera say, belongs to the caller and stays open.

    Args:
        expected: errors that are an item's own; any other ends the stream.
        take: makes of an item what the first step gets, before the source is asked for the next one.
    """
    going = threading.Event()
    going.set()
    room = threading.Semaphore(depth)
    waiting: queue.SimpleQueue[Future[Any] | BaseException | None] = queue.SimpleQueue()
    workers = [ThreadPoolExecutor(1, thread_name_prefix=f"agvas-step-{number}") for number in range(len(steps))]

    def soon(worker: ThreadPoolExecutor, before: Future[Any], step: Callable[[Any], Any]) -> Future[Any]:
        try:
            return worker.submit(_after, before, step)
        except RuntimeError:
            if not going.is_set():
                raise  # closed meanwhile
        # The main thread has ended, and pools take no more work, while the consumer's thread goes on: the source's thread does it.
        now: Future[Any] = Future()
        try:
            now.set_result(_after(before, step))
        except Exception as error:
            now.set_exception(error)
        return now

    def feed() -> None:
        ending: BaseException | None = None
        try:
            for item in source:
                room.acquire()
                if not going.is_set():
                    break
                before: Future[Any] = Future()
                try:
                    before.set_result(take(item))
                except expected as error:
                    before.set_exception(error)
                for worker, step in zip(workers, steps):
                    before = soon(worker, before, step)
                waiting.put(before)
        except BaseException as error:  # told to the consumer, who waits for it
            ending = error
        finally:
            waiting.put(ending)
            if not going.is_set() and isinstance(source, Generator):
                source.close()

    feeder = threading.Thread(target=feed, name="agvas-source", daemon=True)
    feeder.start()
    try:
        while isinstance(future := waiting.get(), Future):
            try:
                yield future.result(), None
            except expected as error:
                yield None, error
            finally:
                room.release()
        if future is not None:
            raise future
    finally:
        going.clear()
        room.release()  # the source's thread may be waiting for room
        for worker in workers:
            worker.shutdown(wait=not getattr(_collecting, "now", False), cancel_futures=True)


_collecting = threading.local()


def _mark(phase: str, _: object, collecting: threading.local = _collecting) -> None:
    """Called by the garbage collector. A stream that was abandoned in a cycle is closed by it, in whatever thread it runs: be it one that a
    step is just starting and waits for, which must not wait for that step."""
    collecting.now = phase == "start"  # an argument, since it is called while the interpreter ends and modules are emptied, too


gc.callbacks.append(_mark)


def _after(before: Future[Any], step: Callable[[Any], Any]) -> Any:
    return step(before.result())
