"""Whether a bundle says what its checkpoint says: every mode on every engine against the reference's greedy text, token for token.

    python -m benchmarks.explicit_modes --checkpoint nano --bundle BUNDLE --images 32 --output benchmarks/results/explicit_modes.json

Asked are the modes that the checkpoint was trained for, with their own instructions, and one free instruction. In fp32 every token must
be the reference's: exit code 1 where one is not. In 16 bit and in integers, tokens may differ, and the row says in how many answers, from
which on, and what that does to the masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.other_work import counted, other_work
from engines import EngineError, EngineOptions
from export.parity import NORMAL_STATE
from runtime.bundle import Bundle
from runtime.parity import Outcome, compare
from runtime.prompts import DIRECT, PLUS
from runtime.selection import candidates_for
from runtime.verify import gates_for, open_pipeline, outcome_of

FREE = "Is anything wrong near the middle? Answer in words, then segment it."


def measure(checkpoint: str, folder: Path, count: int, engines: list[str], normal_state: str, free: str, threads: int) -> dict[str, Any]:
    """Tokens, texts and masks of `count` procedural pictures, mode by mode and engine by engine."""
    import torch

    from agvas import load
    from agvas.model import Segmented
    from export.parity import outcome_of_reference
    from export.pictures import parity_pictures

    torch.set_num_threads(threads or torch.get_num_threads())
    machine = environment()  # now: its load average is of others' work alone
    model, bundle = load(checkpoint), Bundle(folder)
    questions: dict[str, tuple[str | None, str, str | None]] = {"free": (free, DIRECT, None)}
    for mode in bundle.manifest.prompts.instructions:
        questions[mode] = (None, mode, normal_state if mode == PLUS else None)
    prompts = {name: bundle.prompt_encoder().encode(*question) for name, question in questions.items()}
    pictures = parity_pictures(None, count)
    reference: dict[str, list[Segmented]] = {name: [] for name in questions}
    for picture in tqdm(pictures, desc="reference", unit="image"):
        for name, (instruction, mode, normal) in questions.items():
            reference[name].append(model.segment(picture, instruction, mode, normal_state=normal))
    rows: list[dict[str, Any]] = []
    before = counted(())
    for engine, precision in candidates_for(bundle, "cpu"):
        if engine not in engines:
            continue
        options = EngineOptions(threads=threads, inference_precision=precision)
        try:
            pipeline = open_pipeline(bundle, engine, options)
        except EngineError as error:
            rows.append({"engine": engine, "inference_precision": precision, "error": str(error)})
            continue
        outcomes: dict[str, list[Outcome]] = {name: [] for name in questions}
        milliseconds: dict[str, list[float]] = {name: [] for name in questions}  # of the language stage, a token
        confirmed: Counter[str] = Counter()
        for picture in tqdm(pictures, desc=f"{engine}/{precision}", unit="image"):
            vision = pipeline.see(picture)
            for name, prompt in prompts.items():
                trace = pipeline.answer(vision, prompt)
                outcomes[name].append(outcome_of(trace, bundle.manifest.mask_rule))
                milliseconds[name].append(trace.timings["language"] / len(trace.answer))
                confirmed[name] += trace.verified
        for name in questions:
            wanted = [outcome_of_reference(segmented) for segmented in reference[name]]
            changed = [(a.answer, b.answer) for a, b in zip(outcomes[name], wanted, strict=True) if a.answer != b.answer]
            rows.append(
                {
                    "engine": engine,
                    "inference_precision": precision,
                    "mode": name,
                    "gates": gates_for(bundle, options),
                    "answers": count,
                    "answers_changed": len(changed),
                    "first_changed_token": min((_first_difference(*pair) for pair in changed), default=None),
                    "tokens": sum(len(outcome.answer) for outcome in wanted),
                    "texts": len({segmented.text for segmented in reference[name]}),
                    "without_anchors": sum(segmented.anchor_groups == 0 for segmented in reference[name]),
                    "several_groups": sum(segmented.anchor_groups > 1 for segmented in reference[name]),
                    "truncated": sum(segmented.truncated for segmented in reference[name]),
                    "draft_confirmed": confirmed[name],
                    "language_ms_per_token": round(statistics.median(milliseconds[name]), 3),
                    "parity": compare(outcomes[name], wanted).to_json(),
                    "example": reference[name][0].text,
                }
            )
    return {
        "checkpoint": checkpoint,
        "bundle_precision": next(iter(bundle.manifest.precision.values())),
        "lmm": bundle.manifest.lmm,
        "images": count,
        "normal_state": normal_state,
        "free_instruction": free,
        "rows": rows,
        "other_work": other_work(before, counted(())),
        "environment": machine,
    }


def _first_difference(ours: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, wanted)) if a != b), min(len(ours), len(wanted)))


def verdict(result: dict[str, Any]) -> tuple[str, bool]:
    """In words, whether the rows in fp32 have the reference's answers, and whether one has not."""
    judged = [row for row in result["rows"] if row.get("gates") == "fp32"]
    wrong = [row for row in judged if row["answers_changed"]]
    if not judged:
        return "no row computes in fp32, so none had to have the reference's answers", False
    if not wrong:
        return "every answer in fp32 is the reference's, token for token", False
    return "\n".join(f"{row['engine']}, {row['mode']}: {row['answers_changed']} of {row['answers']} answers differ" for row in wrong), True


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| engine | mode | answers changed | texts | no anchors | cut | mask IoU mean | min | flips |", "| --- " * 9 + "|"]
    for row in result["rows"]:
        start = f"| {row['engine']}/{row['inference_precision']} |"
        if "error" in row:
            lines.append(f"{start} refused: {row['error'][:80]} | | | | | | | |")
            continue
        parity = row["parity"]
        masks = f"{parity['mask_iou_mean']:.4f} | {parity['mask_iou_min']:.4f} | {parity['flips']}"
        lines.append(
            f"{start} {row['mode']} | {row['answers_changed']} of {row['answers']} ({row['tokens']} tokens) | {row['texts']} | "
            f"{row['without_anchors']} | {row['truncated']} | {masks} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", default="nano", help="the checkpoint the bundle was exported from")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--normal-state", default=NORMAL_STATE)
    parser.add_argument("--instruction", default=FREE, help="the free instruction")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    result = measure(
        options.checkpoint, options.bundle, options.images, options.engines, options.normal_state, options.instruction, options.threads
    )
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    words, failed = verdict(result)
    print(words, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
