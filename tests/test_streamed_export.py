"""Exports whose weights are never all in memory: the same bytes, the same numbers, and an interruption that costs one stage."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import Trace, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import export.bundle as writer
from agvas import load
from agvas.checkpoint import open_checkpoint
from agvas.config import LanguageConfig, tiny
from agvas.streamed import stream
from agvas.weights import LazyTensor, safetensors_file
from benchmarks.random_checkpoint import write_random_checkpoint
from calibration.gptq import GPTQSettings, round_to_nearest, rounded_to_nearest
from engines import Engine, EngineFailed, EngineOptions, open_engine
from export import work
from export.adapters import axis_sizes, example_inputs
from export.bundle import export_bundle
from export.cli import main
from export.onnx_writer import export_stage, stage_module, write
from export.outcomes import OutcomesOnDisk
from export.passes import lower_precision, turn_weights
from export.piecewise import PiecewiseStage, cut
from export.progress import Progress
from export.settings import ExportSettings
from export.stage_weights import all_weights, held, stage_weights
from export.streamed_reference import EmbeddingRows, streamed_pipeline, streamed_stages
from export.streamed_tensor import StreamedTensor
from runtime import Segmenter
from runtime.bundle import UNFINISHED, Bundle
from runtime.contract import STAGES
from runtime.errors import BundleMissing, NotCompared, OutputError, ParityFailed, RequestError
from runtime.one_at_a_time import Turn, TurnStage
from runtime.parity import Outcome

QUIET = Progress(quiet=True)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def written(tensor: ir.TensorProtocol, folder: Path) -> bytes:
    with open(folder / "bytes", "wb") as file:
        tensor.tofile(file)
    return (folder / "bytes").read_bytes()


# A weight in a graph


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("wanted", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_streamed_weight_that_is_no_number_is_refused(
    value: float, wanted: ir.DataType, order: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.streamed_tensor.SLAB_BYTES", 64)
    tensor = weight(40, 6)
    tensor[33, 2] = value
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    streamed = StreamedTensor(safetensors_file(tmp_path / "w.safetensors")["w"], "head").transposed(order, "head").as_type(wanted, "head")
    with pytest.raises(ValueError, match="head holds 1 NaN or infinite values of"):
        written(streamed, tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_streamed_weight_is_written_as_numpy_would_write_it(
    stored: torch.dtype, wanted: ir.DataType, order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.streamed_tensor.SLAB_BYTES", 64)  # several slabs
    save_file({"w": weight(5, 3, 7, dtype=stored)}, tmp_path / "x.safetensors")
    tensor = StreamedTensor(safetensors_file(tmp_path / "x.safetensors")["w"], "w").as_type(wanted).transposed(order)
    expected = weight(5, 3, 7, dtype=stored).float().numpy().transpose(order).astype(wanted.numpy())
    assert written(tensor, tmp_path) == np.ascontiguousarray(expected).tobytes() == tensor.tobytes()
    assert tensor.shape == list(expected.shape) and tensor.dtype == wanted
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_weight_that_half_precision_does_not_hold_is_named_and_not_written_as_infinite(stored: torch.dtype, tmp_path: Path) -> None:
    tensor = StreamedTensor(held(torch.tensor([1.0, -98304.0], dtype=stored)))
    with pytest.raises(ValueError, match="language.w has values up to 9.83e[+]04, which float16 does not hold; take bfloat16"):
        written(tensor.as_type(ir.DataType.FLOAT16, "language.w"), tmp_path)
    written(tensor.as_type(ir.DataType.BFLOAT16), tmp_path)
    infinite = StreamedTensor(held(torch.tensor([-torch.inf, 1.0])), "a mask")  # meant
    assert np.isneginf(infinite.as_type(ir.DataType.FLOAT16).numpy()[0])


def test_what_is_stored_as_it_is_wanted_is_copied_without_being_read(tmp_path: Path) -> None:
    save_file({"other": weight(9), "w": weight(6, 4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    source = replace(safetensors_file(tmp_path / "x.safetensors")["w"], read=lambda: pytest.fail("it was read"))
    tensor = StreamedTensor(source).as_type(ir.DataType.BFLOAT16)
    assert written(tensor, tmp_path) == weight(6, 4, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()


def test_scalars_and_whole_numbers_are_written_too(tmp_path: Path) -> None:
    for tensor in (torch.tensor(2.5), torch.arange(6), torch.zeros(0, 3)):
        assert written(StreamedTensor(held(tensor)), tmp_path) == tensor.numpy().tobytes()


def test_a_transposed_weight_is_turned_once_and_its_node_goes() -> None:
    kind = ir.TensorType(ir.DataType.FLOAT)
    source = ir.Value(name="w", shape=ir.Shape([4, 6]), type=kind, const_value=StreamedTensor(held(weight(4, 6)), "w"))
    x = ir.Value(name="x", shape=ir.Shape([1, 6]), type=kind)
    nodes = [ir.node("Transpose", [source], attributes={"perm": [1, 0]}) for _ in range(2)]
    products = [ir.node("MatMul", [x, node.outputs[0]]) for node in nodes]
    outputs = [product.outputs[0] for product in products]
    graph = ir.Graph([x], outputs, nodes=[*nodes, *products], initializers=[source], opset_imports={"": 20})
    turn_weights(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in graph] == ["MatMul", "MatMul"] and len(graph.initializers) == 1
    (turned,) = graph.initializers.values()
    np.testing.assert_array_equal(turned.const_value.numpy(), weight(4, 6).T)


@pytest.mark.parametrize("stage", ["language", "spam"])
def test_a_graph_made_without_weights_is_the_one_made_with_them(
    stage: str, tiny_checkpoint: Path, tmp_path: Path, always_traced: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node by node and byte by byte; and making it reads nothing that is large."""
    monkeypatch.setattr(torch.onnx, "export", always_traced)
    opened = open_checkpoint(tiny_checkpoint)
    large: list[str] = []

    def watched(name: str, tensor: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            if tensor.bytes > 4096:
                large.append(name)
            return tensor.read()

        return replace(tensor, read=read, span=None)

    weights = {name: watched(name, tensor) for name, tensor in all_weights(opened).items()}
    skeleton, sizes = opened.skeleton(), axis_sizes(opened.config)
    graphs = {
        "streamed": export_stage(stage_module(skeleton, stage), stage, sizes, stage_weights(weights, skeleton, stage)),
        "held": export_stage(stage_module(load(tiny_checkpoint), stage), stage, sizes),
    }
    assert not large
    for precision in ("fp32", "fp16"):
        for name, graph in graphs.items():
            if precision == "fp16":
                lower_precision(graph, precision)
            write(graph, tmp_path / name, stage)
        made, wanted = ([str(node) for node in ir.load(tmp_path / name / f"{stage}.onnx").graph] for name in graphs)
        assert made == wanted, precision
        same = (tmp_path / "streamed" / f"{stage}.data").read_bytes() == (tmp_path / "held" / f"{stage}.data").read_bytes()
        assert same, precision


def test_a_weight_that_is_not_given_is_named(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_checkpoint)
    skeleton = opened.skeleton()
    weights = stage_weights(all_weights(opened), skeleton, "spam")
    del weights["spam.query.weight"]
    with pytest.raises(ValueError, match=r"spam: expected a weight for spam.query.weight \[18, 18\], got none"):
        export_stage(stage_module(skeleton, "spam"), "spam", axis_sizes(opened.config), weights)


def test_rounding_in_parts_gives_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.gptq.ROUNDED_AT_ONCE", 300)
    settings = GPTQSettings(bits=4, group=32)
    lazy, whole = rounded_to_nearest(held(weight(23, 64)), settings).read(), round_to_nearest(weight(23, 64), settings)
    assert np.array_equal(lazy.codes, whole.codes) and np.array_equal(lazy.scales, whole.scales)


# The reference, layer by layer


@pytest.mark.parametrize("checkpoint", ["nano", "tiny"])
def test_the_reference_layer_by_layer_is_the_reference(checkpoint: str, tiny_checkpoint: Path) -> None:
    folder = "nano" if checkpoint == "nano" else str(tiny_checkpoint)
    opened, model = open_checkpoint(folder), load(folder)
    weights = all_weights(opened)
    pipeline = streamed_pipeline(opened, streamed_stages(opened, weights), weights)
    for seed in range(2):
        trace, wanted = pipeline.run(picture(seed), pipeline.prompts.encode()), model.segment(picture(seed))
        assert trace.answer == wanted.answer_ids
        np.testing.assert_allclose(trace.anomaly_map, wanted.anomaly_map, atol=2e-6)
        assert trace.anchor_states is not None and wanted.anchor_states is not None
        np.testing.assert_allclose(trace.anchor_states[0], wanted.anchor_states, atol=1e-5)


def test_weights_are_there_while_a_module_computes_and_at_no_other_time() -> None:
    seen: list[int] = []
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    real = {name: held(weight(*tensor.shape)) for name, tensor in module.state_dict().items()}
    stream(module, real)
    module[0].register_forward_hook(lambda *_: seen.append(sum(not parameter.is_meta for parameter in module.parameters())))
    module(torch.ones(1, 3))
    assert seen[0] <= 2 and all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 5))
    assert all(parameter.is_meta for parameter in module.parameters()), "a failure leaves nothing behind"
    del real["1.weight"]
    with pytest.raises(ValueError, match=r"1.weight: expected a tensor \[2, 4\], got none"):
        stream(module, real)


def test_embeddings_are_read_row_by_row() -> None:
    np.testing.assert_array_equal(EmbeddingRows(held(weight(7, 3)))[[2, 2, 6]], weight(7, 3)[[2, 2, 6]].numpy())


# Pieces and turns


@pytest.mark.parametrize("budget", [5_000, 20_000])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_a_graph_in_pieces_computes_what_it_does_whole(
    budget: int, precision: str, tolerance: float, tiny_bundle: Path, tmp_path: Path
) -> None:
    model = ir.load(tiny_bundle / "language" / "language.onnx")
    if precision != "fp32":
        lower_precision(model, precision)
    write(model, tmp_path, "language")
    feeds = {
        spec.name: tensor.numpy()
        for spec, tensor in zip(STAGES["language"].inputs, example_inputs("language", axis_sizes(tiny()), {"B": 1, "N": 9, "K": 4, "R": 3}))
    }
    path, spec, options = tmp_path / "language.onnx", STAGES["language"], EngineOptions()
    assert len(cut(ir.load(path), budget)) > 2
    whole = TurnStage(Turn(), path, spec, "onnxruntime", options).run(feeds)
    pieces = PiecewiseStage(path, spec, "onnxruntime", options, budget).run(feeds)
    assert pieces.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, atol=tolerance * np.abs(value).max(), err_msg=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["language.data", "language.onnx"]


def test_stages_that_take_turns_give_the_same_map_and_one_is_open_at_a_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Segmenter(tiny_bundle, engine="onnxruntime")(picture())
    living: weakref.WeakSet[object] = weakref.WeakSet()
    most: list[tuple[str, int]] = []

    def counted(graph: Path, *rest: Any) -> Engine:
        engine = open_engine(graph, *rest)
        living.add(engine)
        most.append((graph.stem, len(living)))
        return engine

    monkeypatch.setattr("runtime.one_at_a_time.open_engine", counted)
    segmenter = Segmenter(tiny_bundle, engine="onnxruntime", low_memory=True)
    np.testing.assert_allclose(segmenter(picture()).anomaly_map, wanted.anomaly_map, atol=1e-6)
    assert most == [(name, 1) for name in STAGES]
    with pytest.raises(RequestError, match="low_memory: expected a named engine"):
        Segmenter(tiny_bundle, low_memory=True)


# Whole exports


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(picture(0)).save(folder / "0.png")
    return folder


@pytest.fixture
def ready_graphs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages come from the session's bundle; lists those asked for."""
    asked: list[str] = []

    def ready(module: nn.Module, stage: str, sizes: dict[str, int], weights: object) -> ir.Model:
        asked.append(stage)
        return ir.load(tiny_bundle / stage / f"{stage}.onnx")

    monkeypatch.setattr(writer, "export_stage", ready)
    return asked


def interrupted_at(monkeypatch: pytest.MonkeyPatch, stage: str) -> Callable[[], None]:
    original = writer.write

    def failing(model: ir.Model, folder: Path, name: str) -> None:
        original(model, folder, name)
        if name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write", failing)
    return lambda: monkeypatch.setattr(writer, "write", original)


def stopped_at(monkeypatch: pytest.MonkeyPatch, stage: str, settings: ExportSettings) -> None:
    """What an export leaves that was interrupted when it had written the stage."""
    repair = interrupted_at(monkeypatch, stage)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(settings, QUIET)
    repair()


def test_an_interrupted_export_goes_on_with_its_finished_stages_and_opens_nowhere_before(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    repair = interrupted_at(monkeypatch, "language")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(settings, QUIET)
    (kept,) = (tmp_path / "out").iterdir()
    (kept / "manifest.json").write_bytes(b"{}")  # as an interruption during the comparison would leave one
    with pytest.raises(BundleMissing, match="was not exported to its end; run the same agvas-export again"):
        Bundle(kept)
    repair()
    ready_graphs.clear()
    bundle, report = export_bundle(settings, QUIET)
    assert ready_graphs == ["language", "mask_decoder"] and report is not None and not report.failures
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"] and not (bundle.folder / UNFINISHED).exists()
    assert UNFINISHED not in bundle.manifest.files


@pytest.mark.parametrize("change", ["checkpoint", "part", "damage", "code"])
def test_stages_of_another_export_are_made_again(
    change: str,
    ready_graphs: list[str],
    tiny_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    weights = (tmp_path if change == "part" else checkpoint) / "model.safetensors"
    for file in tiny_checkpoint.iterdir():
        (weights if file.name == weights.name else checkpoint / file.name).write_bytes(file.read_bytes())
    if change == "part":
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(checkpoint / name, tmp_path / name)
        (checkpoint / "parts.json").write_text('{"base": ".."}')
    settings = ExportSettings(str(checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    stopped_at(monkeypatch, "semantic_encoder", settings)
    if change == "code":
        monkeypatch.setattr(writer, "_code_sha256", lambda: "of a later commit")
    elif change != "damage":
        save_file(load_file(weights), weights)
    else:
        data = tmp_path / "out" / ".bundle.partial" / "pixel_encoder" / "pixel_encoder.data"
        data.write_bytes(data.read_bytes()[:-1])
    ready_graphs.clear()
    capsys.readouterr()
    export_bundle(settings, Progress())
    told = ".bundle.partial held (1 finished stage) was of another checkpoint, or of other code" in capsys.readouterr().err
    assert told == (change != "damage")
    assert ready_graphs == [name for name in STAGES if not (change == "damage" and name == "semantic_encoder")] or change == "damage"
    assert "pixel_encoder" in ready_graphs


def test_finished_stages_of_other_options_are_not_lost(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    stopped_at(monkeypatch, "language", settings)
    other = replace(settings, precision="fp16", strict=False)
    with pytest.raises(OutputError, match=r"--precision fp16 .*got 3 finished stages of another \(--precision fp32 .*or remove the folder"):
        export_bundle(other, QUIET)
    ready_graphs.clear()
    export_bundle(settings, QUIET)
    assert ready_graphs == ["language", "mask_decoder"]
    export_bundle(replace(other, output=tmp_path / "out" / "other"), QUIET)  # its own output has a folder of its own


@pytest.mark.parametrize(("stage", "held"), [("language", "3 finished stages, which"), ("pixel_encoder", "no finished stage")])
def test_an_export_that_begins_anew_says_what_an_interrupted_one_left(
    stage: str,
    held: str,
    ready_graphs: list[str],
    tiny_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    stopped_at(monkeypatch, stage, settings)
    kept = tmp_path / "out" / ".bundle.partial"
    for resume, folders in ((None, [kept.name, "bundle"]), (True, ["bundle"]), (None, ["bundle"])):
        export_bundle(replace(settings, resume=resume), Progress())
        told = f"this export begins anew; an earlier one left {kept} ({held}" in capsys.readouterr().err
        assert told == (kept.name in folders)
        assert sorted(path.name for path in kept.parent.iterdir()) == folders


def test_a_full_disk_leaves_what_is_finished(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures)
    original = writer.write

    def full(model: ir.Model, folder: Path, stage: str) -> None:
        if stage == "language":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(model, folder, stage)

    for resume in (False, True):
        monkeypatch.setattr(writer, "write", full)
        told = "3 finished stages stay in .*bundle.partial, and the same command goes on with them" if resume else "another --output$"
        with pytest.raises(OutputError, match=f"is full; free some space or choose {'another --output; ' if resume else ''}{told}"):
            export_bundle(replace(settings, resume=resume), QUIET)
        assert any((tmp_path / "out").iterdir()) == resume
    monkeypatch.setattr(writer, "write", original)
    ready_graphs.clear()
    export_bundle(replace(settings, resume=True), QUIET)
    assert ready_graphs == ["language", "mask_decoder"]


def test_a_failed_comparison_leaves_the_stages_to_be_judged_otherwise(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    with pytest.raises(ParityFailed, match="5 finished stages stay in .*bundle.partial, and the same command goes on with them"):
        export_bundle(replace(settings, gates={"map_max_abs": -1.0}), QUIET)
    ready_graphs.clear()
    export_bundle(settings, QUIET)
    assert ready_graphs == []


def test_an_export_into_its_checkpoints_folder_goes_on_too(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    settings = ExportSettings(str(checkpoint), "fp32", checkpoint / "bundle", images=pictures, resume=True)
    stopped_at(monkeypatch, "mask_decoder", settings)
    ready_graphs.clear()
    export_bundle(settings, QUIET)
    assert ready_graphs == ["mask_decoder"]


def test_what_a_killed_comparison_left_in_a_stage_does_not_come_into_the_bundle(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    stopped_at(monkeypatch, "mask_decoder", settings)
    (tmp_path / "out" / ".bundle.partial" / "language" / "language.piece.onnx").write_bytes(b"half")
    bundle, _ = export_bundle(settings, QUIET)
    assert not [name for name in bundle.manifest.files if "piece" in name]
    assert not list(bundle.folder.rglob("*.piece.onnx"))


@pytest.mark.parametrize("same", [True, False])
def test_a_second_export_to_the_same_output_is_refused_and_the_first_goes_on(
    same: bool, ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, resume=True)
    original, second = writer.write, settings if same else replace(settings, precision="fp16")

    def meanwhile(model: ir.Model, folder: Path, stage: str) -> None:
        original(model, folder, stage)
        if stage == "language":
            monkeypatch.setattr(writer, "write", original)
            with pytest.raises(OutputError, match=".bundle.partial: another export is at work in it; wait for it, or choose another"):
                export_bundle(second, QUIET)

    monkeypatch.setattr(writer, "write", meanwhile)
    bundle, report = export_bundle(settings, QUIET)
    assert report is not None and not report.failures and set(bundle.manifest.precision.values()) == {"fp32"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]


def test_an_output_that_is_a_link_stays_one_and_what_it_points_at_is_replaced(
    ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "line").symlink_to(tmp_path / "store" / "v3")
    for threshold in (0.3, 0.4):  # the first makes what the link points at
        settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "line", images=pictures, strict=False, threshold=threshold)
        export_bundle(settings, QUIET)
    assert (tmp_path / "line").is_symlink() and Bundle(tmp_path / "line").manifest.threshold == 0.4
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["v3"]


def test_a_mount_point_is_refused_before_the_work(
    ready_graphs: list[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(OutputError, match="is a mount point, which nothing whole can replace; choose a folder in it: .*bundle"):
        export_bundle(ExportSettings(str(tiny_checkpoint), "fp32", tmp_path), QUIET)
    assert not ready_graphs


def test_an_interruption_while_the_bundle_takes_its_place_says_that_it_did(
    ready_graphs: list[str],
    tiny_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = work._rename

    def interrupted(partial: Path, output: Path) -> None:
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)
        handler(signal.SIGINT, None)
        original(partial, output)

    monkeypatch.setattr(work, "_rename", interrupted)
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "bundle"), "--lmm", "float", "--images", str(pictures)]
    assert main(arguments) == 130
    told = capsys.readouterr().err
    assert "interrupted" in told and "bundle was written all the same" in told and "no bundle was written" not in told
    assert Bundle(tmp_path / "bundle").manifest.parity["passed"]


@pytest.mark.parametrize("fault", [EngineFailed("killed"), KeyboardInterrupt()])
def test_a_bundle_whose_memory_could_not_be_measured_was_made_all_the_same(
    fault: BaseException,
    ready_graphs: list[str],
    tiny_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> None:
        raise fault

    monkeypatch.setattr("runtime.footprint.footprints", failing)
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "bundle"), "--lmm", "float", "--images", str(pictures)]
    code = main([*arguments, "--json"])
    told = capsys.readouterr()
    assert Bundle(tmp_path / "bundle").manifest.parity["passed"]
    if isinstance(fault, EngineFailed):
        assert code == 0 and json.loads(told.out.splitlines()[-1])["stages"] == {}
        assert "memory by stage was not measured: killed" in told.err
    else:
        assert code == 130 and "was written all the same; its memory by stage was not measured" in told.err


def test_outcomes_on_disk_are_those_that_were_put_there(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    maps = [generator.random((rows, 7), np.float32) for rows in (3, 11, 5)]
    states = [generator.random((3, 4), np.float32), None, generator.random((3, 4), np.float32)]
    kept = OutcomesOnDisk(tmp_path)
    for number, (anomaly_map, anchors) in enumerate(zip(maps, states)):
        kept.append(Outcome(anomaly_map > 0.5, anomaly_map, anchors, (number, 9), "late" if number == 1 else ""))
        assert len(kept) == number + 1 and np.array_equal(kept[0].anomaly_map, maps[0])  # read between, too
    for number, outcome in enumerate(kept):
        assert np.array_equal(outcome.anomaly_map, maps[number]) and np.array_equal(outcome.mask, maps[number] > 0.5)
        assert outcome.anchor_states is states[number] and outcome.answer == (number, 9) and bool(outcome.error) == (number == 1)
    assert not list(tmp_path.iterdir()), "a file without a name"


def test_parity_layer_by_layer_finds_what_parity_does(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, ready_graphs: list[str]
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "bundle", images=pictures, streamed=True)
    bundle, report = export_bundle(settings, QUIET)
    assert report is not None and not report.failures and report.glue is None
    parity = json.loads((bundle.folder / "parity.json").read_text())
    assert parity["reference"] == "layer by layer" and parity["chain"]["mask_iou_min"] == 1
    assert [len(parity["layers"][name]) for name in ("present_keys", "present_values")] == [3, 3]
    assert all(0 < error < 1e-4 for errors in parity["layers"].values() for error in errors)
    assert all(0 < error < 1e-4 for errors in parity["stages"].values() for error in errors.values())
    assert bundle.golden()["0.image"].shape == picture(0).shape


@pytest.mark.parametrize("parity", ["strict", "none"])
def test_a_weight_that_is_no_number_makes_no_bundle_though_no_picture_shows_it(
    parity: str, tiny_checkpoint: Path, pictures: Path, tmp_path: Path, ready_graphs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    state, name = load_file(checkpoint / "model.safetensors"), "language.model.embed_tokens.weight"
    state[name][-1, 0] = float("nan")  # of a token that no prompt has
    save_file(state, checkpoint / "model.safetensors")
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "bundle"), "--lmm", "float", "--images", str(pictures)]
    assert main([*arguments, "--parity", parity, "--stream-reference"]) == 2
    assert f"{name} holds 1 NaN or infinite values of" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_is_not_compared_says_so(
    tiny_checkpoint: Path, tmp_path: Path, ready_graphs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    asked = ["--checkpoint", str(tiny_checkpoint), "--output", str(output), "--parity", "none", "--lmm", "float", "--json", "--quiet"]
    assert main(asked) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert "export pixel_encoder" not in captured.err
    with pytest.raises(NotCompared, match="export it without --parity none, or run it unverified on an engine that you name"):
        Bundle(output).golden()
    assert told["passed"] is None and told["parity"] is None and told["failures"] == []
    assert Bundle(output).manifest.parity == {"passed": False, "compared": False}
    assert json.loads((output / "parity.json").read_text())["compared"] is False


def test_plain_rounding_and_a_head_in_eight_bits_are_asked_for_by_name_and_told(
    tiny_checkpoint: Path, tiny_bundle: Path, pictures: Path, tmp_path: Path, ready_graphs: list[str]
) -> None:
    settings = ExportSettings(
        str(tiny_checkpoint), "fp32", tmp_path / "bundle", images=pictures, lmm="int8", calibration=Path("rtn"), head="int8", strict=False
    )
    bundle, report = export_bundle(settings, QUIET)
    told = bundle.manifest.quantisation
    assert told["plan"]["method"] == "round to nearest, nothing calibrated" and "round to nearest" in told["plan"]["head"]
    assert told["layers"]["language.lm_head"] == "int8, one scale an output" and len(told["layers"]) == 3 * 7 + 1
    assert report is not None and 0 < report.stages["language"]["logits"] < 1e-4 < report.quantisation["language"]["logits"]
    sizes = [(folder / "language" / "language.data").stat().st_size for folder in (bundle.folder, tiny_bundle)]
    assert sizes[0] < 0.35 * sizes[1]


def test_a_model_that_is_not_in_memory_is_not_calibrated_in_silence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "bundle", lmm="int8", streamed=True)
    with pytest.raises(RequestError, match="cannot be calibrated here; give a plan"):
        export_bundle(settings, QUIET)


# What it takes


def test_what_an_export_takes_is_told_and_refused_before_the_work_unless_forced(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ready_graphs: list[str]
) -> None:
    monkeypatch.setattr(writer, "available_memory", lambda: 700 << 20)
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "bundle"), "--parity", "none", "--lmm", "float"]
    assert main(arguments) == 2 and not ready_graphs
    told = capsys.readouterr().err
    assert "of memory and 700 MiB are available; close other programs, or go on all the same with --force" in told
    assert main([*arguments, "--force"]) == 0


def test_a_random_checkpoint_opens_and_says_the_fixed_answer(tmp_path: Path) -> None:
    # Wide enough for random directions to be apart.
    config = replace(tiny(), name="small", language=LanguageConfig(1024, 256, 2, 4, 2, 512, max_positions=512))
    write_random_checkpoint(config, tmp_path, torch.bfloat16)
    model = load(tmp_path)
    assert model.segment(picture()).answer_ids == model.prompt_encoder.encode().draft
