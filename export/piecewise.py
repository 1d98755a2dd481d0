"""A graph run in pieces, one after the other, so that weights larger than the memory can be computed with: for verification only.

The nodes are cut, in their order, into runs whose weights fit a budget. A piece is a graph of its own that reads what earlier ones put
out and takes its weights from the same file, at the same places; so what is computed is the exported graph, node by node. Floats between
pieces are float32, which holds every 16-bit value exactly. An engine's fusions end at a piece's border; nothing else differs.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines import EngineOptions, StageSpec, TensorSpec, open_engine
from runtime.one_at_a_time import give_back

LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class PiecewiseStage:
    """A stage whose pieces are written beside the graph while it runs, opened one at a time, and removed; see engines.Engine.

    Args:
        graph: an .onnx file with its weights beside it.
        budget: bytes of weights, counted in float32, that a piece may have; one node's at least.
    """

    def __init__(self, graph: Path, spec: StageSpec, engine: str, options: EngineOptions, budget: int) -> None:
        self.graph, self.spec, self.engine, self.options, self.budget = graph, spec, engine, options, budget

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises what open_engine and Engine.run raise."""
        self.spec.check_inputs(feeds)
        values: dict[str, np.ndarray] = dict(feeds)
        whole = ir.load(self.graph)
        nodes, pieces = list(whole.graph), cut(whole, self.budget)
        read = [[str(value.name) for value in read_from_outside([nodes[place] for place in places])] for places in pieces]
        for number, places in enumerate(pieces):
            model = ir.load(self.graph)
            outputs = keep_piece(model, places)
            fed = {name: values[name] for name in read[number]}
            spec = StageSpec(
                f"{self.spec.name}, piece {number}",
                tuple(TensorSpec(name, str(array.dtype), array.shape) for name, array in fed.items()),
                tuple(TensorSpec(name, "float32", ()) for name in outputs),
            )
            path = self.graph.with_name(f"{self.graph.stem}.piece.onnx")
            try:
                ir.save(model, path)
                values |= open_engine(path, spec, self.engine, self.options).run(fed)
            finally:
                path.unlink(missing_ok=True)
            give_back()
            needed = {output.name for output in self.spec.outputs}.union(*read[number + 1 :])
            values = {name: value for name, value in values.items() if name in needed}
        return {output.name: values[output.name] for output in self.spec.outputs}


def cut(model: ir.Model, budget: int) -> list[range]:
    """Runs of nodes, by place, whose weights take at most `budget` bytes in float32."""
    cuts, first, taken = [], 0, 0
    nodes = list(model.graph)
    for place, node in enumerate(nodes):
        size = sum(4 * math.prod(value.shape.numpy()) for value in node.inputs if value is not None and value.is_initializer())
        if taken and taken + size > budget:
            cuts.append(range(first, place))
            first, taken = place, 0
        taken += size
    return [*cuts, range(first, len(nodes))]


def read_from_outside(nodes: list[ir.Node]) -> list[ir.Value]:
    """What nodes read that neither they make nor the graph holds as a constant, each value once."""
    made = {output for node in nodes for output in node.outputs}
    read = [value for node in nodes for value in node.inputs if value is not None and value not in made and not value.is_initializer()]
    return list(dict.fromkeys(read))


def keep_piece(model: ir.Model, places: range) -> list[str]:
    """Leave these nodes of the model, which then is a model of its own.

    Returns:
        Names of its outputs: what nodes outside, or the model's own outputs, take from it.
    """
    graph, nodes = model.graph, list(model.graph)
    mine = [nodes[place] for place in places]
    inside = set(mine)
    results = [
        value
        for node in mine
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    read = read_from_outside(mine)
    outside = [node for node in nodes if node not in inside]
    graph.inputs.clear()
    graph.outputs.clear()
    for value in read:
        kind = ir.DataType.FLOAT if value.dtype in LOW else value.dtype
        outer = ir.Value(name=value.name, shape=value.shape, type=None if kind is None else ir.TensorType(kind))
        graph.inputs.append(outer)
        inner = _cast(graph, outer, value.dtype, f"{value.name}_into") if value.dtype in LOW else outer
        for use in list(value.uses()):
            if use.node in inside:
                use.node.replace_input_with(use.idx, inner)
    names = []
    for value in results:
        names.append(str(value.name))
        result = value
        if value.dtype in LOW:
            value.name = f"{names[-1]}_inside"
            result = _cast(graph, value, ir.DataType.FLOAT, names[-1])
        graph.outputs.append(result)
    for node in outside:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    graph.remove(outside)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    graph.sort()
    return names


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, value.shape
    graph.append(node)  # sorted into place at the end
    return output
