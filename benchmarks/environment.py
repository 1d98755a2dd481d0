"""What a measurement ran on: this package's commit, processor, memory and library versions, for every result file.

No host names, no paths.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("agvas", "torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy", "pillow", "tokenizers", "opencv-python-headless")
ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"  # commit of what is no checkout: an installed package
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "nvidia-ml-py")  # told where they are installed


def versions() -> dict[str, Any]:
    """Python and the packages that numbers may depend on; None where one is not installed."""
    return {"python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES}}


def environment(threads: int | None = None, bundle: str | None = None) -> dict[str, Any]:
    """Facts that a reader needs to repeat a measurement.

    Args:
        threads: CPU threads that were asked for, where the measurement has such a thing.
        bundle: sha256 of the manifest of the bundle that was measured.
    """
    told: dict[str, Any] = {} if threads is None else {"threads": threads}
    if bundle is not None:
        told["bundle"] = bundle
    packages = {name: found for name in GPU_PACKAGES if (found := _version(name)) is not None}
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        **revision(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
        "gpu": _gpus(),
        "gpu_packages": packages,
        "power_mode": _power_mode(),
        "load_average": None if load is None else [round(value, 2) for value in load],
        **told,
        "threads_variable": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def revision(root: Path = ROOT) -> dict[str, Any]:
    """{"commit", "dirty"}: of the checkout that `root` is, and whether tracked files differ from it; UNKNOWN and None where it is none."""
    unknown: dict[str, Any] = {"commit": UNKNOWN, "dirty": None}
    # A package that is installed inside another project's checkout is not of its commit.
    if not (root / ".git").exists() or not shutil.which("git"):
        return unknown
    try:
        commit, changed = (_git(root, *asked) for asked in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": commit, "dirty": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def processor() -> str:
    """Its name, family and model, and the extensions that products are fast with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    wanted = {"model name": "", "cpu family": "family ", "model": "model "}
    found = [f"{label}{fields[name]}" for name, label in wanted.items() if fields.get(name)]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return " ".join([*found, *extra])


def _gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU that nvidia-smi lists; none where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(asked, (cell.strip() for cell in line.split(",")))) for line in listed.splitlines() if line.strip()]


def _power_mode() -> str | None:
    """A Jetson's nvpmodel, or the processor's frequency governor; None where neither tells."""
    if shutil.which("nvpmodel"):
        try:
            told = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            told = ""
        if lines := [line for line in told.splitlines() if line.startswith("NV Power Mode")]:
            return lines[0]
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
