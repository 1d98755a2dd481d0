"""What a measurement ran on: processor, memory and library versions, for every result file. No host names, no paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("agvas", "torch", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt-rtx"),
    *("numpy", "pillow", "tokenizers", "opencv-python-headless"),
)


def versions() -> dict[str, Any]:
    """Python and the packages that numbers may depend on; None where one is not installed."""
    return {"python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES}}


def environment() -> dict[str, Any]:
    """Facts that a reader needs to repeat a measurement."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
        "threads_variable": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "cpu family", "model\t")
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith(wanted)][:3]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return " ".join([*found, *extra])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
