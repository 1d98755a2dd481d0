"""How the builder's process is set: what is asked of the library, with the real one's names, before it is left to build."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_double import CudaDouble

from engines import EngineFailed, tensorrt_builder
from engines.tensorrt_builder import BuildRequest, _clear_tf32, _keep_timings, _made_of, _read_timings, build, check_memory
from engines.tensorrt_library import TENSORRT, TENSORRT_RTX

trt = pytest.importorskip("tensorrt_rtx", reason='its names and types are the double\'s: pip install "agvas[tensorrt-rtx]"')
cudart = pytest.importorskip("cuda.bindings.runtime", reason='pip install "agvas[cuda]"')


class Timings:
    """An ITimingCache of what was read into it and what was measured."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b" measured"


class Config:
    """An IBuilderConfig that records what it is asked for; it has no method that the real one lacks."""

    def __init__(self) -> None:
        self.cleared_flags: list[Any] = []

    def create_timing_cache(self, content: bytes) -> Timings | None:
        return None if content == b"damaged" else Timings(content)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, Timings) and not ignore_mismatch  # the real one takes no None: TypeError
        return cache.content != b"of another GPU"

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, trt.BuilderFlag)
        self.cleared_flags.append(flag)


@pytest.mark.parametrize(("double", "real"), [(Config, trt.IBuilderConfig), (Timings, trt.ITimingCache)])
def test_the_doubles_have_no_method_that_the_real_ones_lack(double: type, real: type) -> None:
    assert [name for name in vars(double) if not name.startswith("_") and not hasattr(real, name)] == []


def test_tf32_is_taken_off_where_a_version_has_it() -> None:
    config = Config()
    _clear_tf32(trt, config)
    assert config.cleared_flags == [trt.BuilderFlag.TF32]
    _clear_tf32(SimpleNamespace(BuilderFlag=SimpleNamespace()), config)
    assert config.cleared_flags == [trt.BuilderFlag.TF32]


def asked(timings: Path, engine: str = TENSORRT) -> BuildRequest:
    return BuildRequest(engine, "g.onnx", "engine", "8.7", {}, timing_cache=str(timings))


@pytest.mark.parametrize(("known", "read"), [(None, b""), (b"known", b"known"), (b"damaged", b""), (b"of another GPU", b"")])
def test_measured_times_are_kept_and_a_file_that_is_refused_is_written_anew(known: bytes | None, read: bytes, tmp_path: Path) -> None:
    request = asked(tmp_path / "timings")
    if known is not None:
        (tmp_path / "timings").write_bytes(known)
    cache = _read_timings(Config(), request)
    assert cache.content == read
    _keep_timings(cache, request)
    assert (tmp_path / "timings").read_bytes() == read + b" measured"
    assert [path.name for path in tmp_path.iterdir()] == ["timings"]


def test_times_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timings").write_bytes(b"known")

    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    _keep_timings(Timings(b""), asked(tmp_path / "timings"))  # the engine is built all the same
    assert (tmp_path / "timings").read_bytes() == b"known"


def test_tensorrt_for_rtx_measures_nothing(tmp_path: Path) -> None:
    assert _read_timings(Config(), asked(tmp_path / "timings", TENSORRT_RTX)) is None
    _keep_timings(None, asked(tmp_path / "timings", TENSORRT_RTX))
    assert not list(tmp_path.iterdir())


def test_a_build_that_is_broken_off_ends_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = '{"phase": "at work", "step": 0, "steps": 1}'
    noted = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    code = f"import os, time; {noted}; print({told!r}, flush=True); time.sleep(30)"
    monkeypatch.setattr(tensorrt_builder, "CHILD", (sys.executable, "-c", code))

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(asked(tmp_path / "timings"), tmp_path / "log", interrupt)
    assert time.monotonic() - began < 20, "it was waited for"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_child_that_dies_before_it_has_heard_what_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "CHILD", ("false",))
    inputs = {f"x{index}": ((1, 8), (1, 8), (4, 8)) for index in range(10_000)}  # more than a pipe holds
    with pytest.raises(EngineFailed, match="ended with exit code 1 and said nothing; the builder's log is"):
        build(BuildRequest(TENSORRT, "g.onnx", "engine", "8.7", inputs), tmp_path / "log")


@pytest.mark.parametrize(
    "words",
    [
        "ERROR: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "error: EngineFailed: CUDA: out of memory (cudaErrorMemoryAllocation)",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "error: MemoryError: ",
    ],
)
def test_a_lack_of_memory_is_told_as_one_whoever_had_none(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys; print({words!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(tensorrt_builder, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(EngineFailed, match="out of memory.*; end other programs, give a smaller --workspace or --max-batch, or build else"):
        build(asked(tmp_path / "timings"), tmp_path / "log")
    assert words in (tmp_path / "log").read_text()


# Memory of the GPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    double = CudaDouble(cudart, memory=50 << 20)
    double.second = "8.9"
    monkeypatch.setattr("engines.cuda.runtime", lambda: double)
    return double


def of_40_mb(folder: Path, engine: str = TENSORRT, **settings: Any) -> BuildRequest:
    (folder / "g.onnx").write_bytes(b"graph")
    with open(folder / "g.data", "wb") as file:
        file.truncate(40 << 20)
    return BuildRequest(engine, str(folder / "g.onnx"), str(folder / "engine"), "8.9", {}, device=1, **settings)


def test_tensorrt_is_refused_a_gpu_that_has_no_room_for_the_weights(cuda: CudaDouble, tmp_path: Path) -> None:
    request = of_40_mb(tmp_path)
    check_memory(request)
    assert cuda.selected == 1, "the one that it builds on was asked"
    cuda.cudaMalloc(12 << 20)  # another program's
    message = r"building g.onnx takes more than 40 MiB of memory on GPU 1, .* 38 MiB are free there; .*nvidia-smi.* larger GPU, .*--force"
    with pytest.raises(EngineFailed, match=message):
        check_memory(request)


def test_memory_that_is_the_hosts_is_judged_as_the_hosts(cuda: CudaDouble, tmp_path: Path) -> None:
    """A Jetson's CUDA counts the bundle's files, just read to check them, as used."""
    cuda.memory, cuda.integrated = 30 << 20, True
    check_memory(of_40_mb(tmp_path))


def test_tensorrt_for_rtx_builds_on_no_gpu_and_asks_none(cuda: CudaDouble, tmp_path: Path) -> None:
    cuda.memory = 0
    check_memory(of_40_mb(tmp_path, TENSORRT_RTX))
    assert not cuda.calls


def test_the_gpu_is_asked_before_the_builder_is_begun_and_not_with_force(
    cuda: CudaDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.memory, begun = 30 << 20, list[BuildRequest]()

    def build(request: BuildRequest) -> None:
        begun.append(request)
        raise EngineFailed("that is far enough")

    monkeypatch.setattr(tensorrt_builder, "_build", build)
    for force, told in ((False, "more than 40 MiB of memory on GPU 1"), (True, "far enough")):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(of_40_mb(tmp_path, force=force)))))
        assert tensorrt_builder.main() == 1 and told in capsys.readouterr().err
        assert len(begun) == force


FUSED = "Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [ { Datatype: Int4 } ], Metadata: [ONNX Layer: softmax_1]"
OTHER = "Name: __myl_Fc_myl0_0, LayerType: kgen, Inputs: [ { Datatype: Float } ]"
FOREIGN = "Layer(Myelin): {ForeignNode[node_MatMul_3...node_Softmax_90]}, Tactic: 0x0000000000000000, x (Float[1,8]) -> y (Float[1,8])"


@pytest.mark.parametrize(
    ("layers", "fused", "unfused", "int4"),
    [
        ([FUSED, OTHER], 1, ("softmax_2",), 1),
        ([OTHER], 0, ("softmax_1", "softmax_2"), 0),
        ([FOREIGN, OTHER], None, (), None),  # as TensorRT 10 lists layers: written after its documentation
        ([FUSED, FOREIGN], None, (), None),
        ([FUSED, FUSED.replace("softmax_1", "softmax_2"), FOREIGN], 2, (), None),
        ([], None, (), None),
    ],
)
def test_what_layers_hide_is_unknown_and_not_none(layers: list[str], fused: int | None, unfused: tuple[str, ...], int4: int | None) -> None:
    told = _made_of(["softmax_1", "softmax_2"], layers)
    assert told == {"attention_fused": fused, "unfused": unfused, "int4_layers": int4}
