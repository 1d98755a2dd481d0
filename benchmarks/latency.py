"""One picture end to end: the runtime against the PyTorch reference as the paper runs it, in turns, on the same threads.

    python -m benchmarks.latency --bundle BUNDLE --checkpoint nano --threads 2 --output benchmarks/results/latency.json

Ratios are taken pair by pair, so that a machine whose speed drifts drifts for both. The clock runs from a decoded uint8 picture in
memory to the full-size map and mask in memory. Absolute times of a shared CPU are context, not a claim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.environment import environment
from runtime import Segmenter

SIZE = (480, 640)
REST = 0.1  # seconds before each turn: thread pools go on spinning for a while and would take the cores from whoever is next


def measure(bundle: Path, checkpoint: str, threads: int, rounds: int, warmups: int) -> dict[str, Any]:
    """Interleaved timings of every candidate.

    Returns:
        Per candidate the median and the 90th percentile in milliseconds, its median ratio to the runtime, and the runtime's
        stage medians with the share of pre- and post-processing.
    """
    import torch

    from agvas import load
    from export.pictures import FIRST_SEED, procedural_picture

    torch.set_num_threads(threads)
    pictures = [procedural_picture(FIRST_SEED + 500 + i, *SIZE) for i in range(8)]
    segmenter = Segmenter(bundle, engine="auto", threads=threads)
    model = load(checkpoint)
    stages: list[dict[str, float]] = []

    def ours(picture: np.ndarray) -> np.ndarray:
        result = segmenter(picture)
        stages.append(result.timings)
        return result.mask

    def reference(picture: np.ndarray) -> np.ndarray:
        return model.segment(picture).mask

    candidates: dict[str, Callable[[np.ndarray], np.ndarray]] = {"runtime": ours, "torch fp32, generate": reference}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    ious: list[float] = []
    for i in tqdm(range(-warmups, rounds), desc="pairs", unit="pair"):
        picture, masks = pictures[i % len(pictures)], {}
        for name, segment in candidates.items():
            time.sleep(REST)
            started = time.perf_counter()
            masks[name] = segment(picture)
            if i >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
        a, b = masks.values()
        union = int(np.count_nonzero(a | b))
        ious.append(int(np.count_nonzero(a & b)) / union if union else 1.0)
    stages = stages[warmups:]
    medians = {name: statistics.median(stage[name] for stage in stages) for name in stages[0]}
    outside = sum(statistics.median(stage[name] for stage in stages) for name in ("preprocess", "postprocess"))
    return {
        "engine": f"{segmenter.engine}/{segmenter.inference_precision}",
        "rejected": segmenter.choice.rejected if segmenter.choice else {},
        "picture": list(SIZE),
        "threads": threads,
        "rounds": rounds,
        "p50_ms": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "p90_ms": {name: round(float(np.quantile(values, 0.9)), 2) for name, values in times.items()},
        "ratio_to_runtime": {
            name: round(statistics.median(b / a for a, b in zip(times["runtime"], values)), 2)
            for name, values in times.items()
            if name != "runtime"
        },
        "stages_ms": {name: round(value, 3) for name, value in medians.items()},
        "pre_and_post_share": round(outside / medians["total"], 4),
        "mask_iou_mean": round(float(np.mean(ious)), 5),
        "samples_ms": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "environment": environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result, raw samples included, as JSON")
    options = parser.parse_args(arguments)
    result = measure(options.bundle, options.checkpoint, options.threads, options.rounds, options.warmups)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("samples_ms", "environment")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
