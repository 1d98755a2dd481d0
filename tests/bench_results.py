"""Results of agvas-bench that are made up: as little as a comparison reads, or whole ones for reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.bench_statistics import percentiles

STAGE_SHARES = {"preprocess": 0.1, "pixel_encoder": 0.6, "language": 0.2}


def samples(seed: int, median: float, count: int = 400) -> list[float]:
    """Skewed, with drifts, as latencies are."""
    rng = np.random.default_rng(seed)
    drift = 1 + 0.05 * np.sin(np.arange(count) / 25)
    return list(median * drift * (1 + rng.gamma(1.0, 0.03, count)))


def run_of(ms: list[float], stages: dict[str, list[float]] | None = None) -> dict[str, Any]:
    return {"samples": {"ms": ms, "stages_ms": stages or {}}}


def result_of(**runs: dict[str, Any]) -> dict[str, Any]:
    return {"runs": runs, "environment": {"processor": "one", "threads": 2}}


def whole_run(seed: int, median: float, **changes: Any) -> dict[str, Any]:
    ms = samples(seed, median, 200)
    stages = {name: [share * value for value in ms] for name, share in STAGE_SHARES.items()}
    return {
        **percentiles(ms),
        "stages_ms": {name: float(np.median(values)) for name, values in stages.items()},
        "gap_ms": 0.1 * median,
        "queries": len(ms),
        "peak_rss_bytes": 300_000_000,
        "device_memory_bytes": None,
        "bytes": 46_000_000,
        "load_ms": 800.0,
        "first_result_ms": 1000.0,
        "disk_ms": 0.1,
        "decode_ms": 5.0,
        "stream_fps": None,
        "engine": "onnxruntime",
        "inference_precision": "graph",
        "precision": "fp32",
        "lmm": "float",
        "device": "cpu",
        "mask_iou_mean": 0.999,
        "mask_iou_min": 0.99,
        "flips": 0,
        "judged": 64,
        "samples": {"ms": ms, "stages_ms": stages},
    } | changes


def whole_result(**runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "runs": runs,
        "ratios": {},
        "ratio_spreads": {},
        "reference": "torch",
        "model": "nano",
        "pictures": {"source": "procedural", "count": 64, "sizes": [[480, 640]]},
        "effort": {"warmups": 50, "queries": 1024, "seconds": 60.0, "pictures": 64, "frames": 512},
        "power": {"power_watts": None, "clock_mhz": None, "reason": "nothing tells"},
        "full": True,
        "environment": {"processor": "one", "threads": 2, "gpu": [], "power_mode": None, "load_average": [0.1, 0.1, 0.1]},
    }
