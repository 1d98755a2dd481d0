"""An answer's text, handed over piece by piece while the model writes it.

A token may hold a part of a letter, and trailing space is not part of the text as long as nothing follows: both wait for what comes next.
So the pieces, joined, are the answer's text exactly. It decodes with a function it is given and knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What byte-level decoders write for bytes that are no whole letter (yet).
_BROKEN = "\ufffd"


class TextStream:
    """Passes new text to `on_text`; what that raises ends the answer and reaches the caller.

    Args:
        decode: text of token ids, without white space around it; ids that are added may only add to it, but for _BROKEN at its end.
        on_text: called with each new piece, never an empty one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], on_text: Callable[[str], object]) -> None:
        self._decode = decode
        self._on_text = on_text
        self._passed = 0  # letters

    def update(self, ids: Sequence[int]) -> None:
        """The answer so far, from its beginning; the whole is decoded anew, which is little beside one step of a model."""
        self._pass(self._decode(ids).rstrip(_BROKEN).rstrip())

    def end(self, ids: Sequence[int]) -> None:
        """The whole answer: what is broken now stays so."""
        self._pass(self._decode(ids))

    def _pass(self, text: str) -> None:
        if len(text) > self._passed:
            piece, self._passed = text[self._passed :], len(text)
            self._on_text(piece)
