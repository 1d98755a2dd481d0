"""What exporting a checkpoint will roughly take: disk for the bundle and memory on the way, by precision, from its tensors' shapes.

Estimates to plan by, not limits: they count weights alone, as each precision stores them, and what was measured beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4}  # bytes of a weight; int8 is the encoders' linear layers alone
LMM = {"float": None, "int8": 1.0, "gptq4": 0.5}  # bytes of a weight of the decoder layers; None: the precision's
GROUP, SCALE = 128, 2  # weights that share a scale, and its bytes
EMBEDDINGS = "language.model.embed_tokens.weight"
# Torch, its exporter, onnxruntime and OpenVINO with nothing in them.
LIBRARIES = 1_500_000_000
# Peak over the stage's own weights in fp32 while it is exported (two full-width Qwen2-7B layers with their head: 15.7 GB over 6.2 GB).
EXPORTING = 1.5

Shapes = Mapping[str, tuple[int, ...]]  # of every tensor, by the model's names


@dataclass(frozen=True)
class Needs:
    """In bytes.

    Attributes:
        disk: the bundle.
        memory: peak of an export that holds the reference in fp32.
        bounded: least peak of one that reads weights as it writes them: the largest tensor in fp32, twice.
    """

    disk: int
    memory: int
    bounded: int


def export_needs(shapes: Shapes, precision: str = "fp32", lmm: str = "float") -> Needs:
    """What an export in this precision takes. KeyError for a precision that is none."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    disk = sum(size * stored_bytes(name, len(shapes[name]), precision, lmm) for name, size in sizes.items())
    stages: dict[str, int] = {}
    for name, size in sizes.items():
        stage = name.partition(".")[0]
        stages[stage] = stages.get(stage, 0) + size
    whole = 4 * sum(sizes.values())
    memory = LIBRARIES + whole + max(int(4 * EXPORTING * max(stages.values())), whole)
    return Needs(int(disk), memory, LIBRARIES + 8 * max(sizes.values()))


def stored_bytes(name: str, axes: int, precision: str, lmm: str) -> float:
    """Bytes a weight of the tensor takes in a bundle."""
    matrix = axes == 2 and name.endswith(".weight")
    integer = LMM[lmm]
    if integer is not None and matrix and name.startswith("language.model.layers."):
        return integer + SCALE / GROUP
    if precision == "int8" and matrix and name.startswith(("pixel_encoder.", "semantic_encoder.")):
        return 1.0
    return PRECISIONS[precision]
