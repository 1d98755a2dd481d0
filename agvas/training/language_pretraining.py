"""Language pretraining: what a small AG-VAS gets in place of a pretrained LLaVA, from procedural samples alone.

The language model and the semantic encoder learn to read the questions and to answer them in the words of the samples' descriptions, with
image tokens and without aligned ones: there are none before AG-VAS (paper eq. 3). Tuning alone sees too few answers for that: from random
weights the mode that was asked for is forgotten behind the anchors, where most answers end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from agvas.model import AGVAS, Vision
from agvas.training.batch import Batch
from agvas.training.loop import Group, LoopSettings
from agvas.training.losses import text_loss
from runtime.prompts import MODES


@dataclass(frozen=True)
class LanguagePretrainingSettings:
    """modes: weight of each instruction mode."""

    loop: LoopSettings = LoopSettings(
        steps=400,
        global_batch=32,
        micro_batch=32,
        learning_rate=1e-3,
        warmup_steps=40,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        average_decay=0.997,
    )
    modes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODES, 1.0))


class LanguagePretraining(nn.Module):
    """Semantic encoder and language model of a model; a batch → {"text": loss}."""

    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.model = model
        for parameter in self.learned():
            parameter.requires_grad_(True)

    def learned(self) -> list[nn.Parameter]:
        """A tied head counts once."""
        return [*self.model.semantic_encoder.parameters(), *self.model.language.parameters()]

    def groups(self) -> list[Group]:
        return [Group(self.learned())]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        _, image_embeddings = self.model.semantic_encoder(batch.semantic_image)
        unseen = image_embeddings.new_empty(0)  # no mask is drawn
        logits, _ = self.model.read(Vision(unseen, image_embeddings, None), batch.prompts, batch.answers)
        return {"text": text_loss(logits, batch.answers)}
