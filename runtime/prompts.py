"""The words around the image: conversation template, instructions per mode, the fixed answer, and where its anchors are.

Everything textual is data of the checkpoint (config.json, manifest.json); this file turns it into token ids, the same way for
training, the reference and the line. It holds no embeddings and knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from runtime.errors import RequestError, choose

DIRECT = "direct"
MODES = (DIRECT, "describe-then-segment", "describe-then-segment-plus", "segment-then-explain")
ANCHOR_POSITIONS = ("own", "predicting")


@dataclass(frozen=True)
class Prompts:
    """The conversation of one checkpoint.

    The language model reads: `prefix`, image tokens, aligned tokens, `suffix` with the instruction, then the answer (eq. 3).

    Attributes:
        prefix, suffix: text before and after the image; `suffix` holds "{instruction}" once.
        instructions: default instruction by mode; a mode that is not a key was not trained and is refused.
        answer: what a trained model says in direct mode, without the end token: the draft that one pass verifies.
        end: token that ends an answer.
        anchors: the tokens of [NOR], [ANO], [SEG], in this order; fewer in an ablation of the paper's table 3.
        anchor_position: "own" takes the state at the anchor token itself (the paper's wording), "predicting" the state one
            position before, from which the anchor was predicted (LISA's code).
        max_instruction_tokens, max_new_tokens: limits of input and answer.
    """

    prefix: str
    suffix: str
    instructions: dict[str, str]
    answer: str
    end: str
    anchors: tuple[str, ...]
    anchor_position: str
    max_instruction_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        choose("anchor_position", self.anchor_position, ANCHOR_POSITIONS)
        for mode in self.instructions:
            choose("mode", mode, MODES)
        if self.suffix.count("{instruction}") != 1:
            raise RequestError(f"prompts.suffix must hold {{instruction}} exactly once, got {self.suffix!r}")


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request; `draft` is the answer to verify in direct mode (end token included), None where the model writes freely."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    draft: tuple[int, ...] | None


class PromptEncoder:
    """Turns instructions into ids and answers into text with a checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        self.prompts = prompts
        self._tokenizer = tokenizer
        self.anchor_ids = tuple(self._single_id(token) for token in prompts.anchors)
        self.end_id = self._single_id(prompts.end)

    def encode(self, instruction: str | None = None, mode: str = DIRECT) -> Prompt:
        """Ids of one request; without an instruction, the mode's default.

        Raises:
            RequestError: unknown or untrained mode; empty or over-long instruction; an instruction that contains one of the
                model's control tokens (it could forge the answer).
        """
        choose("mode", mode, MODES)
        if mode not in self.prompts.instructions:
            raise RequestError(f"mode {mode!r} is not one this model was trained for; it has {', '.join(self.prompts.instructions)}")
        text = self.prompts.instructions[mode] if instruction is None else instruction.strip()
        if not text:
            raise RequestError("the instruction is empty; leave it out to use the mode's default, or write a sentence")
        ids = self._ids(text)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        if found := sorted(token for token in special if token in text):
            raise RequestError(f"the instruction contains the control token {', '.join(found)}; remove it")
        if len(ids) > self.prompts.max_instruction_tokens:
            raise RequestError(f"the instruction has {len(ids)} tokens, this model takes {self.prompts.max_instruction_tokens}; shorten it")
        draft = self.encode_answer(self.prompts.answer) if mode == DIRECT else None
        return Prompt(
            prefix=self._ids(self.prompts.prefix),
            suffix=self._ids(self.prompts.suffix.replace("{instruction}", text)),
            draft=draft,
        )

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer as a model should give it: anchors as their tokens, the end token last."""
        return (*self._ids(text), self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, anchors written out, the end token left away."""
        return self._tokenizer.decode([i for i in ids if i != self.end_id], skip_special_tokens=False).strip()

    def find_anchors(self, ids: Sequence[int]) -> tuple[int, ...] | None:
        """Indices into the answer of the first [NOR], [ANO] and [SEG]; None unless all were said.

        An anchor that is the very last token the length limit allowed counts as unsaid: it was never read back, so its own
        state does not exist. Reference and runtime share this rule because they share this function.
        """
        readable = list(ids[:-1])
        if not all(anchor in readable for anchor in self.anchor_ids):
            return None
        return tuple(readable.index(anchor) for anchor in self.anchor_ids)

    @property
    def state_shift(self) -> int:
        """0 when an anchor's state stands at its own position, -1 when at the position that predicts it."""
        return 0 if self.prompts.anchor_position == "own" else -1

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _single_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise RequestError(f"token {token!r} is not in the tokenizer; the prompts and tokenizer.json do not belong together")
        return index
