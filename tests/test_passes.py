"""Lowering to 16 bit, before and after: which operator computes in which type, and that the graphs still give the numbers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import new_tiny

from agvas import AGVAS
from agvas.config import LanguageConfig
from engines import EngineFailed, EngineOptions, open_engine
from engines.onnxruntime import OnnxRuntimeEngine
from export.adapters import axis_sizes, example_inputs
from export.onnx_writer import export_stage, stage_module, write
from export.passes import lower_precision
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.parity import relative_error

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
BOTH = pytest.mark.parametrize("precision", LOW)


def graph(signature: str, body: str, **constants: np.ndarray) -> ir.Model:
    """A model from ONNX's text form: `x: float[N, 4]` as "float[N, 4] x"."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def lowered(model: ir.Model, precision: str) -> ir.Model:
    """A lowered copy, checked."""
    copy = ir.from_proto(ir.to_proto(model))
    lower_precision(copy, precision)
    proto = ir.to_proto(copy)
    onnx.checker.check_model(proto, full_check=True)
    before, after = ir.to_proto(model).graph, proto.graph
    assert list(after.input) == list(before.input)
    assert [(o.name, o.type.tensor_type.elem_type) for o in after.output] == [
        (o.name, o.type.tensor_type.elem_type) for o in before.output
    ]
    return copy


def types(model: ir.Model) -> dict[str, ir.DataType]:
    """What each operator computes in: the type of its first float input, casts left out."""
    return {
        node.op_type: next(v.dtype for v in node.inputs if v is not None and v.dtype in {*LOW.values(), ir.DataType.FLOAT})
        for node in model.graph
        if node.op_type != "Cast"
    }


def casts(model: ir.Model) -> list[str]:
    return [node.inputs[0].name for node in model.graph if node.op_type == "Cast"]


def computed(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """By onnxruntime, its optimiser off."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings).run(None, feeds)


def computed_by_the_book(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """Every node in its own type, as a GPU would: onnxruntime's CPU provider computes much of fp16 in fp32."""
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# Which operator in which type


@BOTH
def test_matmuls_are_low_and_norms_and_probabilities_are_not(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)",
        "a = MatMul(x, w) b = LayerNormalization(a, scale, bias) c = Gelu(b) d = MatMul(c, v) y = Softmax(d)",
        w=ones(4, 4),
        v=ones(4, 4),
        scale=ones(4),
        bias=ones(4),
    )
    fp32 = ir.DataType.FLOAT
    assert types(lowered(model, precision)) == {
        "MatMul": LOW[precision],
        "LayerNormalization": fp32,
        "Gelu": LOW[precision],
        "Softmax": fp32,
    }


@BOTH
def test_a_value_times_its_sigmoid_is_fp32_and_the_matmul_behind_it_low(precision: str) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "s = Sigmoid(x) m = Mul(x, s) y = MatMul(m, w)", w=ones(4, 4))
    assert types(lowered(model, precision)) == {
        "Sigmoid": ir.DataType.FLOAT,
        "Mul": ir.DataType.FLOAT,
        "MatMul": LOW[precision],
    }


@pytest.mark.parametrize(("precision", "wanted"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.FLOAT)])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_a_convolution_is_low_only_where_onnx_defines_it(operator: str, precision: str, wanted: ir.DataType) -> None:
    model = graph("(float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y)", f"y = {operator}(x, w)", w=ones(3, 3, 1, 1))
    assert types(lowered(model, precision)) == {operator: wanted}


@BOTH
def test_an_input_that_onnx_wants_in_fp32_stays(precision: str) -> None:
    model = graph(
        "(float[N, 3, 8, 8] x) => (float[N, 3, 16, 16] y)",
        "a = MatMul(x, w) y = Resize(a, , scales)",
        w=ones(8, 8),
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    after = lowered(model, precision)
    assert types(after)["Resize"] == LOW[precision]
    assert after.graph.initializers["scales"].dtype == ir.DataType.FLOAT


@BOTH
def test_integers_stay_integers(precision: str) -> None:
    model = graph(
        "(float[N, 4] x, int64[R] rows) => (float[R, 4] y, int64[2] shape)",
        "a = MatMul(x, w) y = Gather(a, rows) shape = Shape(a)",
        w=ones(4, 4),
    )
    after = lowered(model, precision)
    assert types(after)["Gather"] == LOW[precision]
    assert [value.dtype for value in after.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.INT64]
    assert after.graph.outputs[1].dtype == ir.DataType.INT64


@BOTH
def test_rounding_begins_at_the_first_product_in_the_low_type(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)",
        "a = Abs(x) b = Mul(a, scale) c = MatMul(b, w) d = Mul(c, scale) y = Relu(d)",
        w=ones(4, 4),
        scale=ones(4),
    )
    computes_in = {node.outputs[0].name: node.inputs[0].dtype for node in lowered(model, precision).graph if node.op_type != "Cast"}
    fp32, low = ir.DataType.FLOAT, LOW[precision]
    assert list(computes_in.values()) == [fp32, fp32, low, low, low]
    assert casts(lowered(model, precision))[0] == "b"


@BOTH
def test_a_sum_that_is_a_graph_output_is_not_rounded_on_its_way_to_fp32(precision: str) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "a = MatMul(x, w) y = Add(a, x)", w=ones(4, 4))
    after = lowered(model, precision)
    assert types(after) == {"MatMul": LOW[precision], "Add": ir.DataType.FLOAT}
    assert sorted(casts(after)) == ["a", "x"]  # nothing behind the sum, and x is read as it came
    read_on = graph("(float[N, 4] x) => (float[N, 4] y, float[N, 4] z)", "a = MatMul(x, w) y = Add(a, x) z = Relu(y)", w=ones(4, 4))
    assert types(lowered(read_on, precision))["Add"] == LOW[precision]


@BOTH
def test_where_a_map_is_drawn_from_kernels_and_features_nothing_is_rounded_from_the_products_before_it_on(precision: str) -> None:
    model = graph(
        "(float[N, 4] x, float[N, 4] z) => (float[N, N] y)",
        "a = MatMul(x, w) k = MatMul(a, w) f = MatMul(z, w) g = Gelu(f) t = Transpose(g) m = MatMul(k, t) l = Neg(m) y = Sigmoid(l)",
        w=ones(4, 4),
    )
    computes_in = {node.outputs[0].name: node.inputs[0].dtype for node in lowered(model, precision).graph if node.op_type != "Cast"}
    fp32 = ir.DataType.FLOAT
    assert computes_in == {"a": LOW[precision]} | dict.fromkeys(("k", "f", "g", "t", "m", "l", "y"), fp32)


@BOTH
def test_attention_that_another_product_follows_draws_no_map(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)",
        "q = MatMul(x, w) t = Transpose(q) s = MatMul(q, t) p = Softmax(s) v = MatMul(p, q) y = MatMul(v, w)",
        w=ones(4, 4),
    )
    products = [node for node in lowered(model, precision).graph if node.op_type == "MatMul"]
    assert {value.dtype for node in products for value in node.inputs} == {LOW[precision]}


# Borders


@BOTH
def test_a_value_is_cast_once_for_all_its_readers(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y, float[N, 4] z)", "y = MatMul(x, w) z = MatMul(x, w)", w=ones(4, 4)
    )
    after = lowered(model, precision)
    assert sorted(casts(after)) == sorted(["x", f"y_{LOW[precision].name.lower()}", f"z_{LOW[precision].name.lower()}"])


@BOTH
def test_a_constant_is_converted_once_and_never_cast_at_run_time(precision: str) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)",
        "a = MatMul(x, w) b = Softmax(a) y = MatMul(b, w)",
        w=weights,
    )
    after = lowered(model, precision)
    assert "w" not in casts(after)
    constants = [value for value in after.graph.initializers.values() if value.shape == [4, 4]]
    assert [value.dtype for value in constants] == [LOW[precision]]
    np.testing.assert_array_equal(constants[0].const_value.numpy(), weights.astype(LOW[precision].numpy()))


@BOTH
def test_a_constant_read_in_both_types_is_kept_in_both(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)",
        "m = MatMul(x, w) a = Add(m, scale) y = LayerNormalization(a, scale, scale)",
        w=ones(4, 4),
        scale=ones(4),
    )
    after = lowered(model, precision)
    kept = [value.dtype for value in after.graph.initializers.values() if value.shape == [4]]
    assert len(kept) == 2 and set(kept) == {LOW[precision], ir.DataType.FLOAT}


@BOTH
def test_an_output_that_is_read_on_keeps_its_name_and_fp32(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y, float[N, 4] z)", "y = MatMul(x, w) z = Softmax(y)", w=2 * ones(4, 4)
    )
    after = lowered(model, precision)
    assert [value.name for value in after.graph.outputs] == ["y", "z"]
    if precision == "fp16":
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        np.testing.assert_array_equal(computed(after, x=x)[0], computed(model, x=x)[0])


def test_a_graph_that_only_passes_on_is_left_alone() -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "y = LayerNormalization(x, scale, scale)", scale=ones(4))
    assert not casts(lowered(model, "fp16"))


def test_a_node_with_a_subgraph_is_refused() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[4] x) => (float[4] y)'
        "{ y = If (c) <then_branch = t () => (float[4] a) { a = Relu(x) }, else_branch = e () => (float[4] b) { b = Neg(x) }> }"
    )
    with pytest.raises(ValueError, match=r"\(If\) holds a subgraph"):
        lower_precision(ir.from_proto(proto), "fp16")


@BOTH
def test_lowering_a_clone_leaves_the_graph_it_came_from_alone(precision: str) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "a = MatMul(x, w) b = Gelu(a) y = MatMul(b, w)", w=ones(4, 4))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first = ir.to_proto(lower_precision(model.clone(), precision)).SerializeToString(deterministic=True)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert ir.to_proto(lower_precision(model.clone(), precision)).SerializeToString(deterministic=True) == first


# Numbers that 16 bit cannot hold

INVERSE_NORM = {
    "Pow": "p = Pow(x, two) m = ReduceMean <keepdims = 1> (p, axes) e = Add(m, epsilon) s = Sqrt(e) r = Reciprocal(s)",
    "a product": "p = Mul(x, x) m = ReduceMean <keepdims = 1> (p, axes) e = Add(m, epsilon) s = Sqrt(e) r = Reciprocal(s)",
    "ReduceSumSquare": "q = ReduceSumSquare <keepdims = 1> (x, axes) s = Sqrt(q) r = Reciprocal(s)",
    "ReduceL2": "l = ReduceL2 <keepdims = 1> (x, axes) r = Reciprocal(l)",
}


@pytest.mark.parametrize("squared_by", INVERSE_NORM)
def test_a_norm_written_out_in_parts_survives_values_of_ten_thousand(squared_by: str) -> None:
    """Their squares are 1,500 times what fp16 can hold."""
    model = graph(
        "(float[N, 4] raw) => (float[N, 4] y)",
        # What comes before and behind is low: the norm has to ask for its own type.
        f"x = MatMul(raw, unit) {INVERSE_NORM[squared_by]} n = Mul(x, r) o = Mul(n, weight) y = Relu(o)",
        unit=np.eye(4, dtype=np.float32),
        two=np.array(2, np.float32),
        axes=np.array([-1]),
        epsilon=np.array(1e-6, np.float32),
        weight=np.array([1, 2, 3, 4], np.float32),
    )
    raw = np.array([[1e4, 2e4, 3e3, 1.0], [1e-2, 2e-2, 0, 1e-2]], np.float32)
    after = lowered(model, "fp16")
    computes_in = {node.outputs[0].name: node.inputs[0].dtype for node in after.graph if node.op_type != "Cast"}
    assert computes_in["x"] == computes_in["o"] == ir.DataType.FLOAT16
    for compute in (computed, computed_by_the_book):
        (ours,), (wanted,) = compute(after, raw=raw), computed(model, raw=raw)
        np.testing.assert_allclose(ours, wanted, rtol=3e-3)


@BOTH
def test_angles_keep_all_their_bits_from_the_position_on(precision: str) -> None:
    """Rotary embeddings as exported: bf16 cannot tell position 257 from 256, fp16 not 2049 from 2048."""
    model = graph(
        "(int64[N, 1] positions, float[1, 4] scale) => (float[N, 4] y)",
        "p = Cast <to = 1> (positions) a = Mul(p, frequencies) c = Cos(a) s = Sin(a) t = Add(c, s) q = MatMul(scale, unit) "
        "z = Mul(t, q) y = Relu(z)",
        unit=np.eye(4, dtype=np.float32),
        frequencies=np.array([1, 0.3, 0.1, 0.03], np.float32),
    )
    after = lowered(model, precision)
    assert {node.outputs[0].name: node.outputs[0].dtype for node in after.graph if node.op_type == "Mul"} == {
        "a": ir.DataType.FLOAT,
        "z": LOW[precision],
    }
    if precision == "fp16":
        feeds = {"positions": np.array([[257], [2049], [30001]]), "scale": ones(1, 4)}
        np.testing.assert_allclose(computed(after, **feeds)[0], computed(model, **feeds)[0], atol=2e-3)


@BOTH
def test_what_an_angle_is_computed_from_stays_low_where_others_read_it_too(precision: str) -> None:
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y)", "a = MatMul(x, w) s = Sin(a) b = Relu(a) y = Add(s, b)", w=ones(4, 4)
    )
    assert types(lowered(model, precision))["MatMul"] == LOW[precision]


# The exported stages


def stage_lowered(bundle: Path, stage: str, precision: str, folder: Path) -> Path:
    model = ir.load(bundle / stage / f"{stage}.onnx")
    lower_precision(model, precision)
    write(model, folder, stage)
    onnx.checker.check_model(str(folder / f"{stage}.onnx"), full_check=True)
    return folder / f"{stage}.onnx"


def feeds_for(bundle: Path, stage: str) -> dict[str, np.ndarray]:
    # Past 256 positions, where bf16 begins to skip some.
    axes = {"B": 1, "N": 40, "K": 290, "R": 3}
    tensors = example_inputs(stage, Bundle(bundle).manifest.sizes, axes)
    return {spec.name: tensor.numpy() for spec, tensor in zip(STAGES[stage].inputs, tensors, strict=True)}


# fp16 keeps 11 bits, bf16 8; errors of a tiny random model's few layers add up to some units of the last place.
@pytest.mark.parametrize(("precision", "engine", "tolerance"), [("fp16", "onnxruntime", 5e-3), ("bf16", "openvino", 3e-2)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_lowered_stage_stays_close_to_fp32(
    stage: str, precision: str, engine: str, tolerance: float, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = stage_lowered(tiny_bundle, stage, precision, tmp_path)
    spec, feeds = STAGES[stage], feeds_for(tiny_bundle, stage)
    wanted = open_engine(tiny_bundle / stage / f"{stage}.onnx", spec, "onnxruntime").run(feeds)
    ours = open_engine(path, spec, engine).run(feeds)
    for name, tensor in wanted.items():
        assert ours[name].dtype == np.float32
        assert relative_error(ours[name], tensor) < tolerance, name
    # Not for having stayed fp32: what matrix products read is low, all of it but where a map is drawn.
    products = [node for node in ir.load(path).graph if node.op_type in ("MatMul", "Gemm")]
    fp32 = [node.op_type for node in products if {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}]
    assert fp32 == (["Gemm"] * 3 + ["MatMul"] if stage == "mask_decoder" else [])
    assert len(products) > 5 and all(len({value.dtype for value in node.inputs}) == 1 for node in products)


@pytest.mark.parametrize("bias", [100.0, 300.0])  # scores of 24,000 and 72,000 before they are scaled, the same for every key
def test_keys_with_the_biases_of_qwen2_leave_fp16_scores_finite_and_exact(bias: float, tmp_path: Path) -> None:
    """Each operator in its own type, as on a GPU that does not fuse: onnxruntime's CPU provider computes products of fp16 in fp32."""
    model = new_tiny()
    config = dataclasses.replace(model.config, language=LanguageConfig(512, 256, 2, 2, 1, 64, max_positions=512))
    torch.manual_seed(0)
    model = AGVAS(config, model.tokenizer).eval()
    with torch.no_grad():
        for layer in model.language.model.layers:
            keys, queries = layer.self_attn.k_proj.bias, layer.self_attn.q_proj.bias
            keys.zero_(), queries.zero_()
            keys[60:64] = bias  # the slowest channels of a head of 128: the angle hardly turns them
            queries.view(2, 128)[:, 60:64] = 60.0
    sizes = axis_sizes(config)
    inputs = example_inputs("language", sizes, {"B": 1, "N": 40, "K": 0, "R": 3})
    module = stage_module(model, "language")
    with torch.no_grad():
        wanted = module(*inputs)[0].numpy()
        half = copy.deepcopy(model).half().language.model(inputs_embeds=inputs[0].half()).last_hidden_state[:, -3:].float().numpy()
    graph = lower_precision(export_stage(module, "language", sizes), "fp16")
    write(graph, tmp_path, "language")
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(STAGES["language"].inputs, inputs, strict=True)}
    states = onnx.reference.ReferenceEvaluator(str(tmp_path / "language.onnx")).run(None, feeds)[0]
    assert relative_error(states, wanted) < 1.5 * relative_error(half, wanted), "torch's fused attention in fp16"


def test_onnxruntime_refuses_bf16_and_says_which_engine_takes_it(tiny_bundle: Path, tmp_path: Path) -> None:
    path = stage_lowered(tiny_bundle, "spam", "bf16", tmp_path)
    with pytest.raises(EngineFailed, match="spam.onnx.*no bfloat16 kernels: for a bf16 bundle use engine openvino"):
        OnnxRuntimeEngine(path, STAGES["spam"], EngineOptions())
