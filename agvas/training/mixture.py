"""The training mixture (paper Table 5 and B.1): four groups of sources, and one sample for every (seed, step, index).

    {"general":      {"probability": 0.4,  "sources": [{"kind": "ade20k", "root": "ADEChallengeData2016"}, ...]},
     "instruct":     {"probability": 0.25, "sources": [{"kind": "anomaly-instruct", "root": "instruct", "modes": {"direct": 1, ...}}]},
     "anomaly":      {"probability": 0.25, "sources": [{"kind": "real-iad", "root": "Real-IAD"}, ...], "anomalous_share": 0.5},
     "conversation": {"probability": 0.1,  "sources": [{"kind": "llava", "root": "llava"}]}}

The probabilities are the paper's and the defaults. A group is switched off by "probability": 0 or by leaving it out; then, and only then,
the others' probabilities are divided by their sum, which `Mixture.describe` says. With all four groups on they must sum to 1.

A sample is a pure function of seed, step and index: it is the same in every process and after every resumption, and samples may be made in
any order. A group is drawn by its probability; in "anomaly" and "instruct" then normal or anomalous (the paper's "balanced distribution",
over the group as a whole, since some of its sources have no normal pictures); then a source by weight, a record, and the words around it.
The paper's Anomaly-Seg20K is 20,000 pictures drawn once; here all records of the sources take part.

Only "instruct" and "anomaly" supervise [NOR] and [ANO]. Opening a mixture reads every source's index and no pixels, and sees whether the
checkpoint takes its words (text_limits.py); a picture that does not decode during training is an error that names it, never a silent skip.
No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from agvas.config import ANCHORS
from agvas.training.instructions import dialogue, object_dialogue, with_anchors
from agvas.training.record_digest import digest_of
from agvas.training.sample import TrainingSample
from agvas.training.settings import meant, read_own_json, without_quotes
from agvas.training.sources.catalogue import GROUPS, OPTIONS, SourceSettings, read_source
from agvas.training.sources.conversations import Conversation
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.instruct import DescribedImage
from agvas.training.sources.masked import AnomalyRecord
from agvas.training.sources.pictures import read_picture
from agvas.training.text_limits import TextLimits
from runtime.prompts import DIRECT, MODES

BALANCED = ("instruct", "anomaly")
"""Groups whose records are normal or anomalous."""
PROBABILITIES = {"general": 0.4, "instruct": 0.25, "anomaly": 0.25, "conversation": 0.1}
REDRAWS = 100  # images of general segmentation that may turn out to hold no class before that is an error
_ROUNDING = 1e-6


@dataclass(frozen=True)
class GroupSettings:
    """One group.

    Attributes:
        probability: of a sample to come from this group, 0..1; 0 switches it off.
        sources: at least one, unless switched off.
        anomalous_share: how many of the group's pictures are anomalous, where it has normal ones too; BALANCED alone.
    """

    probability: float
    sources: tuple[SourceSettings, ...]
    anomalous_share: float = 0.5


@dataclass(frozen=True)
class MixtureSettings:
    """The four groups; None is a group left out. Raises ValueError where the probabilities do not add up."""

    general: GroupSettings | None = None
    instruct: GroupSettings | None = None
    anomaly: GroupSettings | None = None
    conversation: GroupSettings | None = None

    def __post_init__(self) -> None:
        active = self.active()
        for name, group in active.items():
            if not 0 < group.probability <= 1:
                remedy = "correct it, or leave the group out to turn it off"
                raise ValueError(f"{name}.probability: expected more than 0 and at most 1, got {group.probability:g}; {remedy}")
        total = sum(group.probability for group in active.values())
        if not active:
            raise ValueError(f"mixture: expected at least one group with a probability above 0, got none; give one of {', '.join(GROUPS)}")
        if total > 1 + _ROUNDING or (len(active) == len(GROUPS) and total < 1 - _ROUNDING):
            given = " + ".join(f"{group.probability:g}" for group in active.values())
            raise ValueError(f"mixture: expected probabilities that sum to 1, got {given} = {total:g}; correct them")
        for name, group in active.items():
            _check_group(name, group)

    def active(self) -> dict[str, GroupSettings]:
        """The groups that are drawn from, by name."""
        groups = {name: getattr(self, name) for name in GROUPS}
        return {name: group for name, group in groups.items() if group is not None and group.probability != 0}

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> MixtureSettings:
        """From a JSON file; a relative root starts at the file's folder. Raises ValueError naming the key, or DatasetError for the file."""
        path = Path(file)
        content = read_own_json(path, "the groups of a mixture")
        try:
            given = _object(content, GROUPS, "mixture")
            return cls(**{name: _group(name, value, path.parent) for name, value in given.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class Mixture:
    """An opened mixture: every source's index in memory.

    Args:
        anchors: those that answers hold: fewer than three where an ablation is tuned.
        limits: of the checkpoint that is tuned; None looks at no text.
    """

    def __init__(self, settings: MixtureSettings, anchors: Sequence[str] = ANCHORS, limits: TextLimits | None = None) -> None:
        """Reads the indexes, with a progress bar on a terminal. Raises DatasetError."""
        self.settings, self.anchors = settings, anchors
        active = settings.active()
        total = sum(group.probability for group in active.values())
        waiting = [(name, source) for name, group in active.items() for source in group.sources]
        opened: dict[str, list[_Source]] = {name: [] for name in active}
        for name, source in tqdm(waiting, desc="reading sources", unit="source", disable=None):
            records, remarks = read_source(name, source)
            remarks = remarks if limits is None else remarks + limits.check(name, source, records)
            opened[name].append(_Source(name, source, records, remarks))
        self._groups = [_Group(name, group.probability / total, group, opened[name]) for name, group in active.items()]
        self._total = total

    def sample(self, seed: int, step: int, index: int) -> TrainingSample:
        """Sample `index` of step `step`, all from 0 on. Raises DatasetError where its picture or truth cannot be read."""
        rng = np.random.default_rng([seed, step, index])
        group = self._groups[_choose([group.probability for group in self._groups], rng)]
        sample = group.sample(rng)
        return replace(sample, answer=with_anchors(sample.answer, self.anchors))

    def facts(self) -> dict[str, Any]:
        """What makes it this mixture, for JSON: all settings by group (None: off), and of each source its records' number and digest."""
        found: dict[str, Any] = dict.fromkeys(GROUPS)
        for group in self._groups:
            sources = [
                asdict(source.settings) | {"records": len(source.records), "records_sha256": digest_of(source.records)}
                for source in group.sources
            ]
            found[group.name] = asdict(getattr(self.settings, group.name)) | {"sources": sources}
        return found

    def describe(self) -> str:
        """A Markdown table: group, source, records, and the probability of a sample to come from it; below it what is worth knowing."""
        rows = [("group", "source", "records", "probability")]
        remarks = []
        for group in self._groups:
            for source, share in zip(group.sources, group.shares()):
                name = f"{source.settings.kind} ({source.settings.root})"
                rows.append((group.name, name, str(len(source.records)), f"{group.probability * share:.4f}"))
                remarks += [f"{name}: {remark}" for remark in source.remarks]
        off = [name for name in GROUPS if name not in self.settings.active()]
        if off and abs(self._total - 1) > _ROUNDING:
            remarks.insert(0, f"without {', '.join(off)}: the other groups' probabilities are divided by {self._total:g}")
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], *remarks])


class _Source:
    """One source's records; where its group is balanced, also which are normal and which anomalous."""

    def __init__(self, group: str, settings: SourceSettings, records: Sequence[Any], remarks: list[str]) -> None:
        self.settings, self.records, self.remarks = settings, records, remarks
        everything = np.arange(len(records))
        if group in BALANCED:
            anomalous = np.fromiter((record.is_anomalous for record in records), bool, len(records))
            self.parts = {False: everything[~anomalous], True: everything[anomalous]}
        else:
            self.parts = {True: everything}

    def weight(self, part: bool) -> float:
        """Before division by the sum over the group's sources; 0 where the source has nothing of that part."""
        size = len(self.parts[part])
        return float(size if self.settings.weight is None or not size else self.settings.weight)


class _Group:
    """One group's sources, and how a sample is made of its records."""

    def __init__(self, name: str, probability: float, settings: GroupSettings, sources: list[_Source]) -> None:
        self.name, self.probability, self.sources = name, probability, sources
        weights = {part: [source.weight(part) for source in sources] for part in sources[0].parts}
        self.weights = {part: values for part, values in weights.items() if sum(values)}
        if len(self.weights) == 2:
            self.part_shares = {False: 1 - settings.anomalous_share, True: settings.anomalous_share}
        else:
            self.part_shares = dict.fromkeys(self.weights, 1.0)

    def shares(self) -> list[float]:
        """Of a sample of this group to come from each source."""
        return [
            sum(share * self.weights[part][n] / sum(self.weights[part]) for part, share in self.part_shares.items())
            for n in range(len(self.sources))
        ]

    def sample(self, rng: np.random.Generator) -> TrainingSample:
        parts = list(self.part_shares)
        part = parts[_choose([self.part_shares[part] for part in parts], rng)]
        source = self.sources[_choose(self.weights[part], rng)]
        if self.name == "general":
            return _general(source, rng)
        record = source.records[int(rng.choice(source.parts[part]))]
        if self.name == "instruct":
            return _described(record, source.settings, rng)
        return _anomaly(record, rng) if self.name == "anomaly" else _conversation(record, rng)


def _general(source: _Source, rng: np.random.Generator) -> TrainingSample:
    """A class or phrase of an image, and its mask. An image without a class, or a class without a pixel, is drawn again."""
    for _ in range(REDRAWS):
        record = source.records[int(rng.integers(len(source.records)))]
        image = read_picture(record.image)
        drawn = record.draw(*image.shape[:2], rng)
        if drawn is not None and drawn[1].any():
            instruction, answer = object_dialogue(drawn[0], rng)
            return TrainingSample(image, instruction, answer, drawn[1], relative=False, origin=record.image)
    remedy = "check that the masks belong to the class names"
    raise DatasetError(Path(source.settings.root), None, "images with a class", f"none in {REDRAWS} drawn", remedy)


def _anomaly(record: AnomalyRecord, rng: np.random.Generator) -> TrainingSample:
    image, mask = _read(record)
    instruction, answer = dialogue(DIRECT, None, rng)
    return TrainingSample(image, instruction, answer, mask, relative=True, origin=record.image)


def _described(record: DescribedImage, settings: SourceSettings, rng: np.random.Generator) -> TrainingSample:
    shares = dict(settings.modes) or dict.fromkeys(MODES, 1.0)
    mode = list(shares)[_choose(list(shares.values()), rng)]
    image, mask = _read(record.picture)
    instruction, answer = dialogue(mode, record.description, rng)
    return TrainingSample(image, instruction, answer, mask, relative=True, origin=record.picture.image)


def _conversation(record: Conversation, rng: np.random.Generator) -> TrainingSample:
    question, answer = record.draw(rng)
    return TrainingSample(read_picture(record.image), question, answer, mask=None, relative=False, origin=record.image)


def _read(record: AnomalyRecord) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    image = read_picture(record.image)
    return image, record.read_mask(*image.shape[:2])


def _choose(weights: Sequence[float], rng: np.random.Generator) -> int:
    """An index by weight. Never one of weight 0, whatever rounding does."""
    cumulated = np.cumsum(weights)
    index = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def _check_group(name: str, group: GroupSettings) -> None:
    if not group.sources:
        raise ValueError(f"{name}.sources: expected at least one, got none; add one, or switch the group off with probability 0")
    if not 0 <= group.anomalous_share <= 1:
        raise ValueError(f"{name}.anomalous_share: expected 0 to 1, got {group.anomalous_share:g}; correct it")
    weighted = [source for source in group.sources if source.weight is not None]
    if weighted and len(weighted) < len(group.sources):
        raise ValueError(f"{name}.sources: expected a weight for all sources or for none, got {len(weighted)} of {len(group.sources)}")
    for n, source in enumerate(group.sources):
        _check_source(f"{name}.sources[{n}]", name, source)


def _check_source(where: str, group: str, source: SourceSettings) -> None:
    if source.kind not in OPTIONS[group]:
        raise ValueError(f"{where}.kind: {_unknown(source.kind, tuple(OPTIONS[group]))}")
    taken = OPTIONS[group][source.kind]
    for option in ("annotations", "images", "split"):
        if getattr(source, option) is not None and option not in taken:
            raise ValueError(f"{where}.{option}: {source.kind} takes {', '.join(taken) or 'no such option'}; leave it out")
    if source.weight is not None and not source.weight > 0:
        raise ValueError(f"{where}.weight: expected more than 0, got {source.weight:g}; leave the source out to switch it off")
    if source.modes and group != "instruct":
        raise ValueError(f"{where}.modes: only the group instruct has descriptions to answer with; leave it out")
    for mode, share in source.modes:
        if mode not in MODES:
            raise ValueError(f"{where}.modes: {_unknown(mode, MODES)}")
        if not share >= 0:
            raise ValueError(f"{where}.modes: expected a share of 0 or more for {mode}, got {share:g}")
    if source.modes and not sum(share for _, share in source.modes):
        raise ValueError(f"{where}.modes: expected a share above 0, got none; leave modes out for all four alike")


def _group(name: str, value: Any, folder: Path) -> GroupSettings:
    allowed = ("probability", "sources", *(("anomalous_share",) if name in BALANCED else ()))
    given = _object(value, allowed, name)
    sources = given.get("sources", [])
    if not isinstance(sources, list):
        raise ValueError(f"{name}.sources: expected a list, got {sources!r:.60}")
    return GroupSettings(
        probability=_number(given.get("probability", PROBABILITIES[name]), f"{name}.probability"),
        sources=tuple(_source(source, f"{name}.sources[{n}]", folder) for n, source in enumerate(sources)),
        anomalous_share=_number(given.get("anomalous_share", 0.5), f"{name}.anomalous_share"),
    )


def _source(value: Any, where: str, folder: Path) -> SourceSettings:
    given = _object(value, tuple(field.name for field in fields(SourceSettings)), where)
    for key in ("kind", "root"):
        if key not in given:
            raise ValueError(f"{where}: expected a {key}, got {', '.join(given) or 'nothing'}; add it")
    for key in ("kind", "root", "annotations", "images", "split"):
        if key in given and not isinstance(given[key], str):
            raise ValueError(f"{where}.{key}: expected text, got {given[key]!r:.60}")
    given["root"] = str(folder / given["root"])
    if "weight" in given:
        given["weight"] = _number(given["weight"], f"{where}.weight")
    if "modes" in given:
        given["modes"] = _modes(given["modes"], f"{where}.modes")
    return SourceSettings(**given)


def _modes(value: Any, where: str) -> tuple[tuple[str, float], ...]:
    """From a list of modes, alike, or an object of shares."""
    if isinstance(value, list) and value and all(isinstance(mode, str) for mode in value):
        return tuple((mode, 1.0) for mode in dict.fromkeys(value))
    if isinstance(value, dict) and value:
        return tuple((mode, _number(share, f"{where}.{mode}")) for mode, share in value.items())
    raise ValueError(f"{where}: expected a list of modes or an object of their shares, got {value!r:.60}; leave it out for all four alike")


def _object(value: Any, allowed: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(allowed)}, got {value!r:.60}")
    for key in value:
        if key not in allowed:
            raise ValueError(f"{where}: {_unknown(key, allowed)}")
    return dict(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError(f"{where}: expected a number, got {json.dumps(value)[:60]}{without_quotes(value, float)}")
    return float(value)


def _unknown(name: str, allowed: tuple[str, ...]) -> str:
    return f"expected one of {', '.join(allowed)}, got {name!r}{meant(name, allowed)}"
