"""The sources a mixture may name: for each kind the groups it belongs to, the options it takes, and its reader.

One table and one function, so that a settings file is checked before anything is read. Defaults of options stand with the readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agvas.training.sources.coco import read_coco
from agvas.training.sources.conversations import read_conversations
from agvas.training.sources.crackforest import read_crackforest
from agvas.training.sources.gc10 import read_gc10
from agvas.training.sources.index_masks import read_ade20k, read_coco_stuff
from agvas.training.sources.instruct import read_instruct
from agvas.training.sources.manifest import read_phrases, read_split
from agvas.training.sources.mvtec import read_mvtec
from agvas.training.sources.real_iad import read_real_iad
from agvas.training.sources.referring import PLACES, read_referring
from agvas.training.sources.zju_leaper import read_zju_leaper

GROUPS = ("general", "instruct", "anomaly", "conversation")

COCO_PLACES = {
    "coco": ("annotations/instances_train2017.json", "train2017"),
    "paco-lvis": ("annotations/paco_lvis_v1_train.json", "."),
    "partimagenet": ("annotations/train/train.json", "images/train"),
    "pascal-part": ("train.json", "VOCdevkit/VOC2010/JPEGImages"),
}
"""By kind: annotations and pictures below root. PACO's file names say train2017/ themselves."""
_FLAT = {"partimagenet": ("train.json", "train")}
"""The same where the set was unpacked otherwise: taken where this annotation file exists and that of COCO_PLACES does not."""
_ALL = ("annotations", "images", "split")

OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "general": {
        **dict.fromkeys(COCO_PLACES, ("annotations", "images")),
        "ade20k": ("split",),
        "coco-stuff": ("split",),
        **dict.fromkeys(PLACES, _ALL),
        "manifest": ("split",),
    },
    "instruct": {"anomaly-instruct": ("annotations",)},
    "anomaly": {
        "real-iad": _ALL,
        **dict.fromkeys(("goods-ad", "dtd-synthetic", "miad"), ("split",)),
        "crackforest": (),
        "gc10-det": (),
        "zju-leaper": ("annotations", "split"),
        "manifest": ("split",),
    },
    "conversation": {"llava": ("annotations", "images")},
}
"""By group and kind: which of annotations, images and split the kind takes."""


@dataclass(frozen=True)
class SourceSettings:
    """One source of a group.

    Attributes:
        kind: a key of OPTIONS[group].
        root: the folder of the release.
        annotations, images, split: where the reader looks, and which part it takes; None is the reader's default.
        weight: the source's share of its group, relative to the others' weights; None is its number of records. In a group all sources have
            one or none has.
        modes: the shares of the answer's modes, Anomaly-Instruct only; empty is all four alike.
    """

    kind: str
    root: str
    annotations: str | None = None
    images: str | None = None
    split: str | None = None
    weight: float | None = None
    modes: tuple[tuple[str, float], ...] = ()


def read_source(group: str, source: SourceSettings) -> tuple[Sequence[Any], list[str]]:
    """(records, remarks on what was left out). Pictures are not decoded. Raises DatasetError."""
    root, kind = Path(source.root), source.kind
    given = {name: getattr(source, name) for name in OPTIONS[group][kind] if getattr(source, name) is not None}
    if kind in COCO_PLACES:
        annotations, images = _coco_places(kind, root)
        return read_coco(root / given.get("annotations", annotations), root / given.get("images", images))
    if kind in PLACES:
        return read_referring(root, kind, **given)
    if kind == "manifest":
        lines: Sequence[Any] = read_phrases(root, **given) if group == "general" else read_split(root, **given)
        return lines, []
    if kind in ("goods-ad", "dtd-synthetic", "miad"):
        return read_mvtec(root, **given), []
    if kind == "anomaly-instruct":
        return read_instruct(root / given.get("annotations", "instruct.jsonl"))
    if kind == "llava":
        file, images = given.get("annotations", "llava_instruct_150k.json"), given.get("images", "train2017")
        return read_conversations(root / file, root / images), []
    if kind == "real-iad":
        return read_real_iad(root, **given)
    if kind == "zju-leaper":
        return read_zju_leaper(root, **given), []
    if kind == "crackforest":
        return read_crackforest(root)
    if kind == "gc10-det":
        return read_gc10(root)
    if kind == "ade20k":
        return read_ade20k(root, **given)
    if kind == "coco-stuff":
        return read_coco_stuff(root, **given)
    raise AssertionError(f"{kind} stands in OPTIONS and has no reader")


def _coco_places(kind: str, root: Path) -> tuple[str, str]:
    published, flat = COCO_PLACES[kind], _FLAT.get(kind)
    return flat if flat and (root / flat[0]).is_file() and not (root / published[0]).is_file() else published
