"""The small tokenizer of nano and tiny: byte-level BPE with Qwen2's conversation tokens and the three anchors.

The 7B brings its own tokenizer.json, to which training adds the anchors. Byte level, so that any instruction in any language
has ids; merges are learned from the instruction templates, so that the usual ones are short.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from agvas.config import ANCHORS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *ANCHORS)


def train_tokenizer(sentences: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer with exactly `vocabulary` ids or fewer; deterministic for the same sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer
