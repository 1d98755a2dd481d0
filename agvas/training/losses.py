"""The paper's objective (§3.2, eq. 9-11): cross-entropy of the answer, and BCE plus Dice of each anchor's map.

Padding of the square image counts in no term. Means are over images, so that a large picture weighs no more than a small one, a long
answer no more than a short one, and the loss of a batch is the mean of its parts' losses however it is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agvas.mask_decoder import Maps

TOUCHED = 0.25  # share of a cell from which on a defect is in it: a hairline covers no whole cell


@dataclass(frozen=True)
class MaskLossWeights:
    """Weights of the two mask terms; the defaults are the paper's."""

    bce: float = 0.5
    dice: float = 2.0

    def __post_init__(self) -> None:
        check_weights("mask", bce=self.bce, dice=self.dice)


def check_weights(of: str, **weights: float) -> None:
    """ValueError for a term's weight that would train nothing or the wrong way."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{of}.{name}: expected a finite weight of 0 or more, got {weight:g}")


def text_loss(logits: Tensor, answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Cross-entropy over all tokens of each answer, anchors included (eq. 9). logits: [B, A, V]; answers may be shorter than A."""
    ignored = -100
    rows = [[*answer, *[ignored] * (logits.shape[1] - len(answer))] for answer in answers]
    target = torch.tensor(rows, device=logits.device)  # [B, A]
    losses = F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=ignored, reduction="none")  # [B, A]
    return (losses.sum(dim=1) / (target != ignored).sum(dim=1)).mean()


def mask_loss(
    maps: Maps, target: Tensor, valid: Tensor, weights: MaskLossWeights, absolute: Tensor | None = None, relative: Tensor | None = None
) -> Tensor:
    """Sum over the anchors of weighted BCE and Dice (eq. 10), mean over images; the normal anchor's target is the complement.

    Args:
        target: [B, M, M], the share of each cell that is anomalous, 0..1.
        valid: [B, M, M], 1 inside the picture and 0 in the padding.
        absolute, relative: [B], 1 where [SEG], or [NOR] and [ANO], are supervised (None: everywhere).
    """
    total = torch.zeros(len(target), device=target.device)
    if maps.logit_relative is not None:
        contrast = maps.logit_relative[:, 1] - maps.logit_relative[:, 0]  # softmax over two is a sigmoid of their difference
        both = anchor_losses(contrast, target, valid, weights) + anchor_losses(-contrast, 1 - target, valid, weights)  # ANO, NOR
        total = total + (both if relative is None else both * relative)
    if maps.logit_absolute is not None:
        alone = anchor_losses(maps.logit_absolute, target, valid, weights)  # SEG
        total = total + (alone if absolute is None else alone * absolute)
    return total.mean()


def anchor_losses(logit: Tensor, target: Tensor, valid: Tensor, weights: MaskLossWeights) -> Tensor:
    """Weighted BCE and Dice of each logit map: [B, M, M] → [B]."""
    logit = logit.float()
    area = valid.sum(dim=(1, 2))
    bce = (F.binary_cross_entropy_with_logits(logit, target, reduction="none") * valid).sum(dim=(1, 2)) / area
    probability = logit.sigmoid() * valid
    overlap = (probability * target).sum(dim=(1, 2))
    # One cell of smoothing: an empty target then asks for an empty map instead of dividing by zero.
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(1, 2)) + (target * valid).sum(dim=(1, 2)) + 1)
    return weights.bce * bce + weights.dice * dice


def image_loss(
    maps: Maps, target: Tensor, valid: Tensor, absolute: Tensor | None = None, relative: Tensor | None = None, cells: int = 16
) -> Tensor:
    """BCE of each map's `cells` strongest cells, as one logit, against whether the picture holds a defect; mean over images.

    The paper has no such term. The mean over all cells hardly notices a few false ones in a normal picture, but the verdict does: a mask is
    empty only where no cell exceeds the threshold.

    Args: as in mask_loss.
    """
    label = (target.amax(dim=(1, 2)) > TOUCHED).float()  # [B]
    total = torch.zeros(len(target), device=target.device)

    def alone(logit: Tensor) -> Tensor:
        inside = logit.float().masked_fill(valid == 0, float("-inf")).flatten(1)
        count = min(cells, int(valid.sum(dim=(1, 2)).min()))
        return F.binary_cross_entropy_with_logits(inside.topk(count).values.mean(dim=1), label, reduction="none")

    if maps.logit_relative is not None:
        contrast = alone(maps.logit_relative[:, 1] - maps.logit_relative[:, 0])
        total = total + (contrast if relative is None else contrast * relative)
    if maps.logit_absolute is not None:
        found = alone(maps.logit_absolute)
        total = total + (found if absolute is None else found * absolute)
    return total.mean()
