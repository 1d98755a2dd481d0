"""What can go wrong with an engine, by name, so that a caller can tell a missing package from a wrong array.

The tree stands here and not in runtime/ because engines depend on nothing of ours.
"""

from __future__ import annotations


def let_interrupt_pass(error: BaseException, handled: BaseException | None) -> None:
    """Raises KeyboardInterrupt where one stands behind an error of importing: an extension that is being initialised makes an ImportError
    of a Ctrl-C, which would pass for an engine that is not installed.

    Args:
        handled: what was being handled already when the import began (sys.exc_info()[1] before it), which the import has not met.
    """
    behind: BaseException | None = error
    while behind is not None and behind is not handled:
        if isinstance(behind, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        behind = behind.__cause__ or behind.__context__


class EngineError(Exception):
    """Base of everything an execution back-end raises."""


class EngineUnavailable(EngineError):
    """The engine or device asked for cannot be had on this machine; the message says what to install or choose."""


class EngineFailed(EngineError):
    """The engine was opened but could not load or run this graph."""


class TensorMismatch(EngineError, ValueError):
    """An array does not fit the stage's input: expected, got and remedy are in the message."""
