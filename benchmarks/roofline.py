"""Planning: the least time each stage can take on a device, from its arithmetic and memory traffic, and how far a run is from it.

A floor is max(FLOP / peak, bytes / bandwidth) of each stage, summed: nothing computes faster than its peak nor reads weights faster than
its memory. Real kernels reach a part of both, so a floor orders devices and precisions; it promises no latency. For this machine
peak and bandwidth are measured; for others they are the vendor's dense peaks. Figures of a run come from its JSON alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.work import StageWork, stage_work

__all__ = ["DEVICES", "Device", "floor_ms", "measure_here", "roofline", "table"]


@dataclass(frozen=True)
class Device:
    """A device's dense peaks.

    Attributes:
        flops: FLOP/s by precision.
        bandwidth: of its memory, byte/s.
        source: where the numbers come from.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    source: str


def _tensor_cores(multiprocessors: int, products: int, gigahertz: float) -> float:
    """FLOP/s in 16 bit: multiprocessors × multiplications and additions of each in a clock × 2 × boost clock."""
    return multiprocessors * products * 2 * gigahertz * 1e9


def _device(name: str, sixteen: float, eight: str, bandwidth: float, source: str) -> Device:
    """8 bit is twice as fast as 16 on all of these; INT4 weights are multiplied in 16 bit."""
    return Device(name, {"bf16": sixteen, eight: 2 * sixteen, "int4": sixteen}, bandwidth, source)


DEVICES = (
    _device("H100 SXM", 989.4e12, "fp8", 3.35e12, "NVIDIA H100 datasheet: 1,979 TFLOPS BF16 with sparsity, half of it dense; 3.35 TB/s"),
    _device(
        "RTX 4000 Ada",
        _tensor_cores(48, 512, 2.175),
        "fp8",
        360e9,
        "NVIDIA RTX 4000 Ada datasheet: 192 tensor cores (48 SMs), 26.7 TFLOPS fp32 at 2.175 GHz, 360 GB/s; 512 per SM: Ada whitepaper",
    ),
    _device(
        "RTX A2000",
        _tensor_cores(26, 512, 1.2),
        "int8",
        288e9,
        "NVIDIA RTX A2000 datasheet: 63.9 TFLOPS with sparsity, half of it dense (104 tensor cores, 26 SMs, 1.2 GHz); 288 GB/s",
    ),
    _device(
        "Jetson AGX Orin 64GB",
        _tensor_cores(16, 1024, 1.3),
        "int8",
        204.8e9,
        "NVIDIA Jetson AGX Orin technical brief: GPU 170 INT8 TOPS with sparsity, 85 dense, at 1.3 GHz; 204.8 GB/s; no DLAs",
    ),
    _device(
        "Jetson Orin NX 16GB",
        _tensor_cores(8, 1024, 0.918),
        "int8",
        102.4e9,
        "NVIDIA Jetson Orin NX data sheet: GPU 60 INT8 TOPS with sparsity, 30 dense, at 918 MHz; 102.4 GB/s; no DLAs",
    ),
    _device(
        "Jetson Thor T5000",
        2070e12 / 8,
        "fp8",
        273e9,
        "NVIDIA Jetson Thor data sheet: 2,070 TFLOPS FP4 with sparsity; halved for dense, for FP8 and for 16 bit; 273 GB/s",
    ),
)


def floor_ms(work: StageWork, device: Device, precision: str) -> float | None:
    """Least milliseconds of a stage; None where the device's peak in that precision is not known. FP8 weights are as large as INT8's."""
    peak = device.flops.get(precision)
    if peak is None:
        return None
    stored = "int8" if precision == "fp8" else precision
    return max(work.flops / peak, work.bytes(stored) / device.bandwidth) * 1e3


def measure_here(threads: int = 0, seconds: float = 1.0) -> Device:
    """This machine's processor: the best rate of a square matrix product in fp32 (NumPy), in fp32 and bf16 (OpenVINO, where it is
    installed and the processor multiplies in bf16), and of copying a large array.

    Args:
        threads: of OpenVINO's products; 0 leaves it to the library. NumPy's are its own to choose (OMP_NUM_THREADS).
        seconds: for each measurement.
    """
    side = 1536
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = np.empty_like(a)
    flops = 2.0 * side**3
    rates = {"fp32": flops / _best_seconds(lambda: np.matmul(a, b, out=out), seconds)}
    sources = ["NumPy"]
    for precision, run in _openvino_products(a, b, threads).items():
        rates[precision] = max(rates.get(precision, 0.0), flops / _best_seconds(run, seconds))
        sources = ["NumPy", "OpenVINO"]
    source = np.zeros(1 << 28, np.uint8)  # 256 MiB: beyond any cache
    target = np.empty_like(source)
    copied = 2 * source.nbytes / _best_seconds(lambda: np.copyto(target, source), seconds)
    by = f"{', '.join(sources)}; {threads or os.cpu_count()} threads"
    said = f"measured here: products of {side} × {side} ({by}), copying 256 MiB on one thread"
    return Device("this machine", rates, copied, said)


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
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        request = core.compile_model(openvino.Model([product], [parameter], "product"), "CPU", settings).create_infer_request()
        found[precision] = _one_run(request, a)
    return found


def _one_run(request: Any, a: np.ndarray) -> Callable[[], Any]:
    return lambda: request.infer({0: a}, share_inputs=True)


def roofline(config: Any, here: Device, run: Mapping[str, Any] | None = None, text_tokens: int | None = None) -> dict[str, Any]:
    """Work and floors of every stage on this machine and on DEVICES.

    Args:
        config: AGVASConfig.
        run: one entry of agvas-bench's "runs" and its "precision", to compare its stages with this machine's floor.
        text_tokens: tokens of prompt, instruction and draft; None takes the paper's.

    Returns:
        "stages": by stage flops, weights and bytes in bf16; "devices": by name, precision and stage the floor in milliseconds, and its sum;
        "measured": by stage milliseconds, floor and their ratio, where a run was given.
    """
    works = stage_work(config) if text_tokens is None else stage_work(config, text_tokens)
    devices: dict[str, Any] = {}
    for device in (here, *DEVICES):
        floors = {}
        for precision in device.flops:
            by_stage = {name: floor_ms(work, device, precision) for name, work in works.items()}
            floors[precision] = {"stages_ms": by_stage, "total_ms": sum(value for value in by_stage.values() if value is not None)}
        peaks = {"bytes_per_second": device.bandwidth, "flops": dict(device.flops)}
        devices[device.name] = {"floors": floors, "source": device.source, **peaks}
    result: dict[str, Any] = {
        "model": config.name,
        "stages": {
            name: {"flops": work.flops, "parameters": work.parameters, "bytes_bf16": work.bytes("bf16")} for name, work in works.items()
        },
        "devices": devices,
    }
    if run is not None:
        precision = str(run.get("precision", "fp32"))
        if precision not in here.flops:
            precision = "fp32"
        floors = devices[here.name]["floors"][precision]["stages_ms"]
        told = {name: ms for name, ms in run["stages_ms"].items() if name in floors}
        stages = {name: {"ms": ms, "floor_ms": floors[name], "times": ms / floors[name]} for name, ms in told.items()}
        total = sum(floors.values())
        result["measured"] = {
            "precision": precision,
            "stages": stages,
            "total": {"ms": run["p50_ms"], "floor_ms": total, "times": run["p50_ms"] / total},
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    stages = result["stages"]
    lines = [
        f"Work of one picture, {result['model']}, direct mode in one pass:",
        "",
        "| stage | GFLOP | weights, M | MB read and passed (bf16) |",
        "| --- | --- | --- | --- |",
    ]
    for name, stage in stages.items():
        lines.append(f"| {name} | {stage['flops'] / 1e9:.3g} | {stage['parameters'] / 1e6:.3g} | {stage['bytes_bf16'] / 1e6:.3g} |")
    total = {key: sum(stage[key] for stage in stages.values()) for key in ("flops", "parameters", "bytes_bf16")}
    lines.append(f"| total | {total['flops'] / 1e9:.4g} | {total['parameters'] / 1e6:.4g} | {total['bytes_bf16'] / 1e6:.4g} |")
    lines += [
        "",
        "Floors in ms (the larger of FLOP / peak and bytes / bandwidth, by stage; no kernel reaches its peak throughout):",
        "",
        f"| device | precision | {' | '.join(stages)} | total |",
        f"| --- | --- | {' | '.join('---' for _ in stages)} | --- |",
    ]
    for device, told in result["devices"].items():
        for precision, floors in told["floors"].items():
            cells = " | ".join(f"{value:.3g}" for value in floors["stages_ms"].values())
            lines.append(f"| {device} | {precision} | {cells} | {floors['total_ms']:.3g} |")
    lines += ["", *(f"- {device}: {told['source']}" for device, told in result["devices"].items())]
    if measured := result.get("measured"):
        lines += [
            "",
            f"The measured run against this machine's floor in {measured['precision']}:",
            "",
            "| stage | ms | floor, ms | times |",
            "| --- | --- | --- | --- |",
        ]
        for name, row in {**measured["stages"], "total": measured["total"]}.items():
            lines.append(f"| {name} | {row['ms']:.3g} | {row['floor_ms']:.3g} | {row['times']:.1f} |")
    return "\n".join(lines)
