"""What each precision and engine costs in masks and gains in size, memory and time: bundles against AGVAS.segment on the same pictures.

    python -m benchmarks.precisions --checkpoint nano --images 64 --output benchmarks/results/precisions.json BUNDLE...

Every engine that is installed and can run a bundle is tried at every inference precision that it has for it. Time is a ratio: each
candidate takes turns, picture by picture, with the first bundle of the list on the first engine that runs it as exported, so give an
fp32 bundle first; both use the same number of threads. Absolute times are agvas-bench's. With each ratio stands what other processes took
of the processors over its turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.other_work import BUSY, counted, other_work, taken
from engines import EngineError, EngineOptions
from runtime.bundle import Bundle
from runtime.footprint import WHOLE, footprints
from runtime.parity import Outcome, compare
from runtime.pipeline import Pipeline
from runtime.selection import REST, candidates_for
from runtime.verify import gates_for, limits, open_pipeline, run_outcome

COLUMNS = (
    *("bundle", "lmm", "MB", "engine", "computes in", "gates", "passed", "IoU mean", "IoU min", "flips", "anchor cosine"),
    *("peak RSS, MB", "time", "others"),
)


def measure(checkpoint: str, bundles: list[Path], count: int, threads: int, pairs: int) -> dict[str, Any]:
    """Parity, size, memory and time ratio of every bundle on every engine over `count` procedural pictures."""
    from agvas import load
    from export.parity import outcome_of_reference
    from export.pictures import parity_pictures

    machine = environment(threads)  # now: its load average is of others' work alone
    model = load(checkpoint)
    pictures = parity_pictures(None, count)
    reference = [outcome_of_reference(model.segment(picture)) for picture in tqdm(pictures, desc="reference", unit="image")]
    first = Bundle(bundles[0])
    baseline, named = _baseline(first, threads)
    rows = []
    for folder in bundles:
        bundle = Bundle(folder)
        for engine, precision in candidates_for(bundle, "cpu"):
            options = EngineOptions(threads=threads, inference_precision=precision)
            rows.append(_row(bundle, engine, options, pictures, reference, baseline, pairs))
    return {
        "checkpoint": checkpoint,
        "images": count,
        "reference_empty": sum(not outcome.mask.any() for outcome in reference),
        "time_ratio_to": named,
        "threads": threads,
        "pairs": pairs,
        "rows": rows,
        "environment": machine,
    }


def _baseline(bundle: Bundle, threads: int) -> tuple[Pipeline, str]:
    reasons = []
    for engine, precision in reversed(candidates_for(bundle, "cpu")):
        if precision == "graph":
            try:
                return open_pipeline(bundle, engine, EngineOptions(threads=threads)), f"{_precision(bundle)} on {engine}"
            except EngineError as error:
                reasons.append(str(error))
    raise EngineError(f"{bundle.folder}: no engine runs it to compare times with: {' | '.join(reasons)}")


def _row(
    bundle: Bundle,
    engine: str,
    options: EngineOptions,
    pictures: Any,
    reference: list[Outcome],
    baseline: Pipeline,
    pairs: int,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "bundle_precision": _precision(bundle),
        "lmm": bundle.manifest.lmm,
        "kept_float": sorted(bundle.manifest.quantisation.get("kept_float", {})),
        "bytes": bundle.bytes,
        "engine": engine,
        "inference_precision": options.inference_precision,
    }
    try:
        pipeline = open_pipeline(bundle, engine, options)
    except EngineError as error:
        return row | {"error": str(error)}
    label = f"{row['bundle_precision']} {row['lmm']} {engine}/{options.inference_precision}"
    rule = bundle.manifest.mask_rule
    ours = [run_outcome(pipeline, picture, rule)[0] for picture in tqdm(pictures, desc=label, unit="image")]
    parity = compare(ours, reference)
    failures = limits(bundle, options).failures(parity)
    row |= {"gates": gates_for(bundle, options), "passed": not failures, "failures": failures, "parity": parity.to_json()}
    before = counted(())
    try:
        ratios = [_seconds(pipeline, pictures[i % len(pictures)]) / _seconds(baseline, pictures[i % len(pictures)]) for i in range(pairs)]
        busy = other_work(before, counted(()))
        stages = footprints(bundle, engine, options.inference_precision)
    except EngineError as error:  # the rows of a long run are not lost for one that cannot compute
        return row | {"error": str(error)}
    return row | {"time_ratio": round(statistics.median(ratios), 3), "other_work": busy, "stages": stages}


def _seconds(pipeline: Pipeline, picture: Any) -> float:
    prompt = pipeline.prompts.encode()
    time.sleep(REST)
    started = time.perf_counter()
    pipeline.run(picture, prompt)
    return time.perf_counter() - started


def _precision(bundle: Bundle) -> str:
    """Of the graphs: the encoders', where they differ from the rest."""
    return bundle.manifest.precision["pixel_encoder"]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Time is the ratio to {result['time_ratio_to']}, in turns on {result['threads']} threads; others, what other processes and the "
        f"host's other guests took of the processors meanwhile: beyond {BUSY:.0%} the ratio is not to be trusted.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row in result["rows"]:
        size = f"{row['bytes'] / 1e6:.1f}"
        start = f"| {row['bundle_precision']} | {row['lmm']} | {size} | {row['engine']} | {row['inference_precision']} |"
        if "error" in row:
            lines.append(f"{start} | refused | {row['error'][:80]} | | | | | | |")
            continue
        parity, peak, share = row["parity"], row["stages"][WHOLE]["peak_rss_bytes"], taken(row["other_work"])
        lines.append(
            f"{start} {row['gates']} | {'yes' if row['passed'] else 'NO'} | {parity['mask_iou_mean']:.4f} | "
            f"{parity['mask_iou_min']:.4f} | {parity['flips']} | {parity['anchor_cosine_min']:.5f} | "
            f"{'' if peak is None else round(peak / 1e6)} | {row['time_ratio']:.2f} | "
            f"{'not told' if share is None else f'{share:.1%}'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="nano", help="the checkpoint the bundles were exported from")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20, help="turns that a time ratio is the median of")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    result = measure(options.checkpoint, options.bundles, options.images, options.threads, options.pairs)
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
