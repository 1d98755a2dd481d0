"""What is said around the calibration pictures: the checkpoint's own prompts in every mode it was trained in, and answers to them.

Instructions are the checkpoint's defaults; the answer of direct mode is the draft that inference verifies, and those of the other modes are
worded as in training. A picture's text need not be true of it: what matters is that the language model reads the kind of tokens it will.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from agvas.config import ANCHORS
from agvas.training.descriptions import NAMES, describe
from agvas.training.instructions import dialogue
from runtime.prompts import DIRECT, Prompt, PromptEncoder


class Conversation(NamedTuple):
    """One picture's question and answer, as token ids."""

    mode: str
    prompt: Prompt
    answer: tuple[int, ...]


def modes_in_turn(encoder: PromptEncoder, count: int) -> tuple[str, ...]:
    """The mode of each of `count` pictures: direct, which most pictures of a line are asked in, before each of the others."""
    others = [mode for mode in encoder.prompts.instructions if mode != DIRECT]
    if DIRECT not in encoder.prompts.instructions:
        turn = others
    else:
        turn = [mode for other in others for mode in (DIRECT, other)] or [DIRECT]
    return tuple(turn[i % len(turn)] for i in range(count))


def conversation(encoder: PromptEncoder, mode: str, number: int) -> Conversation:
    """The conversation of picture `number`, always the same."""
    prompts = encoder.prompts
    if mode == DIRECT:
        prompt = encoder.encode()
        assert prompt.draft is not None  # direct mode has one
        return Conversation(mode, prompt, prompt.draft)
    rng = np.random.default_rng(number)
    mask = np.zeros((100, 100), bool)  # empty: a normal picture's words
    if rng.random() < 0.5:
        top, left, height, width = rng.integers(1, 50, 4)
        mask[top : top + height, left : left + width] = True
    description = describe(str(rng.choice(list(NAMES))), mask, rng)
    _, answer = dialogue(mode, description, rng)
    instruction = prompts.instructions[mode]
    if mode == "describe-then-segment-plus":
        instruction = f"{description.expectation} {instruction}"
    answer = answer.replace("".join(ANCHORS), "".join(prompts.anchors))  # an ablation has fewer
    return Conversation(mode, encoder.encode(instruction, mode), encoder.encode_answer(answer))
