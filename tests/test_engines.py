"""Engines: what cannot be had says so, what does not fit is named, and every engine gives the reference's numbers."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import openvino
import pytest
from branch_graph import branches, convolutions

from agvas import AGVAS
from engines import Engine, EngineFailed, EngineOptions, EngineUnavailable, TensorMismatch, open_engine
from engines import onnxruntime as onnxruntime_engine
from engines.cuda import runtime
from engines.openvino import OpenVinoEngine, cut_before_rounding, natively_bf16
from engines.spec import StageSpec, TensorSpec
from engines.tensorrt_library import library
from export.adapters import example_inputs
from export.onnx_writer import write
from export.parity import torch_stages
from export.passes import lower_precision
from runtime.bundle import Bundle
from runtime.contract import LANGUAGE, MASK_DECODER, PIXEL_ENCODER, SPAM, STAGES
from runtime.parity import relative_error

HERE = ("onnxruntime", "openvino")
# fp32 everywhere; sums run in another order. Measured: 2e-6 between the two on values of about 1.
SAME = {"rtol": 1e-5, "atol": 1e-5}
# Axes that a checkpoint leaves open: not those of the export, all different.
OPEN_AXES = {"B": 3, "N": 13, "K": 4, "R": 2}

Feeds = dict[str, np.ndarray]


def feeds_for(bundle: Path, stage: str, seed: int = 0, **axes: int) -> Feeds:
    tensors = example_inputs(stage, Bundle(bundle).manifest.sizes, OPEN_AXES | axes, seed)
    return {spec.name: tensor.numpy() for spec, tensor in zip(STAGES[stage].inputs, tensors, strict=True)}


def opened(bundle: Path, spec: StageSpec, engine: str = "onnxruntime", **options: object) -> Engine:
    return open_engine(bundle / spec.name / f"{spec.name}.onnx", spec, engine, EngineOptions(**options))  # type: ignore[arg-type]


def assert_same(ours: Feeds, wanted: Feeds) -> None:
    assert ours.keys() == wanted.keys()
    for name in wanted:
        assert ours[name].dtype == np.float32
        np.testing.assert_allclose(ours[name], wanted[name], err_msg=name, **SAME)


# OpenVINO in bf16: rounding begins behind the first convolution


def read(bundle: Path, stage: str) -> openvino.Model:
    return openvino.Core().read_model(str(bundle / stage / f"{stage}.onnx"))


def operators(model: openvino.Model) -> set[str]:
    return {node.get_type_name() for node in model.get_ops()}


@pytest.mark.skipif(not natively_bf16(), reason="this CPU does not multiply in bfloat16")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bit_graphs_too_can_be_cut(precision: str, tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx_ir.load(tiny_bundle / "pixel_encoder" / "pixel_encoder.onnx")
    lower_precision(model, precision)
    write(model, tmp_path, "pixel_encoder")
    engine = open_engine(tmp_path / "pixel_encoder.onnx", PIXEL_ENCODER, "openvino", EngineOptions(inference_precision="bf16"))
    assert isinstance(engine, OpenVinoEngine) and len(engine._compiled._parts) == 2
    feeds = feeds_for(tiny_bundle, "pixel_encoder")
    wanted = opened(tiny_bundle, PIXEL_ENCODER).run(feeds)["pixel_embeddings"]
    assert relative_error(engine.run(feeds)["pixel_embeddings"], wanted) < 0.05


def test_a_graph_is_cut_where_rounding_begins_and_the_halves_give_the_same_numbers(tiny_bundle: Path) -> None:
    before, behind = cut_before_rounding(read(tiny_bundle, "pixel_encoder"))
    assert before is not None
    assert sum(node.get_type_name() == "Convolution" for node in before.get_ops()) == 1 and "MatMul" not in operators(before)
    assert "MatMul" in operators(behind) and [output.any_name for output in behind.outputs] == ["pixel_embeddings"]
    feeds = feeds_for(tiny_bundle, "pixel_encoder")
    fp32 = {"INFERENCE_PRECISION_HINT": "f32"}
    passed = openvino.compile_model(before, "CPU", fp32)(feeds)
    got = openvino.compile_model(behind, "CPU", fp32)(list(passed.values()))
    assert_same({"pixel_embeddings": got[0]}, opened(tiny_bundle, PIXEL_ENCODER, "openvino").run(feeds))


def test_a_picture_stays_exact_to_its_first_convolution_and_through_depthwise_ones() -> None:
    picture = np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)
    fp32 = {"INFERENCE_PRECISION_HINT": "f32"}
    wanted = openvino.compile_model(branches(), "CPU", fp32)([picture])[0]
    before, behind = cut_before_rounding(branches())
    assert before is not None
    assert convolutions(before) == {"first", "chain's first", "expand", "depthwise"}
    assert convolutions(behind) == {"second", "project"}
    passed = openvino.compile_model(before, "CPU", fp32)([picture])
    assert_same({"sum": openvino.compile_model(behind, "CPU", fp32)(list(passed.values()))[0]}, {"sum": wanted})


@pytest.mark.parametrize("stage", ["spam", "language", "mask_decoder"])
def test_a_graph_without_convolutions_before_its_products_stays_whole(stage: str, tiny_bundle: Path) -> None:
    model = read(tiny_bundle, stage)
    assert cut_before_rounding(model) == (None, model)


def saved(tmp_path: Path, body: str, outputs: str) -> Path:
    """A graph on a picture [1, 1, 8, 8] with a convolution that takes each pixel from its right neighbour."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[1, 1, 8, 8] x) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    constants = {"difference": np.array([[[[0, -1, 1]]]], np.float32), "unit": np.eye(8, dtype=np.float32)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(proto, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.mark.skipif(not natively_bf16(), reason="this CPU does not multiply in bfloat16")
@pytest.mark.parametrize("outputs", [("z",), ("y", "z"), ("y",)])
def test_a_faint_picture_survives_bf16_up_to_where_rounding_begins(outputs: tuple[str, ...], tmp_path: Path) -> None:
    """Whether or not what stands before rounding is an output itself."""
    body = "y = Conv <pads = [0, 1, 0, 1]> (x, difference) z = MatMul(y, unit)"
    path = saved(tmp_path, body, ", ".join(f"float[1, 1, 8, 8] {name}" for name in outputs))
    picture = 1.5 + 0.001 * np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)  # bf16 has steps of 0.008 there
    spec = StageSpec(
        "g", (TensorSpec("x", "float32", (1, 1, 8, 8)),), tuple(TensorSpec(name, "float32", (1, 1, 8, 8)) for name in outputs)
    )
    engine = open_engine(path, spec, "openvino", EngineOptions(inference_precision="bf16"))
    wanted = np.diff(picture, axis=3)
    got = engine.run({"x": picture})
    errors = {name: relative_error(got[name][..., :-1], wanted) for name in outputs}
    assert all(errors[name] < {"y": 1e-5, "z": 0.01}[name] for name in outputs), errors  # the product rounds to 8 bits
    whole = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})([picture])[0][..., :-1]
    assert relative_error(whole, wanted) > 0.1, "OpenVINO no longer rounds the picture: the cut has no use"


def test_onnxruntimes_pools_do_not_spin(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that did would take the cores from the next stage's."""
    seen = []
    original = onnxruntime_engine.onnxruntime.InferenceSession

    def recorded(path: str, settings: Any, **options: Any) -> Any:
        seen.append(settings.get_session_config_entry("session.intra_op.allow_spinning"))
        return original(path, settings, **options)

    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "InferenceSession", recorded)
    opened(tiny_bundle, SPAM)
    assert seen == ["0"]


# What cannot be had


def test_an_unknown_engine_is_told_with_those_that_exist(tiny_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="'onyx' is unknown; valid: onnxruntime, openvino"):
        opened(tiny_bundle, SPAM, "onyx")


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("cause", [ImportError, OSError])
def test_an_engine_whose_package_does_not_load_says_why(
    engine: str, cause: type[Exception], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """A package that is there, and a library of it that is not."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == engine:
                raise cause("libodd.so.1: cannot open shared object file")

    for name in [name for name in sys.modules if name == engine or name.startswith((f"{engine}.", f"engines.{engine}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(EngineUnavailable, match=rf"engine {engine} is not installed \(libodd.so.1: cannot open.*\); pip install \"agvas"):
        opened(tiny_bundle, SPAM, engine)


@pytest.mark.parametrize("engine", HERE)
def test_ctrl_c_while_an_engine_is_imported_is_no_engine_that_is_missing(
    engine: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        """What an extension's initialisation makes of it (onnxruntime 1.31: "initialization failed")."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == engine:
                try:
                    raise KeyboardInterrupt
                except KeyboardInterrupt as error:
                    raise ImportError("initialization failed") from error

    for name in [name for name in sys.modules if name == engine or name.startswith((f"{engine}.", f"engines.{engine}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(KeyboardInterrupt):
        opened(tiny_bundle, SPAM, engine)


@pytest.mark.parametrize("engine", HERE)
def test_a_package_that_is_missed_while_ctrl_c_is_being_handled_is_missing(
    engine: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == engine or name.startswith((f"{engine}.", f"engines.{engine}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, engine, None)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(EngineUnavailable, match=f"engine {engine} is not installed"):
            opened(tiny_bundle, SPAM, engine)


def test_so_is_one_that_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(EngineUnavailable, match="engine tensorrt is not installed"):
            library("tensorrt")
        with pytest.raises(EngineUnavailable, match="CUDA's Python bindings are not installed"):
            runtime()


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_on_the_cpu_says_what_to_ask_for(engine: str, tiny_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="TensorRT runs on a GPU; ask for device cuda:0, or use engine onnxruntime"):
        opened(tiny_bundle, SPAM, engine)


def test_cuda_on_an_onnxruntime_without_it_names_the_extra(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime_engine.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(EngineUnavailable, match=r"cuda:0 was asked for.*agvas\[gpu\]"):
        opened(tiny_bundle, SPAM, device="cuda:0")


def test_cuda_that_is_listed_but_does_not_start_is_not_replaced_by_the_cpu(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = onnxruntime_engine.onnxruntime.InferenceSession

    def silent(path: str, settings: object, **_: object) -> object:
        return original(path, settings, providers=["CPUExecutionProvider"])

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "InferenceSession", silent)
    with pytest.raises(EngineUnavailable, match="could not start it on cuda:0.*driver"):
        opened(tiny_bundle, SPAM, device="cuda:0")


@pytest.fixture
def on_cpu_memory(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """onnxruntime's way on a GPU, with the CPU in its place: bound memory, but no graphs. Gives the options of each session."""
    sessions: list[dict[str, Any]] = []
    original = onnxruntime_engine.onnxruntime.InferenceSession

    class Session:
        def __init__(self, path: str, settings: object, providers: list[str], provider_options: list[dict[str, Any]]) -> None:
            assert providers == ["CUDAExecutionProvider"]
            sessions.append(provider_options[0])
            if "enable_cuda_graph" in provider_options[0]:
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
            self._session = original(path, settings, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_engine, "DEVICE", "cpu")
    return sessions


ON_GPU = {"device_id": 0, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


def test_memory_bound_for_the_gpu_gives_the_same_numbers_whatever_the_order_of_shapes(
    tiny_bundle: Path, on_cpu_memory: list[dict[str, Any]]
) -> None:
    bound = opened(tiny_bundle, MASK_DECODER, device="cuda:0")
    assert on_cpu_memory == [ON_GPU | {"enable_cuda_graph": "1"}, ON_GPU]
    plain = opened(tiny_bundle, MASK_DECODER, "openvino")
    for seed, batch in enumerate([1, 1, 1, 2, 2, 2, 1, 3, 3, 4, 4, 5, 5, 1, 1]):
        feeds = feeds_for(tiny_bundle, "mask_decoder", seed, B=batch)
        assert_same(bound.run(feeds), plain.run(feeds))
        backwards = dict(reversed(feeds.items()))
        assert_same(bound.run(backwards), plain.run(feeds))


def test_memory_for_the_gpu_is_bound_once_to_the_shapes_that_come_again(
    tiny_bundle: Path, on_cpu_memory: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = opened(tiny_bundle, MASK_DECODER, device="cuda:0")
    session, bindings = bound._session, list[int]()  # type: ignore[attr-defined]
    original = session.io_binding

    def counted() -> Any:
        bindings.append(call)
        return original()

    monkeypatch.setattr(session, "io_binding", counted, raising=False)
    for call, batch in enumerate([1, 1, 1, 2, 1, 2, 1, 2, 2, 2, 1]):
        bound.run(feeds_for(tiny_bundle, "mask_decoder", call, B=batch))
    assert bindings == [1, 8], "one that comes in between, however often, runs unbound"


def test_keys_and_values_stay_on_the_gpu_and_are_fed_back_there(tiny_bundle: Path, on_cpu_memory: list[dict[str, Any]]) -> None:
    growing, plain = opened(tiny_bundle, LANGUAGE, device="cuda:0"), opened(tiny_bundle, LANGUAGE, "openvino")
    assert on_cpu_memory == [ON_GPU]  # nothing to capture in a graph that grows
    first = feeds_for(tiny_bundle, "language", 0, B=1, N=9, K=0, R=2)
    ours, wanted = growing.run(first), plain.run(first)
    assert not isinstance(ours["present_keys"], np.ndarray) and isinstance(ours["states"], np.ndarray)
    assert ours["present_keys"].shape == wanted["present_keys"].shape and ours["present_keys"].ndim == 5
    assert_same({name: np.asarray(value) for name, value in ours.items()}, wanted)
    second = feeds_for(tiny_bundle, "language", 1, B=1, N=4, K=9, R=2)
    here = growing.run(second | {"past_keys": ours["present_keys"], "past_values": ours["present_values"]})
    there = plain.run(second | {"past_keys": wanted["present_keys"], "past_values": wanted["present_values"]})
    assert_same({name: np.asarray(value) for name, value in here.items()}, there)
    np.testing.assert_array_equal(np.asarray(ours["present_keys"]), np.asarray(here["present_keys"])[:, :, :, :9])  # they never change


def test_bound_memory_is_not_the_callers_and_threads_take_turns(tiny_bundle: Path, on_cpu_memory: list[dict[str, Any]]) -> None:
    spam = opened(tiny_bundle, SPAM, device="cuda:0")
    feeds = [feeds_for(tiny_bundle, "spam", seed) for seed in range(4)]
    wanted = [opened(tiny_bundle, SPAM, "openvino").run(each) for each in feeds]
    kept = [spam.run(each) for each in feeds for _ in range(2)]
    for index, ours in enumerate(kept):
        assert_same(ours, wanted[index // 2])
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                assert_same(spam.run(feeds[index]), wanted[index])
        except Exception as error:  # whatever it is, in a thread it would go unseen
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_that_does_not_load_on_the_gpu_fails_with_its_own_reason(
    tmp_path: Path, on_cpu_memory: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(onnxruntime_engine.onnxruntime, "InferenceSession", broken)
    with pytest.raises(EngineFailed, match="cannot load spam.onnx on cuda:1: CUDA failure 2: out of memory"):
        open_engine(tmp_path / "spam.onnx", SPAM, "onnxruntime", EngineOptions("cuda:1"))


def test_openvino_takes_no_cuda_device(tiny_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="openvino runs on device cpu.*cuda:0"):
        opened(tiny_bundle, SPAM, "openvino", device="cuda:0")


def test_onnxruntime_has_no_bf16_of_its_own_and_says_who_has(tiny_bundle: Path) -> None:
    for precision in ("bf16", "bf16+int8"):
        with pytest.raises(EngineUnavailable, match=rf"no inference precision {re.escape(precision)}:.*openvino"):
            opened(tiny_bundle, SPAM, inference_precision=precision)


def test_openvino_refuses_bf16_on_a_cpu_that_would_emulate_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.openvino.natively_bf16", lambda core=None: False)
    monkeypatch.setattr("engines.openvino.bytes_saturate", lambda: False)
    for precision, instead in (("bf16", "graph"), ("bf16+int8", "int8")):
        with pytest.raises(EngineUnavailable, match=f"does not multiply in bfloat16; use precision {instead}$"):
            opened(tiny_bundle, SPAM, "openvino", inference_precision=precision)


def test_openvino_refuses_int8_where_it_would_round_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.openvino.bytes_saturate", lambda: True)
    monkeypatch.setattr("engines.openvino.natively_bf16", lambda core=None: True)
    for precision in ("int8", "bf16+int8"):
        message = rf"precision {re.escape(precision)} was asked for, but this CPU has no VNNI, without which OpenVINO rounds nothing; use"
        with pytest.raises(EngineUnavailable, match=message):
            opened(tiny_bundle, SPAM, "openvino", inference_precision=precision)


@pytest.mark.parametrize("engine", HERE)
def test_a_graph_that_is_gone_is_named(engine: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="cannot load spam.onnx"):
        open_engine(tmp_path / "spam.onnx", SPAM, engine, EngineOptions())


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("content", [b"", b"not a graph " * 100], ids=["empty", "garbage"])
def test_a_file_that_is_no_graph_is_named(engine: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "spam.onnx").write_bytes(content)
    with pytest.raises(EngineFailed, match=f"{engine} cannot load spam.onnx"):
        open_engine(tmp_path / "spam.onnx", SPAM, engine)


@pytest.mark.parametrize("engine", HERE)
def test_a_graph_whose_weights_are_gone_does_not_open(engine: str, copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    (folder / "spam" / "spam.data").unlink()
    with pytest.raises(EngineFailed, match=f"{engine} cannot load spam.onnx"):
        opened(folder, SPAM, engine)


# What does not fit

WRONG: dict[str, tuple[StageSpec, Callable[[Feeds], object], str]] = {
    "dtype": (
        PIXEL_ENCODER,
        lambda feeds: feeds.update(pixel_image=feeds["pixel_image"].astype(np.float64)),
        r"pixel_image float32 \[B, 3, S, S\], got float64 \[3, 3, 56, 56\]",
    ),
    "integer dtype": (
        LANGUAGE,
        lambda feeds: feeds.update(rows=feeds["rows"].astype(np.int32)),
        r"rows int64 \[R\], got int32 \[2\]",
    ),
    "rank": (
        PIXEL_ENCODER,
        lambda feeds: feeds.update(pixel_image=feeds["pixel_image"][0]),
        r"pixel_image float32 \[B, 3, S, S\], got float32 \[3, 56, 56\]",
    ),
    "fixed axis": (
        MASK_DECODER,
        lambda feeds: feeds.update(anchor_states=feeds["anchor_states"][:, :2]),
        r"anchor_states float32 \[B, 3, D\], got float32 \[3, 2, 24\].*must be 3",
    ),
    "unequal sides": (
        PIXEL_ENCODER,
        lambda feeds: feeds.update(pixel_image=feeds["pixel_image"][..., :48]),
        r"pixel_image float32 \[B, 3, S, S\], got float32 \[3, 3, 56, 48\].*axis S is 48 here but 56",
    ),
    "two inputs that disagree": (
        SPAM,
        lambda feeds: feeds.update(pixel_embeddings=feeds["pixel_embeddings"][:1]),
        r"pixel_embeddings float32 \[B, P, G, G\], got float32 \[1, 32, 7, 7\].*axis B is 1 here but 3 in semantic_features",
    ),
    "pasts that disagree": (
        LANGUAGE,
        lambda feeds: feeds.update(past_values=feeds["past_values"][:, :, :, :1]),
        r"past_values float32 .*axis K is 1 here but 4 in past_keys",
    ),
    "missing": (SPAM, lambda feeds: feeds.pop("pixel_embeddings"), "input pixel_embeddings is missing"),
    "unknown": (SPAM, lambda feeds: feeds.update(pixels=feeds["pixel_embeddings"]), "unknown input pixels"),
}


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_named_with_what_was_expected_and_given(engine: str, case: str, tiny_bundle: Path) -> None:
    spec, spoil, message = WRONG[case]
    feeds = feeds_for(tiny_bundle, spec.name)
    spoil(feeds)
    with pytest.raises(TensorMismatch, match=message) as caught:
        opened(tiny_bundle, spec, engine).run(feeds)
    assert f"stage {spec.name}" in str(caught.value)


@pytest.mark.parametrize("engine", HERE)
def test_a_size_that_only_the_graph_knows_fails_in_the_stages_name(engine: str, tiny_bundle: Path) -> None:
    feeds = feeds_for(tiny_bundle, "pixel_encoder")
    feeds["pixel_image"] = feeds["pixel_image"][..., :48, :48]
    with pytest.raises(EngineFailed, match=f"{engine} failed in stage pixel_encoder"):
        opened(tiny_bundle, PIXEL_ENCODER, engine).run(feeds)


# The numbers


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_stage_gives_the_references_numbers(
    engine: str, stage: str, batch: int, tiny_bundle: Path, tiny_model: AGVAS
) -> None:
    feeds = feeds_for(tiny_bundle, stage, B=batch)
    assert_same(opened(tiny_bundle, STAGES[stage], engine).run(feeds), torch_stages(tiny_model)[stage].run(feeds))


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize(("tokens", "past", "rows"), [(50, 0, 8), (1, 50, 1), (37, 5, 3)])
def test_one_language_graph_takes_any_batch_past_and_rows(
    engine: str, tokens: int, past: int, rows: int, tiny_bundle: Path, tiny_model: AGVAS
) -> None:
    feeds = feeds_for(tiny_bundle, "language", B=2, N=tokens, K=past, R=rows)
    # Neither in order nor at the end: rows are positions, not a count.
    feeds["rows"] = np.random.default_rng(0).permutation(tokens)[:rows].astype(np.int64)
    ours = opened(tiny_bundle, LANGUAGE, engine).run(feeds)
    assert ours["states"].shape[:2] == (2, rows) and ours["present_keys"].shape[3] == past + tokens
    assert_same(ours, torch_stages(tiny_model)["language"].run(feeds))


@pytest.mark.parametrize("engine", HERE)
def test_two_calls_over_a_past_are_one_call_over_all(engine: str, tiny_bundle: Path) -> None:
    language = opened(tiny_bundle, LANGUAGE, engine)
    feeds = feeds_for(tiny_bundle, "language", B=1, N=40, K=0, R=1)
    whole = language.run(feeds | {"rows": np.array([20, 39])})
    first = language.run(
        feeds
        | {"input_embeddings": feeds["input_embeddings"][:, :29], "positions": feeds["positions"][:, :29]}
        | {"rows": np.array([20])}
    )
    second = language.run(
        {
            "input_embeddings": feeds["input_embeddings"][:, 29:],
            "positions": feeds["positions"][:, 29:],
            "past_keys": first["present_keys"],
            "past_values": first["present_values"],
            "rows": np.array([10]),
        }
    )
    np.testing.assert_allclose(np.concatenate([first["states"], second["states"]], axis=1), whole["states"], **SAME)
    np.testing.assert_allclose(second["present_values"], whole["present_values"], **SAME)


@pytest.mark.parametrize("engine", HERE)
def test_feeds_need_not_be_contiguous(engine: str, tiny_bundle: Path) -> None:
    spam = opened(tiny_bundle, SPAM, engine)
    feeds = feeds_for(tiny_bundle, "spam")
    turned = {name: np.asfortranarray(array) for name, array in feeds.items()}
    assert not turned["pixel_embeddings"].flags.c_contiguous
    assert_same(spam.run(turned), spam.run(feeds))


@pytest.mark.parametrize("engine", HERE)
def test_a_result_is_the_callers_own(engine: str, tiny_bundle: Path) -> None:
    spam = opened(tiny_bundle, SPAM, engine)
    first = spam.run(feeds_for(tiny_bundle, "spam", seed=1))["aligned_embeddings"]
    kept = first.copy()
    spam.run(feeds_for(tiny_bundle, "spam", seed=2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("engine", HERE)
def test_threads_at_once_get_what_one_after_the_other_gets(engine: str, tiny_bundle: Path) -> None:
    language = opened(tiny_bundle, LANGUAGE, engine, threads=1)
    # Another length in every thread, so that a shared tensor would show in the shapes too.
    requests = [feeds_for(tiny_bundle, "language", seed=i, B=1, N=10 + i, K=i, R=2) for i in range(6)]
    alone = [language.run(feeds) for feeds in requests]
    start, wrong = threading.Barrier(len(requests)), list[str]()

    def work(index: int) -> None:
        start.wait()
        try:
            for _ in range(20):
                assert_same(language.run(requests[index]), alone[index])
        except Exception as error:  # AssertionError too: in a thread it would go unseen
            wrong.append(f"{index}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
