"""Which part of AG-VAS matters at nano's size, and how much is chance: ablations (table 3) and seeds, trained and measured alike.

    python -m benchmarks.variants --work runs --seeds 0 1 2 --ablations no-seg no-relative no-spam single-anchor \\
        --output benchmarks/results/variants.json DATASET...

Ablations start from the first seed's pixel pretraining, which they all share, and differ in tuning alone; every seed is trained whole.
A stopped command goes on where it was. At a small budget (`--steps` of tuning) differences below the spread of the seeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agvas.config import ABLATIONS
from agvas.training.recipe import Recipe, train_from_nothing
from benchmarks.accuracy import evaluate_datasets, read_datasets
from benchmarks.environment import environment
from benchmarks.evaluation import mean_metrics
from benchmarks.predictors import Source, open_predictor

SHOWN = ("ap", "f1_max", "iou_anomalous", "empty_normal")


def train_variant(recipe: Recipe, work: Path, name: str, pretrained: str | None, workers: int) -> Path:
    """The checkpoint of one variant, trained in work/name on the pool in work/pool; `pretrained` names whose pixel pretraining it takes."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    (work / "pool").mkdir(exist_ok=True)
    if not (folder / "pool").exists():
        (folder / "pool").symlink_to(os.path.relpath(work / "pool", folder))
    if pretrained is not None and not (folder / "pretraining").exists():
        shutil.copytree(work / pretrained / "pretraining", folder / "pretraining")
    train_from_nothing(recipe, folder, workers=workers)
    return folder / "checkpoint"


def measured(checkpoint: Path, datasets: Sequence[Path]) -> dict[str, Any]:
    """The means over the data sets, and each set's own."""
    read = read_datasets([("manifest", folder) for folder in datasets])
    results = evaluate_datasets(read, open_predictor(Source(checkpoint=str(checkpoint))))
    mean = mean_metrics([result["mean"] for result in results])
    sets = {result["dataset"]: {name: result["mean"][name] for name in SHOWN} for result in results}
    return {"mean": {name: mean[name] for name in SHOWN}, "datasets": sets}


def spread(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds of each metric that all have."""
    table = {}
    for name in SHOWN:
        values = [run["mean"][name] for run in runs]
        if all(value is not None for value in values):
            table[name] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="folders with a manifest.csv")
    parser.add_argument("--work", type=Path, required=True, help="folder of pool, runs and checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ablations", nargs="*", default=[], choices=ABLATIONS)
    parser.add_argument("--config", default="nano", choices=("nano", "tiny"))
    parser.add_argument("--steps", type=int, help="tuning steps (default: the recipe's)")
    parser.add_argument("--pretraining-steps", type=int, help="default: the recipe's")
    parser.add_argument("--samples", type=int, help="samples in the pool (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    recipe = Recipe(config=options.config).shortened(options.pretraining_steps, options.steps, options.samples)
    first = f"seed-{options.seeds[0]}"
    variants = {f"seed-{seed}": (recipe.with_seed(seed), None) for seed in options.seeds}
    variants |= {name: (replace(recipe.with_seed(options.seeds[0]), ablation=name), first) for name in options.ablations}
    found = {}
    for name, (variant, pretrained) in variants.items():
        print(f"{name}:", file=sys.stderr)
        found[name] = measured(train_variant(variant, options.work, name, pretrained, options.workers), options.datasets)
        print(name, " ".join(f"{key} {value:.3f}" for key, value in found[name]["mean"].items() if value is not None), flush=True)
    result = {
        "variants": found,
        "seeds": spread([found[f"seed-{seed}"] for seed in options.seeds]),
        "steps": {"pretraining": recipe.pretraining.loop.steps, "tuning": recipe.tuning.loop.steps},
        "environment": environment(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
