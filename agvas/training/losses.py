"""The paper's objective (§3.2, eq. 9-11): cross-entropy of the answer, and BCE plus Dice of each anchor's map.

Padding of the square image counts in no term. Means are over images, so that a large picture weighs no more than a small one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agvas.mask_decoder import Maps


@dataclass(frozen=True)
class MaskLossWeights:
    """Weights of the two mask terms; the defaults are the paper's."""

    bce: float = 0.5
    dice: float = 2.0


def text_loss(logits: Tensor, answer: tuple[int, ...]) -> Tensor:
    """Cross-entropy over all answer tokens, anchors included (eq. 9). logits: [B, A, V]."""
    target = torch.tensor(answer, device=logits.device).expand(logits.shape[0], -1)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def mask_loss(maps: Maps, target: Tensor, valid: Tensor, weights: MaskLossWeights) -> Tensor:
    """Sum over the three anchors of weighted BCE and Dice (eq. 10); the normal anchor's target is the complement.

    Args:
        target: [B, M, M], the share of each cell that is anomalous, 0..1.
        valid: [B, M, M], 1 inside the picture and 0 in the padding.
    """
    contrast = maps.logit_relative[:, 1] - maps.logit_relative[:, 0]  # softmax over two is a sigmoid of their difference
    anchors = ((contrast, target), (-contrast, 1 - target), (maps.logit_absolute, target))  # ANO, NOR, SEG
    return torch.stack([anchor_loss(logit, wanted, valid, weights) for logit, wanted in anchors]).sum()


def anchor_loss(logit: Tensor, target: Tensor, valid: Tensor, weights: MaskLossWeights) -> Tensor:
    """Weighted BCE and Dice of one logit map [B, M, M]."""
    logit = logit.float()
    area = valid.sum(dim=(1, 2))
    bce = (F.binary_cross_entropy_with_logits(logit, target, reduction="none") * valid).sum(dim=(1, 2)) / area
    probability = logit.sigmoid() * valid
    overlap = (probability * target).sum(dim=(1, 2))
    # One cell of smoothing: an empty target then asks for an empty map instead of dividing by zero.
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(1, 2)) + (target * valid).sum(dim=(1, 2)) + 1)
    return (weights.bce * bce + weights.dice * dice).mean()
