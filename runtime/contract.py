"""The stages of a deployed AG-VAS: their names, tensors and symbolic shapes, written once.

export/ writes graphs with these names and runtime/ feeds them, so a rename happens here or nowhere. Sizes belong to a
checkpoint and stand in the bundle's manifest. Every float at a stage's border is float32, whatever the precision inside:
NumPy has no bfloat16, and one rule spares each engine a table of exceptions.

Axes: B images, S and s image sides, P pixel width, G pixel grid side, T semantic tokens, Ds semantic width, D language width,
N tokens of this call, L layers, H key/value heads, K past tokens, C head width, R rows, V vocabulary, M map side.
"""

from __future__ import annotations

from engines.spec import StageSpec, TensorSpec

CONTRACT_VERSION = 1
# What graphs call the axes that a call may choose.
AXIS_NAMES = {"B": "batch", "N": "tokens", "K": "past", "R": "row_count"}

PIXEL_ENCODER = StageSpec(
    "pixel_encoder",
    inputs=(TensorSpec("pixel_image", "float32", ("B", 3, "S", "S")),),
    outputs=(TensorSpec("pixel_embeddings", "float32", ("B", "P", "G", "G"), stays=True),),
)
SEMANTIC_ENCODER = StageSpec(
    "semantic_encoder",
    inputs=(TensorSpec("semantic_image", "float32", ("B", 3, "s", "s")),),
    outputs=(
        TensorSpec("semantic_features", "float32", ("B", "T", "Ds"), stays=True),
        TensorSpec("image_embeddings", "float32", ("B", "T", "D"), stays=True),
    ),
)
SPAM = StageSpec(
    "spam",
    inputs=(
        TensorSpec("semantic_features", "float32", ("B", "T", "Ds")),
        TensorSpec("pixel_embeddings", "float32", ("B", "P", "G", "G")),
    ),
    outputs=(TensorSpec("aligned_embeddings", "float32", ("B", "T", "D"), stays=True),),
)
LANGUAGE = StageSpec(
    "language",
    inputs=(
        TensorSpec("input_embeddings", "float32", ("B", "N", "D")),
        TensorSpec("positions", "int64", ("B", "N")),
        TensorSpec("past_keys", "float32", ("L", "B", "H", "K", "C")),
        TensorSpec("past_values", "float32", ("L", "B", "H", "K", "C")),
        TensorSpec("rows", "int64", ("R",)),
    ),
    outputs=(
        TensorSpec("states", "float32", ("B", "R", "D")),
        TensorSpec("logits", "float32", ("B", "R", "V")),
        TensorSpec("present_keys", "float32", ("L", "B", "H", "K+N", "C"), stays=True),
        TensorSpec("present_values", "float32", ("L", "B", "H", "K+N", "C"), stays=True),
    ),
)
MASK_DECODER = StageSpec(
    "mask_decoder",
    inputs=(
        TensorSpec("anchor_states", "float32", ("B", 3, "D")),
        TensorSpec("pixel_embeddings", "float32", ("B", "P", "G", "G")),
    ),
    outputs=(
        TensorSpec("probability_absolute", "float32", ("B", "M", "M")),
        TensorSpec("probability_relative", "float32", ("B", 2, "M", "M")),
        TensorSpec("anomaly_map", "float32", ("B", "M", "M")),
    ),
)

STAGES: dict[str, StageSpec] = {stage.name: stage for stage in (PIXEL_ENCODER, SEMANTIC_ENCODER, SPAM, LANGUAGE, MASK_DECODER)}
