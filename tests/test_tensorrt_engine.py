"""The TensorRT runner on a double of the GPU: the chain's numbers, verdicts and what they lead to, and what is refused at loading."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_double
import numpy as np
import pytest
from cuda_double import CudaDouble
from tensorrt_machine import BOTH, GPU, Feeds, Gpu, cudart, give_verdict, install_only, spam_feeds, trt

from engines import EngineFailed, EngineOptions, EngineUnavailable, TensorMismatch, open_engine, tensorrt_builder, tensorrt_cache
from engines.tensorrt import TensorRtEngine
from engines.tensorrt_cache import engines_folder, record_of, set_aside
from export.bisect import bisect
from runtime import Segmenter
from runtime.bundle import Bundle
from runtime.cli import build as build_command
from runtime.cli import verify as verify_command
from runtime.contract import SPAM, STAGES
from runtime.engine_builds import BuildSettings, build_engines

# Build, verify, run


@BOTH
def test_engines_that_can_run_here_are_verified_after_the_build(gpu: Gpu, tiny_bundle: Path) -> None:
    report = gpu.build(tiny_bundle)
    assert report["verified"] is True and report["note"] == "built and verified"
    for entry in report["engines"]:
        verified = record_of(Path(entry["path"])).verified
        assert entry["capability"] == "8.9" and entry["verified"] is True
        assert verified is not None and verified["passed"] and verified["mask_iou_min"] == 1.0


@BOTH
def test_the_segmenter_gives_the_references_masks_on_them(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    image = Bundle(tiny_bundle).golden()["0.image"]
    ours, wanted = Segmenter(tiny_bundle, gpu.engine, "cuda:0"), Segmenter(tiny_bundle, "onnxruntime")
    for _ in range(3):  # plain, captured, replayed
        np.testing.assert_allclose(ours(image).anomaly_map, wanted(image).anomaly_map, atol=1e-5)
        assert ours(image).text == wanted(image).text


@BOTH
def test_auto_on_a_gpu_considers_built_engines_and_says_what_is_missing(
    gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_only(gpu, monkeypatch)
    with pytest.raises(
        EngineUnavailable, match=f"{gpu.engine}/graph: stage pixel_encoder: expected an engine of.*found none; run agvas-build"
    ):
        Segmenter(tiny_bundle, device="cuda:0")
    gpu.build(tiny_bundle)
    assert Segmenter(tiny_bundle, device="cuda:0").engine == gpu.engine


@BOTH
def test_an_engine_that_gives_other_masks_is_set_aside_and_not_used(gpu: Gpu, tiny_bundle: Path, spoilt: Path) -> None:
    gpu.graphs["mask_decoder"] = spoilt / "mask_decoder" / "mask_decoder.onnx"
    report = gpu.build(tiny_bundle)
    assert report["verified"] is False and "maps differ" in report["note"] and "--bisect" in report["note"]
    names = sorted(path.name for path in engines_folder().iterdir())
    assert not [name for name in names if name.endswith(".engine")]
    aside = [name for name in names if name.endswith(".engine.failed.json")]
    assert len(aside) == 5 and not json.loads((engines_folder() / aside[0]).read_text())["verified"]["passed"]
    with pytest.raises(EngineUnavailable, match="found only one that failed its verification and was set aside"):
        gpu.open(tiny_bundle, "mask_decoder")
    del gpu.graphs["mask_decoder"]
    assert gpu.build(tiny_bundle)["verified"] is True


def test_a_failed_build_is_exit_code_1_and_a_failed_verification_sets_aside_too(
    gpu: Gpu, tiny_bundle: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--engine", gpu.engine, "--quiet"]
    gpu.graphs["mask_decoder"] = spoilt / "mask_decoder" / "mask_decoder.onnx"
    assert build_command.main(arguments) == 1
    assert "FAILED    built, but the masks are not the reference's" in capsys.readouterr().out
    # Built ahead of time elsewhere, with the same fault, and first verified on the device:
    gpu.cuda.capability = None
    assert build_command.main([*arguments, "--compute-capability", "8.9"]) == 0
    gpu.cuda.capability = "8.9"
    capsys.readouterr()
    assert verify_command.main([*arguments, "--device", "cuda:0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["set_aside"]) == 5 and all(name.endswith(".failed") for name in report["set_aside"])
    assert not list(engines_folder().glob("*.engine"))


def test_an_engine_that_was_built_again_while_the_old_one_was_verified_is_left_alone(
    gpu: Gpu, tiny_bundle: Path, spoilt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.graphs["mask_decoder"] = spoilt / "mask_decoder" / "mask_decoder.onnx"
    gpu.cuda.capability = None
    gpu.build(tiny_bundle, capabilities=("8.9",))
    gpu.cuda.capability = "8.9"
    start = TensorRtEngine.start

    def meanwhile(self: TensorRtEngine, feeds: Feeds) -> Any:
        if gpu.graphs:  # another process repairs the one that this one has opened
            gpu.graphs.clear()
            gpu.build(tiny_bundle, stages=("mask_decoder",), rebuild=True)
        return start(self, feeds)

    monkeypatch.setattr(TensorRtEngine, "start", meanwhile)
    arguments = ["--bundle", str(tiny_bundle), "--engine", gpu.engine, "--quiet", "--device", "cuda:0", "--json"]
    assert verify_command.main(arguments) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["set_aside"]) == 4 and "another process has built mask_decoder again meanwhile" in report["notes"][0]
    path = gpu.key(tiny_bundle, "mask_decoder").path
    assert list(engines_folder().glob("*.engine")) == [path] and record_of(path).verified is None
    assert gpu.build(tiny_bundle)["verified"] is True


def test_engines_that_cannot_run_are_no_wrong_ones_and_stay(
    gpu: Gpu, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have the GPU's memory: nothing was computed that could be wrong."""
    arguments = ["--bundle", str(tiny_bundle), "--engine", gpu.engine, "--quiet"]
    start = TensorRtEngine.start

    def full(self: TensorRtEngine, feeds: Feeds) -> Any:
        if self.spec.name == "language":
            raise EngineFailed("CUDA: out of memory (cudaErrorMemoryAllocation)")
        return start(self, feeds)

    monkeypatch.setattr(TensorRtEngine, "start", full)
    for command, options in ((build_command, []), (verify_command, ["--device", "cuda:0", "--json"])):
        assert command.main([*arguments, *options]) == 2
        captured = capsys.readouterr()
        assert "CUDA: out of memory" in captured.err and "Traceback" not in captured.err
        assert len(list(engines_folder().glob("*.engine"))) == 5
    assert json.loads(captured.out.splitlines()[-1])["error"].startswith("CUDA: out of memory")
    assert record_of(gpu.key(tiny_bundle).path).verified is None


@pytest.mark.parametrize("right", [True, False])
def test_a_cache_that_cannot_be_written_changes_no_verdict(
    right: bool, gpu: Gpu, tiny_bundle: Path, spoilt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not right:
        gpu.graphs["mask_decoder"] = spoilt / "mask_decoder" / "mask_decoder.onnx"
    gpu.cuda.capability = None
    gpu.build(tiny_bundle, capabilities=("8.9",))
    gpu.cuda.capability = "8.9"

    def read_only(*paths: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", read_only)
    arguments = ["--bundle", str(tiny_bundle), "--engine", gpu.engine, "--quiet"]
    assert verify_command.main([*arguments, "--device", "cuda:0", "--json"]) == (0 if right else 1)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["passed"] is right and report["parity"]["images"] > 0 and report["set_aside"] == []
    noted = f"the verdict could not be noted beside the engines ([Errno 13] Permission denied); let this user write to {engines_folder()}"
    kept = "the engines could not be set aside and go on being used ([Errno 13] Permission denied); remove them from "
    assert report["notes"][0] == noted and [note.startswith(kept) for note in report["notes"][1:]] == ([] if right else [True])
    assert verify_command.main([*arguments, "--device", "cuda:0"]) == (0 if right else 1)
    assert f"note      {noted}" in capsys.readouterr().out.splitlines()
    assert build_command.main(arguments) == (0 if right else 1)  # all of it is in the cache
    assert noted in capsys.readouterr().out


def test_engines_that_compute_nan_are_set_aside(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = TensorRtEngine.start

    def spoilt(self: TensorRtEngine, feeds: Feeds) -> Any:
        if self.spec.name == "spam":
            feeds = {name: np.full_like(np.asarray(feed), np.nan) for name, feed in feeds.items()}
        return start(self, feeds)

    monkeypatch.setattr(TensorRtEngine, "start", spoilt)
    report = gpu.build(tiny_bundle)
    assert report["verified"] is False and "stage spam computed NaN" in report["note"]
    assert not list(engines_folder().glob("*.engine"))


def test_verifying_on_the_device_is_noted_in_the_sidecar(gpu: Gpu, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.cuda.capability = None
    assert gpu.build(tiny_bundle, capabilities=("8.9",))["verified"] is None
    gpu.cuda.capability = "8.9"
    assert record_of(gpu.key(tiny_bundle).path).verified is None
    assert verify_command.main(["--bundle", str(tiny_bundle), "--engine", gpu.engine, "--device", "cuda:0", "--quiet"]) == 0
    verified = record_of(gpu.key(tiny_bundle).path).verified
    assert verified is not None and verified["passed"] and verified["flips"] == 0


@BOTH
def test_engines_that_were_never_verified_are_warned_of_once_with_the_command(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    for stage in STAGES:
        give_verdict(gpu, tiny_bundle, None, stage)
    command = f"agvas-verify --bundle {tiny_bundle} --engine {gpu.engine} --device cuda:0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            Segmenter(tiny_bundle, gpu.engine, "cuda:0")
    told = f"the engines of {gpu.engine} for compute capability 8.9 have not been compared with the reference; run {command}, which notes "
    assert len(caught) == 1 and str(caught[0].message).startswith(told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_command.main([*command.split()[1:], "--quiet"]) == 0
        Segmenter(tiny_bundle, gpu.engine, "cuda:0")


@BOTH
def test_an_engine_that_failed_and_could_not_be_set_aside_is_refused_but_can_be_judged_again(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    path = give_verdict(gpu, tiny_bundle, {"passed": False, "failures": ["3 flips", "maps differ"]}, "language")
    named = f"--bundle {tiny_bundle} --engine {gpu.engine} --device cuda:0"
    with pytest.raises(EngineUnavailable) as refused:
        Segmenter(tiny_bundle, gpu.engine, "cuda:0")
    assert str(refused.value) == (
        f"{path}: expected an engine that gives the reference's masks, found one that agvas-verify failed (3 flips; maps differ); "
        f"run agvas-build {named} --rebuild, or judge it again with agvas-verify {named}"
    )
    assert verify_command.main([*named.split(), "--quiet"]) == 0
    Segmenter(tiny_bundle, gpu.engine, "cuda:0")


@BOTH
def test_auto_verifies_for_itself_and_again_when_an_engine_is_another(
    gpu: Gpu, tiny_bundle: Path, spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_only(gpu, monkeypatch)
    gpu.build(tiny_bundle)

    def remembered() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choice = Segmenter(tiny_bundle, device="cuda:0").choice
        assert choice is not None and choice.engine == gpu.engine
        return choice.remembered

    for verdict in (None, {"passed": False, "failures": []}):
        give_verdict(gpu, tiny_bundle, verdict)
        assert [remembered(), remembered()] == [False, True]
    give_verdict(gpu, tiny_bundle, {"passed": True, "failures": []})
    assert remembered(), "as when there was no verdict: this one only agrees"
    gpu.graphs["mask_decoder"] = spoilt / "mask_decoder" / "mask_decoder.onnx"
    gpu.build(tiny_bundle, stages=("mask_decoder",), rebuild=True)
    with pytest.raises(EngineUnavailable, match=f"{gpu.engine}/graph: mean mask IoU .* maps differ"):
        Segmenter(tiny_bundle, device="cuda:0")


@BOTH
def test_bisecting_builds_the_graphs_it_takes_apart(gpu: Gpu, tiny_bundle: Path, spoilt: Path) -> None:
    sealed = Bundle(tiny_bundle)  # the weights on the engine's side are others than the manifest's
    sealed.folder = spoilt
    finding, errors = bisect(sealed, gpu.engine, GPU, against=Bundle(tiny_bundle))
    assert finding is not None and finding.stage == "mask_decoder" and finding.operator in ("MatMul", "Gemm")
    assert max(error for stage, error in errors.items() if stage != "mask_decoder") < 1e-5


@BOTH
def test_an_engine_is_built_on_the_gpu_that_it_is_for(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT measures kernels on the GPU of the thread that builds; TensorRT for RTX builds on none."""
    gpu.cuda.second = "8.6"
    report = gpu.build(tiny_bundle, device="cuda:1")
    assert {entry["capability"] for entry in report["engines"]} == {"8.6"} and report["verified"] is True
    found: list[int] = []

    def builder(logger: object) -> None:
        found.append(gpu.cuda.selected)
        raise EngineFailed("that is far enough")

    monkeypatch.setattr(gpu.trt, "Builder", builder)
    gpu.cuda.selected = 0  # as in the new process that the request goes to
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(dataclasses.asdict(gpu.requests[0]))))
    assert tensorrt_builder.main() == 1
    assert found == [1 if gpu.engine == "tensorrt" else 0]


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_bisecting_builds_on_the_gpu_that_was_asked_for(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.cuda.second = "8.6"
    assert bisect(Bundle(tiny_bundle), gpu.engine, EngineOptions(device="cuda:1"))[0] is None
    assert {(request.device, request.capability) for request in gpu.requests} == {(1, "8.6")}


@pytest.fixture
def spoilt(copy_of_bundle: Callable[[], Path]) -> Path:
    """A bundle whose mask decoder has other weights."""
    folder = copy_of_bundle()
    path = folder / "mask_decoder" / "mask_decoder.data"
    weights = np.fromfile(path, np.float32)
    (weights + np.random.default_rng(1).normal(0, 0.1, weights.size)).astype(np.float32).tofile(path)
    return folder


# What is refused


@BOTH
def test_shapes_outside_the_profile_are_told_with_the_command_that_widens_it(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    with pytest.raises(TensorMismatch, match=r"expected semantic_features between \[1, .* got \[3, .*--max-batch N --rebuild"):
        gpu.open(tiny_bundle).run(spam_feeds(tiny_bundle, batch=3))


@BOTH
@pytest.mark.parametrize("part", ["engine", "sidecar"])
def test_what_another_gpu_or_version_built_is_named_with_the_command(part: str, gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    old = gpu.key(tiny_bundle).path
    gpu.cuda.capability = "8.6"
    command = f"run agvas-build --bundle {tiny_bundle} --engine {gpu.engine} --device cuda:0"
    if part == "engine":
        message = f"for compute capability 8.6, found one for compute capability 8.9; {command}"
    else:  # copied under the other GPU's name
        old.rename(gpu.key(tiny_bundle).path)
        old.with_suffix(".json").rename(gpu.key(tiny_bundle).path.with_suffix(".json"))
        message = f"expected an engine for compute capability 8.6, found one for 8.9; {command} --rebuild"
    with pytest.raises(EngineUnavailable) as caught:
        gpu.open(tiny_bundle)
    assert message in str(caught.value)


@BOTH
def test_another_version_or_another_bundle_is_told_apart(gpu: Gpu, tiny_bundle: Path, spoilt: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam", "mask_decoder"))
    gpu.trt.__version__, before = "99.1.0", gpu.trt.__version__
    with pytest.raises(
        EngineUnavailable, match=f"of {gpu.engine} 99.1.0 for .* found one of {gpu.engine} {before} for 8.9; run agvas-build"
    ):
        gpu.open(tiny_bundle)
    with pytest.raises(EngineUnavailable, match="found only engines of other graphs"):
        gpu.open(spoilt, "mask_decoder")


def test_an_engine_that_was_set_aside_is_not_told_as_one_that_is_there(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    path = gpu.key(tiny_bundle).path
    set_aside(path, record_of(path).sha256)
    gpu.cuda.capability = "8.6"
    with pytest.raises(EngineUnavailable, match="for compute capability 8.6, found none; run agvas-build"):
        gpu.open(tiny_bundle)


@BOTH
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), r"expected [0-9]+ bytes, found [0-9]+ \(cut off\?\)"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), r"expected sha256 [0-9a-f]{16}…, found [0-9a-f]{16}… \(altered\)"),
        (lambda path: path.with_suffix(".json").unlink(), "expected the engine's sidecar, found FileNotFoundError"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "expected the engine's sidecar, found KeyError"),
        (lambda path: path.unlink(), "expected an engine of .* found none"),
    ],
    ids=["truncated", "altered", "no sidecar", "another sidecar", "gone"],
)
def test_a_spoilt_engine_is_named_and_never_loaded(spoil: Callable[[Path], Any], message: str, gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spoil(gpu.key(tiny_bundle).path)
    with pytest.raises(EngineUnavailable, match=f"{message}.*run agvas-build --bundle .* --engine {gpu.engine}"):
        gpu.open(tiny_bundle)


@BOTH
def test_an_engine_that_cannot_be_read_is_one_that_cannot_be_had(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.build(tiny_bundle)
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.suffix == ".engine":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(EngineUnavailable, match=r"spam-.*engine: cannot be read \(.*Permission denied\); check its permissions"):
        gpu.open(tiny_bundle)
    install_only(gpu, monkeypatch)
    with pytest.raises(EngineUnavailable, match=f"{gpu.engine}/graph: .*cannot be read .* onnxruntime/graph: device cuda:0 was asked for"):
        Segmenter(tiny_bundle, device="cuda:0")  # goes on to the next one


def test_a_graph_that_cannot_be_read_is_told_as_an_engines_failure(
    gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tensorrt_cache, "_sha256", refused)
    with pytest.raises(EngineFailed, match=r"spam.* cannot be read \(.*Permission denied\); check its permissions"):
        gpu.open(tiny_bundle)


def test_an_engine_that_the_library_finds_invalid_is_told_by_its_reasons(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    reasons = trt.EngineInvalidityDiagnostics
    gpu.trt.validity = (trt.EngineValidity.INVALID, int(reasons.OLD_CUDA_DRIVER) | int(reasons.UNSUPPORTED_CC))
    with pytest.raises(EngineUnavailable, match=r"does not \(UNSUPPORTED_CC, OLD_CUDA_DRIVER\); update the driver, or run agvas-build"):
        gpu.open(tiny_bundle)


def test_an_engine_that_the_library_finds_slow_is_told_once_and_runs(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    gpu.trt.validity = (trt.EngineValidity.SUBOPTIMAL, int(trt.EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        Segmenter(tiny_bundle, gpu.engine, "cuda:0")
    assert [str(warning.message) for warning in caught] == [
        "tensorrt-rtx finds that engines built for compute capability 8.9 may be slower here than they need be (OLD_CUDA_RUNTIME); "
        f"update the driver, or run agvas-build --bundle {tiny_bundle} --engine tensorrt-rtx --device cuda:0 --rebuild on this GPU"
    ]


@BOTH
def test_a_failure_is_not_told_with_the_reason_of_an_earlier_one_or_of_another_thread(
    gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)

    def refusing(context: object, name: str, shape: object, said: str = "node_7 is odd") -> bool:
        spam._logger.log(trt.ILogger.ERROR, said)
        return False

    with monkeypatch.context() as loud:
        loud.setattr(cuda_double._Context, "set_input_shape", refusing)
        with pytest.raises(EngineFailed, match="was refused: node_7 is odd"):
            spam.run(feeds)

    def silent(context: object, name: str, shape: object) -> bool:
        other = threading.Thread(target=refusing, args=(None, name, shape, "in another thread"))
        other.start()
        other.join()
        return False

    monkeypatch.setattr(cuda_double._Context, "set_input_shape", silent)
    with pytest.raises(EngineFailed, match="was refused: the library gave no reason"):
        spam.run(feeds)


@BOTH
def test_the_files_content_is_let_go_once_the_library_has_the_engine(
    gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as large as the engine: more than a gigabyte of full-size SAM's."""
    gpu.build(tiny_bundle, stages=("spam",))
    events: list[str] = []

    class Content(bytes):
        def __del__(self) -> None:
            events.append("let go")

    def load(*arguments: Any) -> tuple[bytes, Any]:
        content, record = tensorrt_cache.load(*arguments)
        return Content(content), record

    check = TensorRtEngine._check_tensors
    monkeypatch.setattr("engines.tensorrt.load", load)
    monkeypatch.setattr(TensorRtEngine, "_check_tensors", lambda engine: (events.append("checked"), check(engine)))
    gpu.open(tiny_bundle)
    assert events == ["let go", "checked"]


@BOTH
def test_an_engine_that_does_not_load_is_told_with_the_librarys_last_error(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    gpu.trt.deserializes = False
    with pytest.raises(EngineFailed, match="cannot load it: magicTag is odd; run agvas-build .* --rebuild"):
        gpu.open(tiny_bundle)


@BOTH
def test_a_precision_of_another_engine_is_refused(gpu: Gpu, tiny_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="computes what the graph states, not bf16; use precision graph"):
        open_engine(Bundle(tiny_bundle).graph("spam"), SPAM, gpu.engine, EngineOptions("cuda:0", inference_precision="bf16"))


@pytest.mark.parametrize("capability", [None, "8.9"])
def test_a_device_that_is_not_there_is_told(capability: str | None, gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.cuda.capability = capability
    message = "no CUDA GPU here .*; check the driver" if capability is None else "expected cuda:0 to cuda:0"
    with pytest.raises(EngineUnavailable, match=f"device cuda:3: {message}"):
        open_engine(Bundle(tiny_bundle).graph("spam"), SPAM, gpu.engine, EngineOptions("cuda:3"))


@BOTH
def test_a_gpu_that_is_not_there_is_no_machine_without_one(gpu: Gpu, tiny_bundle: Path) -> None:
    """What cannot be asked is told in the driver's words; a number that no GPU has is a mistake."""
    with pytest.raises(EngineUnavailable, match="device cuda:3: expected cuda:0 to cuda:0; choose one of them"):
        gpu.build(tiny_bundle, capabilities=("8.9",), device="cuda:3")
    gpu.cuda.capability = None
    told = r"device cuda:3: no CUDA GPU here \(.*\(cudaErrorNoDevice\)\); check the driver with nvidia-smi"
    with pytest.raises(EngineUnavailable, match=told):
        gpu.build(tiny_bundle, device="cuda:3")
    if gpu.engine == "tensorrt-rtx":
        report = gpu.build(tiny_bundle, capabilities=("8.9",), stages=("spam",), device="cuda:3")
        assert re.fullmatch(f"built, not verified: {told}; run agvas-verify on the device", report["note"]), report["note"]


def test_tensorrt_builds_for_the_gpu_here_alone(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.tensorrt_library.library", lambda name: gpu.trt)
    with pytest.raises(EngineUnavailable, match=r"expected 8.9 \(the one here\), got 8.6; build on that device"):
        build_engines(Bundle(tiny_bundle), BuildSettings("tensorrt", ("8.6",)))


def test_the_double_knows_no_name_that_the_real_packages_lack(gpu: Gpu) -> None:
    for name in dir(CudaDouble):
        assert not name.startswith("_cuda") or hasattr(cudart, name[1:]), name
    with pytest.raises(AttributeError):
        gpu.cuda.cudaDoSomethingElse  # noqa: B018
    with pytest.raises(AssertionError, match="the double has no cudaMemset"):
        gpu.cuda.cudaMemset  # noqa: B018


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_the_double_of_tensorrt_knows_no_name_that_only_rtx_has(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam = gpu.open(tiny_bundle)
    engine, runtime, context = spam._engine, spam._runtime, spam._new_context()
    for name in ("ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "EngineValidity", "IRuntimeCache", "IRuntimeConfig"):
        assert hasattr(trt, name) and not hasattr(gpu.trt, name), name
    for double, of, names in (
        (runtime, trt.Runtime, ("get_engine_validity",)),
        (engine, trt.ICudaEngine, ("create_runtime_config", "create_weights_manager")),
        (context, trt.IExecutionContext, ("is_stream_capturable", "get_runtime_config")),
    ):
        assert all(hasattr(of, name) and not hasattr(double, name) for name in names), names
    for of, names in cuda_double.TENSORRT_NAMES.items():
        assert all(hasattr(trt if of == "module" else getattr(trt, of), name) for name in names), of
