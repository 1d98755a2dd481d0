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
PLUS = "describe-then-segment-plus"
MODES = (DIRECT, "describe-then-segment", PLUS, "segment-then-explain")
ANCHOR_POSITIONS = ("own", "predicting")
KNOWN_TEXTS = 64  # at most, whose ids are kept


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
        max_instruction_tokens: limit of the instruction, a sentence on the normal state included.
        max_new_tokens: limit of the answer, its end token included; a request may ask for less.
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
    """One request as the model gets it.

    Attributes:
        prefix, suffix: token ids before and after the image.
        draft: the answer to verify in direct mode (end token included), None where the model writes freely.
        mode: one of MODES.
        instruction: the words in the suffix, whole: a sentence on the normal state stands in front.
        max_new_tokens: generation stops there, end or not.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    draft: tuple[int, ...] | None
    mode: str
    instruction: str
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What an answer's token ids say; the same reading for the reference and the line.

    Attributes:
        text: anchors written out, the end token left away.
        anchors: index of each anchor of the first group, in the anchors' order; None where no group is complete. The first group
            makes the mask.
        anchor_groups: how many complete groups there are. A group is complete when each anchor was said since the last one was.
        truncated: it stopped at the length limit, not at the end token; the text may break off within a word.
    """

    text: str
    anchors: tuple[int, ...] | None
    anchor_groups: int
    truncated: bool


def with_normal_state(instruction: str, normal_state: str) -> str:
    """The instruction of describe-then-segment-plus: the sentence on the normal state comes first (paper §4.3, table 4).

    Training draws its instructions through this function too, so a user's sentence stands where the model learned to look for it.

    Raises:
        RequestError: the sentence is empty.
    """
    if not (sentence := normal_state.strip()):
        raise RequestError("normal_state: expected a sentence on what a normal object looks like, got an empty text; write one")
    return f"{sentence} {instruction}"


def _check_text(name: str, text: object) -> None:
    """RequestError unless it is None or a text that can be written in UTF-8, which a command line's bytes need not be."""
    if text is None:
        return
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: expected text in UTF-8, got {ascii(text)}; check the terminal's encoding") from error


class PromptEncoder:
    """Turns instructions into ids and answers into text with a checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        self.prompts = prompts
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}
        self.anchor_ids = tuple(self._single_id(token) for token in prompts.anchors)
        self.end_id = self._single_id(prompts.end)

    def encode(
        self,
        instruction: str | None = None,
        mode: str = DIRECT,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """Ids of one request; without an instruction, the mode's default.

        Args:
            normal_state: for describe-then-segment-plus, a sentence on what a normal object looks like; it is put before the
                instruction. A user's own instruction in that mode may do without: it can hold the sentence itself.
            max_new_tokens: longest answer, 1 to the checkpoint's own limit; None is that limit.

        Raises:
            RequestError: unknown or untrained mode; an instruction or sentence that is no text; an empty or over-long instruction, or one
                that contains one of the model's control tokens (it could forge the answer); a sentence on the normal state that is empty,
                missing or given to another mode; a length out of range.
        """
        choose("mode", mode, MODES)
        for name, given in (("instruction", instruction), ("normal_state", normal_state)):
            _check_text(name, given)
        if mode not in self.prompts.instructions:
            raise RequestError(f"mode {mode!r} is not one this model was trained for; it has {', '.join(self.prompts.instructions)}")
        text = self.prompts.instructions[mode] if instruction is None else instruction.strip()
        if not text:
            raise RequestError("the instruction is empty; leave it out to use the mode's default, or write a sentence")
        if normal_state is not None and mode != PLUS:
            raise RequestError(f"normal_state (--normal-state): only mode {PLUS} takes it, got mode {mode}; leave it out, or ask in that")
        if normal_state is not None:
            text = with_normal_state(text, normal_state)
        elif mode == PLUS and instruction is None:
            raise RequestError(
                f"normal_state (--normal-state): mode {PLUS} needs a sentence on what a normal object looks like, got none; give it, or "
                "ask in mode describe-then-segment"
            )
        ids = self._ids(text)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        if found := sorted(token for token in special if token in text):
            raise RequestError(f"the instruction contains the control token {', '.join(found)}; remove it")
        if len(ids) > self.prompts.max_instruction_tokens:
            raise RequestError(f"the instruction has {len(ids)} tokens, this model takes {self.prompts.max_instruction_tokens}; shorten it")
        longest = self.prompts.max_new_tokens if max_new_tokens is None else max_new_tokens
        is_whole = hasattr(longest, "__index__") and not isinstance(longest, bool)
        if not (is_whole and 1 <= longest <= self.prompts.max_new_tokens):
            raise RequestError(f"max_new_tokens: expected 1 to {self.prompts.max_new_tokens}, this model's limit, got {longest!r}")
        return Prompt(
            prefix=self._ids(self.prompts.prefix),
            suffix=self._ids(self.prompts.suffix.replace("{instruction}", text)),
            draft=self.encode_answer(self.prompts.answer) if mode == DIRECT else None,
            mode=mode,
            instruction=text,
            max_new_tokens=int(longest),
        )

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer as a model should give it: anchors as their tokens, the end token last."""
        return (*self._ids(text), self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, anchors written out, the end token left away."""
        return self._tokenizer.decode([i for i in ids if i != self.end_id], skip_special_tokens=False).strip()

    def read(self, ids: Sequence[int]) -> Answer:
        """What an answer says."""
        groups = self._anchor_groups(ids)
        truncated = not ids or ids[-1] != self.end_id
        return Answer(self.decode(ids), groups[0] if groups else None, len(groups), truncated)

    def find_anchors(self, ids: Sequence[int]) -> tuple[int, ...] | None:
        """Indices into the answer of the first [NOR], [ANO] and [SEG]; None unless all were said.

        An anchor that is the very last token the length limit allowed counts as unsaid: it was never read back, so its own
        state does not exist. Reference and runtime share this rule because they share this function.
        """
        groups = self._anchor_groups(ids)
        return groups[0] if groups else None

    def _anchor_groups(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Of each complete group, where its anchors stand; an anchor said twice within a group counts where it came first."""
        groups: list[tuple[int, ...]] = []
        group: dict[int, int] = {}
        for index, token in enumerate(ids[:-1]):
            if token in self.anchor_ids:
                group.setdefault(token, index)
            if len(group) == len(self.anchor_ids):
                groups.append(tuple(group[anchor] for anchor in self.anchor_ids))
                group = {}
        return groups

    @property
    def state_shift(self) -> int:
        """0 when an anchor's state stands at its own position, -1 when at the position that predicts it."""
        return 0 if self.prompts.anchor_position == "own" else -1

    def _ids(self, text: str) -> tuple[int, ...]:
        """A line says the same words to every picture: they are looked up once (0.1 ms each)."""
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) >= KNOWN_TEXTS:
                self._known.clear()
            ids = self._known[text] = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids

    def _single_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise RequestError(f"token {token!r} is not in the tokenizer; the prompts and tokenizer.json do not belong together")
        return index
