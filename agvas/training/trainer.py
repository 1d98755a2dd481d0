"""Tunes an AG-VAS as the paper does: its objective, its trained parts, any source of samples.

What is particular to the paper stands in objective.py and adaptation.py, what is particular to one machine in loop.py. The folder holds
settings, state, logs and, at the end, what was trained (`trained/`) and a whole checkpoint (`checkpoint/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agvas.checkpoint import save
from agvas.model import AGVAS
from agvas.training.adaptation import Adaptation, TrainedParts
from agvas.training.batch import Batch, collate
from agvas.training.feature_cache import FeatureCache
from agvas.training.loop import LoopSettings, Source, is_main_process, keep_settings, run
from agvas.training.objective import Objective, ObjectiveSettings
from agvas.training.sample import TrainingSample


@dataclass(frozen=True)
class TuningSettings:
    """The defaults are the paper's."""

    loop: LoopSettings = LoopSettings()
    parts: TrainedParts = TrainedParts()
    objective: ObjectiveSettings = ObjectiveSettings()


class _CachedObjective(Objective):
    """The objective on features that are kept from step to step."""

    def __init__(self, model: AGVAS, settings: ObjectiveSettings, cache: FeatureCache) -> None:
        super().__init__(model, settings)
        self._cache = cache

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(batch, step, self._cache.features(self.model, batch))


def tune(
    model: AGVAS,
    source: Source,
    settings: TuningSettings,
    folder: Path,
    device: str = "cpu",
    workers: int = 1,
    cache: Path | None = None,
    facts: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> AGVAS:
    """Train `model` on `source`, or go on where `folder` stopped; the merged model, also written to folder/checkpoint.

    Args:
        cache: folder for the frozen encoders' features; None computes them at every step.
        facts: what else makes this run this run (which base, which mixture); kept, and compared on resume.
        dtype: of the checkpoint written (None: as it was trained).

    Raises:
        ValueError: the folder holds another run; settings that cannot be.
        Diverged: see loop.py.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        keep_settings(folder / "run.json", {"model": model.config.name, **asdict(settings), **(facts or {})})
    adaptation = Adaptation(model, settings.parts, settings.loop.seed)
    model.train()
    if not settings.parts.encoders:  # frozen: no dropout, no batch statistics
        model.pixel_encoder.eval()
        model.semantic_encoder.eval()
    if cache is None:
        objective = Objective(model, settings.objective)
    else:
        objective = _CachedObjective(model, settings.objective, FeatureCache(cache, model))
    make_batch = partial(_collate, model=model)
    run(objective, adaptation.groups(), source, make_batch, settings.loop, folder, device, workers=workers)
    if is_main_process():
        adaptation.save(folder / "trained")
    merged = adaptation.merge()
    if is_main_process():
        save(merged, folder / "checkpoint", dtype=dtype)
    return merged


def _collate(samples: Sequence[TrainingSample], model: AGVAS) -> Batch:
    return collate(samples, model.config, model.prompt_encoder)
