"""What samples of time say: percentiles, ratios of pairs, late frames, and whether one result is worse than another.

Latencies of a busy machine are skewed and neighbours resemble each other, so nothing here supposes a normal distribution or
independence: intervals come from a bootstrap over blocks of neighbouring samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.bench_result import check_samples
from runtime.errors import RequestError

BLOCK = 16  # neighbouring samples that are drawn together
DRAWS = 1000
LEVEL = 0.99  # of the interval that decides
NOTICEABLE = 0.005  # of a picture's time: a stage that lost less is told, but fails nothing
MOST = 10.0  # a threshold that lets pass what is ten times slower compares nothing
# Masks of one bundle differ by 1e-5 in mean IoU between processors and by 5e-4 between fp32 and fp16; one small mask moves the least more.
MASK_LOSS = {"mask_iou_mean": 0.002, "mask_iou_min": 0.02}
MEMORY = 1.1  # peaks of one candidate differ by 1 or 2 % from run to run
MACHINE = ("processor", "cpus", "gpu", "threads", "power_mode", "packages", "bundle")  # not the commit: it is what is being compared
MEASURED = ("model", "pictures", "effort", "reference")
RUN_FACTS = ("engine", "precision", "inference_precision", "lmm", "device")


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
    """What got worse from result `a` to result `b` of agvas-bench, run by run: times by stage, masks, memory, and what is gone.

    A stage counts as slower, and its loss as one, only where that is more than NOTICEABLE of the picture's whole time.

    Returns:
        "runs": by name {"total", "stages"} as `slower` says; "slower": names of what is; "worse": what else got worse, in words, either of
        them a reason to fail; "other_machine": facts in which the environments differ, "other_conditions": other facts by name, [a, b].

    Raises:
        RequestError: the threshold is none, they have no run in common, or one lacks raw samples.
    """
    if not 1 <= threshold <= MOST:  # nan is neither
        raise RequestError(f"--threshold: expected a ratio from 1 to {MOST:g} (1.05: 5 % slower), got {threshold:g}; 1.05 is the default")
    names = [name for name in a["runs"] if name in b["runs"]]
    if not names:
        raise RequestError(f"expected a run in common, got {', '.join(a['runs'])} and {', '.join(b['runs'])}; measure the same candidates")
    runs: dict[str, Any] = {}
    found: list[str] = []
    worse = [f"{name}: not measured any more" for name in a["runs"] if name not in b["runs"]]
    for name in names:
        before, after = a["runs"][name], b["runs"][name]
        check_samples(name, before)
        check_samples(name, after)
        runs[name] = _compared_times(before["samples"], after["samples"], threshold)
        found += [name] if runs[name]["total"]["slower"] else []
        found += [f"{name}/{stage}" for stage, judged in runs[name]["stages"].items() if judged["slower"]]
        worse += [f"{name}: {text}" for text in (*_gone(before["samples"], after["samples"]), *_worse_masks(before, after))]
        worse += [f"{name}: {text}" for text in _more_memory(before, after)]
    other = [fact for fact in MACHINE if _told(fact, a["environment"]) != _told(fact, b["environment"])]
    conditions = _other_conditions(a, b, names)
    return {
        "threshold": threshold,
        "runs": runs,
        "slower": found,
        "worse": worse,
        "other_machine": other,
        "other_conditions": conditions,
    }


def _compared_times(first: Mapping[str, Any], second: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    whole = float(np.median(first["ms"]))
    stages = {}
    for stage in first["stages_ms"]:
        if stage not in second["stages_ms"]:
            continue
        before, after = first["stages_ms"][stage], second["stages_ms"][stage]
        if not (np.median(before) > 0 and np.median(after) > 0):
            continue  # a stage that most pictures do not reach has no ratio
        judged = slower(before, after, threshold)
        judged["lost_ms"] = round(float(np.median(after) - np.median(before)), 4)
        judged["slower"] = judged["slower"] and judged["lost_ms"] > NOTICEABLE * whole
        stages[stage] = judged
    return {"total": slower(first["ms"], second["ms"], threshold), "stages": stages}


def _gone(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Stages that counted and are not told any more: nothing says that they got no slower."""
    whole = float(np.median(first["ms"]))
    names = [stage for stage, spent in first["stages_ms"].items() if float(np.median(spent)) > NOTICEABLE * whole]
    return [f"stage {stage} is not told any more" for stage in names if stage not in second["stages_ms"]]


def _worse_masks(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Masks further from the reference's than before: a speed without its masks is none."""
    if before.get("mask_iou_mean") is None:
        return []
    if after.get("mask_iou_mean") is None:
        return ["masks are not judged any more"]
    found = []
    for key, allowed in MASK_LOSS.items():
        first, second = before.get(key), after.get(key)
        if first is not None and (second is None or first - second > allowed):
            found.append(f"{key} fell from {first:.4f} to {'nothing' if second is None else f'{second:.4f}'} ({allowed:g} is let pass)")
    if (after.get("flips") or 0) > (before.get("flips") or 0):
        found.append(f"flips rose from {before.get('flips') or 0} to {after['flips']}")
    return found


def _more_memory(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    found = []
    for key in ("peak_rss_bytes", "device_memory_bytes"):
        first, second = before.get(key), after.get(key)
        if first and second and second > MEMORY * first:
            found.append(f"{key} rose from {first / 1e6:.0f} to {second / 1e6:.0f} MB (a ratio of {MEMORY:g} is let pass)")
    return found


def _other_conditions(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """What was measured, and how, where the two results tell it differently; what only one tells is a matter of its version."""
    pairs = {fact: (a[fact], b[fact]) for fact in MEASURED if fact in a and fact in b}
    for name in names:
        first, second = (result["runs"][name] for result in (a, b))
        pairs |= {f"{name} {fact}": (first[fact], second[fact]) for fact in RUN_FACTS if fact in first and fact in second}
    pairs |= {f"{name} only in B": (None, True) for name in b["runs"] if name not in a["runs"]}
    for name in names:
        first, second = (result["runs"][name]["samples"]["stages_ms"] for result in (a, b))
        pairs |= {f"{name} stage {stage} only in B": (None, True) for stage in second if stage not in first}
    return {fact: [first, second] for fact, (first, second) in pairs.items() if first != second}


def _told(fact: str, environment: Mapping[str, Any]) -> Any:
    value = environment.get(fact)
    return processor_words(str(value)) if fact == "processor" and value else value


def processor_words(label: str) -> list[str]:
    """What a processor's label says, however it is put: "family" and "model" have not always been written, nor in this order."""
    return sorted(word for word in label.split() if word not in ("family", "model"))


def same_processor(one: str, other: str) -> bool:
    return processor_words(one) == processor_words(other)


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| run | stage | B / A | 99 % interval | verdict |", "| --- | --- | --- | --- | --- |"]
    for name, run in comparison["runs"].items():
        for stage, judged in {"total": run["total"], **run["stages"]}.items():
            verdict = "SLOWER" if judged["slower"] else "faster" if judged["high"] < 1 else ""
            lines.append(f"| {name} | {stage} | {judged['ratio']:.3f} | {judged['low']:.3f} .. {judged['high']:.3f} | {verdict} |")
    if comparison["worse"]:
        lines += ["", *(f"WORSE: {text}" for text in comparison["worse"])]
    if comparison["other_machine"]:
        lines += ["", f"Not the same conditions: {', '.join(comparison['other_machine'])} differ; a ratio then tells of them, too."]
    if comparison["other_conditions"]:
        lines += ["", "Not the same measurement, A and B:"]
        lines += [f"- {fact}: {first} and {second}" for fact, (first, second) in comparison["other_conditions"].items()]
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
