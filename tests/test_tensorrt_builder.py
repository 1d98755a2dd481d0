"""How the builder's process is set: what is asked of the library, with the real one's names, before it is left to build."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines.tensorrt_builder import _clear_tf32

trt = pytest.importorskip("tensorrt_rtx", reason='its names and types are the double\'s: pip install "agvas[tensorrt-rtx]"')


class Config:
    """An IBuilderConfig that records what it is asked for; it has no method that the real one lacks."""

    def __init__(self) -> None:
        self.cleared_flags: list[Any] = []

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, trt.BuilderFlag)
        self.cleared_flags.append(flag)


def test_the_double_has_no_method_that_the_real_config_lacks() -> None:
    assert [name for name in vars(Config) if not name.startswith("_") and not hasattr(trt.IBuilderConfig, name)] == []


def test_tf32_is_taken_off_where_a_version_has_it() -> None:
    config = Config()
    _clear_tf32(trt, config)
    assert config.cleared_flags == [trt.BuilderFlag.TF32]
    _clear_tf32(SimpleNamespace(BuilderFlag=SimpleNamespace()), config)
    assert config.cleared_flags == [trt.BuilderFlag.TF32]
