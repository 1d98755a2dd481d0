"""Bisecting: a graph broken on purpose is found by stage and layer, on engines that run here."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from engines import Engine, EngineOptions, EngineUnavailable, open_engine
from engines.openvino import natively_bf16
from engines.spec import StageSpec
from export import bisect as bisecting
from export.bisect import Finding, bisect, search
from export.bundle import write_cuda_form
from export.onnx_writer import write
from export.passes import lower_precision
from runtime.bundle import Bundle, FileRecord, Manifest, sha256_of
from runtime.cli import verify as command
from runtime.contract import STAGES

HERE = ("onnxruntime", "openvino")


def broken(folder: Path, stage: str, operator: str, which: int, factor: float = 1.5) -> tuple[Path, str]:
    """The bundle with the result of one node scaled, its manifest in order; and the tensor that goes wrong."""
    path = folder / stage / f"{stage}.onnx"
    model = onnx.load(path, load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == operator][which]
    (output,) = node.output
    node.output[0] = f"{output}_right"
    scale = onnx.numpy_helper.from_array(np.array(factor, np.float32), f"{output}_scale")
    model.graph.initializer.append(scale)
    place = next(index for index, other in enumerate(model.graph.node) if other is node or other.output[0] == node.output[0])
    model.graph.node.insert(place + 1, onnx.helper.make_node("Mul", [node.output[0], scale.name], [output]))
    onnx.save(model, path)
    sealed(folder)
    return folder, output


def sealed(folder: Path, **changes: Any) -> Bundle:
    """The bundle with a manifest that tells its files as they are."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    files = {name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in manifest.files}
    (folder / "manifest.json").write_text(replace(manifest, files=files, **changes).to_json())
    return Bundle(folder)


def found(folder: Path, against: Path, engine: str = "onnxruntime") -> Finding:
    finding, _ = bisect(Bundle(folder), engine, EngineOptions(), against=Bundle(against))
    assert finding is not None
    return finding


@pytest.mark.parametrize(
    ("stage", "operator", "which", "engine"),
    [
        ("pixel_encoder", "Softmax", 0, "onnxruntime"),
        ("pixel_encoder", "LayerNormalization", -1, "openvino"),
        ("semantic_encoder", "Gelu", 1, "openvino"),
        ("language", "Reciprocal", 3, "onnxruntime"),
        ("mask_decoder", "Softmax", 2, "onnxruntime"),
        ("mask_decoder", "ConvTranspose", -1, "onnxruntime"),
    ],
)
def test_the_stage_and_the_layer_that_were_broken_are_found(
    stage: str, operator: str, which: int, engine: str, tiny_bundle: Path, copy_of_bundle: Callable[[], Path]
) -> None:
    folder, output = broken(copy_of_bundle(), stage, operator, which)
    finding = found(folder, tiny_bundle, engine)
    assert (finding.stage, finding.output, finding.in_fusion) == (stage, output, False)
    assert finding.error is not None and finding.error > finding.tolerance == 1e-3
    assert all(error <= finding.tolerance for error in finding.input_errors.values())
    assert finding.tries <= 12  # graphs of a hundred to four hundred nodes, eight tensors a try


def test_the_module_of_the_reference_is_named(tiny_bundle: Path, copy_of_bundle: Callable[[], Path]) -> None:
    folder, _ = broken(copy_of_bundle(), "semantic_encoder", "Gelu", 1)
    model = onnx.load(folder / "semantic_encoder" / "semantic_encoder.onnx", load_external_data=False)
    mul = next(node for node in model.graph.node if node.op_type == "Mul" and node.input[1].endswith("_scale"))
    entry = mul.metadata_props.add()
    entry.key, entry.value = bisecting.SCOPES, "['', 'encoder', 'encoder.layers.1.mlp', 'gelu']"
    onnx.save(model, folder / "semantic_encoder" / "semantic_encoder.onnx")
    sealed(folder)
    assert found(folder, tiny_bundle).module == "encoder.layers.1.mlp"


@pytest.mark.parametrize("engine", HERE)
def test_where_nothing_is_broken_nothing_is_found(engine: str, tiny_bundle: Path) -> None:
    finding, errors = bisect(Bundle(tiny_bundle), engine, EngineOptions())
    assert finding is None and len(errors) == 5 and max(errors.values()) < 1e-4


@pytest.mark.parametrize("worst", [1, 3])
def test_the_picture_that_is_followed_is_the_one_whose_mask_is_furthest(
    worst: int, tiny_bundle: Path, copy_of_bundle: Callable[[], Path]
) -> None:
    folder = copy_of_bundle()
    golden = dict(np.load(folder / "golden.npz"))
    golden[f"{worst}.map"] = 1 - golden[f"{worst}.map"]
    np.savez(folder / "golden.npz", **golden)
    broken(folder, "mask_decoder", "LayerNormalization", -1, 1.1)
    assert found(folder, tiny_bundle).picture == worst


def test_one_stage_of_the_reference_is_in_memory_at_a_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[weakref.ref[Any]]()

    def opening(*arguments: Any) -> Any:
        assert not [engine for engine in opened if engine() is not None]
        engine = open_engine(*arguments)
        opened.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr("runtime.one_at_a_time.open_engine", opening)
    assert bisect(Bundle(tiny_bundle), "onnxruntime", EngineOptions())[0] is None
    assert len(opened) == 5


def test_rounding_is_not_blamed_in_16_bit_but_a_break_is(tiny_bundle: Path, copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    for stage in ("spam", "mask_decoder"):
        model = onnx_ir.load(tiny_bundle / stage / f"{stage}.onnx")
        lower_precision(model, "fp16")
        for path in (folder / stage).iterdir():
            path.unlink()
        write(model, folder / stage, stage)
        write_cuda_form(folder / stage, stage)
    bundle = sealed(folder, precision=dict.fromkeys(Bundle(tiny_bundle).manifest.precision, "fp16"))
    finding, errors = bisect(bundle, "onnxruntime", EngineOptions())  # against its own graphs, raised to fp32
    assert finding is None and 1e-5 < errors["mask_decoder"] < 0.03
    folder, output = broken(folder, "mask_decoder", "LayerNormalization", -1, -2.0)
    finding = found(folder, tiny_bundle)
    assert (finding.stage, finding.output, finding.tolerance) == ("mask_decoder", output, 0.03)


class Chain:
    """A stand-in for a graph: tensors 0..n-1 in a row, each read by the next."""

    def __init__(self, count: int) -> None:
        names = [f"t{index}" for index in range(count)]
        self.producer = {
            name: onnx.helper.make_node("Relu", [names[index - 1] if index else "x"], [name], name=f"node_{index}")
            for index, name in enumerate(names)
        }
        self.order = {name: index for index, name in enumerate(names)}

    inputs_of = bisecting._Graph.inputs_of
    before = bisecting._Graph.before


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("marked", [1, 3, 8])
def test_every_place_of_a_break_in_a_chain_is_found(count: int, marked: int) -> None:
    """The slow oracle is the place itself."""
    graph: Any = Chain(count)
    for place in {0, count // 3, count - 2, count - 1} & set(range(count)):

        class Probe:
            candidates = set(graph.producer)
            tries = 0
            broken_at = place

            def __call__(self, tensors: list[str]) -> dict[str, float]:
                self.tries += 1
                assert 0 < len(tensors) <= marked
                errors = {name: 1.0 if graph.order[name] >= self.broken_at else 1e-6 for name in tensors}
                return {f"t{count - 1}": 1.0, **errors}

        finding = search(graph, Probe(), "stage", 1.0, f"t{count - 1}", 1e-3, marked)  # type: ignore[arg-type]
        assert finding.output == f"t{place}" and finding.node == f"node_{place}"


def test_an_error_that_goes_when_tensors_are_shown_is_in_a_fusion() -> None:
    graph: Any = Chain(10)

    class Probe:
        candidates = set(graph.producer)
        tries = 1

        def __call__(self, tensors: list[str]) -> dict[str, float]:
            return {"t9": 1e-6, **dict.fromkeys(tensors, 1e-6)}

    finding = search(graph, Probe(), "stage", 1.0, "t9", 1e-3)  # type: ignore[arg-type]
    assert finding.in_fusion and finding.output == "t9"


# agvas-verify --bisect


def test_the_command_tells_stage_layer_and_errors(
    tiny_bundle: Path, copy_of_bundle: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = broken(copy_of_bundle(), "mask_decoder", "Softmax", 2)
    arguments = ["--bundle", str(folder), "--engine", "onnxruntime", "--bisect", "--against", str(tiny_bundle), "--quiet"]
    assert command.main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["finding"]["stage"], report["finding"]["output"]) == ("mask_decoder", output)
    assert report["passed"] is False and report["stage_errors"]["pixel_encoder"] < 1e-4
    assert command.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--bisect", "--quiet"]) == 0
    assert "every stage is within" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "auto"), "--bisect: expected one engine by name"),
        (("--engine", "openvino", "--device", "cuda:0"), "openvino runs on device cpu"),
        (("--engine", "onnxruntime", "--against", "nowhere"), "nowhere is not a folder"),
        (("--engine", "onnxruntime", "--low-memory"), "--low-memory: not with --bisect"),
    ],
)
def test_what_cannot_be_bisected_is_exit_code_2(
    arguments: tuple[str, ...], message: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--bundle", str(tiny_bundle), "--bisect", "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_precision_that_would_round_nothing_is_refused_as_elsewhere(tiny_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="inference precision int8 rounds what is multiplied with integer weights"):
        bisect(Bundle(tiny_bundle), "onnxruntime", EngineOptions(inference_precision="int8"))


@pytest.mark.skipif(not natively_bf16(), reason="this CPU does not multiply in bfloat16")
def test_stages_are_opened_as_the_chain_opens_them(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, set[str]] = {}
    original = bisecting.open_engine

    def noted(graph: Path, spec: StageSpec, engine: str, options: EngineOptions) -> Engine:
        if engine == "openvino":
            opened.setdefault(spec.name, set()).add(options.inference_precision)
        return original(graph, spec, engine, options)

    monkeypatch.setattr(bisecting, "open_engine", noted)
    assert bisect(Bundle(tiny_bundle), "openvino", EngineOptions(inference_precision="bf16"))[0] is None
    assert opened == {stage: {"graph" if stage == "mask_decoder" else "bf16"} for stage in STAGES}


def test_without_onnx_the_extra_is_named(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "onnx.py").write_text("raise ImportError('no onnx here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert command.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--bisect", "--quiet"]) == 2
    told = "agvas-verify: --bisect takes the graphs apart with onnx, which cannot be had (no onnx here); pip install \"agvas[bisect]\"\n"
    assert capsys.readouterr().err == told
