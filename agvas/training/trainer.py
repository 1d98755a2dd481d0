"""Tunes an AG-VAS as the paper does: its objective, its trained parts, any source of samples.

What is particular to the paper stands in objective.py and adaptation.py, what is particular to one machine in loop.py. The folder holds
settings, state, logs and, at the end, what was trained (`trained/`) and a whole checkpoint (`checkpoint/`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agvas.checkpoint import save
from agvas.model import AGVAS
from agvas.training.adaptation import Adaptation, TrainedParts
from agvas.training.batch import collate
from agvas.training.feature_cache import FeatureCache
from agvas.training.loop import LoopSettings, Source, run
from agvas.training.objective import Objective, ObjectiveSettings
from agvas.training.processes import is_main_process


@dataclass(frozen=True)
class TuningSettings:
    """The defaults are the paper's."""

    loop: LoopSettings = LoopSettings()
    parts: TrainedParts = TrainedParts()
    objective: ObjectiveSettings = ObjectiveSettings()


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
        Diverged: see state.py.
    """
    if cache is not None and model.config.pixel.kind != "sam":
        kind = model.config.pixel.kind
        raise ValueError(f"feature cache: expected a frozen pixel encoder, got {kind} with a neck that learns; leave it out")
    adaptation = Adaptation(model, settings.parts, settings.loop.seed)
    model.train()
    if not settings.parts.encoders:  # frozen: no dropout, no batch statistics
        model.pixel_encoder.eval()
        model.semantic_encoder.eval()
    for layer in model.modules():  # a batch of eight whole pictures has other statistics than what a stem was pretrained on, and noisy ones
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    objective = Objective(model, settings.objective, None if cache is None else FeatureCache(cache, model))
    run(
        objective,
        adaptation.groups(),
        source,
        lambda samples: collate(samples, model.config, model.prompt_encoder),
        settings.loop,
        folder,
        device,
        workers=workers,
        facts={"model": model.config.name, "parts": asdict(settings.parts), "objective": asdict(settings.objective), **(facts or {})},
    )
    if is_main_process():
        adaptation.save(folder / "trained")
    merged = adaptation.merge()
    if is_main_process():
        save(merged, folder / "checkpoint", dtype=dtype)
    return merged

