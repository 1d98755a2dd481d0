"""Integers in a graph: a product's weight becomes packed integers and the DequantizeLinear that reads them, its input is rounded to 8 bit.

One graph for every engine: onnxruntime makes a MatMulNBits of a product with integer weights, OpenVINO and TensorRT their own, and each of
them an 8-bit product where the input is rounded, too. The integers are the plan's own, so the graph computes what the fake-quantised
torch model computes. Nothing here chooses an integer (calibration/ does), or which layer stays float (export/gate.py does).
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from calibration.weights import IntegerWeight
from export.passes import is_weight

# DequantizeLinear knows 4-bit integers and blocks from here on. TensorRT, onnxruntime and OpenVINO read it.
BLOCKS_FROM_OPSET = 21
# Between opset 20 and 21 every operator but this one kept its meaning and only gained types.
CHANGED_IN_OPSET_21 = frozenset({"GroupNormalization"})
SCOPES = "pkg.torch.onnx.name_scopes"


def linears(model: ir.Model) -> dict[str, ir.Node]:
    """The products of an exported graph whose weight is a constant or read from one, by the torch module: MatMul [.., K] × [K, N].

    The exporter notes on every node the modules it stands in; the innermost one is the linear layer.
    """
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and (weight.is_initializer() or _dequantized(weight)) and weight.shape is not None and len(weight.shape) == 2:
            scopes = [scope.strip(" '\"") for scope in node.metadata_props.get(SCOPES, "").strip("[]").split(",")]
            if len(scopes) >= 2 and scopes[-2]:
                found[scopes[-2]] = node
    return found


def store_integers(model: ir.Model, weights: Mapping[str, IntegerWeight]) -> ir.Model:
    """Read the weights of the named products from integers; everything else stays.

    Rule: a MatMul's constant [K, N] is replaced by DequantizeLinear(codes, scales) without a zero point. Codes are int4, two to a byte,
    or int8, [K, N]; scales [K / group, N] with axis 0 and block_size = group, or, of int8 where a group is all of K, [N] with axis 1. They
    are float32, exactly the plan's float16; lowering to 16 bit comes behind (export/passes.py, rule 8). The float weight goes.

    Args:
        model: changed in place; its opset is raised to 21 where it is below.
        weights: by the names of `linears`.

    Raises:
        ValueError: a name that the graph has no product for, or integers of another shape than its weight.
    """
    products = linears(model)
    for name, weight in weights.items():
        if name not in products:
            raise ValueError(f"{model.graph.name}: expected a linear layer {name}, got none; the graph has {', '.join(sorted(products))}")
        _read_integers(model, products[name], name, weight)
    if any(map(_in_blocks, weights.values())):
        _raise_opset(model)
    model.graph.sort()
    return model


def round_inputs(model: ir.Model, ranges: Mapping[str, float]) -> ir.Model:
    """Round what the named products read to 8 bit; with their weights in int8 (`store_integers`) engines then multiply in int8.

    Rule: between a product and its input stand QuantizeLinear and DequantizeLinear with one fixed scale, range / 127, and no zero point
    (TensorRT takes no other). Products that read one tensor with one range share them.

    Args:
        model: changed in place.
        ranges: largest absolute input by the names of `linears`; what exceeds it is clipped.

    Raises:
        ValueError: a name that the graph has no product for, or a range that is not positive.
    """
    products = linears(model)
    rounded: dict[tuple[ir.Value, float], ir.Value] = {}
    for name, most in ranges.items():
        if name not in products:
            raise ValueError(f"{model.graph.name}: expected a linear layer {name}, got none; the graph has {', '.join(sorted(products))}")
        if not most > 0:
            raise ValueError(f"{model.graph.name}: {name}: expected a positive range of its input, got {most}; calibrate on other pictures")
        value = products[name].inputs[0]
        assert value is not None
        if (value, most) not in rounded:
            rounded[value, most] = _rounded(model, value, name, most)
        products[name].replace_input_with(0, rounded[value, most])
    model.graph.sort()
    return model


def _rounded(model: ir.Model, value: ir.Value, name: str, most: float) -> ir.Value:
    scale = _constant(model, f"{name}.input_scale", np.array(most / 127, np.float32), ir.DataType.FLOAT)
    zero = _constant(model, f"{name}.input_zero", np.array(0, np.int8), ir.DataType.INT8)  # left out, QuantizeLinear would make uint8
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}.quantize_input")
    codes = quantize.outputs[0]
    codes.name, codes.dtype, codes.shape = f"{name}.input_codes", ir.DataType.INT8, value.shape
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero], name=f"{name}.dequantize_input")
    output = dequantize.outputs[0]
    output.name, output.dtype, output.shape = f"{name}.input", ir.DataType.FLOAT, value.shape
    model.graph.extend([quantize, dequantize])  # sorted into place at the end
    return output


def _read_integers(model: ir.Model, product: ir.Node, name: str, weight: IntegerWeight) -> None:
    before = product.inputs[1]
    assert before is not None
    outputs, inputs = weight.shape
    if before.shape != [inputs, outputs]:
        raise ValueError(
            f"{model.graph.name}: {name}: expected integers of the weight's shape {before.shape} [K, N], got {[inputs, outputs]}; "
            "calibrate this checkpoint"
        )
    per_output = not _in_blocks(weight)
    kind = ir.DataType.INT4 if weight.bits == 4 else ir.DataType.INT8

    # Both are made when the graph is written, and codes let go: of a whole model's integers one layer's are in memory. Scales are few, and
    # are kept from when the codes were made, which come first in the file.
    kept: list[np.ndarray] = []

    def codes() -> ir.Tensor:
        made = weight.read()
        kept[:] = [made.scales]
        turned = np.ascontiguousarray(made.codes.T)
        return ir.tensor(turned.astype(ml_dtypes.int4) if weight.bits == 4 else turned, dtype=kind)

    def scales() -> ir.Tensor:
        turned = np.ascontiguousarray((kept[0] if kept else weight.read().scales).T).astype(np.float32)
        return ir.tensor(turned[0] if per_output else turned, dtype=ir.DataType.FLOAT)

    stored = _initializer(model, ir.LazyTensor(codes, kind, ir.Shape([inputs, outputs]), name=f"{name}.codes"))
    shape = [outputs] if per_output else [inputs // weight.group, outputs]
    scale = _initializer(model, ir.LazyTensor(scales, ir.DataType.FLOAT, ir.Shape(shape), name=f"{name}.scales"))
    attributes = {"axis": 1} if per_output else {"axis": 0, "block_size": weight.group}
    node = ir.node("DequantizeLinear", [stored, scale], attributes=attributes, name=f"{name}.dequantize")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{name}.weight", ir.DataType.FLOAT, before.shape
    model.graph.append(node)  # sorted into place at the end
    product.replace_input_with(1, output)
    if not before.uses() and not before.is_graph_output():
        assert before.name is not None
        del model.graph.initializers[before.name]


def _in_blocks(weight: IntegerWeight) -> bool:
    return weight.bits == 4 or weight.group != weight.shape[1]


def _dequantized(value: ir.Value) -> bool:
    """Whether it is a weight read from integers."""
    node = value.producer()
    return node is not None and is_weight(node)


def _constant(model: ir.Model, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    return _initializer(model, ir.tensor(array, dtype=dtype, name=name))


def _initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _raise_opset(model: ir.Model) -> None:
    if model.opset_imports[""] >= BLOCKS_FROM_OPSET:
        return
    for node in model.graph:
        if node.op_type in CHANGED_IN_OPSET_21:
            raise ValueError(f"{model.graph.name}: {node.op_type} ({node.name}) means something else from opset 21 on; export it in parts")
    model.opset_imports[""] = BLOCKS_FROM_OPSET
