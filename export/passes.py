"""Graph passes, each with its rule in prose: turning weights once and for all, and lowering a graph's arithmetic to 16 bit.

The rule goes by operator, never by model, so that it holds for graphs not seen yet. A pass takes a model and changes it in place;
what it leaves is strongly typed: every tensor's type is in the graph and no builder flag decides anything.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from export.streamed_tensor import StreamedTensor

LOW_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

# Sums of squares overflow fp16 from 256 on, exponentials and their sums lose the small terms, angles need all their bits, and
# what is left when a mean is taken from its terms is smaller than they are.
FP32_OPERATORS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "AveragePool",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Softmax",
        "LogSoftmax",
        "Sigmoid",
        "Sin",
        "Cos",
    }
)
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
# Of an elementwise operator's inputs, one of these makes it part of the norm or probability being computed. (Sin and Cos are not:
# their values are bounded and what they are multiplied with is not theirs.)
FP32_REACH = frozenset({"AveragePool", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow", "Sqrt", "Reciprocal", "Sigmoid"})
ANGLES = frozenset({"Sin", "Cos"})
SCALE = 1  # DequantizeLinear's input that has the type of its output
# What 16 bit is for: where the time goes and weights are read.
PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention"})
# Products that can have two computed factors and no weight.
PAIRINGS = frozenset({"MatMul", "Gemm", "Einsum"})


def turn_weights(model: ir.Model) -> ir.Model:
    """Turn weights as they are read from the checkpoint, and not in the graph.

    Rule: a Transpose of a streamed weight becomes that weight with its axes in the new order. An engine that finds the Transpose would hold
    the weight twice, or turn it in every run; and folding it as other constants are folded would need its values.

    Args:
        model: changed in place.
    """
    turned: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        weight = value.const_value if value is not None else None
        if value is None or not isinstance(weight, StreamedTensor) or node.outputs[0].is_graph_output():
            continue
        axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else tuple(reversed(range(len(weight.shape))))
        order = tuple(axes)
        if (value, order) not in turned:
            tensor = weight.transposed(order, f"{value.name}_{'_'.join(map(str, order))}")
            initializer = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(initializer)
            turned[value, order] = initializer
        node.outputs[0].replace_all_uses_with(turned[value, order])
        model.graph.remove(node, safe=True)
        if not value.uses():
            assert value.name is not None
            del model.graph.initializers[value.name]
    return model


def lower_precision(model: ir.Model, precision: str) -> ir.Model:
    """Compute in fp16 or bf16 wherever the rule allows; inputs and outputs of the graph stay fp32.

    Rule: every float operator works in the low type, except (1) `FP32_OPERATORS`, (2) an elementwise operator that reads the
    output of one of `FP32_REACH`, which covers the epsilon and the scaling of a norm written out in parts, a contrast with
    a mean, and the fusion of probabilities, (3) a value multiplied with itself, which is a square written out, (4) whatever
    only `ANGLES` read: bf16 counts positions to 256, and an angle of 100 would be off by up to 0.25 in it, (5) operators
    and inputs that ONNX does not define in the low type at this opset (convolutions in bf16, the scales of a Resize), (6) whatever
    comes before the first product in the low type: there rounding would lose bits of the picture and save nothing, (7) an
    elementwise operator whose result is a graph output, which is fp32 anyway, and (8) a product of two computed tensors that no
    other product follows, whatever follows it, and what it reads up to the products before it, those included: such a product draws a
    map (kernels × features), whose values near the threshold decide single pixels; nano's mask decoder in bf16 lost up to 7 % of a mask
    without this rule and 4.5 % with it, the least IoU of 64 pictures. (9) A DequantizeLinear of a constant is a weight: it works in
    the type of the operators that read it. A cast
    stands at each border, once per value and direction. Constants are stored in the type of the operator that reads them.

    Args:
        precision: "fp16" or "bf16".
    """
    low = LOW_TYPES[precision]
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _Lowering(model, low).run()
    model.graph.sort()
    return model


class _Lowering:
    def __init__(self, model: ir.Model, low: ir.DataType) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports[""]
        self.low = low
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.angles: set[ir.Node] = set()
        self.behind_products: set[ir.Node] = set()
        self.maps: set[ir.Node] = set()

    def run(self) -> None:
        nodes = list(self.graph)
        self.angles = self._read_by_angles(nodes)
        self.behind_products = self._products_and_what_follows(nodes)
        self.maps = self._maps(nodes)
        wanted = {node: self._type_of(node) for node in nodes if not is_weight(node)}
        wanted |= {node: self._type_of_weight(node, wanted) for node in nodes if is_weight(node)}
        floats = {value for value in self._values(nodes) if value.dtype == ir.DataType.FLOAT}
        for node in nodes:
            if any(isinstance(attr.value, ir.Graph) for attr in node.attributes.values()):
                raise ValueError(f"node {node.name} ({node.op_type}) holds a subgraph; lowering to 16 bit knows none")
            for output in node.outputs:
                if output in floats:
                    output.type = ir.TensorType(wanted[node])  # not .dtype, which would change the type of the clones of this graph, too
            if node.op_type == "Cast" and node.outputs[0] in floats:
                node.attributes["to"] = ir.AttrInt64("to", int(wanted[node]))
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value in floats and value is not None and node.op_type != "Cast":
                    allowed = _defined_in(node.op_type, self.opset, self.low, index)
                    node.replace_input_with(index, self._as(value, wanted[node] if allowed else ir.DataType.FLOAT))
        for index, output in enumerate(self.graph.outputs):
            if output in floats and output.dtype != ir.DataType.FLOAT:
                self._keep_output(index, output)
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            if not self.graph.initializers[name].is_graph_output():
                del self.graph.initializers[name]

    def _type_of(self, node: ir.Node) -> ir.DataType:
        if node.op_type in FP32_OPERATORS or node in self.angles or not _defined_in(node.op_type, self.opset, self.low):
            return ir.DataType.FLOAT
        if node not in self.behind_products or node in self.maps:
            return ir.DataType.FLOAT
        if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
            return ir.DataType.FLOAT
        if node.op_type in ELEMENTWISE and node.outputs[0].is_graph_output() and not node.outputs[0].uses():
            return ir.DataType.FLOAT
        reached = (
            value is not None and (producer := value.producer()) is not None and producer.op_type in FP32_REACH for value in node.inputs
        )
        return ir.DataType.FLOAT if node.op_type in ELEMENTWISE and any(reached) else self.low

    def _type_of_weight(self, node: ir.Node, wanted: dict[ir.Node, ir.DataType]) -> ir.DataType:
        readers = {wanted[use.node] for use in node.outputs[0].uses()}
        return self.low if readers == {self.low} and _defined_in(node.op_type, self.opset, self.low, SCALE) else ir.DataType.FLOAT

    @staticmethod
    def _maps(nodes: list[ir.Node]) -> set[ir.Node]:
        """Products of computed tensors that no product follows, with what rule 8 says of them."""
        followed: set[ir.Node] = set()
        for node in reversed(nodes):
            readers = [use.node for output in node.outputs for use in output.uses()]
            if any(reader.op_type in PRODUCTS or reader in followed for reader in readers):
                followed.add(node)
        computed = [node for node in nodes if node.op_type in PAIRINGS and node not in followed]
        behind = {node for node in computed if all(value is not None and value.producer() for value in node.inputs)}
        before: set[ir.Node] = set()
        waiting = list(behind)
        while waiting:
            for value in waiting.pop().inputs:
                producer = value.producer() if value is not None else None
                if producer is not None and producer not in before:
                    before.add(producer)
                    if producer.op_type not in PRODUCTS:
                        waiting.append(producer)
        for node in nodes:
            if any(value is not None and value.producer() in behind for value in node.inputs):
                behind.add(node)
        return behind | before

    @staticmethod
    def _read_by_angles(nodes: list[ir.Node]) -> set[ir.Node]:
        """`ANGLES`, and every node that nothing but they read, directly or through one another."""
        angles: set[ir.Node] = set()
        for node in reversed(nodes):
            readers = [use.node for output in node.outputs for use in output.uses()]
            read_elsewhere = not readers or any(output.is_graph_output() for output in node.outputs)
            if node.op_type in ANGLES or (not read_elsewhere and angles.issuperset(readers)):
                angles.add(node)
        return angles

    def _products_and_what_follows(self, nodes: list[ir.Node]) -> set[ir.Node]:
        """Products that ONNX defines in the low type, and every node that reads one, directly or through others."""
        behind: set[ir.Node] = set()
        for node in nodes:
            product = node.op_type in PRODUCTS and _defined_in(node.op_type, self.opset, self.low)
            if product or any(value is not None and value.producer() in behind for value in node.inputs):
                behind.add(node)
        return behind

    def _values(self, nodes: list[ir.Node]) -> list[ir.Value]:
        values = [*self.graph.inputs, *self.graph.initializers.values()]
        return values + [output for node in nodes for output in node.outputs]

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in `dtype`: itself, a converted copy of a constant, or a cast."""
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self.casts:
            self.casts[key] = self._constant(value, dtype) if value.is_initializer() else self._cast(value, dtype)
        return self.casts[key]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}_{dtype.name.lower()}"
        if isinstance(value.const_value, StreamedTensor):
            tensor = value.const_value.as_type(dtype, name)
        elif isinstance(value.const_value, ir.LazyTensor):
            made = value.const_value
            tensor = ir.LazyTensor(lambda: ir.tensor(made.numpy().astype(dtype.numpy()), dtype=dtype), dtype, made.shape, name=name)
        else:
            tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
        copy = ir.Value(name=tensor.name, shape=value.shape, type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(copy)
        return copy

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}_to_{dtype.name.lower()}")
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"{value.name}_{dtype.name.lower()}", dtype, value.shape
        self.graph.append(node)  # sorted into place at the end
        return output

    def _keep_output(self, index: int, output: ir.Value) -> None:
        """A graph output keeps its name and fp32: the low value behind it is renamed."""
        name = output.name
        output.name = f"{name}_{self.low.name.lower()}"
        cast = self._as(output, ir.DataType.FLOAT)
        cast.name = name
        self.graph.outputs[index] = cast


def is_weight(node: ir.Node) -> bool:
    """Whether it makes a weight of constant integers."""
    return node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()


@functools.cache
def _defined_in(operator: str, opset: int, dtype: ir.DataType, index: int = 0) -> bool:
    """Whether ONNX lets the operator's input at `index` be of this type at this opset."""
    schema = onnx.defs.get_schema(operator, opset)
    if not schema.inputs:
        return True
    return f"tensor({dtype.name.lower()})" in schema.inputs[min(index, len(schema.inputs) - 1)].types  # the last may repeat
