"""What samples of time say: percentiles, ratios of pairs, late frames, and whether one run is slower than another.

Latencies of a busy machine are skewed and neighbours resemble each other, so nothing here supposes a normal distribution or
independence: intervals come from a bootstrap over blocks of neighbouring samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

BLOCK = 16  # neighbouring samples that are drawn together
DRAWS = 1000
LEVEL = 0.99  # of the interval that decides
NOTICEABLE = 0.005  # of a picture's time: a stage that lost less is told, but fails nothing


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """{"p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms"}."""
    values = np.asarray(samples, float)
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    named = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": values.max(), "mean_ms": values.mean()}
    return {name: round(float(value), 4) for name, value in named.items()}


def paired_ratio(against: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median of against / ours pair by pair, its 99 % interval, and the pairs' own spread (10th and 90th percentile)."""
    ratios = np.asarray(against, float) / np.asarray(ours, float)
    medians = np.sort(np.median(_blocks(ratios, np.random.default_rng(0)), axis=1))
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    p10, p90 = np.quantile(ratios, (0.1, 0.9))
    named = {"median": np.median(ratios), "low": low, "high": high, "p10": p10, "p90": p90}
    return {name: round(float(value), 4) for name, value in named.items()}


def deadline(samples: Sequence[float], fps: float) -> dict[str, float]:
    """Late frames at a line's pace: those that take longer than a period alone, and those that are late when they queue.

    In the queue, frame k arrives at k periods, waits for the frame before it, and is late when its result comes more than one period after
    its arrival. Computed from the closed loop's latencies, so the camera's own jitter is not in it.
    """
    period = 1e3 / fps
    late = finished = 0.0
    for index, spent in enumerate(samples):
        arrival = index * period
        finished = max(arrival, finished) + spent
        late += finished - arrival > period
    alone = sum(spent > period for spent in samples)
    return {"fps": fps, "period_ms": period, "missed_alone": alone / len(samples), "missed_in_queue": late / len(samples)}


def slower(before: Sequence[float], after: Sequence[float], threshold: float) -> dict[str, Any]:
    """Whether `after` takes longer than `before` by more than `threshold` (1.05: 5 %).

    Returns:
        "ratio" of the medians, its interval "low".."high", and "slower": the ratio is beyond the threshold and even the interval's lower
        end says that it was no chance (is above 1).
    """
    rng = np.random.default_rng(0)
    first, second = (np.median(_blocks(np.asarray(samples, float), rng), axis=1) for samples in (before, after))
    low, high = np.quantile(second / first, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    ratio = float(np.median(after) / np.median(before))
    verdict = bool(ratio > threshold and low > 1)
    return {"ratio": round(ratio, 4), "low": round(float(low), 4), "high": round(float(high), 4), "slower": verdict}


def compare(a: Mapping[str, Any], b: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """What got slower from result `a` to result `b` of agvas-bench, run by run and stage by stage.

    A stage counts as slower only where it lost more than NOTICEABLE of the picture's whole time.

    Returns:
        "runs": by name {"total", "stages"} as `slower` says, "slower": names of what is, "other_machine": facts in which the
        environments differ.

    Raises:
        ValueError: they have no run in common, or one lacks raw samples.
    """
    names = [name for name in a["runs"] if name in b["runs"]]
    if not names:
        raise ValueError(f"expected a run in common, got {', '.join(a['runs'])} and {', '.join(b['runs'])}; measure the same candidates")
    runs: dict[str, Any] = {}
    found: list[str] = []
    for name in names:
        samples = [result["runs"][name].get("samples") for result in (a, b)]
        if not all(samples):
            raise ValueError(f"run {name}: expected raw samples in both files, got none; give what --json FILE wrote")
        first, second = samples
        total = slower(first["ms"], second["ms"], threshold)
        whole = float(np.median(first["ms"]))
        stages = {}
        for stage in first["stages_ms"]:
            if stage not in second["stages_ms"]:
                continue
            before, after = first["stages_ms"][stage], second["stages_ms"][stage]
            judged = slower(before, after, threshold)
            judged["lost_ms"] = round(float(np.median(after) - np.median(before)), 4)
            judged["slower"] = judged["slower"] and judged["lost_ms"] > NOTICEABLE * whole
            stages[stage] = judged
        runs[name] = {"total": total, "stages": stages}
        found += [name] if total["slower"] else []
        found += [f"{name}/{stage}" for stage, judged in stages.items() if judged["slower"]]
    facts = ("processor", "cpus", "gpu", "threads", "power_mode", "packages", "bundle")
    other = [fact for fact in facts if a["environment"].get(fact) != b["environment"].get(fact)]
    return {"threshold": threshold, "runs": runs, "slower": found, "other_machine": other}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| run | stage | B / A | 99 % interval | verdict |", "| --- | --- | --- | --- | --- |"]
    for name, run in comparison["runs"].items():
        for stage, judged in {"total": run["total"], **run["stages"]}.items():
            verdict = "SLOWER" if judged["slower"] else "faster" if judged["high"] < 1 else ""
            lines.append(f"| {name} | {stage} | {judged['ratio']:.3f} | {judged['low']:.3f} .. {judged['high']:.3f} | {verdict} |")
    if comparison["other_machine"]:
        lines += ["", f"Not the same conditions: {', '.join(comparison['other_machine'])} differ; a ratio then tells of them, too."]
    return "\n".join(lines)


def _blocks(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[DRAWS, N] resamples of values [N], in blocks of neighbours that wrap around the end."""
    count = len(values)
    size = max(1, min(BLOCK, count // 8))
    starts = rng.integers(0, count, (DRAWS, -(-count // size)))
    index = (starts[:, :, None] + np.arange(size)) % count
    return values[index.reshape(DRAWS, -1)[:, :count]]


# What a caller shows while work goes on: label, done, total.
Show = Callable[[str, int, int], None]
