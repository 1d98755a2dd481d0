"""A result of agvas-bench as a file: what a reader may rely on is checked when it is read, so that no reader stumbles later.

Results of earlier versions lack what came later (ceilings, other work, the commit); readers take those as not told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

REPORTED = ("ratios", "ratio_spreads", "reference", "model", "pictures", "effort", "power")
REPORTED_ENVIRONMENT = ("processor", "threads", "gpu", "power_mode", "load_average")
REPORTED_RUN = (
    *("p50_ms", "p90_ms", "p99_ms", "max_ms", "stages_ms", "gap_ms", "queries", "stream_fps", "load_ms", "first_result_ms"),
    *("disk_ms", "decode_ms", "peak_rss_bytes", "device_memory_bytes", "bytes", "engine", "precision", "mask_iou_mean", "flips", "judged"),
)


def read_result(path: Path) -> dict[str, Any]:
    """What `agvas-bench --json` wrote, raw samples or not.

    Raises:
        RequestError: it cannot be read, or is none; names what is wrong.
    """
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise RequestError(f"{path}: expected what agvas-bench --json wrote, got {error.strerror}; check the path") from error
    except ValueError as error:
        raise RequestError(f"{path}: expected what agvas-bench --json wrote, got {error}; measure again") from error
    if not isinstance(told, dict) or not all(isinstance(told.get(name), dict) for name in ("runs", "environment")):
        raise RequestError(f"{path}: expected what agvas-bench --json wrote, got other JSON; measure again")
    if not told["runs"] or not all(isinstance(run, dict) for run in told["runs"].values()):
        raise RequestError(f"{path}: expected runs by name, got {told['runs'] or 'none'}; measure again")
    return told


def check_samples(name: str, run: Mapping[str, Any]) -> None:
    """Raises RequestError where a run has no raw samples, or not the same number of each stage, or such as are no times."""
    samples = run.get("samples")
    if not isinstance(samples, Mapping) or not samples.get("ms"):
        raise RequestError(f"run {name}: expected raw samples in the file, got none; give what agvas-bench --json FILE wrote")
    if not isinstance(samples.get("stages_ms"), Mapping):
        raise RequestError(f"run {name}: expected raw samples by stage (samples.stages_ms), got none; measure again")
    for label, values in {"ms": samples["ms"], **samples["stages_ms"]}.items():
        if not isinstance(values, list) or len(values) != len(samples["ms"]):
            count = len(values) if isinstance(values, list) else type(values).__name__
            raise RequestError(f"run {name}: expected {len(samples['ms'])} samples of {label}, got {count}; measure again")
        wrong = [value for value in values if not _is_time(value)]
        if wrong or (label == "ms" and not min(values) > 0):
            raise RequestError(f"run {name}: expected milliseconds of {label}, got {(wrong or [0])[0]}; measure again")


def check_run(result: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's own run, "ours": its median, stages and precision are there.

    Raises:
        RequestError: it is not, or they are not.
    """
    run = dict(result["runs"].get("ours", {}))
    stages = run.get("stages_ms")
    whole = isinstance(stages, dict) and all(_is_time(value) for value in (run.get("p50_ms"), *stages.values()))
    if not whole or not isinstance(run.get("precision"), str):
        got = ", ".join(run) or f"none among {', '.join(result['runs'])}"
        raise RequestError(f"run ours: expected p50_ms, stages_ms and precision as --json writes them, got {got}; measure again")
    return run


def check_report(result: Mapping[str, Any]) -> None:
    """Raises RequestError where a result lacks what a report shows, and names it."""
    check_run(result)
    missing = [name for name in REPORTED if name not in result]
    missing += [f"environment.{name}" for name in REPORTED_ENVIRONMENT if name not in result["environment"]]
    for name, run in result["runs"].items():
        missing += [f"runs.{name}.{key}" for key in REPORTED_RUN if key not in run]
    if missing:
        raise RequestError(f"expected a whole result, which has {', '.join(missing[:6])}; give what agvas-bench --json FILE wrote")
    for name, run in result["runs"].items():
        check_samples(name, run)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
