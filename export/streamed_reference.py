"""Parity where the reference does not fit the memory: the same comparisons as export/parity.py, stage by stage and layer by layer.

The reference's stages compute with weights that are read while they do (agvas.streamed), behind the runtime's own chain; the exported
stages are opened one at a time, and a graph whose weights are too large for the machine is run in pieces. So comparison (1), the glue
against AGVAS.segment, is not made here: it needs the whole model. It takes minutes for each picture; give few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from agvas.checkpoint import OpenedCheckpoint
from agvas.streamed import stream
from agvas.weights import LazyTensor, LazyTensors
from engines import EngineOptions
from export.adapters import axis_sizes
from export.estimate import PIECE_BYTES, TABLE, too_large
from export.half_range import HalfRange
from export.onnx_writer import stage_module
from export.outcomes import OutcomesOnDisk
from export.parity import (
    GOLDEN_PICTURES,
    TRACED_PICTURES,
    ParityReport,
    RecordingStage,
    TorchStage,
    chain_failures,
    golden_of,
    hardest,
    layer_errors,
    note_errors,
)
from export.piecewise import PiecewiseStage
from export.quantisation import Quantisation, fake_quantised_tensors, round_inputs_of
from export.stage_weights import all_weights, stage_weights
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.one_at_a_time import Turn, TurnStage
from runtime.parity import Gates, Parity, compare, together
from runtime.pipeline import Pipeline, Stage
from runtime.verify import outcome_of, run_outcome


class EmbeddingRows:
    """The token table as a chain asks for it, `table[rows]` → float32 [n, D], without holding it."""

    def __init__(self, table: LazyTensor) -> None:
        self.table = table

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        return self.table.read()[rows].float().numpy()


def streamed_stages(opened: OpenedCheckpoint, weights: LazyTensors) -> dict[str, TorchStage]:
    """The reference's stages, each reading its weights while it computes.

    Args:
        weights: see all_weights; with what integers stand for in the place of float weights, the fake-quantised reference.
    """
    skeleton = opened.skeleton()
    stages = {}
    for name, spec in STAGES.items():
        module = stage_module(skeleton, name)
        stages[name] = TorchStage(stream(module, stage_weights(weights, skeleton, name)), spec)
    return stages


def streamed_pipeline(opened: OpenedCheckpoint, stages: Mapping[str, Stage], weights: LazyTensors) -> Pipeline:
    """The runtime's chain over given stages, with the checkpoint's own embeddings."""
    prompts = opened.skeleton().prompt_encoder
    return Pipeline(stages, opened.config.preprocessing, prompts, EmbeddingRows(weights[TABLE]), axis_sizes(opened.config))


def exported_stages(bundle: Bundle, engine: str, options: EngineOptions, memory: int | None) -> dict[str, Stage]:
    """A bundle's stages for a machine with so many bytes to spare (None: enough): one open at a time, and those too large in pieces."""
    turn, pieces = Turn(), in_pieces(bundle, memory)
    stages: dict[str, Stage] = {}
    for name, spec in STAGES.items():
        stages[name] = TurnStage(turn, bundle.graph(name), spec, engine, options)
        if name in pieces:
            stages[name] = PiecewiseStage(bundle.graph(name), spec, engine, options, pieces[name])
    return stages


def in_pieces(bundle: Bundle, memory: int | None) -> dict[str, int]:
    """Stages that a machine with so many bytes to spare (None: enough) cannot hold, and the bytes of weights that a piece may have."""
    return {name: PIECE_BYTES for name in STAGES if too_large(resident_bytes(bundle, name), memory)}


def resident_bytes(bundle: Bundle, stage: str) -> int:
    """Weights of a stage as an engine on the CPU holds them: 16-bit floats in 32."""
    total = 0.0
    for value in ir.load(bundle.graph(stage)).graph.initializers.values():
        width = max(value.dtype.itemsize, 4) if value.dtype.is_floating_point() else value.dtype.itemsize
        total += math.prod(value.shape.numpy()) * width
    return math.ceil(total)


def measure_streamed(
    opened: OpenedCheckpoint,
    bundle: Bundle,
    engine: str,
    memory: int | None,
    images: Sequence[np.ndarray],
    gates: Gates,
    progress: Callable[[], None],
    quantisation: Quantisation,
    ranges: HalfRange | None = None,
) -> tuple[ParityReport, dict[str, np.ndarray]]:
    """Run every picture through the reference, layer by layer, and the exported chain.

    Args:
        memory: bytes to spare.
        images: uint8 RGB [H, W, 3] each.
        ranges: shown what the reference fed its stages on the first picture.

    Returns:
        The report, and the golden traces for the bundle.
    """
    options = EngineOptions(low_memory=True)  # as it was measured: an arena would keep the largest activations
    rule = opened.config.mask_decoder.mask_rule
    weights = all_weights(opened)
    stages = streamed_stages(opened, weights)
    # Of the fake-quantised reference the stages that hold integers; the others are the reference's own.
    quantised = fake_quantised_tensors(weights, quantisation)
    twins = {name: stage for name, stage in streamed_stages(opened, quantised).items() if quantisation.in_stage(name)[0]}
    for name, twin in twins.items():
        round_inputs_of(twin.module, quantisation.in_stage(name)[1])
    exported_here = exported_stages(bundle, engine, options, memory)
    exported = streamed_pipeline(opened, exported_here, weights)
    exported.embeddings = bundle.embeddings()
    prompt = exported.prompts.encode()
    reference = OutcomesOnDisk(bundle.folder)
    chain: list[Parity] = []
    traces: list[Mapping[str, np.ndarray]] = []
    errors: dict[str, dict[str, float]] = {}
    of_quantisation: dict[str, dict[str, float]] = {}
    layers: dict[str, list[float]] = {}
    for place, image in enumerate(images):
        recorders = {name: RecordingStage(stage) for name, stage in stages.items()}
        trace = streamed_pipeline(opened, recorders, weights).run(image, prompt)
        reference.append(outcome := outcome_of(trace, rule))
        run = {name: RecordingStage(stage) for name, stage in exported_here.items()}
        exported.stages = run
        chain.append(compare([run_outcome(exported, image, rule)[0]], [outcome]))
        if place < TRACED_PICTURES:
            feeds = {name: recorder.feeds for name, recorder in recorders.items() if recorder.feeds is not None}
            if ranges is not None and place == 0:
                ranges.note(feeds)
            floats = {name: recorders[name].outputs for name in feeds}
            wanted = {name: twins[name].run(fed) if name in twins else floats[name] for name, fed in feeds.items()}
            if twins:
                note_errors(wanted, floats, of_quantisation)
            ours = {name: run[name].outputs if _same(run[name].feeds, fed) else exported_here[name].run(fed) for name, fed in feeds.items()}
            note_errors(ours, wanted, errors)
            layer_errors(ours, wanted, layers)
        traces.append(trace.tensors if place < TRACED_PICTURES else {})
        progress()
    parity = together(chain)
    chosen = hardest(reference, rule)[:GOLDEN_PICTURES]
    golden: dict[str, np.ndarray] = {}
    # Those with tensors first, as measure has them, too.
    for place, index in enumerate(sorted(chosen, key=lambda index: not traces[index])):
        golden |= golden_of(place, images[index], reference[index], traces[index])
    on_golden = together([chain[index] for index in chosen])
    failures = chain_failures(gates, parity)
    return ParityReport(None, errors, parity, failures, engine, on_golden, of_quantisation, layers), golden


def _same(ours: Mapping[str, np.ndarray] | None, feeds: Mapping[str, np.ndarray]) -> bool:
    """Whether a stage was fed just this already: the encoders are, by chain and reference alike, and need not compute twice."""
    return ours is not None and all(np.array_equal(ours[name], array) for name, array in feeds.items())
