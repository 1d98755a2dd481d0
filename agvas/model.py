"""AG-VAS in PyTorch: the reference that everything exported is measured against (paper §3.1).

`forward` is the training pass with a given answer; `segment` is inference as the paper does it: greedy generation, then the mask
from the states of the anchors that were said. It knows nothing of deployment: no row selection, no drafts, no exported shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from agvas.config import AGVASConfig
from agvas.encoders import SemanticEncoder, language_model, pixel_encoder
from agvas.mask_decoder import Maps, MaskDecoder
from agvas.spam import SPAM
from runtime import preprocess
from runtime.prompts import DIRECT, Prompt, PromptEncoder


class Features(NamedTuple):
    """What the two encoders see in a batch of images."""

    pixel_embeddings: Tensor  # [B, P, G, G]
    semantic_features: Tensor  # [B, T, Ds]
    image_embeddings: Tensor  # [B, T, D]


class Vision(NamedTuple):
    """What the image contributes: all a language pass and a mask decoder need of it."""

    pixel_embeddings: Tensor  # [B, P, G, G]
    image_embeddings: Tensor  # [B, T, D]
    aligned_embeddings: Tensor | None  # [B, T, D]; None in a model without SPAM (an ablation)


class ForwardOutput(NamedTuple):
    """Answer logits and maps of a pass with given answers, the longest of A tokens."""

    logits: Tensor  # [B, A, V]: position i predicts answer token i; of no meaning behind a shorter answer's end
    anchor_states: Tensor  # [B, K, D], K anchors
    maps: Maps  # of no meaning where the answer held no anchors


@dataclass(frozen=True)
class Segmented:
    """The reference's result on one image.

    Attributes:
        mask: bool [H, W], cut as the checkpoint says (runtime.masking).
        anomaly_map: float32 [H, W] in 0..1.
        score: the map's maximum; the image is anomalous when it exceeds the threshold, that is when the mask is not empty.
        text: the answer.
        answer_ids: its tokens, end token included when it was reached.
        anchor_states: float32 [K, D] (K = 3 but in an ablation), None when the answer lacks an anchor (mask and map are then empty).
        anchor_groups: complete groups of anchors in the answer; the first makes the mask.
        truncated: the answer stopped at the length limit, not at its end.
    """

    mask: np.ndarray
    anomaly_map: np.ndarray
    score: float
    text: str
    answer_ids: tuple[int, ...]
    anchor_states: np.ndarray | None
    anchor_groups: int
    truncated: bool


class AGVAS(nn.Module):
    """Pixel encoder, semantic encoder, SPAM, language model and mask decoder, composed as in the paper's figure 3."""

    def __init__(self, config: AGVASConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.prompt_encoder = PromptEncoder(tokenizer, config.prompts)
        self.pixel_encoder = pixel_encoder(config.pixel)
        self.semantic_encoder = SemanticEncoder(config)
        self.spam = None
        if config.spam is not None:
            self.spam = SPAM(config.semantic.width, config.pixel.output_width, config.spam.width, config.spam.heads, config.language.width)
        self.language = language_model(config.language)
        self.mask_decoder = MaskDecoder(config.mask_decoder, config.language.width, config.pixel.output_width, config.pixel.grid)

    def encode(self, pixel_image: Tensor, semantic_image: Tensor) -> Features:
        """Both encoders: [B, 3, S, S] and [B, 3, s, s] → features."""
        return Features(self.pixel_encoder(pixel_image).last_hidden_state, *self.semantic_encoder(semantic_image))

    def align(self, features: Features) -> Vision:
        """SPAM (eq. 1-2)."""
        aligned = None if self.spam is None else self.spam(features.semantic_features, features.pixel_embeddings)
        return Vision(features.pixel_embeddings, features.image_embeddings, aligned)

    def see(self, pixel_image: Tensor, semantic_image: Tensor) -> Vision:
        """Both encoders and SPAM: [B, 3, S, S] and [B, 3, s, s] → embeddings."""
        return self.align(self.encode(pixel_image, semantic_image))

    def input_embeddings(self, vision: Vision, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Prefix, image tokens, aligned tokens, suffix, answer of each image: [B, N, D] (eq. 3).

        Shorter rows end in end tokens: behind everything that counts, a causal model needs no mask for them.
        """
        answers = answers or [()] * len(prompts)
        table = self.language.get_input_embeddings()

        def embed(rows: Sequence[tuple[int, ...]]) -> Tensor:
            longest = max(len(row) for row in rows)
            ids = [(*row, *[self.prompt_encoder.end_id] * (longest - len(row))) for row in rows]
            return table(torch.tensor(ids, dtype=torch.long, device=vision.image_embeddings.device))

        parts = [
            embed([prompt.prefix for prompt in prompts]),
            vision.image_embeddings,
            vision.aligned_embeddings,
            embed([prompt.suffix + answer for prompt, answer in zip(prompts, answers, strict=True)]),
        ]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def forward(
        self,
        pixel_image: Tensor,
        semantic_image: Tensor,
        prompts: Sequence[Prompt],
        answers: Sequence[tuple[int, ...]],
        features: Features | None = None,
    ) -> ForwardOutput:
        """One pass with given answers (teacher forcing).

        Args:
            answers: of each image, ending with the end token. One with a mask to learn holds all anchors.
            features: what `encode` gave for these images, where it was kept; the images are then not looked at.
        """
        vision = self.align(self.encode(pixel_image, semantic_image) if features is None else features)
        logits, anchor_states = self.read(vision, prompts, answers)
        return ForwardOutput(logits, anchor_states, self.mask_decoder(anchor_states, vision.pixel_embeddings))

    def read(self, vision: Vision, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """The language model's part of `forward`: logits [B, A, V] and anchor states [B, K, D], as in ForwardOutput."""
        embeddings = self.input_embeddings(vision, prompts, answers)
        states = self.language.model(inputs_embeds=embeddings).last_hidden_state  # [B, N, D]
        before = embeddings.shape[1] - max(len(prompt.suffix + answer) for prompt, answer in zip(prompts, answers, strict=True))
        first = torch.tensor([before + len(prompt.suffix) for prompt in prompts], device=states.device)  # answers' first tokens
        steps = torch.arange(max(map(len, answers)), device=states.device)
        batch = torch.arange(len(prompts), device=states.device)[:, None]
        predicting = (first[:, None] - 1 + steps).clamp(max=states.shape[1] - 1)  # [B, A]
        logits = self.language.lm_head(states[batch, predicting])  # [B, A, V]
        nowhere = (0,) * len(self.prompt_encoder.anchor_ids)
        anchors = torch.tensor([self.prompt_encoder.find_anchors(answer) or nowhere for answer in answers], device=states.device)
        anchor_states = states[batch, first[:, None] + anchors + self.prompt_encoder.state_shift]  # [B, K, D]
        return logits, anchor_states

    @torch.inference_mode()
    def segment(
        self,
        image: np.ndarray,
        instruction: str | None = None,
        mode: str = DIRECT,
        *,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Segmented:
        """Segment one picture as the paper does: generate greedily, decode the mask from the anchors' last-layer states.

        Args:
            image: uint8 RGB [H, W, 3].
            instruction: what to ask; None for the mode's default.
            normal_state: for describe-then-segment-plus, a sentence on what a normal object looks like.
            max_new_tokens: longest answer; None for the checkpoint's limit.

        Raises:
            RequestError: see PromptEncoder.encode.
        """
        prompt = self.prompt_encoder.encode(instruction, mode, normal_state, max_new_tokens)
        settings = self.config.preprocessing
        pixel_image, semantic_image, frame = preprocess.encoder_images(image, settings)
        vision = self.see(self._batch(pixel_image), self._batch(semantic_image))
        ids, states = self.generate(vision, prompt)
        answer = self.prompt_encoder.read(ids)
        anomaly_map, anchor_states = np.zeros(image.shape[:2], np.float32), None
        if answer.anchors is not None:
            chosen = states[[i + 1 + self.prompt_encoder.state_shift for i in answer.anchors]]  # [K, D]
            maps = self.mask_decoder(chosen.unsqueeze(0), vision.pixel_embeddings)
            anomaly_map = preprocess.restore(maps.anomaly_map[0].float().cpu().numpy(), frame)
            anchor_states = chosen.float().cpu().numpy()
        # Without anchors nothing was found, whatever the threshold: the map's zeros exceed none.
        mask = self.config.mask_decoder.mask_rule.mask(anomaly_map)
        score = float(anomaly_map.max())
        return Segmented(mask, anomaly_map, score, answer.text, ids, anchor_states, answer.anchor_groups, answer.truncated)

    def generate(self, vision: Vision, prompt: Prompt) -> tuple[tuple[int, ...], Tensor]:
        """Greedy answer of one image and the last-layer states behind it: row i predicted answer token i, and stands at token i - 1."""
        output = self.language.generate(
            inputs_embeds=self.input_embeddings(vision, [prompt]),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=self.prompt_encoder.end_id,
            pad_token_id=self.prompt_encoder.end_id,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        states = torch.cat([step[-1][0, -1:] for step in output.hidden_states])  # [A, D]
        return tuple(output.sequences[0].tolist()), states

    def _batch(self, image: np.ndarray) -> Tensor:
        parameter = next(self.parameters())
        return torch.from_numpy(image).to(parameter.device, parameter.dtype).unsqueeze(0)
