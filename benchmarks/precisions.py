"""What each precision and engine costs in masks: bundles against AGVAS.segment on the same pictures, under the export's gates.

    python -m benchmarks.precisions --checkpoint nano --images 64 --output benchmarks/results/precisions.json BUNDLE...

Every engine that is installed and can run a bundle is tried, OpenVINO also at bfloat16 inference precision. It judges masks; speed is
benchmarks/latency.py's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from engines import EngineError, EngineOptions
from runtime.bundle import Bundle
from runtime.parity import GATES, Outcome, compare
from runtime.selection import CPU_CANDIDATES
from runtime.verify import gates_for, open_pipeline, outcome_of


def measure(checkpoint: str, bundles: list[Path], count: int) -> dict[str, Any]:
    """Parity of every bundle on every engine over `count` procedural pictures."""
    from agvas import load
    from export.parity import outcome_of_reference
    from export.pictures import parity_pictures

    model = load(checkpoint)
    pictures = parity_pictures(None, count)
    reference = [outcome_of_reference(model.segment(picture)) for picture in tqdm(pictures, desc="reference", unit="image")]
    rows = []
    for folder in bundles:
        bundle = Bundle(folder)
        for engine, precision in CPU_CANDIDATES:
            rows.append(_row(bundle, engine, EngineOptions(inference_precision=precision), pictures, reference))
    return {
        "checkpoint": checkpoint,
        "images": count,
        "reference_empty": sum(not outcome.mask.any() for outcome in reference),
        "rows": rows,
        "environment": environment(),
    }


def _row(bundle: Bundle, engine: str, options: EngineOptions, pictures: Any, reference: list[Outcome]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "bundle_precision": next(iter(bundle.manifest.precision.values())),
        "bytes": bundle.bytes,
        "engine": engine,
        "inference_precision": options.inference_precision,
    }
    try:
        pipeline = open_pipeline(bundle, engine, options)
    except EngineError as error:
        return row | {"error": str(error)}
    prompt = pipeline.prompts.encode()
    label = f"{row['bundle_precision']} {engine}/{options.inference_precision}"
    ours = [outcome_of(pipeline.run(picture, prompt), bundle.manifest.threshold) for picture in tqdm(pictures, desc=label, unit="image")]
    parity, gates = compare(ours, reference), gates_for(bundle, options)
    failures = GATES[gates].failures(parity)
    return row | {"gates": gates, "passed": not failures, "failures": failures, "parity": parity.to_json()}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| bundle | MB | engine | computes in | gates | passed | IoU mean | IoU min | flips | map max diff | anchor cosine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        start = f"| {row['bundle_precision']} | {row['bytes'] / 1e6:.1f} | {row['engine']} | {row['inference_precision']} |"
        if "error" in row:
            lines.append(f"{start} | refused | {row['error'][:80]} | | | | |")
            continue
        parity = row["parity"]
        lines.append(
            f"{start} {row['gates']} | {'yes' if row['passed'] else 'NO'} | {parity['mask_iou_mean']:.4f} | "
            f"{parity['mask_iou_min']:.4f} | {parity['flips']} | {parity['map_max_abs']:.1e} | {parity['anchor_cosine_min']:.5f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="nano", help="the checkpoint the bundles were exported from")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    result = measure(options.checkpoint, options.bundles, options.images)
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
