"""SPAM, the Semantic-Pixel Alignment Module (paper §3.1, eq. 1-2).

Semantic features ask, pixel embeddings answer: multi-head cross-attention at one common width, then a linear map to the language
model's width so that the aligned tokens can stand in its input. Without norms or a residual: the paper states neither.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SPAM(nn.Module):
    """Aligned embeddings [B, T, D] from semantic features [B, T, Ds] and pixel embeddings [B, P, G, G]."""

    def __init__(self, semantic_width: int, pixel_width: int, width: int, heads: int, output_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.semantic_map = nn.Linear(semantic_width, width)
        self.pixel_map = nn.Linear(pixel_width, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, output_width)

    def forward(self, semantic_features: Tensor, pixel_embeddings: Tensor) -> Tensor:
        semantic = self.semantic_map(semantic_features)  # [B, T, W]
        pixel = self.pixel_map(pixel_embeddings.flatten(2).transpose(1, 2))  # [B, G·G, W]
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(semantic)), self._heads(self.key(pixel)), self._heads(self.value(pixel))
        )  # [B, heads, T, W / heads]
        return self.output(attended.transpose(1, 2).flatten(2))  # [B, T, D]

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
