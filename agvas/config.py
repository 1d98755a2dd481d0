"""What an AG-VAS checkpoint is: the sizes of its parts, its prompts and its preprocessing, kept as config.json.

Frozen dataclasses passed whole. Named sizes stand at the end: `ov_7b` is the paper's model, `llava_13b` its other base, `nano` the one
this package ships, `tiny` the one its tests use. No weights here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, replace
from typing import Any

from runtime.masking import MaskRule
from runtime.preprocess import Preprocessing
from runtime.prompts import Prompts

ANCHORS = ("[NOR]", "[ANO]", "[SEG]")
ROLES = ("normal", "anomalous", "segment")
ANSWER = "Sure, it is [NOR][ANO][SEG]."
INSTRUCTION = "Please segment the anomalies in this image."
DESCRIBE = "What anomalies are present in this image? Please describe the anomalies and then output the segmentation map."
INSTRUCTIONS = {
    "direct": INSTRUCTION,
    "describe-then-segment": DESCRIBE,
    "describe-then-segment-plus": DESCRIBE,  # the user's sentence on the normal state comes before it
    "segment-then-explain": "Please segment the anomalies in this image and explain the result.",
}

# EfficientNet-Lite0, the trunk of a pretrained stem: kernel, stride, expansion, channels and blocks of each stage (Tan & Le 2019, table 1;
# Lite leaves out squeeze-and-excitation), channels behind the first convolution, and the stages whose features are taken: the last ones of
# stride 4, 8, 16 and 32.
TRUNK_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
TRUNK_FIRST = 32
TRUNK_TAPS = (1, 2, 4, 6)
STEMS = ("linear", "convolutional", "pretrained")
PIXEL_KINDS = ("sam", "clip", "siglip", "dinov2", "dinov3")
SEMANTIC_KINDS = ("siglip", "clip")
LANGUAGE_KINDS = ("qwen2", "llama")


@dataclass(frozen=True)
class PixelEncoderConfig:
    """SAM's ViT (Kirillov et al. 2023): windowed attention with relative positions, global in `global_layers`, neck to `output_width`.

    Attributes:
        mlp_width: of a gated DINOv2 before its gate takes a third of it (width times mlp_ratio).
        window, global_layers: of SAM alone; the other kinds attend globally.
        stem: "linear", SAM's patch embedding, "convolutional" (agvas/stem.py), or "pretrained", the same beside a trunk that was trained
            on photographs (agvas/trunk.py).
        kind: "sam", or another ViT behind a neck of its own (the paper's table 7, agvas/vision_transformer.py).
        registers: DINOv3's tokens that stand for no patch.
        gated: whether a DINO's MLPs are gated (DINOv2 ViT-G, DINOv3 ViT-H+).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    window: int
    global_layers: tuple[int, ...]
    output_width: int = 256
    stem: str = "linear"
    kind: str = "sam"
    registers: int = 0
    gated: bool = False

    def __post_init__(self) -> None:
        _one_of("pixel.kind", self.kind, PIXEL_KINDS)
        if self.kind != "sam" and self.stem != "linear":
            raise ValueError(f"stem: expected \"linear\" with pixel.kind {self.kind!r}, got {self.stem!r}")
        _one_of("stem", self.stem, STEMS)
        if self.stem == "pretrained" and (self.patch_size != 16 or self.image_size % 64):
            expected = "patches of 16 pixels and an image_size that 64 divides"
            raise ValueError(f'stem "pretrained": expected {expected}, got {self.patch_size} and {self.image_size}')

    @property
    def grid(self) -> int:
        """Side of the embeddings' grid."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SemanticEncoderConfig:
    """A ViT without its head: features are the output of layer `layers`, before any final norm.

    Attributes:
        layers: as many as are computed: all 26 of LLaVA-OneVision's tower, 23 of the 24 of LLaVA 1.5's (vision_feature_layer -2).
        kind: "siglip" (LLaVA-OneVision), or "clip" (LLaVA 1.5), whose class token is computed with and then left out.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kind: str = "siglip"

    def __post_init__(self) -> None:
        _one_of("semantic.kind", self.kind, SEMANTIC_KINDS)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2, or Llama (LLaVA 1.5's Vicuna), which has no biases and is the same otherwise.

    Attributes:
        vocabulary: rows of the embedding table and of the head; more than the tokenizer has tokens where it was padded.
        tied_head: the head is the embedding table (LLaVA-OneVision 0.5B).
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    rope_theta: float = 1_000_000.0
    norm_epsilon: float = 1e-6
    max_positions: int = 32768
    tied_head: bool = False
    kind: str = "qwen2"

    def __post_init__(self) -> None:
        _one_of("language.kind", self.kind, LANGUAGE_KINDS)


@dataclass(frozen=True)
class SPAMConfig:
    """Semantic-Pixel Alignment Module (eq. 1-2): `width` is the common width both encoders are mapped to."""

    width: int
    heads: int


@dataclass(frozen=True)
class MaskDecoderConfig:
    """Token refiner and AGMD (eq. 4-8, B.4); the decoder's width is the pixel encoder's output width.

    Attributes:
        threshold, relative_threshold: how a mask is cut from a map, see runtime.masking; 0.5 and 1 are the paper's.
        roles: which anchors there are, in the order of the prompts' anchors: ROLES, or one of the ablations' parts of it.
    """

    layers: int
    heads: int
    mlp_width: int
    fusion_weight: float = 0.5
    threshold: float = 0.5
    relative_threshold: float = 1.0
    roles: tuple[str, ...] = ROLES

    def __post_init__(self) -> None:
        if self.roles not in (ROLES, ROLES[:2], ROLES[2:]):
            raise ValueError(f"mask_decoder.roles: expected {list(ROLES)}, the first two or the last of them, got {list(self.roles)}")
        MaskRule(self.threshold, self.relative_threshold)

    @property
    def mask_rule(self) -> MaskRule:
        return MaskRule(self.threshold, self.relative_threshold)


@dataclass(frozen=True)
class AGVASConfig:
    """One checkpoint, whole."""

    name: str
    pixel: PixelEncoderConfig
    semantic: SemanticEncoderConfig
    language: LanguageConfig
    spam: SPAMConfig | None  # None: the ablation without it (Table 3)
    mask_decoder: MaskDecoderConfig
    preprocessing: Preprocessing
    prompts: Prompts

    def __post_init__(self) -> None:
        if len(self.prompts.anchors) != len(self.mask_decoder.roles):
            raise ValueError(
                f"prompts.anchors: expected one for each of mask_decoder.roles ({', '.join(self.mask_decoder.roles)}), "
                f"got {', '.join(self.prompts.anchors)}; correct one of the two"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AGVASConfig:
        """Raises ValueError naming the field when one is missing, unknown or in the wrong place."""
        fields = json.loads(text)
        parts = {
            "pixel": PixelEncoderConfig,
            "semantic": SemanticEncoderConfig,
            "language": LanguageConfig,
            "spam": SPAMConfig,
            "mask_decoder": MaskDecoderConfig,
            "preprocessing": Preprocessing,
            "prompts": Prompts,
        }
        _known("config.json", cls, fields)
        try:
            built = {key: _build(key, parts[key], fields[key]) for key in parts if fields.get(key) is not None}
            return cls(**(fields | built))
        except (AttributeError, TypeError) as error:  # the first where a value is no object
            raise ValueError(f"config.json does not describe an AG-VAS: {error}") from error


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _known(where: str, kind: type, fields: Any) -> None:
    """ValueError for a field that the configuration does not have, with the one that was meant."""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in fields if isinstance(fields, dict) else ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise ValueError(f"{where}: expected no field {name!r}; {hint}")


def _build(name: str, kind: type, fields: dict[str, Any]) -> Any:
    _known(f"config.json: {name}", kind, fields)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def _prompts(**changes: Any) -> Prompts:
    """Qwen2's chat template around the image, direct mode only unless said otherwise."""
    defaults: dict[str, Any] = {
        "prefix": "<|im_start|>user\n",
        "suffix": "\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "instructions": {"direct": INSTRUCTION},
        "answer": ANSWER,
        "end": "<|im_end|>",
        "anchors": ANCHORS,
        "anchor_position": "own",
        "max_instruction_tokens": 256,
        "max_new_tokens": 64,
    }
    return Prompts(**(defaults | changes))


def published_prompts(kind: str) -> Prompts:
    """The conversation of a published base by its language model: LLaVA-OneVision's on Qwen2, LLaVA 1.5's (Vicuna's) on Llama."""
    if kind == "llama":
        return _prompts(
            prefix="<s>A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ",
            suffix="\n{instruction} ASSISTANT:",
            end="</s>",
            instructions=INSTRUCTIONS,
            max_new_tokens=512,
        )
    return _prompts(
        prefix="<|im_start|>user ",
        suffix="\n{instruction}<|im_end|><|im_start|>assistant\n",
        instructions=INSTRUCTIONS,
        max_new_tokens=512,
    )


def _preprocessing(pixel_size: int, semantic_size: int) -> Preprocessing:
    """SAM's ImageNet statistics and SigLIP's symmetric ones."""
    return Preprocessing(
        pixel_size=pixel_size,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        semantic_size=semantic_size,
        semantic_mean=(127.5, 127.5, 127.5),
        semantic_std=(127.5, 127.5, 127.5),
    )


def ov_7b() -> AGVASConfig:
    """The paper's model: LLaVA-OneVision-7B (SigLIP so400m, Qwen2-7B) and SAM ViT-H. The vocabulary is Qwen2's 152,064 rows."""
    return AGVASConfig(
        name="ov_7b",
        pixel=PixelEncoderConfig(1024, 16, 1280, 32, 16, 5120, 14, (7, 15, 23, 31)),
        semantic=SemanticEncoderConfig(384, 14, 1152, 26, 16, 4304),
        language=LanguageConfig(152064, 3584, 28, 28, 4, 18944),
        spam=SPAMConfig(width=256, heads=8),
        mask_decoder=MaskDecoderConfig(layers=2, heads=8, mlp_width=2048),
        preprocessing=_preprocessing(1024, 384),
        prompts=published_prompts("qwen2"),
    )


def llava_13b() -> AGVASConfig:
    """The paper's other base: LLaVA-1.5-13B (CLIP ViT-L/14 at 336 pixels, Vicuna-13B) and SAM ViT-H."""
    return AGVASConfig(
        name="llava_13b",
        pixel=ov_7b().pixel,
        semantic=SemanticEncoderConfig(336, 14, 1024, 23, 16, 4096, kind="clip"),
        language=LanguageConfig(32064, 5120, 40, 40, 40, 13824, 10_000.0, 1e-5, 4096, kind="llama"),
        spam=ov_7b().spam,
        mask_decoder=ov_7b().mask_decoder,
        preprocessing=replace(
            _preprocessing(1024, 336),
            semantic_mean=(122.7709383, 116.7460125, 104.09373615),
            semantic_std=(68.5005327, 66.6321579, 70.32316305),
        ),
        prompts=published_prompts("llama"),
    )


def nano() -> AGVASConfig:
    """The model this package ships, trained on procedural defects (agvas/training) in all four modes.

    Its thresholds are judged on drawn defects (benchmarks/threshold.py): 0.5 marks something in most normal pictures.
    """
    return AGVASConfig(
        name="nano",
        pixel=PixelEncoderConfig(512, 16, 128, 3, 2, 384, 8, (1,), output_width=128, stem="pretrained"),
        semantic=SemanticEncoderConfig(160, 16, 128, 4, 4, 384),
        language=LanguageConfig(768, 160, 4, 5, 1, 448, max_positions=2048),
        spam=SPAMConfig(width=128, heads=4),
        mask_decoder=MaskDecoderConfig(layers=2, heads=4, mlp_width=256, threshold=0.8, relative_threshold=0.45),
        preprocessing=_preprocessing(512, 160),
        prompts=_prompts(instructions=INSTRUCTIONS, max_new_tokens=96),
    )


def tiny(**prompt_changes: Any) -> AGVASConfig:
    """For tests: every axis another prime or otherwise unmistakable, so that a swapped axis cannot go unseen."""
    return AGVASConfig(
        name="tiny",
        pixel=PixelEncoderConfig(56, 8, 12, 2, 2, 23, 3, (1,), output_width=32),
        semantic=SemanticEncoderConfig(45, 15, 14, 2, 2, 29),
        language=LanguageConfig(512, 24, 3, 6, 2, 37, max_positions=512),
        spam=SPAMConfig(width=18, heads=3),
        mask_decoder=MaskDecoderConfig(layers=2, heads=2, mlp_width=31),
        preprocessing=_preprocessing(56, 45),
        prompts=_prompts(**prompt_changes),
    )


NAMED = {"ov_7b": ov_7b, "llava_13b": llava_13b, "nano": nano, "tiny": tiny}
# Tables 3 and 1: without [SEG], without [NOR] and [ANO], without SPAM; [SEG] alone without SPAM, as LISA.
ABLATIONS = ("no-seg", "no-relative", "no-spam", "single-anchor")


def ablated(config: AGVASConfig, ablation: str | None) -> AGVASConfig:
    """The config without what an ablation of ABLATIONS leaves out; itself for None. ValueError for another name."""
    if ablation is None:
        return config
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {ablation!r}")
    kept = {"no-seg": slice(0, 2), "no-spam": slice(0, 3)}.get(ablation, slice(2, 3))
    roles = tuple(ROLES[kept])
    return replace(
        config,
        name=f"{config.name}-{ablation}",
        spam=None if ablation in ("no-spam", "single-anchor") else config.spam,
        mask_decoder=replace(config.mask_decoder, roles=roles),
        prompts=prompts_of_roles(config.prompts, roles),
    )


def prompts_of_roles(prompts: Prompts, roles: tuple[str, ...]) -> Prompts:
    """The prompts with the anchors of these roles alone, in their answer, too."""
    anchors = tuple(anchor for anchor, role in zip(prompts.anchors, ROLES, strict=True) if role in roles)
    return replace(prompts, anchors=anchors, answer=prompts.answer.replace("".join(prompts.anchors), "".join(anchors)))
