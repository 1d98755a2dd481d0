"""What an export will take, told before it begins: disk, memory and time, from the checkpoint's shapes alone.

No weight is read for it. Memory decides how the reference is computed: whole, as the model is used in training, or layer by layer
(export/streamed_reference.py). The figures are upper bounds from what was measured, not promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agvas.weights import LazyTensors
from export.adapters import name_in_stage
from export.quantisation import ENCODERS, HEAD, LAYERS, LMM
from export.streamed_tensor import SLAB_BYTES
from runtime.contract import STAGES

# Python with torch, transformers, the exporter and an engine, before any weight: 1.1 GB measured.
LIBRARIES = 1_300_000_000
# The largest activations of a picture at full size: SAM's global attention, 16 heads of 4096 × 4096 scores, more than twice.
ACTIVATIONS = 2_600_000_000
TABLE = "language.model.embed_tokens.weight"
LOW = ("fp16", "bf16")
# Rough, of two idle cores: seconds that tracing and optimising a graph take for each decoder layer or block, seconds to write a gigabyte,
# and seconds that 10^12 multiplications of the reference take.
SECONDS_A_BLOCK, SECONDS_A_GB, SECONDS_A_TERA = 4.0, 15.0, 25.0
TOKENS = 1600  # that a picture makes in the full-size model; each multiplies with every weight


@dataclass(frozen=True)
class Estimate:
    """One export's needs.

    Attributes:
        disk: bytes of the bundle.
        export_memory: most resident bytes while graphs are made and written.
        streamed_memory: most resident bytes while the reference computes layer by layer and the exported stages one at a time.
        whole_memory: most resident bytes where reference and exported chain are held whole to be compared.
        largest_stage: bytes of weights of the largest stage while an engine on the CPU computes with it, in its own types.
        export_seconds: to make and write the graphs.
        picture_seconds: for each parity picture, with the reference layer by layer.
    """

    disk: int
    export_memory: int
    streamed_memory: int
    whole_memory: int
    largest_stage: int
    export_seconds: float
    picture_seconds: float


def estimate(tensors: LazyTensors, precision: str, lmm: str, head: str = "float") -> Estimate:
    """Of a checkpoint's export, by its tensors' shapes."""
    disk = dict.fromkeys((*STAGES, "embeddings"), 0)
    running = dict.fromkeys(STAGES, 0)
    numbers = most = integers = 0
    blocks: set[str] = set()
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        numbers, most = numbers + count, max(most, count)
        if name == TABLE:
            disk["embeddings"] = count * (2 if precision in LOW else 4)
            continue
        stage = next(stage for stage in STAGES if name_in_stage(stage, name))
        bits = _bits(name, tensor.shape, stage, precision, lmm, head)
        integers += count if bits < 16 else 0
        disk[stage] += math.ceil(count * bits / 8)
        # onnxruntime computes 16-bit floats on a CPU in fp32, for which it keeps a copy; integers it keeps as they are.
        running[stage] += math.ceil(count * (bits if bits < 16 else 32) / 8)
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        if parts[number - 1] == "layers":  # decoder layers and ViT blocks, not the many small parts of a trunk
            blocks.add(".".join(parts[: number + 1]))
    largest = 4 * most  # the largest tensor as it is read, and as much again in slabs and conversions
    return Estimate(
        disk=int(1.05 * sum(disk.values())) + (32 << 20),
        export_memory=LIBRARIES + largest + 4 * SLAB_BYTES,
        streamed_memory=LIBRARIES + 2 * largest + min(ACTIVATIONS, 4 * numbers),
        whole_memory=LIBRARIES + 4 * numbers * (2 if integers else 1) + sum(running.values()),
        largest_stage=max(running.values()),
        export_seconds=SECONDS_A_BLOCK * len(blocks) + SECONDS_A_GB * (sum(disk.values()) + 2 * numbers) / 1e9,
        picture_seconds=SECONDS_A_TERA * 2 * numbers * TOKENS / 1e12,
    )


def _bits(name: str, shape: tuple[int, ...], stage: str, precision: str, lmm: str, head: str) -> float:
    """Bits on disk of one number, scales included."""
    linear = len(shape) == 2 and name.endswith(".weight")
    if linear and name.startswith(f"{LAYERS}.") and lmm != "float":
        group = LMM[lmm].group or shape[1]
        return LMM[lmm].bits + (16 if precision in LOW else 32) / group
    if (name == f"{HEAD}.weight" and head == "int8") or (linear and stage in ENCODERS and precision == "int8"):
        return 8
    if precision == "bf16" and stage == "mask_decoder":
        return 32
    return 16 if precision in LOW else 32
