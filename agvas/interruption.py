"""Ctrl-C and termination, where Python's own way of raising KeyboardInterrupt anywhere at all would lose something.

Outside the main thread, where no handler can be set, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM (of a service manager, a container's stop) ends the block as Ctrl-C does, so that nothing half-written is left."""
    if not _can_handle():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Held:
    """asked: whether Ctrl-C or a termination came while it was held back."""

    asked: bool = False


@contextlib.contextmanager
def held_back(until: str | None = None) -> Iterator[Held]:
    """Ctrl-C, and a termination that is taken as one, wait for the end of the block; a second one raises at once.

    For libraries that lose an exception raised inside their callbacks, or end the process for it (torch's exporter does both), and for
    steps that are whole or nothing.

    Args:
        until: told on stderr when the first one comes: what is waited for.

    Raises:
        KeyboardInterrupt: at the end of the block where one came, in place of any error that it brought about.
    """
    held = Held()
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if _can_handle() and callable(signal.getsignal(number))]

    def hold(number: int, frame: FrameType | None) -> None:
        if held.asked:
            raise KeyboardInterrupt
        held.asked = True
        if until is not None:
            print(f"\nstopping after {until}; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held.asked:
            raise KeyboardInterrupt


def _can_handle() -> bool:
    return threading.current_thread() is threading.main_thread()
