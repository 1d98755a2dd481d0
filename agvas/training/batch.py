"""Samples put together into what one step computes with: both encoders' images, targets on the decoder's grid, token ids.

Images are preprocessed exactly as the runtime does it. It draws nothing and augments nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agvas.config import AGVASConfig
from agvas.training.sample import TrainingSample
from runtime import preprocess
from runtime.prompts import Prompt, PromptEncoder


@dataclass(frozen=True)
class Batch:
    """B samples; M is the side of the decoder's maps, 4 G."""

    pixel_image: Tensor  # [B, 3, S, S]
    semantic_image: Tensor  # [B, 3, s, s]
    target: Tensor  # [B, M, M] share of each cell that is anomalous
    valid: Tensor  # [B, M, M] 1 inside the picture
    absolute: Tensor  # [B] 1 where [SEG] is supervised
    relative: Tensor  # [B] 1 where [NOR] and [ANO] are
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        return Batch(**{name: part.to(device) if isinstance(part, Tensor) else part for name, part in vars(self).items()})


def collate(samples: Sequence[TrainingSample], config: AGVASConfig, prompt_encoder: PromptEncoder) -> Batch:
    """The batch of these samples.

    Raises:
        ValueError: an answer to a sample with a mask lacks an anchor, or the runtime would refuse the instruction; names the picture.
    """
    images = [_image(sample, config) for sample in samples]
    answers = tuple(prompt_encoder.encode_answer(sample.answer) for sample in samples)
    for sample, answer in zip(samples, answers):
        if sample.mask is not None and prompt_encoder.find_anchors(answer) is None:
            anchors = ", ".join(config.prompts.anchors)
            raise ValueError(f"{_origin(sample)}the answer to a sample with a mask must hold {anchors}, got {sample.answer!r}")
    pixel, semantic, target, valid = (torch.from_numpy(np.stack(column)) for column in zip(*images, strict=True))
    return Batch(
        pixel_image=pixel,
        semantic_image=semantic,
        target=target,
        valid=valid,
        absolute=torch.tensor([float(sample.mask is not None) for sample in samples]),
        relative=torch.tensor([float(sample.mask is not None and sample.relative) for sample in samples]),
        prompts=tuple(_prompt(sample, prompt_encoder) for sample in samples),
        answers=answers,
    )


def _prompt(sample: TrainingSample, prompt_encoder: PromptEncoder) -> Prompt:
    try:
        return prompt_encoder.encode(sample.instruction)
    except ValueError as error:  # the runtime's RequestError
        raise ValueError(f"{_origin(sample)}{error}; it is {sample.instruction!r:.200}") from error


def _origin(sample: TrainingSample) -> str:
    return "" if sample.origin is None else f"{sample.origin}: "


def _image(sample: TrainingSample, config: AGVASConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """pixel_image, semantic_image, target, valid."""
    pixel, semantic, frame = preprocess.encoder_images(sample.image, config.preprocessing)
    side = 4 * config.pixel.grid
    target, valid = np.zeros((side, side), np.float32), np.zeros((side, side), np.float32)
    rows = max(1, round(side * frame.resized_height / frame.padded_size))
    columns = max(1, round(side * frame.resized_width / frame.padded_size))
    if sample.mask is not None:
        shares = Image.fromarray(sample.mask.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX)
        target[:rows, :columns] = np.asarray(shares)
    valid[:rows, :columns] = 1
    return pixel, semantic, target, valid
