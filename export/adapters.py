"""One adapter per stage: the reference's modules behind the contract's names, shaped for a graph.

The model knows nothing of deployment; what export needs stands here. Only the language stage differs from the reference in how it
computes: one graph for every mode, whose last layer, norm and head work on the rows that are asked for. A module's inputs
and outputs stand in the contract's order.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionLayer

from agvas.config import AGVASConfig
from agvas.model import AGVAS
from agvas.stem import StemmedVisionEncoder
from runtime.contract import STAGES


class PixelEncoderStage(nn.Module):
    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        self.encoder = model.pixel_encoder
        if isinstance(self.encoder, StemmedVisionEncoder):
            # Batch norms are folded in fp32, before any precision is lowered; into a copy, since the reference stays as it is.
            self.encoder = copy.deepcopy(self.encoder)
            self.encoder.patch_embed.fold()

    def forward(self, pixel_image: Tensor) -> tuple[Tensor]:
        return (self.encoder(pixel_image).last_hidden_state,)

    def for_graph(self) -> PixelEncoderStage:
        """As it is exported, over the same weights; what it is compared with computes as SAM does."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if isinstance(self.encoder, SamVisionEncoder):
            twin.encoder = without_padded_products(self.encoder)
        return twin


class WindowLayer(SamVisionLayer):
    """SAM's layer of windowed attention, whose linear layers see the picture's tokens alone.

    Windows that do not divide the grid are filled up with zeros before queries, keys and values are made of them, which are then the
    biases, and what attention makes of the filling is projected and thrown away. Here both products stand outside the windows, which are
    filled up with the biases: of ViT-H's 4,900 tokens they leave out 804. The result is the same, sum by sum.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        attention, size = self.attn, hidden.shape[1:3]
        projected = attention.qkv(self.layer_norm1(hidden))  # [B, G, G, 3 D]
        filling = torch.zeros_like(projected[0, 0, 0]) if attention.qkv.bias is None else attention.qkv.bias  # [3 D]
        for axis in (1, 2):
            shape = list(projected.shape)
            shape[axis] = -shape[axis] % self.window_size
            projected = torch.cat([projected, filling.expand(shape)], axis)
        windows, padded = self.window_partition(projected, self.window_size)  # [n, w, w, 3 D]
        mixed = self.window_unpartition(_attend(attention, windows), self.window_size, padded, size)
        hidden = hidden + attention.proj(mixed)
        return hidden + self.mlp(self.layer_norm2(hidden))


def _attend(attention: nn.Module, projected: Tensor) -> Tensor:
    """SAM's attention with relative positions in windows [n, w, w, 3 D] of queries, keys and values: [n, w, w, D]."""
    count, height, width, _ = projected.shape
    size, heads = (height, width), attention.num_attention_heads
    query, key, value = projected.reshape(count, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [n, heads, w w, C]
    bias = attention.get_decomposed_rel_pos(query.flatten(0, 1), attention.rel_pos_h, attention.rel_pos_w, size, size)
    bias = bias.reshape(count, heads, height * width, height * width)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return mixed.transpose(1, 2).reshape(count, height, width, -1)


def without_padded_products(encoder: SamVisionEncoder) -> SamVisionEncoder:
    """The encoder with a WindowLayer wherever windows have to be filled up, over the same weights; itself where they divide the grid."""
    grid = encoder.config.image_size // encoder.config.patch_size
    if all(grid % (layer.window_size or grid) == 0 for layer in encoder.layers):
        return encoder
    twin = copy.copy(encoder)
    twin._modules = dict(encoder._modules)
    twin.layers = nn.ModuleList(_window_layer(layer) if layer.window_size else layer for layer in encoder.layers)
    return twin


def _window_layer(layer: SamVisionLayer) -> SamVisionLayer:
    twin = copy.copy(layer)
    twin.__class__ = WindowLayer
    return twin


class SemanticEncoderStage(nn.Module):
    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        self.encoder = model.semantic_encoder

    def forward(self, semantic_image: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(semantic_image)


class SpamStage(nn.Module):
    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        assert model.spam is not None  # see export.bundle: an ablation is refused
        self.spam = model.spam

    def forward(self, semantic_features: Tensor, pixel_embeddings: Tensor) -> tuple[Tensor]:
        return (self.spam(semantic_features, pixel_embeddings),)


class LanguageStage(nn.Module):
    """Qwen2 with an explicit past and row selection.

    Every layer's keys and values cover all tokens; queries of the last layer, its MLP, the final norm and the head cover `rows`
    alone, since nothing else of them is ever read. A row sees keys up to its own position in past plus this call.

    Scores are of the keys less their mean, which moves all scores of a query alike and so nothing that softmax gives (SageAttention,
    arXiv 2410.02367, §4.2). Qwen2's keys have biases of some hundreds in their slow channels: what they add to every score overflows
    fp16 and leaves bf16 no bits for the rest, where an engine stores scores (transformers' pull request 33317).
    """

    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        self.layers = model.language.model.layers
        self.norm = model.language.model.norm
        self.head = model.language.lm_head
        self.rotary = model.language.model.rotary_emb

    def forward(
        self, input_embeddings: Tensor, positions: Tensor, past_keys: Tensor, past_values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = input_embeddings  # [B, N, D]
        cos, sin = self.rotary(hidden, positions)  # [B, N, C]
        tokens, past = hidden.shape[1], past_keys.shape[3]
        every = torch.arange(tokens, device=hidden.device)
        keys_seen = torch.arange(past + tokens, device=hidden.device)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            asking = rows if last else every  # [Q]
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            key = self._heads(attention.k_proj(normed), attention.head_dim)  # [B, H, N, C]
            value = self._heads(attention.v_proj(normed), attention.head_dim)
            if last:
                normed, hidden = normed.index_select(1, rows), hidden.index_select(1, rows)
            query = self._heads(attention.q_proj(normed), attention.head_dim)  # [B, heads, Q, C]
            query, _ = apply_rotary_pos_emb(query, query, cos.index_select(1, asking), sin.index_select(1, asking))
            key, _ = apply_rotary_pos_emb(key, key, cos, sin)
            key = torch.cat([past_keys[index], key], dim=2)  # [B, H, K + N, C]
            value = torch.cat([past_values[index], value], dim=2)
            hidden_from_row = keys_seen[None, :] > asking[:, None] + past  # [Q, K + N]
            centred = key - key.mean(dim=2, keepdim=True)
            scores = query @ repeat_kv(centred, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
            scores = scores.masked_fill(hidden_from_row, torch.finfo(torch.float16).min)
            mixed = scores.softmax(dim=-1) @ repeat_kv(value, attention.num_key_value_groups)  # [B, heads, Q, C]
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            keys.append(key)
            values.append(value)
        states = self.norm(hidden)  # [B, R, D]
        return states, self.head(states), torch.stack(keys), torch.stack(values)

    @staticmethod
    def _heads(tokens: Tensor, width: int) -> Tensor:
        return tokens.unflatten(-1, (-1, width)).transpose(1, 2)


class MaskDecoderStage(nn.Module):
    def __init__(self, model: AGVAS) -> None:
        super().__init__()
        self.decoder = model.mask_decoder

    def forward(self, anchor_states: Tensor, pixel_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.decoder(anchor_states, pixel_embeddings)
        return maps.probability_absolute, maps.probability_relative, maps.anomaly_map


ADAPTERS: dict[str, type[nn.Module]] = {
    "pixel_encoder": PixelEncoderStage,
    "semantic_encoder": SemanticEncoderStage,
    "spam": SpamStage,
    "language": LanguageStage,
    "mask_decoder": MaskDecoderStage,
}


# What an adapter calls the parts of AGVAS that it holds, for every tensor of them: a linear layer is
# `language.model.layers.0.mlp.up_proj` in a checkpoint and in a plan, and `layers.0.mlp.up_proj` in its stage's graph.
PARTS: dict[str, dict[str, str]] = {
    "pixel_encoder": {"encoder": "pixel_encoder"},
    "semantic_encoder": {"encoder": "semantic_encoder"},
    "spam": {"spam": "spam"},
    "language": {
        "layers": "language.model.layers",
        "norm": "language.model.norm",
        "head": "language.lm_head",
        "rotary": "language.model.rotary_emb",
    },
    "mask_decoder": {"decoder": "mask_decoder"},
}


def name_in_stage(stage: str, name: str) -> str | None:
    """A module's name in its stage's graph, from its name in AGVAS; None for a module of another stage."""
    for ours, whole in PARTS[stage].items():
        if name == whole or name.startswith(f"{whole}."):
            return ours + name[len(whole) :]
    return None


def axis_sizes(config: AGVASConfig) -> dict[str, int]:
    """Size of every axis of the contract that the checkpoint fixes."""
    return {
        "S": config.pixel.image_size,
        "s": config.semantic.image_size,
        "P": config.pixel.output_width,
        "G": config.pixel.grid,
        "T": config.semantic.tokens,
        "Ds": config.semantic.width,
        "D": config.language.width,
        "L": config.language.layers,
        "H": config.language.key_value_heads,
        "C": config.language.width // config.language.heads,
        "V": config.language.vocabulary,
        "M": 4 * config.pixel.grid,
    }


def example_inputs(stage: str, sizes: dict[str, int], free: dict[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of a stage; `free` gives the axes that a checkpoint leaves open (B, N, K, R). Positions and rows count up."""
    generator = torch.Generator().manual_seed(seed)
    axes = sizes | free
    tensors = []
    for spec in STAGES[stage].inputs:
        shape = [axis if isinstance(axis, int) else axes[axis] for axis in spec.shape]
        if spec.name == "positions":
            tensors.append((torch.arange(shape[1]) + free["K"]).repeat(shape[0], 1))
        elif spec.name == "rows":
            tensors.append(torch.arange(free["N"] - free["R"], free["N"]))
        else:
            tensors.append(torch.randn(shape, generator=generator))
    return tuple(tensors)
