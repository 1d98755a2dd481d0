"""How close two runs of the same pictures are, judged on masks first, and the gates that a bundle must pass.

Used by export against the PyTorch reference and by agvas-verify against the bundle's golden traces, so that both speak of the same
numbers. Relative tolerances on single tensors are reported, not gated: what an inspection line loses is masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """What is compared of one picture: mask bool [H, W], map float32 [H, W], anchor states float32 [3, D] or None, answer ids.

    `error`: why there is no map (it is NaN then); empty where there is one.
    """

    mask: np.ndarray
    anomaly_map: np.ndarray
    anchor_states: np.ndarray | None
    answer: tuple[int, ...]
    error: str = ""


@dataclass(frozen=True)
class Parity:
    """Agreement over a set of pictures.

    Attributes:
        images: how many.
        compared: of them, those where the reference said its anchors, so that there was a map to compare.
        non_empty: of them, those whose reference mask is not empty.
        mask_iou_mean, mask_iou_min: intersection over union of the two masks; 1 where both are empty, and where they are specks, see SPECK.
        flips: pictures whose mask is empty in one of the two and not in the other (OK against NG).
        answers_changed: pictures whose answer tokens differ.
        anchors_changed: pictures where one of the two said its anchors and the other did not.
        map_max_abs, map_mean_abs: difference of the anomaly maps.
        anchor_cosine_min: least cosine between anchor states; 1 where neither has any, -1 where only one has.
        not_finite: maps with NaN or infinity.
        specks: pictures whose masks differ and were taken for equal as specks.
        engine_error: what an engine said of the first picture for which it gave no map; empty where there was none.
    """

    images: int
    compared: int
    non_empty: int
    mask_iou_mean: float
    mask_iou_min: float
    flips: int
    answers_changed: int
    anchors_changed: int
    map_max_abs: float
    map_mean_abs: float
    anchor_cosine_min: float
    not_finite: int
    specks: int = 0
    engine_error: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dictionary fit for JSON: NaN, which JSON has no word for, becomes None."""
        return finite(asdict(self))


@dataclass(frozen=True)
class Gates:
    """Limits of a Parity. None leaves a number ungated; `flips` is a share of the pictures, 0 for none at all."""

    mask_iou_mean: float
    mask_iou_min: float
    flips: float
    map_max_abs: float | None
    answers_changed: int | None
    anchor_cosine_min: float | None = None

    def failures(self, parity: Parity) -> list[str]:
        """Each broken gate in words; empty when all hold."""
        failed = []
        if not parity.compared:
            failed.append(f"the reference said its anchors on none of {parity.images} pictures: no mask was compared")
        if parity.anchors_changed:
            failed.append(f"{parity.anchors_changed} answers gained or lost their anchors")
        if parity.engine_error:
            failed.append(f"an engine gave no map: {parity.engine_error}")
        if parity.not_finite:
            failed.append(f"{parity.not_finite} maps hold NaN or infinity")
        if not parity.mask_iou_mean >= self.mask_iou_mean:
            failed.append(f"mean mask IoU {parity.mask_iou_mean:.4f} is below {self.mask_iou_mean}")
        if not parity.mask_iou_min >= self.mask_iou_min:
            failed.append(f"least mask IoU {parity.mask_iou_min:.4f} is below {self.mask_iou_min}")
        if parity.flips > (allowed := math.floor(self.flips * parity.images)):
            failed.append(f"{parity.flips} masks flipped between empty and not empty, {allowed} allowed")
        if self.answers_changed is not None and parity.answers_changed > self.answers_changed:
            failed.append(f"{parity.answers_changed} answers changed, {self.answers_changed} allowed")
        if self.map_max_abs is not None and not parity.map_max_abs <= self.map_max_abs:
            failed.append(f"maps differ by up to {parity.map_max_abs:.2e}, {self.map_max_abs:.0e} allowed")
        if self.anchor_cosine_min is not None and not parity.anchor_cosine_min >= self.anchor_cosine_min:
            failed.append(f"an anchor state's cosine is {parity.anchor_cosine_min:.4f}, below {self.anchor_cosine_min}")
        return failed

    def allowing(self, other: Gates) -> Gates:
        """The laxer of the two in every number."""
        return Gates(
            mask_iou_mean=min(self.mask_iou_mean, other.mask_iou_mean),
            mask_iou_min=min(self.mask_iou_min, other.mask_iou_min),
            flips=max(self.flips, other.flips),
            map_max_abs=_laxer(max, self.map_max_abs, other.map_max_abs),
            answers_changed=_laxer(max, self.answers_changed, other.answers_changed),
            anchor_cosine_min=_laxer(min, self.anchor_cosine_min, other.anchor_cosine_min),
        )


# fp32 graphs reorder sums and nothing else: 1e-4 on a probability is a hundred times what was measured. A mask may still lose a
# pixel whose probability lies within 1e-4 of the threshold, hence 0.999 and not 1. In 16 bit the map moves by up to a few hundredths
# at edges, so masks alone are gated. Integers move whole regions a little: 8-bit encoders are to keep a mean of 0.97,
# 4-bit weights one of 0.95, with one flip in a hundred; the least IoU keeps a single picture from paying for the mean. From the coarsest:
GATES = {
    "gptq4": Gates(mask_iou_mean=0.95, mask_iou_min=0.8, flips=0.01, map_max_abs=None, answers_changed=None, anchor_cosine_min=0.95),
    "int8": Gates(mask_iou_mean=0.97, mask_iou_min=0.85, flips=0.01, map_max_abs=None, answers_changed=None, anchor_cosine_min=0.98),
    "bf16": Gates(mask_iou_mean=0.99, mask_iou_min=0.95, flips=0, map_max_abs=None, answers_changed=None),
    "fp16": Gates(mask_iou_mean=0.99, mask_iou_min=0.95, flips=0, map_max_abs=None, answers_changed=None),
    "fp32": Gates(mask_iou_mean=0.999, mask_iou_min=0.99, flips=0, map_max_abs=1e-4, answers_changed=0),
}


# A cell of a decoder's map is at least this share of the picture (nano's, 128 x 128; the paper's has a quarter of it). A mask of less than
# four cells is one peak that just exceeds the threshold; enlarged to the picture it has some pixels more or less by chance, and an IoU says
# nothing: of two pixels and one, 0.5. Where such masks differ by less than a cell, they count as equal. A flip remains a flip.
CELL = 1 / 128**2
SPECK = 4 * CELL


def compare(ours: Sequence[Outcome], reference: Sequence[Outcome]) -> Parity:
    """Agreement of two equally long lists of outcomes of the same pictures."""
    if len(ours) != len(reference) or not ours:
        raise ValueError(f"expected two equally long, non-empty lists of outcomes, got {len(ours)} and {len(reference)}")
    return together([_of_one(a, b) for a, b in zip(ours, reference)])


def together(parts: Sequence[Parity]) -> Parity:
    """Parity over pictures from each one's own, so that no picture's maps need be kept until the last one is done."""
    if not parts:
        raise ValueError("expected the parity of at least one picture, got none")
    return Parity(
        images=len(parts),
        compared=sum(part.compared for part in parts),
        non_empty=sum(part.non_empty for part in parts),
        mask_iou_mean=float(np.mean([part.mask_iou_mean for part in parts])),
        mask_iou_min=float(np.min([part.mask_iou_min for part in parts])),
        flips=sum(part.flips for part in parts),
        answers_changed=sum(part.answers_changed for part in parts),
        anchors_changed=sum(part.anchors_changed for part in parts),
        map_max_abs=float(np.max([part.map_max_abs for part in parts])),
        map_mean_abs=float(np.mean([part.map_mean_abs for part in parts])),
        anchor_cosine_min=float(np.min([part.anchor_cosine_min for part in parts])),
        not_finite=sum(part.not_finite for part in parts),
        specks=sum(part.specks for part in parts),
        engine_error=next((part.engine_error for part in parts if part.engine_error), ""),
    )


def _of_one(ours: Outcome, reference: Outcome) -> Parity:
    iou = mask_iou(ours.mask, reference.mask)
    difference = np.abs(ours.anomaly_map - reference.anomaly_map)
    return Parity(
        images=1,
        compared=int(reference.anchor_states is not None),
        non_empty=int(reference.mask.any()),
        mask_iou_mean=iou,
        mask_iou_min=iou,
        flips=int(bool(ours.mask.any()) != bool(reference.mask.any())),
        answers_changed=int(ours.answer != reference.answer),
        anchors_changed=int((ours.anchor_states is None) != (reference.anchor_states is None)),
        map_max_abs=float(difference.max()),
        map_mean_abs=float(difference.mean()),
        anchor_cosine_min=_cosine(ours.anchor_states, reference.anchor_states),
        not_finite=int(not np.isfinite(ours.anomaly_map).all()),
        specks=int(_one_speck(ours.mask, reference.mask) and not np.array_equal(ours.mask, reference.mask)),
        engine_error=ours.error or reference.error,
    )


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def worst(known: float | None, error: float) -> float:
    """The larger of two errors; NaN, which is worse than any number, wins."""
    return error if known is None else float(np.maximum(known, error))


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    wanted = reference.astype(np.float64)
    # Not `ours.astype`: a GPU's engine keeps some outputs where they are (engines.Resident).
    return float(np.linalg.norm(np.asarray(ours, np.float64) - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def _laxer(pick: Any, a: float | None, b: float | None) -> Any:
    return None if a is None or b is None else pick(a, b)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks bool [H, W]; 1 where both are empty, and where they are one speck."""
    union = np.count_nonzero(a | b)
    return 1.0 if not union or _one_speck(a, b) else np.count_nonzero(a & b) / union


def _one_speck(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two masks are the same speck: neither is empty, and they differ by less than what a map can tell."""
    if not (a.any() and b.any()):
        return False
    return bool(np.count_nonzero(a | b) < SPECK * a.size and np.count_nonzero(a ^ b) < CELL * a.size)


def _cosine(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """The least cosine of the three anchors."""
    if a is None or b is None:
        return 1.0 if a is b else -1.0
    a, b = a.reshape(3, -1).astype(np.float64), b.reshape(3, -1).astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
