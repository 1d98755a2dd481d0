"""A training run's losses and throughput, from its logs into a result file and a picture.

    python -m benchmarks.training_curves --run training-run --output benchmarks/results/training_nano.json

It reads log.jsonl of each phase; the picture (same name, .png) shows each loss, smoothed over a twentieth of the run, over the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.environment import environment

PHASES = {
    "pixel pretraining": "pretraining/log.jsonl",
    "language pretraining": "language-pretraining/log.jsonl",
    "tuning": "log.jsonl",
}
NOT_LOSSES = ("step", "seconds", "images_per_second", "processes", "norm", "rate")
WIDTH, HEIGHT, MARGIN = 640, 260, 42
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))


def curves(run: Path) -> dict[str, Any]:
    """{phase: {"steps", "seconds", "images_per_second", "losses": {name: [[step, value], …]}}}; values are means over a twentieth.

    Raises:
        ValueError: a folder that holds no run.
    """
    found = {}
    for phase, name in PHASES.items():
        if (run / name).exists():
            found[phase] = _phase([json.loads(line) for line in (run / name).read_text().splitlines()])
    if not found:
        raise ValueError(f"{run} holds no {' or '.join(PHASES.values())}; give the folder that agvas-train wrote")
    return found


def _phase(lines: list[dict[str, float]]) -> dict[str, Any]:
    names = [name for name in lines[0] if name not in NOT_LOSSES]
    size = max(1, len(lines) // 20)
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return {
        "steps": int(lines[-1]["step"]) + 1,
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines), 2),
        "losses": {
            name: [[int(part[len(part) // 2]["step"]), round(statistics.fmean(line[name] for line in part), 4)] for part in parts]
            for name in names
        },
    }


def draw(phases: dict[str, Any]) -> Image.Image:
    """One panel a phase, each loss in its own colour from 0 to its largest value."""
    image = Image.new("RGB", (WIDTH * len(phases), HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    for number, (phase, values) in enumerate(phases.items()):
        left, right = number * WIDTH + MARGIN, (number + 1) * WIDTH - 12
        top, bottom = 24, HEIGHT - MARGIN
        highest = max(value for curve in values["losses"].values() for _, value in curve)
        pen.rectangle((left, top, right, bottom), outline=(160, 160, 160))
        pen.text((left, 6), f"{phase}: {values['steps']} steps, {values['images_per_second']} images/s", fill="black", font=font)
        pen.text((number * WIDTH + 4, top - 4), f"{highest:.2g}", fill="black", font=font)
        pen.text((number * WIDTH + 4, bottom - 8), "0", fill="black", font=font)
        pen.text((right - 40, bottom + 6), str(values["steps"]), fill="black", font=font)
        for colour, (name, curve) in zip(COLOURS, values["losses"].items()):
            points = [
                (left + (right - left) * step / values["steps"], bottom - (bottom - top) * value / highest) for step, value in curve
            ]
            pen.line(points, fill=colour, width=2)
            pen.text((left + 8 + 90 * list(values["losses"]).index(name), bottom + 18), name, fill=colour, font=font)
    return image


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_curves", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder that agvas-train wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    try:
        phases = curves(options.run)
        options.output.write_text(json.dumps({"phases": phases, "environment": environment()}, indent=2) + "\n")
        draw(phases).save(options.output.with_suffix(".png"))
    except (OSError, ValueError) as error:
        print(f"training_curves: {error}", file=sys.stderr)
        return 2
    for phase, values in phases.items():
        ends = {name: f"{curve[0][1]:.3f} to {curve[-1][1]:.3f}" for name, curve in values["losses"].items()}
        print(f"{phase}: {values['steps']} steps, {values['images_per_second']} images/s, {ends}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
