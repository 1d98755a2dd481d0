"""What a second instruction about one picture costs, asked of an Inspection and asked in a fresh call, in turns.

    python -m benchmarks.prefix_reuse --bundle BUNDLE --threads 1 --output benchmarks/results/prefix_reuse.json

Both answers must be alike, in text, verdict and mask (within the gate of fp32); exit code 1 where a pair is not. Ratios are taken pair by
pair, so that a machine whose speed drifts drifts for both: of the time by the clock, of the processor's time, which other programs on the
machine disturb less, and of the language stage alone, since a fresh call also runs both encoders. Absolute times are context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.other_work import counted, in_words, other_work
from runtime import Segmenter
from runtime.parity import GATES, mask_iou
from runtime.prompts import DIRECT

SIZE = (480, 640)
# Asked first, untimed: an Inspection keeps the language model's part from its first answer on.
OPENING = "Please segment the anomalies in this image."
INSTRUCTIONS = ("Find scratches.", "Where is rust on this part?", "Please segment the dents in this picture.", "Mark all stains.")


@dataclass
class _Pairs:
    """Milliseconds of a fresh call and of the later question beside it."""

    fresh: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def add(self, fresh: float, later: float) -> None:
        self.fresh.append(fresh)
        self.later.append(later)

    def summary(self) -> dict[str, float]:
        ratio = statistics.median(a / b for a, b in zip(self.fresh, self.later))
        medians = statistics.median(self.fresh), statistics.median(self.later)
        return {"fresh_ms": round(medians[0], 2), "later_ms": round(medians[1], 2), "fresh_to_later": round(ratio, 2)}


def measure(bundle: Path, engines: list[str], modes: list[str], pictures: int, threads: int) -> dict[str, Any]:
    """Pairs of a fresh call and a later question, over pictures, instructions, modes and engines."""
    from export.pictures import FIRST_SEED, procedural_picture

    images = [procedural_picture(FIRST_SEED + 700 + i, *SIZE) for i in range(pictures)]
    machine, before, rows = environment(threads), counted(()), []
    for engine in engines:
        segmenter = Segmenter(bundle, engine, threads=threads)
        segmenter(images[0])
        for mode in modes:
            clock, processor, language, unlike, least = _Pairs(), _Pairs(), _Pairs(), 0, 1.0
            for image in tqdm(images, desc=f"{engine}, {mode}", unit="image"):
                inspection = segmenter.inspect(image)
                inspection.ask(OPENING)
                for instruction in INSTRUCTIONS:
                    times = [(time.perf_counter(), time.process_time())]
                    fresh = segmenter(image, instruction, mode)
                    times.append((time.perf_counter(), time.process_time()))
                    later = inspection.ask(instruction, mode)
                    times.append((time.perf_counter(), time.process_time()))
                    (clock_0, processor_0), (clock_1, processor_1), (clock_2, processor_2) = times
                    clock.add((clock_1 - clock_0) * 1e3, (clock_2 - clock_1) * 1e3)
                    processor.add((processor_1 - processor_0) * 1e3, (processor_2 - processor_1) * 1e3)
                    language.add(fresh.timings["language"], later.timings["language"])
                    unlike += fresh.text != later.text or fresh.is_anomalous != later.is_anomalous
                    # Kept keys and values are rounded in another order than those computed anew: a pixel at the level may turn.
                    least = min(least, mask_iou(fresh.mask, later.mask))
            rows.append(
                {
                    "engine": engine,
                    "mode": mode,
                    "pairs": len(clock.fresh),
                    "unlike": unlike,
                    "mask_iou_min": round(least, 6),
                    "clock": clock.summary(),
                    "processor": processor.summary(),
                    "language_clock": language.summary(),
                    "samples_ms": {
                        name: {"fresh": [round(t, 2) for t in pairs.fresh], "later": [round(t, 2) for t in pairs.later]}
                        for name, pairs in (("clock", clock), ("processor", processor), ("language_clock", language))
                    },
                }
            )
    busy = other_work(before, counted(()))
    return {"picture": list(SIZE), "pictures": pictures, "threads": threads, "rows": rows, "other_work": busy, "environment": machine}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--modes", nargs="+", default=[DIRECT, "segment-then-explain"])
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the result, raw samples included, as JSON")
    options = parser.parse_args(arguments)
    result = measure(options.bundle, options.engines, options.modes, options.pictures, options.threads)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(json.dumps({key: value for key, value in row.items() if key != "samples_ms"}))
    print(in_words(result["other_work"]), file=sys.stderr)
    alike = all(not row["unlike"] and row["mask_iou_min"] >= GATES["fp32"].mask_iou_min for row in result["rows"])
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
