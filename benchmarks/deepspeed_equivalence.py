"""Two processes under DeepSpeed's ZeRO-2 against one without it: the same losses? And is the state that they saved, imported, the model
that they left? A person runs it in an environment that has deepspeed.

    ENVIRONMENT/bin/pip install deepspeed
    DS_ACCELERATOR=cpu ENVIRONMENT/bin/python -m benchmarks.deepspeed_equivalence --output benchmarks/results/deepspeed_equivalence.json

deepspeed compiles its operators where they are used, so a compiler has to be there; that and its size are why this is no test. Tuned
as the paper does is the tiny model, on a small set of procedural defects, with the configuration that is shipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agvas import load, save
from agvas.importing import ImportSettings, import_parts
from agvas.training.procedural import make_sample
from agvas.training.recipe import new_model
from benchmarks.environment import environment

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "agvas" / "training" / "deepspeed_zero2.json"
PICTURES = 8
RUN = ["-m", "agvas.training.cli", "--batch", "8", "--micro-batch", "4", "--workers", "0"]
LAUNCH = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--deepspeed_config_file", str(CONFIGURATION)]
# The first step's losses come of equal weights; later ones also of updates whose sums were taken in another order and clipped with
# another epsilon; up to 1.8e-4 was measured.
FIRST, LATER = 1e-5, 1e-3
IMPORTED = 1e-6  # adapters are added to the same weights, as peft does it; 0 was measured
SHOWN = ("text", "mask")
SHOWN_RESULTS = ("largest_relative_difference", "largest_difference_of_the_imported_state", "tolerance", "passed")


def prepare(work: Path) -> None:
    """A random tiny checkpoint, a manifest set and the mixture of it, for `train`."""
    save(new_model("tiny", seed=0), work / "checkpoint")
    (work / "set").mkdir()
    lines = ["image,mask,label,class"]
    for number in range(PICTURES):
        made = make_sample(number, 64, 64)
        Image.fromarray(made.image).save(work / "set" / f"{number}.png")
        Image.fromarray(np.where(made.mask, 255, 0).astype(np.uint8)).save(work / "set" / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,{int(made.mask.any())},part")
    (work / "set" / "manifest.csv").write_text("\n".join(lines) + "\n")
    mixture = {"anomaly": {"probability": 1, "sources": [{"kind": "manifest", "root": "set"}]}}
    (work / "mixture.json").write_text(json.dumps(mixture))
    (work / "settings.json").write_text(json.dumps({"loop": {"log_every": 1, "save_every": 3}}))


def train(work: Path, name: str, steps: int, launch: list[str]) -> list[dict[str, float]]:
    """The log of a tuning of that many steps."""
    folder = work / name
    given = ["--checkpoint", str(work / "checkpoint"), "--mixture", str(work / "mixture.json"), "--settings", str(work / "settings.json")]
    command = [sys.executable, *launch, *RUN, *given, "--steps", str(steps), "--output", str(folder)]
    finished = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr[-3000:]}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]], steps: range) -> float:
    """Largest relative difference of the losses over some steps."""
    return max(abs(ours[i][name] - theirs[i][name]) / abs(theirs[i][name]) for i in steps for name in SHOWN)


def difference_of_import(base: Path, run: Path) -> float:
    """Largest absolute difference of a weight between the checkpoint that a run left and its last state, imported over its base.

    Raises:
        CheckpointError: the state is none, or does not fit.
    """
    import_parts(ImportSettings(base, run / "imported", trained=(run / "state",)))
    found, expected = (load(run / name).state_dict() for name in ("imported", "checkpoint"))
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


def compare(steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work))
        one = train(Path(work), "one", steps, [])
        two = train(Path(work), "two", steps, LAUNCH)
        imported = difference_of_import(Path(work) / "checkpoint", Path(work) / "two")
        saved = (Path(work) / "two" / "checkpoint" / "model.safetensors").stat().st_size
    first, later = difference(two, one, range(1)), difference(two, one, range(1, steps))
    return {
        "steps": steps,
        "losses": {"one process": one, "two processes, ZeRO-2": two},
        "largest_relative_difference": {"first step": first, "later steps": later},
        "largest_difference_of_the_imported_state": imported,
        "tolerance": {"first step": FIRST, "later steps": LATER, "imported state": IMPORTED},
        "checkpoint_bytes": saved,
        "passed": first <= FIRST and later <= LATER and imported <= IMPORTED,
        "versions": {name: version(name) for name in ("deepspeed", "accelerate", "torch")},
        "environment": environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if find_spec("deepspeed") is None:
        print("deepspeed is not installed; pip install deepspeed into an environment of its own", file=sys.stderr)
        return 2
    result = compare(options.steps)
    print(json.dumps({key: result[key] for key in SHOWN_RESULTS}))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
