"""Other people's names for the tensors of an AG-VAS: published bases, pixel encoders and training states, by rule.

A rule says what a name becomes, or that nothing here uses it; a name that no rule knows is kept aside, so that a checkpoint of another
kind is told from one that fits. Names alone: where the files lie and what is done to the values stands in parts.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from agvas.weights import LazyTensor

Rules = tuple[tuple[str, str | None], ...]  # (pattern, replacement); None: not used by an AG-VAS

# Hugging Face's LLaVA-OneVision and LLaVA 1.5. Transformers before 4.52 wrote language_model.model.* and later ones, at times,
# model.language_model.*; before 5 the tower's names had vision_model in them.
_TOWER = r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"
LLAVA: Rules = (
    (r"^.*\.(?:position_ids|rotary_emb\.inv_freq)$", None),  # buffers that older versions wrote, too
    (_TOWER + r"(embeddings|pre_layrnorm|encoder)\.", r"semantic_encoder.\1."),
    (_TOWER + r"(?:post_layernorm|head)\.", None),  # features are taken before them
    (r"^(?:model\.)?image_newline$", None),  # of anyres packing, which 384 px do without
    (r"^(?:model\.)?multi_modal_projector\.", "semantic_encoder.projector."),
    (r"^(?:language_model\.)?lm_head\.", "language.lm_head."),
    (r"^language_model\.model\.", "language.model."),
    (r"^model\.language_model\.(?:model\.)?", "language.model."),
)

# segment-anything's own files: sam_vit_h_4b8939.pth, sam_vit_l_0b3195.pth, sam_vit_b_01ec64.pth.
SAM: Rules = (
    (r"^image_encoder\.patch_embed\.proj\.", "pixel_encoder.patch_embed.projection."),
    (r"^image_encoder\.pos_embed$", "pixel_encoder.pos_embed"),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"pixel_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.(\d+)\.(attn|mlp)\.", r"pixel_encoder.layers.\1.\2."),
    (r"^image_encoder\.neck\.0\.", "pixel_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "pixel_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "pixel_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "pixel_encoder.neck.layer_norm2."),
    (r"^(?:prompt_encoder|mask_decoder)\.", None),
)

# transformers' SamModel.
SAM_MODEL: Rules = (
    (r"^(?:sam\.)?vision_encoder\.", "pixel_encoder."),
    (r"^(?:sam\.)?(?:prompt_encoder|mask_decoder|shared_image_embedding)\.", None),
)

# transformers' CLIP, SigLIP, DINOv2 and DINOv3 in SAM's place, by themselves or the towers of two.
VIT: Rules = (
    (r"^.*\.position_ids$", None),
    (r"^(?:text_model|text_projection|visual_projection|logit_scale|logit_bias)", None),
    (r"^(?:vision_model\.)?(?:head|classifier)\.", None),
    (r"^(?:dinov2\.)?(encoder\.layer\.\d+\.attention)\.attention\.query\.", r"pixel_encoder.backbone.\1.q_proj."),
    (r"^(?:dinov2\.)?(encoder\.layer\.\d+\.attention)\.attention\.key\.", r"pixel_encoder.backbone.\1.k_proj."),
    (r"^(?:dinov2\.)?(encoder\.layer\.\d+\.attention)\.attention\.value\.", r"pixel_encoder.backbone.\1.v_proj."),
    (r"^(?:dinov2\.)?(encoder\.layer\.\d+\.attention)\.output\.dense\.", r"pixel_encoder.backbone.\1.o_proj."),
    (r"^(?:dinov2\.)?(encoder\.layer\.\d+\.mlp)\.weights_out\.", r"pixel_encoder.backbone.\1.down_proj."),
    (r"^layer\.(\d+)\.", r"pixel_encoder.backbone.model.layer.\1."),
    (
        r"^(?:vision_model\.|dinov2\.)?(embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|norm|model)\.",
        r"pixel_encoder.backbone.\1.",
    ),
)

# What agvas-train writes: our own names, behind the prefixes of the modules that a training state wraps the model in.
_PARTS = r"(pixel_encoder|semantic_encoder|spam|language|mask_decoder)\."
TRAINED: Rules = ((r"^(?:module\.)?(?:model\.)?" + _PARTS, r"\1."),)

# peft's names, its own prefix taken off: of our language model by itself, or of one inside a LLaVA.
ADAPTER: Rules = (
    *TRAINED,
    (r"^language_model\.(?:model\.)?(layers|embed_tokens|norm)\.", r"language.model.\1."),
    (r"^model\.language_model\.(?:model\.)?", "language.model."),
    (r"^(?:language_model\.)?lm_head(?=\.|$)", "language.lm_head"),
    (r"^model\.(layers|embed_tokens|norm)\.", r"language.model.\1."),
    *LLAVA,
)


@dataclass(frozen=True)
class Translated:
    """Tensors by the names of AGVAS.state_dict(); the names not used, and those that no rule knows, as the file has them; and by our
    names, the file's."""

    tensors: dict[str, LazyTensor]
    unused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)


def translate(tensors: Mapping[str, LazyTensor], rules: Rules) -> Translated:
    """Rename by the first rule that fits each name.

    Raises:
        ValueError: two names that become the same one.
    """
    ours: dict[str, LazyTensor] = {}
    origins: dict[str, str] = {}
    unused, unknown = [], []
    for name, tensor in tensors.items():
        found, new = rename(name, rules)
        if not found:
            unknown.append(name)
        elif new is None:
            unused.append(name)
        elif new in ours:
            raise ValueError(f"{origins[new]} and {name} are both {new}; the files of two checkpoints are mixed, give those of one")
        else:
            ours[new], origins[new] = tensor, name
    return Translated(ours, tuple(unused), tuple(unknown), origins)


def rename(name: str, rules: Rules) -> tuple[bool, str | None]:
    """(whether a rule knows the name, what it becomes: None where it is not used)."""
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            return True, None if replacement is None else match.expand(replacement) + name[match.end() :]
    return False, None


def beyond(tensors: Mapping[str, LazyTensor], prefix: str, layers: int) -> set[str]:
    """Names of the layers `prefix`N. from `layers` on: those behind the one whose output is taken."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return {name for name in tensors if (match := pattern.match(name)) and int(match[1]) >= layers}
