"""Whether a checkpoint takes what a mixture asks and can say what it answers: seen once when it is opened, not at a random step.

A question that is too long for it, and a text that holds one of its tokenizer's own tokens ("</s>" would end Vicuna's answer), are errors
that name the record. Longer answers than inference writes are trained and counted: inference cuts them off, and anchors behind the limit
are never said. Around words that a template is drawn for stands the longest one. Texts are tokenised in batches, and where their letters
are fewer than the limit not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from agvas.training.instructions import ANSWERS, OBJECT_TEMPLATES, every_question, with_anchors
from agvas.training.sources.catalogue import SourceSettings
from agvas.training.sources.coco import CocoImage
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.manifest import Phrase
from agvas.training.sources.referring import Reference
from runtime.prompts import DIRECT, MODES, PLUS, Prompts, with_normal_state

_BATCH = 4096
_EXPLAIN = "segment-then-explain"


@dataclass(frozen=True)
class _Text:
    """Words of a record: where they stand, what they are ("a question of record 3"), and the longest `whole` that is made of them."""

    file: Path
    line: int | None
    place: str
    words: str
    whole: str
    is_answer: bool = False


class TextLimits:
    """What a checkpoint's tokenizer and prompts leave room for."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        """Raises ValueError where not even the questions of agvas/training/instructions.py fit."""
        self._tokenizer, self._prompts = tokenizer, prompts
        added = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        longest = max(map(len, self._ids([self._longest(every_question(mode)) for mode in MODES])))
        if longest > prompts.max_instruction_tokens:
            raise ValueError(
                f"prompts.max_instruction_tokens: expected room for training's questions, {longest} tokens, got "
                f"{prompts.max_instruction_tokens}; raise it in the checkpoint's config.json"
            )

    def check(self, group: str, settings: SourceSettings, records: Sequence[Any]) -> list[str]:
        """Remarks on a source's answers. Raises DatasetError for a question that is too long, or a text with a token of the tokenizer's."""
        texts = self._texts(group, settings, records)
        answers = cut = 0
        first: _Text | None = None
        while batch := list(islice(texts, _BATCH)):
            for text in batch:
                if found := self._control.search(text.words):
                    remedy = "remove the token from the text, or the record from the file"
                    expected = f"{text.place} without tokens of the checkpoint's tokenizer"
                    raise DatasetError(text.file, text.line, expected, found[0], remedy)
            answers += sum(text.is_answer for text in batch)
            questions = [text for text in batch if not text.is_answer]
            for text, tokens in self._beyond(questions, self._prompts.max_instruction_tokens):
                expected = f"{text.place} that makes at most {self._prompts.max_instruction_tokens} tokens, what the checkpoint takes"
                raise DatasetError(text.file, text.line, expected, str(tokens), "shorten it, or remove the record from the file")
            # The end token is one of those that inference writes.
            for text, _ in self._beyond([text for text in batch if text.is_answer], self._prompts.max_new_tokens - 1):
                cut, first = cut + 1, first or text
        if first is None:
            return []
        where = first.place if first.line is None else f"line {first.line}"
        limit = f"the {self._prompts.max_new_tokens} tokens that this checkpoint ever writes"
        return [f"{cut} of {answers} answers are longer than {limit} ({first.file.name}, {where} first): it will not say their ends"]

    def _texts(self, group: str, settings: SourceSettings, records: Sequence[Any]) -> Iterator[_Text]:
        if group == "conversation":
            return _of_conversations(records)
        if group == "instruct":
            modes = [mode for mode, share in settings.modes if share] or list(MODES)
            return _of_descriptions(records, modes, self._prompts.anchors, self._longest)
        return _of_names(Path(settings.root), records, self._longest) if group == "general" else iter(())

    def _beyond(self, texts: Sequence[_Text], limit: int) -> Iterator[tuple[_Text, int]]:
        """Those of more tokens, with how many. An ASCII text has no more tokens than letters, but for one that some put in front."""
        long = [text for text in texts if len(text.whole) >= limit or not text.whole.isascii()]
        for text, ids in zip(long, self._ids([text.whole for text in long]), strict=True):
            if len(ids) > limit:
                yield text, len(ids)

    def _longest(self, texts: Sequence[str]) -> str:
        return max(zip(map(len, self._ids(texts)), texts))[1]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _of_conversations(records: Iterable[Any]) -> Iterator[_Text]:
    for record in records:
        for question, answer in record.turns:
            yield _Text(record.listed_in, None, f"a question of {record.place}", question, question)
            yield _Text(record.listed_in, None, f"an answer of {record.place}", answer, answer, is_answer=True)


def _of_descriptions(
    records: Iterable[Any], modes: Sequence[str], anchors: Sequence[str], longest: Callable[[Sequence[str]], str]
) -> Iterator[_Text]:
    question = longest(every_question(PLUS))
    answer = longest([with_anchors(template, anchors).format(explanation="") for template in ANSWERS])
    for record in records:
        description = record.description
        if PLUS in modes:
            whole = with_normal_state(question, description.expectation)
            yield _Text(record.file, record.line, "an expectation", description.expectation, whole)
        if not {DIRECT, _EXPLAIN}.issuperset(modes):
            words, whole = (with_anchors(description.summary, kept) for kept in ((), anchors))
            yield _Text(record.file, record.line, "a summary", words, whole, is_answer=True)
        if _EXPLAIN in modes:
            whole = answer + description.explanation
            yield _Text(record.file, record.line, "an explanation", description.explanation, whole, is_answer=True)


def _of_names(root: Path, records: Iterable[Any], longest: Callable[[Sequence[str]], str]) -> Iterator[_Text]:
    """Each name once; most images of a set share theirs."""
    template = longest(OBJECT_TEMPLATES)
    seen: set[int | str] = set()
    for record in records:
        where: tuple[Path, int | None, str] = root, None, "a class name"
        names: Iterable[str] = ()
        if isinstance(record, Phrase):
            where, names = (record.item.manifest, record.item.line, "a text"), (record.text,)
        elif isinstance(record, Reference):
            where, names = (record.listed_in, None, f"a sentence about {record.image.name}"), record.sentences
        elif id(record.names) not in seen:  # all images of a set have one table of names
            seen.add(id(record.names))
            names = record.names.values()
            if isinstance(record, CocoImage):
                where, names = (record.listed_in, None, "a category's name"), chain.from_iterable(names)
        for name in names:
            if name not in seen:
                seen.add(name)
                yield _Text(*where, name, template.format(name=name))
