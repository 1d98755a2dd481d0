"""What a file's reader stumbled over, in words: Python's own name a class or a method, and not what the file should have had."""

from __future__ import annotations


def misread(error: Exception) -> str:
    """For the message on a JSON file whose fields are not as they were written."""
    if isinstance(error, KeyError):
        return f"expected {error.args[0]!r} in it, got none"
    if isinstance(error, (TypeError, AttributeError)):
        return "expected its fields with values of their kinds, got others"
    return str(error)
