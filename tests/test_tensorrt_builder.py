"""How the builder's process is set: what is asked of the library, with the real one's names, before it is left to build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.tensorrt_builder import BuildRequest, _clear_tf32, _keep_timings, _made_of, _read_timings
from engines.tensorrt_library import TENSORRT, TENSORRT_RTX

trt = pytest.importorskip("tensorrt_rtx", reason='its names and types are the double\'s: pip install "agvas[tensorrt-rtx]"')


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
