"""Real TensorRT-RTX engines, built ahead of time with no GPU: what fuses, what a build tells, and what happens when it goes wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from agvas.config import AGVASConfig, PixelEncoderConfig, nano
from agvas.model import AGVAS
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from calibration.gptq import GPTQSettings, round_to_nearest
from calibration.weights import IntegerWeight
from engines import EngineFailed, EngineUnavailable, memory, tensorrt_builder
from engines.cuda import capability_here
from engines.tensorrt_builder import BuildReport, BuildRequest, Profile, build
from engines.tensorrt_cache import EngineKey, build_into_cache, engines_folder, hash_of, load, record_of
from engines.tensorrt_library import TENSORRT_RTX, ahead_of_time, version
from export.adapters import axis_sizes
from export.integer_weights import linears, store_integers
from export.onnx_writer import export_stage, stage_module, write
from export.passes import lower_precision
from runtime.bundle import Bundle
from runtime.cli import build as command
from runtime.contract import STAGES
from runtime.engine_builds import BuildSettings, build_engines, profile_of, profiles

pytest.importorskip("tensorrt_rtx", reason='builds real engines: pip install "agvas[tensorrt-rtx]"')

ROOT = Path(__file__).parents[1]
LEAST, USUAL, MOST = {"B": 1, "N": 1, "K": 0, "R": 1}, {"B": 1, "N": 260, "K": 0, "R": 8}, {"B": 2, "N": 600, "K": 700, "R": 8}
# Attentions of each stage of `short_nano`, all of which are to become one kernel each.
ATTENTIONS = {"pixel_encoder": 2, "semantic_encoder": 1, "spam": 1, "language": 2, "mask_decoder": 4}

Graphs = dict[str, ir.Model]


def short_nano() -> AGVASConfig:
    """nano's shapes with as few layers as show every kind: a window and a global layer, a last language layer and one before it."""
    config = nano()
    return dataclasses.replace(
        config,
        pixel=dataclasses.replace(config.pixel, layers=2, stem="linear"),
        semantic=dataclasses.replace(config.semantic, layers=1),
        language=dataclasses.replace(config.language, layers=2),
        mask_decoder=dataclasses.replace(config.mask_decoder, layers=1),
    )


def sam_h_like(config: AGVASConfig) -> AGVASConfig:
    """SAM ViT-H's heads of 80, windows of 14 that do not divide the grid, and a global layer; fewer heads and a smaller picture."""
    return dataclasses.replace(config, pixel=PixelEncoderConfig(512, 16, 160, 2, 2, 320, 14, (1,), output_width=128))


def graph_of(config: AGVASConfig, stage: str) -> ir.Model:
    torch.manual_seed(0)
    model = AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], config.language.vocabulary)).eval()
    return export_stage(stage_module(model, stage), stage, axis_sizes(config))


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    """fp32 graphs of every stage, and "sam_h"."""
    config = short_nano()
    found = {stage: graph_of(config, stage) for stage in STAGES}
    return found | {"sam_h": graph_of(sam_h_like(config), "pixel_encoder")}


def built(model: ir.Model, stage: str, profile: Profile, folder: Path, capability: str = "8.9") -> BuildReport:
    write(model, folder, stage)
    request = BuildRequest(TENSORRT_RTX, str(folder / f"{stage}.onnx"), str(folder / "engine"), capability, profile)
    report = build(request, folder / "log")
    assert report.bytes == (folder / "engine").stat().st_size and not (folder / "log").exists()
    return report


def lowered(model: ir.Model, precision: str) -> ir.Model:
    model = model.clone()
    return model if precision == "fp32" else lower_precision(model, precision)


def nano_profile(stage: str, config: AGVASConfig | None = None) -> Profile:
    return profile_of(stage, axis_sizes(config or short_nano()), LEAST, USUAL, MOST)


# What fuses


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_in_16_bit_every_attention_of_nano_is_one_kernel(stage: str, precision: str, graphs: Graphs, tmp_path: Path) -> None:
    report = built(lowered(graphs[stage], precision), stage, nano_profile(stage), tmp_path)
    assert (report.attention, report.attention_fused, report.unfused) == (ATTENTIONS[stage], ATTENTIONS[stage], ())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sams_attention_fuses_with_its_relative_positions_windows_and_heads_of_80(precision: str, graphs: Graphs, tmp_path: Path) -> None:
    profile = nano_profile("pixel_encoder", sam_h_like(short_nano()))
    report = built(lowered(graphs["sam_h"], precision), "pixel_encoder", profile, tmp_path)
    assert (report.attention, report.attention_fused) == (2, 2)


def test_in_fp32_no_attention_fuses_and_the_report_names_each(graphs: Graphs, tmp_path: Path) -> None:
    report = built(lowered(graphs["spam"], "fp32"), "spam", nano_profile("spam"), tmp_path)
    assert (report.attention, report.attention_fused) == (1, 0)
    assert len(report.unfused) == 1 and "softmax" in report.unfused[0].lower()


def in_4_bit(language: ir.Model) -> tuple[ir.Model, dict[str, IntegerWeight]]:
    """A language graph with its layers' weights in 4 bit, and those."""
    model = language.clone()
    products = {name: node for name, node in linears(model).items() if name.startswith("layers.")}
    settings = GPTQSettings(bits=4, group=32)
    weights = {
        name: round_to_nearest(torch.from_numpy(node.inputs[1].const_value.numpy().T.copy()), settings) for name, node in products.items()
    }
    assert len(weights) == 14  # two layers of q, k, v, o, gate, up, down
    store_integers(model, weights)
    return model, weights


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_int4_weights_stay_in_4_bit_and_attention_fuses_beside_them(precision: str, graphs: Graphs, tmp_path: Path) -> None:
    model, weights = in_4_bit(graphs["language"])
    float_bytes = built(lowered(graphs["language"], precision), "language", nano_profile("language"), tmp_path / "float").bytes
    report = built(lowered(model, precision), "language", nano_profile("language"), tmp_path / "int4")
    assert (report.attention_fused, report.attention) == (2, 2)
    # Engines share products (gate and up are one), so there are fewer kernels than weights; and none was unpacked into the engine.
    assert report.int4_layers is not None and report.int4_layers >= 8
    assert report.bytes < float_bytes - sum(weight.codes.size for weight in weights.values())


@pytest.mark.parametrize("capability", ["8.6", "12.0"])
def test_engines_are_built_for_gpus_that_are_not_here(capability: str, graphs: Graphs, tmp_path: Path) -> None:
    assert capability in ahead_of_time(TENSORRT_RTX)
    report = built(lowered(graphs["spam"], "fp16"), "spam", nano_profile("spam"), tmp_path, capability)
    assert report.attention_fused == 1 and report.bytes > 1000 and report.peak_rss_bytes and report.peak_rss_bytes > 1 << 26


def test_float32_is_computed_in_float32_and_not_in_tf32(graphs: Graphs, tmp_path: Path) -> None:
    """The engine tells its settings, in words between its bytes."""
    built(lowered(graphs["spam"], "fp32"), "spam", nano_profile("spam"), tmp_path)
    assert re.findall(rb"\btf32=(\d)", (tmp_path / "engine").read_bytes()) == [b"0"]


def check_readable(model: ir.Model, opset: int) -> None:
    """What TensorRT 10.3 reads: ONNX's own operators, none of attention. Integers: symmetric and signed. Not run on it."""
    assert model.opset_imports[""] == opset
    assert {node.domain for node in model.graph} == {""}
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding"} & {node.op_type for node in model.graph}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert len(node.inputs) == 2, "a zero point"
            assert node.inputs[0] is not None and node.inputs[0].dtype in (ir.DataType.INT4, ir.DataType.INT8)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_graphs_hold_nothing_that_one_of_the_builders_refuses(precision: str, graphs: Graphs) -> None:
    for model in graphs.values():
        check_readable(lowered(model, precision), 20)
    integers = lowered(in_4_bit(graphs["language"])[0], precision)
    check_readable(integers, 21)
    assert sum(node.op_type == "DequantizeLinear" for node in integers.graph) == 14


# What goes wrong


def saved(text: str, folder: Path) -> Path:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    onnx.save(proto, folder / "g.onnx")
    return folder / "g.onnx"


PLAIN = "g (float[B, 8] x) => (float[B, 8] y) { y = Softmax(x) }"
PLAIN_PROFILE: Profile = {"x": ((1, 8), (1, 8), (4, 8))}


def build_plain(folder: Path, text: str = PLAIN, profile: Profile = PLAIN_PROFILE) -> BuildReport:
    request = BuildRequest(TENSORRT_RTX, str(saved(text, folder)), str(folder / "engine"), "8.9", profile)
    return build(request, folder / "log")


def test_a_graph_that_the_parser_refuses_is_named_with_its_node(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"cannot build g.onnx for compute capability 8.9: .*the parser refuses.*StringNormalizer"):
        build_plain(tmp_path, "g (string[B] x) => (string[B] y) { y = StringNormalizer(x) }")
    assert "StringNormalizer" in (tmp_path / "log").read_text()


def test_shapes_of_other_inputs_than_the_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"expected shapes of the graph's inputs \['x'\], got those of \['z'\]"):
        build_plain(tmp_path, profile={"z": PLAIN_PROFILE["x"]})


def test_a_builder_that_crashes_is_an_error_with_its_last_words_and_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal, sys; print('ERROR: node_7 is odd', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(tensorrt_builder, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(EngineFailed, match=r"the builder crashed \(signal 11\) after: node_7 is odd.*log is .*log"):
        build_plain(tmp_path)


def test_a_builder_that_is_killed_ran_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "CHILD", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(EngineFailed, match="out of memory; end other programs"):
        build_plain(tmp_path)
    request = BuildRequest(TENSORRT_RTX, str(tmp_path / "g.onnx"), str(tmp_path / "engine"), "8.9", PLAIN_PROFILE, workspace_mb=1)
    with pytest.raises(EngineFailed, match="out of memory; end other programs"):  # a limit of the GPU's is none of the host's
        build(request, tmp_path / "log")


def test_a_builder_that_gets_too_little_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real builder in a real limit: enough for the library and a small graph, not for 128 MB of weights."""
    limited = ("sh", "-c", f"ulimit -v 600000; exec {sys.executable} -m engines.tensorrt_builder")
    monkeypatch.setattr(tensorrt_builder, "CHILD", limited)
    assert build_plain(tmp_path).bytes > 0
    path = saved("g (float[B, 8192] x) => (float[B, 4096] y) { y = MatMul(x, w) }", tmp_path)
    proto = onnx.load(path)
    weight = np.random.default_rng(0).normal(size=(8192, 4096)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, path)
    profile: Profile = {"x": ((1, 8192), (1, 8192), (4, 8192))}
    with pytest.raises(EngineFailed, match="out of memory.*end other programs.*builder's log"):
        build(BuildRequest(TENSORRT_RTX, str(path), str(tmp_path / "engine"), "8.9", profile), tmp_path / "log")


LARGER = "a layer needs more scratch memory than --workspace 1 allows .*{}.*; give a larger one, or leave it out"


def test_a_workspace_that_is_too_small_is_no_lack_of_memory(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real builder's words, which differ by layer."""
    write(lowered(graphs["pixel_encoder"], "fp32"), tmp_path, "pixel_encoder")
    graph, profile = str(tmp_path / "pixel_encoder.onnx"), nano_profile("pixel_encoder")
    request = BuildRequest(TENSORRT_RTX, graph, str(tmp_path / "engine"), "8.9", profile, workspace_mb=1)
    with pytest.raises(EngineFailed, match=LARGER.format("workspace limit")):
        build(request, tmp_path / "log")
    words = "VERBOSE:  Try increasing the workspace size with IBuilderConfig.\nerror: Error Code 2: OutOfMemory"  # of nano's pixel encoder
    code = f"import sys; print({words!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(tensorrt_builder, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(EngineFailed, match=LARGER.format("OutOfMemory")):
        build(request, tmp_path / "log")


def child_where(*changes: str) -> tuple[str, ...]:
    """A builder's process in whose tensorrt_builder (`b`) these changes were made."""
    return (sys.executable, "-c", "; ".join(("import sys", "from engines import tensorrt_builder as b", *changes, "sys.exit(b.main())")))


SHORT_OF_MEMORY = "b.available_memory = lambda: 100 << 20"


def test_too_little_free_memory_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "CHILD", child_where(SHORT_OF_MEMORY, "b._build = None"))
    with pytest.raises(EngineFailed, match="takes about 350 MiB of memory, 100 MiB are free .swap does not count.; .*with --force"):
        build_plain(tmp_path)
    monkeypatch.setattr(tensorrt_builder, "CHILD", child_where(SHORT_OF_MEMORY))
    request = BuildRequest(TENSORRT_RTX, str(tmp_path / "g.onnx"), str(tmp_path / "engine"), "8.9", PLAIN_PROFILE, force=True)
    assert build(request, tmp_path / "log").bytes > 0


def test_files_that_a_container_has_read_are_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{95 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {15 << 20}\nfile {80 << 20}\ninactive_file {50 << 20}\nactive_file {20 << 20}\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.available_memory() == 75 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.available_memory() or 0) > 75 << 20, "no limit"
    (tmp_path / "memory.max").write_text(f"{1 << 60}\n")
    assert (memory.available_memory() or 0) < 1 << 50, "more than the machine has"


def test_a_container_of_the_older_kind_has_its_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{100 << 20}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{95 << 20}\n")
    (tmp_path / "memory" / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {50 << 20}\ntotal_active_file {20 << 20}\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.available_memory() == 75 << 20


def test_a_child_that_ends_without_a_word_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "CHILD", ("true",))
    with pytest.raises(EngineFailed, match="ended with exit code 0 and said nothing"):
        build_plain(tmp_path)


def test_an_interrupted_build_leaves_no_child_and_no_engine(tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    key = EngineKey("g", hash_of(saved(PLAIN, tmp_path)), TENSORRT_RTX, version(TENSORRT_RTX), "8.9")
    with pytest.raises(KeyboardInterrupt):
        build_into_cache(key, tmp_path / "g.onnx", PLAIN_PROFILE, progress=interrupt)
    assert not key.path.exists() and not list(engines_folder().glob(".*.partial"))
    record, cached = build_into_cache(key, tmp_path / "g.onnx", PLAIN_PROFILE)
    assert not cached and load(key, "")[1] == record


# agvas-build


def why_not_here() -> str:
    with pytest.raises(EngineUnavailable) as caught:
        capability_here("cuda:0")
    return str(caught.value)


NOT_VERIFIED = f"built, not verified: {why_not_here()}; run agvas-verify on the device"


@pytest.fixture
def run_build(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    def run(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code = command.main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def test_engines_are_built_for_every_gpu_told_in_a_sidecar_and_found_again(tiny_bundle: Path, run_build: Any) -> None:
    arguments = ("--bundle", tiny_bundle, "--engine", TENSORRT_RTX, "--compute-capability", "8.9,12.0", "--stages", "language,spam")
    code, report, _ = run_build(*arguments)
    assert code == 0 and report["verified"] is None
    assert report["note"] == NOT_VERIFIED
    names = [(entry["stage"], entry["capability"]) for entry in report["engines"]]
    assert names == [("language", "8.9"), ("spam", "8.9"), ("language", "12.0"), ("spam", "12.0")]
    for entry in report["engines"]:
        record = record_of(Path(entry["path"]))
        assert Path(entry["path"]).stat().st_size == entry["bytes"] == record.bytes
        assert record.verified is None and record.capability == entry["capability"] and not entry["cached"]
        assert record.graph == Bundle(tiny_bundle).graph_hash(entry["stage"]) == hash_of(Bundle(tiny_bundle).graph(entry["stage"]))
    code, again, _ = run_build(*arguments)
    assert code == 0 and all(entry["cached"] for entry in again["engines"])
    assert [entry["path"] for entry in again["engines"]] == [entry["path"] for entry in report["engines"]]


def test_what_was_built_is_said_once_in_words(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spam")
    assert command.main(["--bundle", str(tiny_bundle), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("built     not verified: device cuda:0: ")


def test_other_shapes_a_rebuild_or_a_spoilt_file_build_anew(tiny_bundle: Path, run_build: Any) -> None:
    arguments = ("--bundle", tiny_bundle, "--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spam")

    def cached(*more: str) -> bool:
        code, report, _ = run_build(*arguments, *more)
        assert code == 0
        (entry,) = report["engines"]
        return bool(entry["cached"])

    assert [cached(), cached(), cached("--rebuild")] == [False, True, False]
    # The engine of three pictures serves who asks for one, so that the two do not build over each other's.
    assert [cached("--max-batch", "3"), cached("--max-batch", "3"), cached(), cached("--max-batch", "2")] == [False, True, True, True]
    engine = next(engines_folder().glob("spam-*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1])
    assert not cached("--max-batch", "3")
    assert record_of(engine).profile["pixel_embeddings"][2][0] == 3


def test_two_processes_that_want_the_same_engine_build_it_once(tiny_bundle: Path) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spam,mask_decoder"]
    start = [sys.executable, "-m", "runtime.cli.build", *arguments, "--json", "--quiet"]
    both = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    for entries in zip(*(report["engines"] for report in reports)):
        assert sorted(entry["cached"] for entry in entries) == [False, True]
        assert len({entry["bytes"] for entry in entries}) == 1
    for engine in engines_folder().glob("*.engine"):
        record = record_of(engine)
        load(EngineKey(record.stage, record.graph, record.engine, record.version, record.capability), "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "tensorrt_rtx"), "did you mean 'tensorrt-rtx'?"),
        (("--engine", TENSORRT_RTX), "expected one or more of 7.5, 8.0, 8.6.*since no GPU here can be asked; got none .device cuda:0: "),
        (("--engine", TENSORRT_RTX, "--compute-capability", "8.7"), "got 8.7; on a Jetson .8.7. .* use engine tensorrt on the device"),
        (("--engine", TENSORRT_RTX, "--compute-capability", "sm_89"), "expected numbers like 8.6,8.9,12.0, got 'sm_89'"),
        (("--engine", TENSORRT_RTX, "--compute-capability", ","), "got none; leave it out"),
        (("--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--max-batch", "0"), "--max-batch: expected 1 or more, got 0"),
        (("--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--workspace", "0"), "--workspace: expected a number of MB"),
        (("--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spm"), "did you mean 'spam'?"),
        (("--engine", TENSORRT_RTX, "--device", "cuda:x"), "--device: expected cuda:N .cuda:0 is the first GPU., got 'cuda:x'"),
        (("--engine", TENSORRT_RTX, "--device", "tpu:0", "--compute-capability", "8.9"), "--device: expected cuda:N .*, got 'tpu:0'"),
        (("--engine", TENSORRT_RTX, "--device", "cpu", "--compute-capability", "8.9"), "--device: expected cuda:N .*, got 'cpu'"),
        (("--engine", "tensorrt", "--compute-capability", "8.9"), r"agvas\[tensorrt\].*JetPack"),
    ],
)
def test_what_cannot_be_built_is_exit_code_2_with_a_remedy(
    arguments: tuple[str, ...], message: str, tiny_bundle: Path, run_build: Any
) -> None:
    code, report, errors = run_build("--bundle", tiny_bundle, *arguments)
    assert code == 2 and report["error"] in errors
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(report["error"])), report["error"]


def test_too_little_memory_or_disk_by_the_estimate_is_no_end_with_force(
    tiny_bundle: Path, run_build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--bundle", tiny_bundle, "--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spam")
    with monkeypatch.context() as short:
        short.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
        code, report, _ = run_build(*arguments)
        assert code == 2 and "MiB are free; free some space, set AGVAS_CACHE to another folder, or go on all" in report["error"]
        assert run_build(*arguments, "--force")[0] == 0
    monkeypatch.setattr(tensorrt_builder, "CHILD", child_where(SHORT_OF_MEMORY))
    code, report, _ = run_build(*arguments, "--rebuild")
    assert code == 2 and "100 MiB are free" in report["error"]
    assert run_build(*arguments, "--rebuild", "--force")[0] == 0


def test_a_device_that_is_none_is_not_told_as_a_gpu_that_is_missing(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="device: expected cuda:N .cuda:0 is the first GPU., got 'tpu:0'"):
        build_engines(Bundle(tiny_bundle), BuildSettings(TENSORRT_RTX, ("8.9",), device="tpu:0"))


def test_the_table_tells_sizes_fusion_and_that_nothing_was_verified(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--engine", TENSORRT_RTX, "--compute-capability", "8.9", "--stages", "spam"]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out
    assert "attention fused 0 of 1" in lines and "not fused: node_Softmax" in lines
    assert "export with --precision fp16 or bf16" in lines
    assert f"built     {NOT_VERIFIED.removeprefix('built, ')}" in lines


def test_only_a_bundle_without_16_bit_is_advised_to_be_exported_in_16(tiny_bundle: Path) -> None:
    report = build_engines(Bundle(tiny_bundle), BuildSettings(TENSORRT_RTX, ("8.9",), stages=("spam",)))
    (entry,) = report["engines"]

    def advised(precision: dict[str, str], fused: int | None) -> bool:
        told = report | {"precision": precision, "engines": [entry | {"attention_fused": fused}]}
        return any("export with --precision fp16 or bf16" in line for line in command._table(told))

    fp32 = report["precision"]
    assert set(fp32.values()) == {"fp32"} and advised(fp32, 0)
    assert advised(fp32, None), "unknown, but known to be none"
    assert not advised(fp32, 1)
    for fused in (0, None):
        assert not advised(dict.fromkeys(fp32, "fp16"), fused)
        assert not advised(dict.fromkeys(fp32, "bf16") | {"mask_decoder": "fp32"}, fused)


# Shapes from the contract


def test_profiles_cover_every_call_that_the_pipeline_makes(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    prompts, sizes = bundle.prompt_encoder(), bundle.manifest.sizes
    shapes = profiles(bundle, max_batch=4)
    language = shapes["language"]
    assert language["past_keys"][0] == (sizes["L"], 1, sizes["H"], 0, sizes["C"]) and language["input_embeddings"][0][1] == 1
    assert language["past_keys"][1][3] == 0, "the usual call has no past"
    prompt = prompts.encode()
    usual = len(prompt.prefix) + 2 * sizes["T"] + len(prompt.suffix) + len(prompt.draft or ()) - 1
    assert language["input_embeddings"][1] == (1, usual, sizes["D"]) and language["rows"][1] == (len(prompt.draft or ()),)
    words = "defect " * 400
    while True:  # the longest instruction that is taken
        try:
            longest = prompts.encode(words)
        except ValueError:
            words = words[: -len("defect ")]
        else:
            break
    tokens = len(longest.prefix) + 2 * sizes["T"] + len(longest.suffix) + len(longest.draft or ()) - 1
    assert usual < tokens <= language["positions"][2][1] <= tokens + 40
    assert language["past_values"][2][3] >= tokens + prompts.prompts.max_new_tokens
    for stage, spec in STAGES.items():
        assert [shapes[stage][tensor.name][0][tensor.shape.index("B")] for tensor in spec.inputs if "B" in tensor.shape] == [1] * sum(
            "B" in tensor.shape for tensor in spec.inputs
        )
        assert all(
            (shape[1][tensor.shape.index("B")], shape[2][tensor.shape.index("B")]) == (1, 4)  # a Segmenter's calls, and the most
            for tensor in spec.inputs
            if "B" in tensor.shape
            for shape in [shapes[stage][tensor.name]]
        )
