"""An AG-VAS under the paper's objective (eq. 11): what the training loop calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from agvas.model import AGVAS
from agvas.training.batch import Batch
from agvas.training.feature_cache import FeatureCache
from agvas.training.losses import MaskLossWeights, check_weights, image_loss, mask_loss, text_loss


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights of the terms; the defaults are the paper's.

    Attributes:
        image: of image_loss, which the paper has not: 0 leaves it out.
        early_mask, early_until: other weights of the mask terms until this step. From scratch Dice alone stalls before there is anything
            to overlap; a pretrained model needs none.
    """

    text: float = 1.0
    mask: MaskLossWeights = MaskLossWeights()
    image: float = 0.0
    early_mask: MaskLossWeights | None = None
    early_until: int = 0

    def __post_init__(self) -> None:
        check_weights("objective", text=self.text, image=self.image)
        if not any((self.text, self.image, self.mask.bce, self.mask.dice)):
            raise ValueError("objective: expected a term with a weight above 0, got none; give text, image, mask.bce or mask.dice one")


class Objective(nn.Module):
    """A batch → {"text": loss, "mask": loss}, with "image" where it is asked for, weighted; with a cache, on the features it keeps from
    step to step."""

    def __init__(self, model: AGVAS, settings: ObjectiveSettings, cache: FeatureCache | None = None) -> None:
        super().__init__()
        self.model, self.settings, self.cache = model, settings, cache

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        settings = self.settings
        features = None if self.cache is None else self.cache.features(self.model, batch)
        weights = settings.early_mask if settings.early_mask is not None and step < settings.early_until else settings.mask
        output = self.model(batch.pixel_image, batch.semantic_image, batch.prompts, batch.answers, features)
        masked = (output.maps, batch.target, batch.valid)
        losses = {
            "text": settings.text * text_loss(output.logits, batch.answers),
            "mask": mask_loss(*masked, weights, batch.absolute, batch.relative),
        }
        if settings.image:
            losses["image"] = settings.image * image_loss(*masked, batch.absolute, batch.relative)
        return losses
