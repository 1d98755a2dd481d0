"""Graphs in onnxruntime's own operators compute what the plain ones do, over the same weights, and are opened on CUDA alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import new_tiny
from onnx import TensorProto, helper

from agvas import AGVAS
from agvas.config import LanguageConfig
from engines.cache import CUDA_FORM
from export.adapters import axis_sizes, example_inputs
from export.cuda_fusion import CONTRIB, fuse
from export.onnx_writer import export_stage, stage_module, write
from export.passes import lower_precision
from runtime.bundle import Bundle
from runtime.contract import STAGES

FREE = {"B": 1, "N": 9, "K": 0, "R": 3}
# fp16 rounds to 2^-11, and the fused operators round at other places.
TOLERANCE = {"fp32": 2e-5, "fp16": 5e-3}


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    return list(onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"]).run(None, feeds))


def compared(folder: Path, stage: str, sizes: dict[str, int], precision: str, **free: int) -> float:
    """Largest relative error of the fused form's outputs against the plain one's."""
    tensors = example_inputs(stage, sizes, FREE | free)
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(STAGES[stage].inputs, tensors, strict=True)}
    plain, fused = run(folder / f"{stage}.onnx", feeds), run(folder / f"{stage}.fused.onnx", feeds)
    assert [one.shape for one in plain] == [one.shape for one in fused]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(plain, fused, strict=True))


def fused_beside(folder: Path, stage: str) -> tuple[ir.Model, dict[str, int]]:
    model = ir.load(folder / f"{stage}.onnx")
    counts = fuse(model, every_type=True)
    ir.save(model, folder / f"{stage}.fused.onnx")
    return model, counts


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.fixture(scope="module")
def model() -> AGVAS:
    """tiny with heads of 8, which GroupQueryAttention takes, in two groups."""
    config = dataclasses.replace(new_tiny().config, language=LanguageConfig(512, 48, 3, 6, 2, 37, max_positions=512))
    made = AGVAS(config, new_tiny().tokenizer)
    for name, parameter in made.named_parameters():
        if "pos" in name:
            parameter.data.normal_(std=0.2)
    return made.eval()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def folder(request: pytest.FixtureRequest, model: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp(request.param)
    for stage in STAGES:
        graph = export_stage(stage_module(model, stage), stage, axis_sizes(model.config))
        if request.param == "fp16":
            lower_precision(graph, request.param)
        write(graph, place, stage)
    return place, request.param


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "language"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_attention_is_one_operator_and_gives_the_same_numbers(
    stage: str, batch: int, folder: tuple[Path, str], model: AGVAS
) -> None:
    place, precision = folder
    plain = operators(ir.load(place / f"{stage}.onnx"))
    made, counts = fused_beside(place, stage)
    assert plain.count("Softmax") - operators(made).count("Softmax") == counts["MultiHeadAttention"] > 0
    # What is left is the softmax of equation 7, over the two relative maps.
    assert operators(made).count("Softmax") == (1 if stage == "mask_decoder" else 0)
    assert compared(place, stage, axis_sizes(model.config), precision, B=batch) < TOLERANCE[precision]


@pytest.mark.parametrize(("tokens", "past", "rows"), [(9, 0, 3), (1, 12, 1), (5, 12, 2)])
def test_the_language_stage_gives_the_same_numbers_with_and_without_a_past(
    tokens: int, past: int, rows: int, folder: tuple[Path, str], model: AGVAS
) -> None:
    place, precision = folder
    made, counts = fused_beside(place, "language")
    layers = model.config.language.layers
    # The last layer asks for some rows only, and stays as it is.
    assert counts["GroupQueryAttention"] == layers - 1 and operators(made).count("Softmax") == 1
    means = [node for node in made.graph if node.op_type == "ReduceMean" and next(iter(node.outputs[0].uses())).node.op_type == "Sub"]
    assert len(means) == 1, "keys are centred where scores are stored, in the last layer"
    assert counts["QuickGelu"] == layers and counts["SimplifiedLayerNormalization"] >= 2 * layers
    assert compared(place, "language", axis_sizes(model.config), precision, N=tokens, K=past, R=rows) < TOLERANCE[precision]


def test_relative_positions_become_columns_and_no_bias_of_the_scores_size_is_left(folder: tuple[Path, str], model: AGVAS) -> None:
    place, _ = folder
    made, _ = fused_beside(place, "pixel_encoder")
    attention = [node for node in made.graph if node.op_type == "MultiHeadAttention"]
    assert len(attention) == model.config.pixel.layers and all(len(node.inputs) == 3 for node in attention)
    assert "Pad" not in operators(made)


def test_without_a_kernel_for_the_type_a_graph_stays(model: AGVAS, tmp_path: Path) -> None:
    graph = export_stage(stage_module(model, "spam"), "spam", axis_sizes(model.config))
    lower_precision(graph, "bf16")
    assert fuse(graph).get("MultiHeadAttention") is None and "Softmax" in operators(graph)
    language = export_stage(stage_module(model, "language"), "language", axis_sizes(model.config))
    counts = fuse(language)  # fp32: no GroupQueryAttention on CUDA
    assert "GroupQueryAttention" not in counts and counts["QuickGelu"] == model.config.language.layers


def attention(tmp_path: Path, bias: bool, pad: dict[str, object] | None = None) -> Path:
    """softmax(Q·Kᵀ / 2 + bias)·V of 2 heads with an ordinary bias, behind a Pad where one is asked for."""
    info = helper.make_tensor_value_info
    shape, scores = [1, 2, 5, 4], [1, 2, 5, 5]
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["raw"]),
        helper.make_node("Mul", ["raw", "half"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased" if bias else "scaled"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("Relu", ["mixed"], ["out"]),
    ]
    values = [info(name, TensorProto.FLOAT, scores) for name in ("raw", "scaled", "biased", "shares")]
    values += [info("mixed", TensorProto.FLOAT, shape), info("kt", TensorProto.FLOAT, [1, 2, 4, 5])]
    initializers = [helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])]
    out = shape
    if pad is not None:
        nodes[-1] = helper.make_node("Pad", ["mixed", "pads", "value"], ["padded"], mode=str(pad["mode"]))
        nodes.append(helper.make_node("Relu", ["padded"], ["out"]))
        out = [1, 2, 6, 7]
        initializers += [
            helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, *pad["before"], 0, 0, *pad["behind"]]),  # type: ignore[misc]
            helper.make_tensor("value", TensorProto.FLOAT, [], [pad["value"]]),
        ]
        values.append(info("padded", TensorProto.FLOAT, out))
    inputs = [info(name, TensorProto.FLOAT, shape) for name in "qkv"] + [info("bias", TensorProto.FLOAT, scores)]
    graph = helper.make_graph(nodes, "g", inputs, [info("out", TensorProto.FLOAT, out)], initializers, value_info=values)
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def both(path: Path) -> tuple[ir.Model, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, 2, 5, 4)).astype(np.float32) for name in "qkv"}
    feeds["bias"] = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    made = ir.load(path)
    fuse(made, every_type=True)
    ir.save(made, path.with_name("fused.onnx"))
    return made, run(path, feeds), run(path.with_name("fused.onnx"), feeds)


@pytest.mark.parametrize("bias", [True, False])
def test_an_ordinary_bias_is_handed_to_the_operator(bias: bool, tmp_path: Path) -> None:
    made, plain, fused = both(attention(tmp_path, bias))
    (node,) = [node for node in made.graph if node.op_type == "MultiHeadAttention"]
    assert node.domain == CONTRIB and (len(node.inputs) == 6) is bias
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-6)


@pytest.mark.parametrize(
    ("pad", "goes"),
    [
        ({"mode": "constant", "before": [0, 0], "behind": [1, 3], "value": 0.0}, True),
        ({"mode": "constant", "before": [0, 0], "behind": [1, 3], "value": 1.0}, False),
        ({"mode": "constant", "before": [1, 0], "behind": [0, 3], "value": 0.0}, False),
        ({"mode": "edge", "before": [0, 0], "behind": [1, 3], "value": 0.0}, False),
    ],
)
def test_only_zeros_behind_become_a_concat(pad: dict[str, object], goes: bool, tmp_path: Path) -> None:
    made, plain, fused = both(attention(tmp_path, True, pad))
    assert ("Pad" not in operators(made)) is goes
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-6)


def test_a_bundle_holds_both_forms_over_the_same_weights_and_cuda_is_given_its_own(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    for stage in STAGES:
        assert bundle.graph(stage) == bundle.graph(stage, "openvino") == bundle.graph(stage, "onnxruntime", "cpu")
        assert bundle.graph(stage) == bundle.graph(stage, "tensorrt", "cuda:0") != bundle.graph(stage, "onnxruntime", "cuda:0")
        own = bundle.graph(stage, "onnxruntime", "cuda:0")
        assert own.name == f"{stage}{CUDA_FORM}" and f"{stage}/{own.name}" in bundle.manifest.files
        held = [value.const_value for value in ir.load(own).graph.initializers.values()]
        assert {tensor.location for tensor in held if isinstance(tensor, ir.ExternalTensor)} <= {f"{stage}.data"}
        assert CUDA_FORM not in bundle.graph_hash(stage)


def test_a_graph_of_its_own_operators_does_not_change_what_engines_are_filed_under(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    before = bundle.graph_hash("spam")
    del bundle.manifest.files[f"spam/spam{CUDA_FORM}"]
    assert bundle.graph_hash("spam") == before
    assert bundle.graph("spam", "onnxruntime", "cuda:0") == bundle.graph("spam")  # a bundle of before
