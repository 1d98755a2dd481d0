"""What an export will take, told before it begins: disk, memory and time, from the checkpoint's shapes alone.

No weight is read for it. Memory decides how the reference is computed: whole, as the model is used in training, or layer by layer
(export/streamed_reference.py). The figures are upper bounds of what was measured at full size, on two cores
(benchmarks/results/full_size*.json; a test holds them to it), not promises for another machine. What looking for fp16's end takes
(half_range.FULL_SIZE) is not among them: it is left out where the memory will not do.
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
# The largest activations of a picture at full size: SAM's global attention, four times 16 heads of 4096 × 4096 scores. With two of SAM's 32
# layers it took 3.8 GB beside the weights (full_size_13b_reduced.json, run-gptq4).
ACTIVATIONS = 4_300_000_000
# Weights in float32 that a piece of a graph may have; the largest single one, the head, has 2.2 GB.
PIECE_BYTES = 1 << 30
TABLE = "language.model.embed_tokens.weight"
LOW = ("fp16", "bf16")
# Rough: seconds that tracing and optimising a graph take for each decoder layer or block, and seconds to write a gigabyte: 650 and 670 s in
# all (full_size.json, export-gptq4 and export-16), 1,020 beside other work with a LoRA to merge (full_size_published.json, export-gptq4).
SECONDS_A_BLOCK, SECONDS_A_GB = 6.0, 20.0
# Seconds that 10^12 multiplications take, weights read included: of the reference, of whose 27.8 a picture took 1,168 s with integers made
# floats again (full_size.json, reference-gptq4), and of the exported stages, 319 s (run-gptq4).
REFERENCE_SECONDS_A_TERA, EXPORTED_SECONDS_A_TERA = 43.0, 12.0
TOKENS = 1600  # that a picture makes in the full-size model; each multiplies with every weight


@dataclass(frozen=True)
class Estimate:
    """One export's needs.

    Attributes:
        disk: bytes of the bundle.
        export_memory: most resident bytes while graphs are made and written.
        streamed_memory: most resident bytes while the reference computes layer by layer and the exported stages one at a time, those that
            are too large for the memory in pieces. The pages of the weights' file are among them.
        whole_memory: most resident bytes where reference and exported chain are held whole to be compared.
        largest_stage: bytes of weights of the largest stage while an engine on the CPU computes with it, in its own types.
        export_seconds: to make and write the graphs.
        picture_seconds: for each parity picture, with the reference layer by layer, where it gives the fixed answer.
    """

    disk: int
    export_memory: int
    streamed_memory: int
    whole_memory: int
    largest_stage: int
    export_seconds: float
    picture_seconds: float


def too_large(resident: int, memory: int | None) -> bool:
    """Whether a stage whose weights take so many bytes (`resident`) is run in pieces, with so many to spare (None: enough).

    An engine on the CPU copies them from their file, whose pages are counted as memory, too: at most as much again.
    """
    return memory is not None and LIBRARIES + 2 * resident > memory


def estimate(tensors: LazyTensors, precision: str, lmm: str, head: str = "float", memory: int | None = None) -> Estimate:
    """Of a checkpoint's export, by its tensors' shapes.

    Args:
        memory: bytes to spare (None: enough), which decide what a comparison runs in pieces.
    """
    disk = dict.fromkeys((*STAGES, "embeddings"), 0)
    running, numbers = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    table = most = integers = 0
    blocks: set[str] = set()
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        most = max(most, count)
        if name == TABLE:
            table, disk["embeddings"] = count, count * (2 if precision in LOW else 4)
            continue
        stage = next(stage for stage in STAGES if name_in_stage(stage, name))
        bits = _bits(name, tensor.shape, stage, precision, lmm, head)
        numbers[stage] += count
        integers += count if bits < 16 else 0
        disk[stage] += math.ceil(count * bits / 8)
        # onnxruntime computes 16-bit floats on a CPU in fp32, for which it keeps a copy; integers it keeps as they are.
        running[stage] += math.ceil(count * (bits if bits < 16 else 32) / 8)
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        if parts[number - 1] == "layers":  # decoder layers and ViT blocks, not the many small parts of a trunk
            blocks.add(".".join(parts[: number + 1]))
    every = table + sum(numbers.values())
    largest = 4 * most  # bytes of the largest tensor in float32
    piece = max(PIECE_BYTES, largest)
    held = {stage: disk[stage] + running[stage] for stage in STAGES}
    held |= {stage: min(held[stage], 2 * piece) for stage in STAGES if too_large(running[stage], memory)}
    held["pixel_encoder"] += min(ACTIVATIONS, 4 * every)
    # The language model computes once more by what the reference fed its stage; with integers their float twin does, too.
    tera, again = (2 * count * TOKENS / 1e12 for count in (every, numbers["language"]))
    return Estimate(
        disk=int(1.05 * sum(disk.values())) + (32 << 20),
        # As it is stored, and in float32: a plan's check of the checkpoint takes 3.7 GB so (full_size_plan.json, export-plan).
        export_memory=LIBRARIES + largest * 3 // 2 + 4 * SLAB_BYTES,
        streamed_memory=LIBRARIES + max(2 * largest, *held.values()),
        whole_memory=LIBRARIES + 4 * every * (2 if integers else 1) + sum(running.values()),
        largest_stage=max(running.values()),
        export_seconds=SECONDS_A_BLOCK * len(blocks) + SECONDS_A_GB * (sum(disk.values()) + 2 * every) / 1e9,
        picture_seconds=REFERENCE_SECONDS_A_TERA * (tera + (again if integers else 0)) + EXPORTED_SECONDS_A_TERA * (tera + again),
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
