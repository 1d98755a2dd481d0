"""Does the paper's model export on a small machine, and do its graphs compute what the reference does? Time, disk, memory, errors.

    python -m benchmarks.full_size --size 7b --work DIR --output benchmarks/results/full_size.json

Makes a random checkpoint at full size (17 GB; --checkpoint takes one of yours), exports it with the language model in 4 bit (plain
rounding) and in 16 bit, compares every stage and each of the language model's layers with the reference computed layer by layer, and
segments a picture with the 4-bit bundle. Each part is a process of its own, so that its peak memory is its own; results are written after
each, and a part that is there already is not done again. --size 13b is LLaVA-1.5-13B's base (it takes twice the disk); with -reduced
behind it a model has its full widths and two layers of everything. Parity of masks is agvas-export's business: here the weights are noise.

    python -m benchmarks.full_size --size 7b --work DIR --parts checkpoint calibrate export-plan stages-plan --output FILE.json

calibrates the language model with agvas-calibrate instead, on a few pictures (one to two hours on two cores; stopped, it goes on where it
was), and exports and compares what the plan says; --again makes the plan anew.

What went on where an earlier run had stopped says "resumed": its seconds and its memory are of the rest alone. An output is of one size,
precision, head and number of pictures, a random checkpoint of one size: others are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

# As the layer-streamed reference of the same weights: 16-bit arithmetic in the encoders and around 4-bit weights, all layers behind one
# another. A wrong weight or a swapped axis gives 0.1 and more.
# The map of random weights spans little of 0..1, so its error is told in shares of what it spans.
TOLERANCE = {"stage_relative_error": 2e-2, "map_share_of_range": 2e-2}
TARGETS = {
    "export_peak_rss_bytes": 8 << 30,
    "gptq4_disk_bytes": 7_800_000_000,
    "gptq4_weight_bytes": 6_700_000_000,
    "run_peak_rss_bytes": 14 << 30,
}
MODELS = {"7b": "ov_7b", "13b": "llava_13b"}
SIZES = tuple(f"{model}{depth}" for model in MODELS for depth in ("", "-reduced"))
IMAGE_TOKENS = 24  # of each kind, where a stage alone is compared: what a token meets in a layer does not depend on their number
PICTURE = (8_000_000_003, 480, 640)  # seed, height, width
PARTS = ("checkpoint", "export-gptq4", "stages-gptq4", "run-gptq4", "reference-gptq4", "export-16", "stages-16")
WITH_A_PLAN = ("calibrate", "export-plan", "stages-plan")  # where asked for
LAST_USE = {"reference-gptq4": "gptq4", "stages-16": "16", "stages-plan": "plan"}  # of a bundle


@dataclasses.dataclass(frozen=True)
class Work:
    """What every part is told."""

    folder: Path
    checkpoint: Path
    size: str
    precision: str
    head: str
    pictures: int

    @property
    def random_checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def plan(self) -> Path:
        return self.folder / "plan"

    @property
    def unfinished_plan(self) -> Path:
        """Where agvas-calibrate keeps what it goes on with."""
        return self.folder / "plan.partial"

    @property
    def settings(self) -> dict[str, Any]:
        """What an output is of."""
        return {"size": self.size, "precision": self.precision, "head": self.head, "pictures": self.pictures}

    def calibration(self, kind: str) -> Path:
        """Where the 4-bit codes of an export come from."""
        from export.quantisation import RTN

        return self.plan if kind == "plan" else RTN

    def bundle(self, kind: str) -> Path:
        return self.folder / f"bundle-{kind}"


def checkpoint(work: Work) -> dict[str, Any]:
    """A random one, bf16 as published ones are, where none of yours is given."""
    import torch

    from agvas.checkpoint import open_checkpoint, weight_files
    from agvas.config import NAMED
    from benchmarks.random_checkpoint import reduced, write_random_checkpoint

    started, (model, _, depth) = time.monotonic(), work.size.partition("-")
    config = NAMED[MODELS[model]]()
    config = reduced(config) if depth else config
    made = work.checkpoint == work.random_checkpoint and not (work.checkpoint / "model.safetensors").exists()
    if made:
        write_random_checkpoint(config, work.checkpoint, torch.bfloat16)
    seconds = round(time.monotonic() - started, 1) if made else None
    parameters = sum(math.prod(tensor.shape) for tensor in open_checkpoint(work.checkpoint).tensors.values())
    return {"bytes": sum(file.stat().st_size for file in weight_files(work.checkpoint)), "parameters": parameters, "seconds": seconds}


def calibrate(work: Work) -> dict[str, Any]:
    """agvas-calibrate as a user calls it, in a process of its own. resumed: it went on with what an earlier one had left, a whole plan
    for instance, so that its seconds and memory are of the rest alone."""
    resumed, before = (work.unfinished_plan / "state.json").exists(), _written(work.plan / "plan.json")
    command = [sys.executable, "-m", "calibration.cli", "--checkpoint", work.checkpoint, "--output", work.plan, "--dtype", "bf16"]
    command += ["--samples", str(work.pictures), "--json"]
    finished = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(finished.stdout.splitlines()[-1])
    del told["plan"]
    resumed |= before == _written(work.plan / "plan.json")
    return told | {"resumed": resumed, "dtype": "bf16", "plan_bytes": sum(file.stat().st_size for file in work.plan.iterdir())}


def _written(file: Path) -> int | None:
    """When, in nanoseconds; None where there is no such file."""
    return file.stat().st_mtime_ns if file.exists() else None


def export(work: Work, kind: str) -> dict[str, Any]:
    """One export without its comparison, step by step. resumed: stages of an earlier one, which was stopped, were not made again."""
    from export.bundle import export_bundle
    from export.progress import Progress
    from export.settings import ExportSettings
    from runtime.contract import STAGES
    from runtime.verify import peak_rss_bytes as peak

    steps: list[dict[str, Any]] = []

    class Recorded(Progress):
        def end(self) -> None:
            if self._step:
                seconds = round(time.monotonic() - self._started, 1)
                steps.append({"step": self._step, "seconds": seconds, "peak_rss_bytes": peak()})
            super().end()

    started = time.monotonic()
    precision = work.precision if kind == "16" else "fp16"
    settings = ExportSettings(str(work.checkpoint), precision, work.bundle(kind), compare=False, resume=True)
    if kind != "16":
        settings = dataclasses.replace(settings, lmm="gptq4", calibration=work.calibration(kind), head=work.head)
    bundle, _ = export_bundle(settings, Recorded())
    sizes = {name: record.bytes for name, record in bundle.manifest.files.items()}
    return {
        "precision": precision,
        "lmm": settings.lmm,
        "head": settings.head,
        "resumed": sum(step["step"].startswith("export ") for step in steps) < len(STAGES),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": peak(),
        "disk_bytes": bundle.bytes,
        "weight_bytes": sum(size for name, size in sizes.items() if "/" in name),
        "files": sizes,
        "steps": steps,
    }


def stages(work: Work, kind: str) -> dict[str, Any]:
    """Every exported stage against the reference's, both fed the reference's tensors; the language model on some tokens, all layers."""
    import numpy as np

    from agvas.checkpoint import open_checkpoint
    from engines import EngineOptions
    from engines.memory import available_memory
    from export.estimate import TABLE
    from export.judging import verification_engine
    from export.parity import layer_errors
    from export.pictures import procedural_picture
    from export.quantisation import Quantisation, fake_quantised_tensors, quantise
    from export.stage_weights import all_weights
    from export.streamed_reference import EmbeddingRows, exported_stages, streamed_stages
    from runtime import preprocess
    from runtime.bundle import Bundle
    from runtime.contract import STAGES
    from runtime.parity import relative_error
    from runtime.verify import peak_rss_bytes as peak

    opened = open_checkpoint(work.checkpoint)
    bundle, weights = Bundle(work.bundle(kind), check_hashes=False), all_weights(opened)
    quantisation = Quantisation()
    if kind != "16":
        quantisation = quantise(opened.skeleton(), opened.tensors, "gptq4", False, work.calibration(kind), work.head)
    reference = streamed_stages(opened, fake_quantised_tensors(weights, quantisation))
    engine = verification_engine(bundle.manifest.precision["language"])
    exported = exported_stages(bundle, engine, EngineOptions(low_memory=True), available_memory())
    prompts = opened.skeleton().prompt_encoder
    prompt, table, rng = prompts.encode(), EmbeddingRows(weights[TABLE]), np.random.default_rng(0)
    pixel, semantic, _ = preprocess.encoder_images(procedural_picture(*PICTURE), opened.config.preprocessing)
    held: dict[str, np.ndarray] = {"pixel_image": pixel[None], "semantic_image": semantic[None]}
    sizes = bundle.manifest.sizes
    found: dict[str, Any] = {"engine": engine, "stages": {}}
    for name, spec in STAGES.items():
        if name == "language":
            draft = prompt.draft or ()
            seen = [held[key][:, :IMAGE_TOKENS] for key in ("image_embeddings", "aligned_embeddings")]
            said = [table[list(ids)][None] for ids in (prompt.prefix, prompt.suffix + draft[:-1])]
            held["input_embeddings"] = np.concatenate([said[0], *seen, said[1]], axis=1)
            tokens = held["input_embeddings"].shape[1]
            held["positions"] = np.arange(tokens, dtype=np.int64)[None]
            held["past_keys"] = np.zeros((sizes["L"], 1, sizes["H"], 0, sizes["C"]), np.float32)
            held["past_values"] = held["past_keys"].copy()
            held["rows"] = np.arange(tokens - len(draft), tokens, dtype=np.int64)
        if name == "mask_decoder":
            held["anchor_states"] = rng.normal(size=(1, 3, sizes["D"])).astype(np.float32)
        feeds = {tensor.name: held[tensor.name] for tensor in spec.inputs}
        started = time.monotonic()
        wanted = reference[name].run(feeds)
        between = time.monotonic()
        ours = exported[name].run(feeds)
        told = {
            "relative_error": {key: relative_error(ours[key], value) for key, value in wanted.items()},
            "reference_seconds": round(between - started, 1),
            "exported_seconds": round(time.monotonic() - between, 1),
            "exported_as": type(exported[name]).__name__,
        }
        if name == "language":
            layers: dict[str, list[float]] = {}
            layer_errors({"language": ours}, {"language": wanted}, layers)
            told |= {"tokens": tokens, "layers": layers, "said_the_draft": bool((wanted["logits"][0].argmax(-1) == draft).all())}
        held |= wanted
        found["stages"][name] = told
        _say(f"{name}: {json.dumps(told['relative_error'])}")
    worst = max(error for told in found["stages"].values() for error in told["relative_error"].values())
    return found | {"worst_relative_error": worst, "peak_rss_bytes": peak()}


def run(work: Work) -> dict[str, Any]:
    """One picture through the bundle, one stage in memory at a time."""
    import numpy as np

    from engines import EngineOptions
    from export.pictures import procedural_picture
    from runtime.bundle import Bundle
    from runtime.verify import open_pipeline
    from runtime.verify import peak_rss_bytes as peak

    image = procedural_picture(*PICTURE)
    before = peak()
    bundle = Bundle(work.bundle("gptq4"), check_hashes=False)
    pipeline = open_pipeline(bundle, "onnxruntime", EngineOptions(low_memory=True))
    trace = pipeline.run(image, pipeline.prompts.encode())
    finite = bool(np.isfinite(trace.anomaly_map).all() and all(np.isfinite(value).all() for value in trace.tensors.values()))
    states = np.zeros(0) if trace.anchor_states is None else trace.anchor_states
    np.savez(work.folder / "run.npz", map=trace.anomaly_map, states=states, answer=np.array(trace.answer))
    return {
        "engine": "onnxruntime, low memory",
        "peak_rss_bytes": peak(),
        "idle_rss_bytes": before,
        "timings_ms": {name: round(value) for name, value in trace.timings.items()},
        "answer_verified": trace.verified,
        "finite": finite,
        "embeddings_mapped": isinstance(pipeline.embeddings, np.memmap),
    }


def reference(work: Work) -> dict[str, Any]:
    """The same picture through the reference with the weights that the integers stand for, layer by layer; against what `run` left."""
    import numpy as np

    from agvas.checkpoint import open_checkpoint
    from export.pictures import procedural_picture
    from export.quantisation import RTN, fake_quantised_tensors, quantise
    from export.stage_weights import all_weights
    from export.streamed_reference import streamed_pipeline, streamed_stages
    from runtime.parity import relative_error
    from runtime.verify import peak_rss_bytes as peak

    opened = open_checkpoint(work.checkpoint)
    quantisation = quantise(opened.skeleton(), opened.tensors, "gptq4", False, RTN, work.head)
    weights = fake_quantised_tensors(all_weights(opened), quantisation)
    pipeline = streamed_pipeline(opened, streamed_stages(opened, weights), weights)
    started = time.monotonic()
    trace = pipeline.run(procedural_picture(*PICTURE), pipeline.prompts.encode())
    with np.load(work.folder / "run.npz") as ours:
        same = trace.anchor_states is not None and ours["states"].shape == trace.anchor_states.shape
        return {
            "seconds": round(time.monotonic() - started, 1),
            "same_answer": tuple(ours["answer"].tolist()) == trace.answer,
            "map_max_abs": float(np.abs(ours["map"] - trace.anomaly_map).max()),
            "map_range": [float(trace.anomaly_map.min()), float(trace.anomaly_map.max())],
            "anchor_states_relative_error": relative_error(ours["states"], trace.anchor_states) if same else None,  # type: ignore[arg-type]
            "peak_rss_bytes": peak(),
        }


def do(part: str, work: Work) -> dict[str, Any]:
    """One part of PARTS, in this process."""
    kind = part.rpartition("-")[2]
    if part == "checkpoint":
        return checkpoint(work)
    if part == "calibrate":
        return calibrate(work)
    if part.startswith("export"):
        return export(work, kind)
    if part.startswith("stages"):
        return stages(work, kind)
    return run(work) if part.startswith("run") else reference(work)


def verdicts(parts: dict[str, Any], size: str) -> dict[str, bool]:
    """Which targets hold, of those that were measured; targets for sizes are the 7B's."""
    held = {}
    exports = [parts[part] for part in ("export-gptq4", "export-16", "export-plan") if part in parts]
    if exports:
        held["export_peak_rss_bytes"] = max(part["peak_rss_bytes"] for part in exports) <= TARGETS["export_peak_rss_bytes"]
    if "export-gptq4" in parts and size.startswith("7b"):
        held["gptq4_disk_bytes"] = parts["export-gptq4"]["disk_bytes"] <= TARGETS["gptq4_disk_bytes"]
        held["gptq4_weight_bytes"] = parts["export-gptq4"]["weight_bytes"] <= TARGETS["gptq4_weight_bytes"]
    for part in ("stages-gptq4", "stages-16", "stages-plan"):
        if part in parts:
            held[part] = parts[part]["worst_relative_error"] <= TOLERANCE["stage_relative_error"]
    if "run-gptq4" in parts:
        held["run_peak_rss_bytes"] = parts["run-gptq4"]["peak_rss_bytes"] <= TARGETS["run_peak_rss_bytes"]
        held["run_finite"] = parts["run-gptq4"]["finite"]
    if "reference-gptq4" in parts:
        told = parts["reference-gptq4"]
        least, most = told["map_range"]
        held["run_as_reference"] = told["same_answer"] and told["map_max_abs"] <= TOLERANCE["map_share_of_range"] * (most - least)
    return held


def _write(output: Path, result: dict[str, Any]) -> bool:
    """Write what was measured so far; whether all of it is as it should be."""
    result |= {"held": verdicts(result["parts"], result["size"]), "environment": environment()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    return all(result["held"].values())


def refusal(work: Work, found: dict[str, Any]) -> str | None:
    """Why parts cannot be added to what an output holds, with what to do; None where they can.

    Args:
        found: the output's content; a setting that an older one does not tell is taken as what is asked for.
    """
    differing = [name for name, value in work.settings.items() if found.get(name, value) != value]
    if differing:
        expected, got = (", ".join(f"--{name} {of[name]}" for name in differing) for of in (found, work.settings))
        return f"--output: expected {expected}, which it was measured with, got {got}; give those, or choose another output"
    config, (model, _, depth) = work.random_checkpoint / "config.json", work.size.partition("-")
    if work.checkpoint != config.parent or not config.exists():
        return None
    expected, name = MODELS[model] + ("_reduced" if depth else ""), json.loads(config.read_text())["name"]
    if name != expected:
        return f"--work: expected {expected}, the model of --size {work.size}, in {config.parent}, got {name}; take another or remove it"
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every part was done and every target held, 1 when one did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b-reduced")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles go: 35 GB free, or 43 with --keep")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder to take in place of a random one")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="of the 16-bit export (default fp16)")
    parser.add_argument("--head", choices=("float", "int8"), default="float", help="of the 4-bit export (default float)")
    parser.add_argument("--pictures", type=int, default=2, help="that calibrate sees (default 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS + WITH_A_PLAN, default=PARTS)
    parser.add_argument("--again", action="store_true", help="do parts again that the output has already")
    parser.add_argument("--keep", action="store_true", help="keep the bundles")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS + WITH_A_PLAN, help=argparse.SUPPRESS)  # what a child process does
    options = parser.parse_args(arguments)
    checkpoint_folder = options.checkpoint or options.work / "checkpoint"
    work = Work(options.work, checkpoint_folder, options.size, options.precision, options.head, options.pictures)
    if options.part:
        print(json.dumps(do(options.part, work)))
        return 0
    work.folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    if why := refusal(work, found):
        parser.error(why)
    result: dict[str, Any] = work.settings | {"targets": TARGETS, "tolerance": TOLERANCE, "parts": found.get("parts", {})}
    for part in options.parts:
        if part in result["parts"] and not options.again:
            continue
        _say(part)
        if part == "calibrate" and options.again:
            result["parts"].pop(part, None)  # of the plan that goes; stopped, the same command without --again goes on with the new one
            _write(options.output, result)
            for folder in filter(Path.exists, (work.plan, work.unfinished_plan)):
                shutil.rmtree(folder)
        own = ["--size", work.size, "--work", work.folder, "--checkpoint", work.checkpoint, "--precision", work.precision]
        own += ["--head", work.head, "--pictures", work.pictures, "--output", options.output, "--part", part]
        command = [sys.executable, "-m", "benchmarks.full_size", *map(str, own)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            _say(f"{part} failed with code {finished.returncode}")
            return 1
        result["parts"][part] = json.loads(finished.stdout.splitlines()[-1])
        _write(options.output, result)
        _say(json.dumps(result["parts"][part])[:400])
        if not options.keep and part in LAST_USE:
            shutil.rmtree(work.bundle(LAST_USE[part]))
    return 0 if _write(options.output, result) else 1


if __name__ == "__main__":
    sys.exit(main())
