"""What can go wrong around the engines, by name: pictures, bundles, requests, outputs.

One short tree, so that a command line can print any `AgvasError` as one line and a service can tell the caller's
mistakes (also ValueError) from the disk's (OutputError, also OSError). What a back-end raises stands in engines/errors.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class AgvasError(Exception):
    """Base of everything the runtime raises on purpose; messages say what was expected, what was found, what to do."""


class ImageError(AgvasError, ValueError):
    """A picture or array that cannot be read, or is of a kind whose grey levels would have to be guessed."""


class BundleError(AgvasError):
    """A bundle that cannot be opened or written."""


class BundleMissing(BundleError):
    """No bundle at this path, or a file that its manifest names is not there."""


class BundleCorrupt(BundleError):
    """A file of the bundle is not what its manifest says: size, sha256 or content."""


class BundleVersionError(BundleError):
    """The bundle was written for another schema or contract version than this runtime reads."""


class NotCompared(BundleError):
    """A bundle that export was told not to compare with the reference: there is nothing to verify it by."""


class ParityFailed(BundleError):
    """An exported chain leaves the reference by more than the gates allow; no bundle was written."""


class RequestError(AgvasError, ValueError):
    """A bad argument of a call: instruction, mode, threshold, engine name."""


class DeadlineMissed(AgvasError, TimeoutError):
    """A call with a deadline was not done in time: there is no verdict. Python's TimeoutError, and so an OSError, too.

    Attributes:
        seconds: that it had.
        step: what it was at when they were over: "answering".
    """

    def __init__(self, seconds: float, step: str) -> None:
        self.seconds, self.step = seconds, step
        super().__init__(
            f"deadline: expected a verdict within {seconds * 1e3:g} ms, got none by then (the call was {step}); treat the part as NG. What "
            "the engine is at cannot be broken off, and the next call waits for its end: if this happens often, give more time or run less "
            "beside it"
        )

    def __reduce__(self) -> tuple[type[DeadlineMissed], tuple[float, str]]:
        """For the way from one process to another."""
        return type(self), (self.seconds, self.step)


class OutputError(AgvasError, OSError):
    """A result that cannot be written: unwritable folder, full disk."""


_PRECISIONS = frozenset({"fp64", "fp32", "fp16", "fp8", "bf16", "int16", "int8", "int4", "gptq8", "gptq4", "gptq3"})
"""Each is one in its own right, and nobody's slip for another."""


def check_whole(name: str, value: object) -> None:
    """Raises RequestError where a setting is no whole number: "1000", 0.5, True."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name}: expected a whole number, got {value!r}")


def choose(name: str, value: str, allowed: Iterable[str], remedy: str = "") -> str:
    """Return `value` if it is one of `allowed`.

    Args:
        name: what is being chosen, as the caller wrote it (`engine`, `--mode`).
        remedy: what else to do, added to the message.

    Raises:
        RequestError: names every valid value and the one nearest to what was given, unless that is a precision that cannot be had here.
    """
    options = list(allowed)
    if value in options:
        return value
    # Compared in lower case: "FP16" for "fp16" is the commonest slip, and by case alone it would be far away.
    by_lower = {option.lower(): option for option in options}
    lower = str(value).lower()
    meant = lower not in _PRECISIONS or lower in by_lower
    nearest = difflib.get_close_matches(lower, by_lower, n=1) if meant else []
    if not nearest and meant and len(lower) > 2:  # the beginning of a long name is far from the whole
        nearest = sorted((option for option in by_lower if option.startswith(lower)), key=len)[:1]
    parts = [f"{name}: expected one of {', '.join(options)}; got {value!r}"]
    if nearest:
        parts.append(f"did you mean {by_lower[nearest[0]]!r}?")
    if remedy:
        parts.append(remedy)
    raise RequestError("; ".join(parts))
