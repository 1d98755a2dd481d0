"""What this machine's processor does at best: rates of matrix products by precision, and of copying memory.

    python -m benchmarks.ceilings --threads 2

In a process of its own (`ceilings`), so that its libraries take the threads that they are told and its arrays count into nobody's memory.
The best of several runs is taken; on a machine that is busy throughout even that is too low, and so what others took is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.other_work import counted, other_work
from engines import EngineFailed

SIDE = 1536  # of the square matrices
COPIED = 1 << 28  # bytes, 256 MiB: beyond any cache


def ceilings(threads: int, seconds: float = 1.0) -> dict[str, Any]:
    """Measured in a new process: {"flops": FLOP/s by precision, "bandwidth": byte/s, "source": in words, "other_work": see
    other_work.py}.

    Args:
        threads: of products and copies, as the run has them that is to be compared.
        seconds: for each of the measurements, at least three runs each.

    Raises:
        EngineFailed: the process failed.
    """
    # NumPy reads its threads when it is loaded.
    told = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.ceilings", "--threads", str(threads), "--seconds", str(seconds)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=told)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineFailed(f"measuring the machine's ceilings failed: {last}")
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """As `ceilings` says, in this process: NumPy's product in fp32, OpenVINO's in fp32 and, where the processor multiplies in it, bf16."""
    before = counted(())
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((SIDE, SIDE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    flops = 2.0 * SIDE**3
    rates = {"fp32": flops / _best_seconds(lambda: np.matmul(a, b, out=out), seconds)}
    libraries = ["NumPy"]
    for precision, run in _openvino_products(a, b, threads).items():
        rates[precision] = max(rates.get(precision, 0.0), flops / _best_seconds(run, seconds))
        libraries = ["NumPy", "OpenVINO"]
    said = f"products of {SIDE} × {SIDE} ({', '.join(libraries)}) and copies of {COPIED >> 20} MiB, {threads} threads"
    bandwidth = 2 * COPIED / _best_seconds(_copying(threads), seconds)
    return {"flops": rates, "bandwidth": bandwidth, "source": said, "other_work": other_work(before, counted(()))}


def _copying(threads: int) -> Callable[[], Any]:
    """A copy of COPIED bytes, a part of it in each thread: NumPy lets go of the interpreter while it copies."""
    source, target = (np.zeros(COPIED, np.uint8) for _ in range(2))
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads)))
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts))


def _best_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of at least three runs: what the machine can do, not what it did while others used it."""
    run()
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        runs += 1
    return best


def _openvino_products(a: np.ndarray, b: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    """The product in each precision that OpenVINO has on this processor; none where it is not installed."""
    try:
        import openvino
        from openvino import opset13
    except ImportError:
        return {}
    core = openvino.Core()
    hints = {"fp32": "f32"}
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hints["bf16"] = "bf16"
    found = {}
    for precision, hint in hints.items():
        parameter = opset13.parameter(a.shape, openvino.Type.f32)
        product = opset13.matmul(parameter, opset13.constant(b), False, False)  # weights are constants, packed beforehand
        settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        request = core.compile_model(openvino.Model([product], [parameter], "product"), "CPU", settings).create_infer_request()
        found[precision] = _one_run(request, a)
    return found


def _one_run(request: Any, a: np.ndarray) -> Callable[[], Any]:
    return lambda: request.infer({0: a}, share_inputs=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of products and copies (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.threads, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
