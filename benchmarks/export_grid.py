"""A checkpoint exported at every precision of graphs and language model: each export's own report, and what it does to real pictures.

    python -m benchmarks.export_grid --checkpoint nano --work DIR --output benchmarks/results/export_nano.json [DATASET...]

Calibrates once for 4 and once for 8 bit, then runs agvas-export for each pair, in a process of its own so that its peak memory is its own.
With data sets (folders with a manifest.csv) every bundle is judged on them as agvas-eval does it, on the first engine that runs it as
exported. What lies in --work is not made again. Prints calibration/README.md's table. Exit code 1 where an export failed its gates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import evaluate_datasets, read_datasets
from benchmarks.environment import environment
from benchmarks.evaluation import mean_metrics
from benchmarks.predictors import Source, open_predictor

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
LANGUAGES = ("float", "int8", "gptq4")
BITS = {"int8": ("8", "0"), "gptq4": ("4", None)}  # and the group, None for the default
SHOWN = ("ap", "f1_max", "iou_anomalous", "empty_normal")


def run(arguments: Sequence[str], log: Path) -> None:
    """A command of this package in a process of its own; what it prints stays in `log`, its messages beside it in .err."""
    with open(log, "w") as printed, open(log.with_suffix(".err"), "w") as messages:
        code = subprocess.run([sys.executable, "-m", *arguments], stdout=printed, stderr=messages, check=False).returncode
    if code not in (0, 1):  # 1: gates failed, which the report tells
        raise SystemExit(f"export_grid: {' '.join(arguments)} ended with exit code {code}; see {log.with_suffix('.err')}")


def exported(checkpoint: str, precision: str, language: str, samples: int, work: Path) -> dict[str, Any]:
    """The export's own report, from work/PRECISION-LANGUAGE and its log."""
    name = f"{precision}-{language}"
    bundle, log = work / name, work / f"{name}.log"
    if not (bundle / "manifest.json").exists():
        asked = ["--checkpoint", checkpoint, "--precision", precision, "--lmm", language]
        arguments = ["export.cli", *asked, "--output", str(bundle), "--parity", "report", "--json"]
        bits = language if language in BITS else "gptq4" if precision == "int8" else None
        if bits is not None:
            plan = work / f"plan-{bits}"
            if not plan.exists():
                count, group = BITS[bits]
                options = ["--samples", str(samples), "--bits", count, *(["--group", group] if group is not None else [])]
                run(["calibration.cli", "--checkpoint", checkpoint, *options, "--output", str(plan)], work / f"plan-{bits}.log")
            arguments += ["--calibration", str(plan)]
        run(arguments, log)
    report = json.loads(log.read_text().splitlines()[-1])
    return report | {"bundle": name}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_grid", description=__doc__)
    parser.add_argument("datasets", nargs="*", type=Path, metavar="DATASET", help="folders with a manifest.csv")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--work", type=Path, required=True, help="folder of plans, bundles and logs")
    parser.add_argument("--samples", type=int, default=64, help="calibration pictures (default 64)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    datasets = read_datasets([("manifest", folder) for folder in options.datasets])
    rows: dict[str, Any] = {}
    for precision in PRECISIONS:
        for language in LANGUAGES:
            row = exported(options.checkpoint, precision, language, options.samples, options.work)
            if datasets and row["passed"]:
                bundle = options.work / row["bundle"]
                engine = "openvino" if precision == "bf16" else "onnxruntime"  # whose CPU provider has no bf16
                judged = evaluate_datasets(datasets, open_predictor(Source(bundle=bundle, engine=engine)))
                mean = mean_metrics([one["mean"] for one in judged])
                row["accuracy"] = {"engine": engine} | {name: mean[name] for name in SHOWN}
            rows[row["bundle"]] = row
            print(line(row), flush=True)
            written = {"checkpoint": options.checkpoint, "samples": options.samples, "exports": rows, "environment": environment()}
            options.output.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows.values()) else 1


def line(row: dict[str, Any]) -> str:
    """A row of calibration/README.md's table; with data sets the AP on them comes before the last column."""
    precision, language = row["bundle"].split("-")
    parity, stages = row["parity"], row["stages"]
    ap = f"{row['accuracy']['ap']:.4f} | " if "accuracy" in row else ""
    kept = ", ".join(row["kept_float"]) or "none"
    sizes = f"{row['bytes'] / 1e6:.1f} | {stages['language']['bytes'] / 1e6:.1f}"
    masks = f"{parity['mask_iou_mean']:.4f} | {parity['mask_iou_min']:.3f} | {parity['flips']} | {parity['anchor_cosine_min']:.5f}"
    return f"| {precision} | {language} | {sizes} | {masks} | {ap}{kept} |"


if __name__ == "__main__":
    raise SystemExit(main())
