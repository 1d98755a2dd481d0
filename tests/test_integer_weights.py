"""Integers in a graph, before and after: what is replaced by what, that engines compute what the integers stand for, and how exactly."""

from __future__ import annotations

import collections
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import engines.onnxruntime
import engines.openvino
from calibration.weights import QuantizedWeight
from engines import EngineOptions, EngineUnavailable, open_engine
from engines.spec import StageSpec, TensorSpec
from export.integer_weights import SCOPES, linears, round_inputs, store_integers
from export.onnx_writer import write
from export.passes import lower_precision
from runtime.parity import relative_error

OUTPUTS, INPUTS = 48, 256
SPEC = StageSpec("g", (TensorSpec("x", "float32", ("B", "T", INPUTS)),), (TensorSpec("y", "float32", ("B", "T", OUTPUTS)),))
HERE = ("onnxruntime", "openvino")
FORMS = {
    "int4 blocks": (4, 128),
    "int4 small blocks": (4, 32),
    "int4 one block": (4, INPUTS),
    "int8 blocks": (8, 128),
    "int8 per output": (8, INPUTS),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def integers(bits: int, group: int, inputs: int = INPUTS) -> QuantizedWeight:
    rng = np.random.default_rng(bits)
    most = 1 << (bits - 1)
    codes = rng.integers(-most, most, (OUTPUTS, inputs)).astype(np.int8)
    return QuantizedWeight(codes, rng.uniform(0.5, 1.5, (OUTPUTS, inputs // group)).astype(np.float16) / np.float16(most), bits, group)


def linear(opset: int = 20) -> ir.Model:
    """y = x W + b as the exporter leaves a linear layer called "part.layer"."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[B, T, {INPUTS}] x) => (float[B, T, {OUTPUTS}] y)'
    proto = onnx.parser.parse_model(text + "{ a = MatMul(x, w) y = Add(a, bias) }")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (INPUTS, OUTPUTS)), ("bias", (OUTPUTS,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    next(node for node in model.graph if node.op_type == "MatMul").metadata_props[SCOPES] = "['', 'part', 'part.layer', 'linear']"
    return model


def bias_of(model: ir.Model) -> np.ndarray:
    return model.graph.initializers["bias"].const_value.numpy()


def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, 37, INPUTS)).astype(np.float32)


def checked(model: ir.Model) -> ir.Model:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@EVERY_FORM
def test_a_weight_is_read_from_integers_and_its_float_form_goes(form: str) -> None:
    weight, model = integers(*FORMS[form]), linear()
    checked(store_integers(model, {"part.layer": weight}))
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert set(stored) == {"part.layer.codes", "part.layer.scales", "bias"}
    codes = stored["part.layer.codes"]
    np.testing.assert_array_equal(codes.numpy().astype(np.int8), weight.codes.T)
    assert len(codes.tobytes()) == weight.codes.size * weight.bits // 8  # two 4-bit integers to a byte
    assert stored["part.layer.scales"].numpy().tolist() in (weight.scales.T.astype(np.float32).tolist(), weight.scales[:, 0].tolist())
    assert model.opset_imports[""] == (20 if form == "int8 per output" else 21)


def test_the_first_of_two_integers_in_a_byte_is_in_the_low_half() -> None:
    weight, model = integers(4, 128), linear()
    store_integers(model, {"part.layer": weight})
    first, second = weight.codes.T.reshape(-1)[:2]
    assert model.graph.initializers["part.layer.codes"].const_value.tobytes()[0] == (first & 15) | (second & 15) << 4
    assert model.graph.initializers["part.layer.codes"].const_value.numpy().dtype == ml_dtypes.int4


def test_a_layer_that_is_not_named_stays_as_it_is() -> None:
    model = linear()
    before = ir.to_proto(model).SerializeToString()
    store_integers(model, {})
    assert ir.to_proto(model).SerializeToString() == before


def test_an_unknown_layer_is_named_with_those_there_are() -> None:
    assert list(linears(linear())) == ["part.layer"]
    with pytest.raises(ValueError, match="expected a linear layer part.other, got none; the graph has part.layer"):
        store_integers(linear(), {"part.other": integers(4, 128)})
    with pytest.raises(ValueError, match="expected a linear layer part.other"):
        round_inputs(linear(), {"part.other": 1.0})


def test_integers_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"part.layer: expected integers of the weight's shape \[256,48\].*got \[128, 48\]"):
        store_integers(linear(), {"part.layer": integers(4, 128, inputs=128)})


def test_an_operator_whose_meaning_changed_keeps_the_opset_from_being_raised() -> None:
    model = linear()
    model.graph.append(ir.node("GroupNormalization", [model.graph.outputs[0]] * 3, attributes={"num_groups": 1}))
    with pytest.raises(ValueError, match="GroupNormalization .* means something else from opset 21 on"):
        store_integers(model, {"part.layer": integers(4, 128)})


@EVERY_FORM
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_engines_compute_what_the_integers_stand_for(form: str, engine: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    """In fp32 to rounding: neither engine may quantise what it multiplies with, as both would by themselves. In 16 bit no scale is lost."""
    if (engine, precision) == ("onnxruntime", "bf16"):
        pytest.skip("its CPU provider has no bfloat16")
    weight, model = integers(*FORMS[form]), linear()
    store_integers(model, {"part.layer": weight})
    if precision != "fp32":
        lower_precision(model, precision)
    write(checked(model), tmp_path, "g")
    ours = open_engine(tmp_path / "g.onnx", SPEC, engine).run({"x": x()})["y"]
    assert relative_error(ours, x() @ weight.dequantized().T + bias_of(linear())) < tolerance


@pytest.mark.parametrize("engine", HERE)
@EVERY_FORM
def test_inference_in_int8_rounds_the_other_factor_and_not_much(engine: str, form: str, tmp_path: Path) -> None:
    weight, model = integers(*FORMS[form]), linear()
    write(store_integers(model, {"part.layer": weight}), tmp_path, "g")
    options = EngineOptions(inference_precision="int8")
    if engine == "openvino" and engines.openvino.bytes_saturate():
        with pytest.raises(EngineUnavailable, match="no VNNI"):
            open_engine(tmp_path / "g.onnx", SPEC, engine, options)
        return
    ours = open_engine(tmp_path / "g.onnx", SPEC, engine, options).run({"x": x()})["y"]
    assert 1e-3 < relative_error(ours, x() @ weight.dequantized().T + bias_of(linear())) < 2e-2


@pytest.mark.skipif(not engines.openvino.natively_bf16(), reason="this CPU does not multiply in bfloat16")
@EVERY_FORM
def test_bf16_and_int8_together_round_more_than_bf16_alone(form: str, tmp_path: Path) -> None:
    weight, model = integers(*FORMS[form]), linear()
    write(store_integers(model, {"part.layer": weight}), tmp_path, "g")
    wanted = x() @ weight.dequantized().T + bias_of(linear())
    ours = {
        precision: open_engine(tmp_path / "g.onnx", SPEC, "openvino", EngineOptions(inference_precision=precision)).run({"x": x()})["y"]
        for precision in ("bf16", "int8", "bf16+int8")
    }
    errors = {precision: relative_error(each, wanted) for precision, each in ours.items()}
    assert errors["bf16"] < errors["bf16+int8"] < 2e-2
    assert not np.array_equal(ours["bf16+int8"], ours["int8"])


@pytest.mark.parametrize(("group", "rounds"), [(8, False), (16, True), (32, True), (64, True)])
def test_openvino_is_not_asked_to_round_where_it_would_not(group: int, rounds: bool, tmp_path: Path) -> None:
    write(store_integers(linear(), {"part.layer": integers(4, group)}), tmp_path, "g")
    graph, options = tmp_path / "g.onnx", EngineOptions(inference_precision="int8")
    if engines.openvino.bytes_saturate():
        with pytest.raises(EngineUnavailable, match="no VNNI"):
            open_engine(graph, SPEC, "openvino", options)
        return
    exact = open_engine(graph, SPEC, "openvino").run({"x": x()})["y"]
    if rounds:
        assert relative_error(open_engine(graph, SPEC, "openvino", options).run({"x": x()})["y"], exact) > 1e-3
        return
    with pytest.raises(EngineUnavailable, match="a scale for each 8 inputs, where OpenVINO rounds nothing; use precision graph"):
        open_engine(graph, SPEC, "openvino", options)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_16_bit_the_scales_are_16_bit_and_nothing_is_cast_on_the_way_to_the_product(precision: str) -> None:
    model = store_integers(linear(), {"part.layer": integers(4, 128)})
    checked(lower_precision(model, precision))
    low = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[1].producer().op_type == "DequantizeLinear" and product.inputs[1].dtype == low
    scales = [value.dtype for name, value in model.graph.initializers.items() if "scales" in name]
    assert scales == [low]


def operators_after_fusion(path: Path) -> collections.Counter[str]:
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(path.with_name("fused.onnx"))
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(path.with_name("fused.onnx"), load_external_data=False).graph.node)


@EVERY_FORM
def test_onnxruntime_makes_one_product_with_integer_weights_of_it(form: str, tmp_path: Path) -> None:
    write(store_integers(linear(), {"part.layer": integers(*FORMS[form])}), tmp_path, "g")
    assert operators_after_fusion(tmp_path / "g.onnx") == {"MatMulNBits": 1}


# Inputs in 8 bit


def in_eight_bits(most: float = 4.0) -> tuple[ir.Model, QuantizedWeight]:
    weight = integers(8, INPUTS)
    return checked(round_inputs(store_integers(linear(), {"part.layer": weight}), {"part.layer": most})), weight


def rounded(values: np.ndarray, most: float) -> np.ndarray:
    scale = np.float32(most / 127)
    return np.clip(np.rint(values / scale), -128, 127) * scale


@pytest.mark.parametrize("vnni", ["as this CPU", "without VNNI"])
@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("most", [4.0, 1.0], ids=["all within", "clipped"])
def test_an_input_is_rounded_to_its_fixed_scale(
    engine: str, most: float, vnni: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of full range on purpose: a CPU without VNNI would saturate, were it not asked."""
    if vnni == "without VNNI":
        monkeypatch.setattr(f"engines.{engine}.bytes_saturate", lambda: True)
    model, weight = in_eight_bits(most)
    assert [node.op_type for node in model.graph if node.op_type != "Add"].count("QuantizeLinear") == 1
    write(model, tmp_path, "g")
    ours = open_engine(tmp_path / "g.onnx", SPEC, engine).run({"x": x()})["y"]
    wanted = rounded(x(), most) @ weight.dequantized().T + bias_of(linear())
    assert relative_error(ours, wanted) < 1e-3  # a tie between two codes may fall either way
    assert relative_error(ours, x() @ weight.dequantized().T + bias_of(linear())) > 5e-3


def test_engines_agree_on_whether_bytes_saturate_here() -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "",
        [
            onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, [1, 4]),
            onnx.helper.make_tensor_value_info("b", onnx.TensorProto.INT8, [4, 1]),
        ],
        [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.INT32, [1, 1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 10)], ir_version=5)
    assert model.SerializeToString() == engines.onnxruntime.FOUR_BYTES
    assert engines.onnxruntime.bytes_saturate() == engines.openvino.bytes_saturate()


def test_onnxruntime_multiplies_in_integers_where_both_sides_are(tmp_path: Path) -> None:
    write(in_eight_bits()[0], tmp_path, "g")
    fused = operators_after_fusion(tmp_path / "g.onnx")
    assert any("Integer" in operator for operator in fused) and not fused["MatMul"] and not fused["MatMulNBits"], fused


def test_products_that_read_one_tensor_share_its_rounding() -> None:
    model = linear()
    (product,) = linears(model).values()
    twin = ir.node("MatMul", list(product.inputs), name="twin")
    twin.metadata_props[SCOPES] = "['', 'part', 'part.twin', 'linear']"
    model.graph.append(twin)
    round_inputs(model, {"part.layer": 2.0, "part.twin": 2.0})
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
    assert twin.inputs[0] is product.inputs[0]


@pytest.mark.parametrize("most", [0.0, -1.0, float("nan")])
def test_a_range_that_is_none_is_refused(most: float) -> None:
    with pytest.raises(ValueError, match="part.layer: expected a positive range"):
        round_inputs(linear(), {"part.layer": most})
