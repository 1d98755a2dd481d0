"""How near fp16's end an fp16 graph's numbers come, tensor by tensor, whatever engine will compute them.

onnxruntime's CPU provider, which judges parity, multiplies in fp32 and keeps fp32 between neighbouring nodes: a tensor beyond 65504, which
an engine that stores fp16 turns into infinity, passes unseen there. So each fp16 tensor's largest magnitude is taken as the graph has
it, on pictures of the comparison. Not seen is what an engine keeps inside a fused operator, where accumulators are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from engines import EngineOptions, StageSpec, TensorSpec, open_engine
from export.bisect import SCOPES, module_of
from export.piecewise import PiecewiseStage
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.one_at_a_time import give_back
from runtime.pipeline import Stage

LARGEST = 65504.0  # that fp16 holds
RESULT = "largest_magnitudes"
# Bytes, of a model that does not fit whole: SAM ViT-H's global attention, tensor by tensor, took 10 GB; its weights in fp32 are 2.5.
FULL_SIZE = 13 << 30


@dataclass(frozen=True)
class Peak:
    """The largest number of a stage.

    Attributes:
        magnitude: its absolute value; infinite or NaN where the engine itself gave that.
        tensor, module: where, in the graph's words and, where it tells, torch's.
    """

    magnitude: float
    tensor: str
    module: str

    @property
    def order(self) -> float:
        """The magnitude, of NaN more than any."""
        return math.inf if math.isnan(self.magnitude) else self.magnitude

    @property
    def fits(self) -> bool:
        return self.magnitude <= LARGEST

    def in_words(self, stage: str) -> str:
        return f"{self.magnitude:.3g} of {LARGEST:.0f} at {self.tensor}" + (f" ({self.module})" if self.module else "") + f" of {stage}"


class HalfRange:
    """The peaks of a bundle's fp16 stages over all feeds that it is shown; none where no stage is fp16.

    Args:
        in_pieces: stages that do not fit the memory, and the bytes of weights that a piece of them may have.
    """

    def __init__(self, bundle: Bundle, engine: str, in_pieces: Mapping[str, int] | None = None) -> None:
        self._engine, self._in_pieces = engine, in_pieces or {}
        self._graphs = {name: bundle.graph(name) for name, precision in bundle.manifest.precision.items() if precision == "fp16"}
        self._feeds: dict[str, list[Mapping[str, np.ndarray]]] = {name: [] for name in self._graphs}
        self.peaks: dict[str, Peak] = {}

    @property
    def watches(self) -> bool:
        """Whether any stage computes in fp16."""
        return bool(self._graphs)

    def note(self, feeds: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """What the stages were fed on one picture; kept until `measure`."""
        for stage in self._graphs.keys() & feeds.keys():  # the mask decoder has none where an answer has no anchors
            self._feeds[stage].append(feeds[stage])

    def measure(self) -> None:
        """Compute each stage once more with all that it was fed, one open at a time."""
        for stage, graph in self._graphs.items():
            feeds, self._feeds[stage] = self._feeds[stage], []
            peak = peak_of(graph, STAGES[stage], feeds, self._engine, self._in_pieces.get(stage)) if feeds else None
            if peak is not None:
                self.peaks[stage] = peak
            give_back()

    def largest(self) -> str:
        """The peak of all stages, in words; there has to be one."""
        stage = max(self.peaks, key=lambda name: self.peaks[name].order)
        return self.peaks[stage].in_words(stage)

    def failures(self) -> list[str]:
        """Stages beyond the range, in words."""
        return [
            f"fp16: {peak.in_words(stage)}: an engine that stores it makes infinity of it; use --precision bf16 or fp32"
            for stage, peak in self.peaks.items()
            if not peak.fits
        ]

    def to_json(self) -> dict[str, Any]:
        return {stage: asdict(peak) | {"share": peak.magnitude / LARGEST} for stage, peak in self.peaks.items()}


def peak_of(
    graph: Path, spec: StageSpec, feeds: Sequence[Mapping[str, np.ndarray]], engine: str, piece_bytes: int | None = None
) -> Peak | None:
    """The largest magnitude among a graph's fp16 tensors that depend on its inputs; None where it has none.

    Args:
        feeds: of each run, at least one; inputs that are empty in the first are empty in all.
        piece_bytes: run it in pieces with so many bytes of weights; None runs it whole.

    Raises:
        EngineError: the engine cannot compute it.
    """
    model = ir.load(graph)
    watched = watch(model, {name for name, array in feeds[0].items() if not array.size})
    if not watched:
        return None
    path = graph.with_name(f"{graph.stem}.range.onnx")
    told = StageSpec(spec.name, spec.inputs, (TensorSpec(RESULT, "float32", (len(watched),)),))
    try:
        ir.save(model, path)
        if piece_bytes is None:
            runner: Stage = open_engine(path, told, engine, EngineOptions())
        else:
            runner = PiecewiseStage(path, told, engine, EngineOptions(), piece_bytes)
        magnitudes = np.max([runner.run(dict(fed))[RESULT] for fed in feeds], axis=0)  # NaN where any is
    finally:
        path.unlink(missing_ok=True)
    peaks = [Peak(float(magnitude), tensor, module) for magnitude, (tensor, module) in zip(magnitudes, watched, strict=True)]
    return max(peaks, key=lambda peak: peak.order)


def watch(model: ir.Model, empty: set[str]) -> list[tuple[str, str]]:
    """Let a graph give the largest magnitude of each fp16 tensor that depends on its inputs, all in one output, and nothing else.

    Args:
        empty: inputs without elements, of which there is no largest; what is cast from them is left out.

    Returns:
        Name and module of each tensor, in the output's order.
    """
    graph = model.graph
    depends: set[ir.Value] = set(graph.inputs)
    without = {value for value in graph.inputs if value.name in empty}
    watched: list[tuple[str, str]] = []
    largest: list[ir.Value] = []
    for node in list(graph):
        if not depends.intersection(value for value in node.inputs if value is not None):
            continue  # weights alone, as unpacked integers are
        depends.update(node.outputs)
        if node.op_type in ("Cast", "Identity") and node.inputs[0] in without:
            without.update(node.outputs)
            continue
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16:
                watched.append((str(value.name), module_of(node.metadata_props.get(SCOPES, ""))))
                largest.append(_largest(graph, node, value, len(largest)))
    if not watched:
        return []
    joined = ir.node("Concat", largest, attributes={"axis": 0}, name="join_largest")
    joined.outputs[0].name, joined.outputs[0].dtype = RESULT, ir.DataType.FLOAT
    joined.outputs[0].shape = ir.Shape([len(largest)])
    graph.append(joined)
    graph.outputs.clear()
    graph.outputs.append(joined.outputs[0])
    return watched


def _largest(graph: ir.Graph, node: ir.Node, value: ir.Value, number: int) -> ir.Value:
    """max |value|, float32 [1], computed right behind the node, so that nothing is kept for it."""
    flat = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([-1], np.int64), name=f"flat_{number}")})
    axis = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([0], np.int64), name=f"axis_{number}")})
    single = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
    line = ir.node("Reshape", [single.outputs[0], flat.outputs[0]])
    # Not the maximum of |value|, which would be a copy of it: attention scores of SAM ViT-H are a gigabyte.
    above = ir.node("ReduceMax", [line.outputs[0], axis.outputs[0]], attributes={"keepdims": 1})
    below = ir.node("ReduceMin", [line.outputs[0], axis.outputs[0]], attributes={"keepdims": 1})
    below_turned = ir.node("Neg", [below.outputs[0]])
    largest = ir.node("Max", [above.outputs[0], below_turned.outputs[0]])
    added = [flat, axis, single, line, above, below, below_turned, largest]
    for place, extra in enumerate(added):
        extra.name = f"range_{number}_{place}"
        extra.outputs[0].name = f"range_{number}_{place}_output"
        extra.outputs[0].dtype = ir.DataType.INT64 if extra.op_type == "Constant" else ir.DataType.FLOAT
    largest.outputs[0].shape = ir.Shape([1])
    graph.insert_after(node, added)
    return largest.outputs[0]
