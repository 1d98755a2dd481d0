"""What predicts in an evaluation: a bundle, a checkpoint, a trivial baseline or another package's detector, and what it is asked.

All are asked in one form, a function of a picture. Models are loaded when they are opened, so that nothing heavy is imported for
a command's help. Nothing falls back: a setting that the source does not have is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agvas.config import ROLES, AGVASConfig
from benchmarks.datasets import Judged
from benchmarks.evaluation import Predict, Prediction
from runtime.errors import choose
from runtime.prompts import DIRECT, MODES, PLUS, with_normal_state
from runtime.recipe import OF_SEGMENTER, Recipe
from runtime.segmentation import MAP_SLACK

__all__ = ["BASELINES", "Predictor", "Question", "Source", "open_predictor", "read_normal_text"]

BASELINES = ("constant", "median", "gradient")  # as in baselines.py, which loads OpenCV; a test compares the two


@dataclass(frozen=True)
class Source:
    """Exactly one of a bundle, a checkpoint ("nano" or a folder), a baseline's name and a detector's .xml, and how it is run.

    Attributes:
        engine, inference_precision: for a bundle; None means auto, and what Segmenter makes of None.
        device: for a bundle or checkpoint; None means cpu.
        threshold, relative_threshold: for a bundle or checkpoint, in 0..1 (runtime.masking); None means its own.
        tile, tile_overlap: for a bundle, in pixels: see large pictures in tiles (runtime.tiling); None sees them whole.
        region: for a bundle, the file of a region that pictures are judged in alone (runtime.region).
        threads: for a bundle, of the CPU, as Segmenter takes them; None leaves it to the engine, as its 0 does.
        fusion_weight: for a checkpoint, the weight of the absolute map (eq. 8), in 0..1; None means its own. In a bundle it is built in.
        recipe: for a bundle, all of its settings, of which this has a part (see of_recipe), and what is asked in place of a Question.
    """

    bundle: Path | None = None
    checkpoint: str | None = None
    baseline: str | None = None
    engine: str | None = None
    device: str | None = None
    inference_precision: str | None = None
    threshold: float | None = None
    relative_threshold: float | None = None
    fusion_weight: float | None = None
    detector: Path | None = None
    tile: int | None = None
    tile_overlap: int | None = None
    region: str | None = None
    threads: int | None = None
    recipe: Recipe | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Source:
        """A station's bundle, run as its recipe says."""
        names = {field.name for field in dataclasses.fields(cls)} & {*OF_SEGMENTER}
        return cls(Path(recipe.bundle), **{name: getattr(recipe, name) for name in names}, recipe=recipe)

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.bundle, self.checkpoint, self.baseline, self.detector)) != 1:
            raise ValueError("expected exactly one of bundle, checkpoint, baseline and detector; give one")
        if self.baseline is not None:
            choose("--baseline", self.baseline, BASELINES)
        if self.engine is not None and self.bundle is None:
            raise ValueError(f"engine: only a bundle has engines, got {self.engine}; leave --engine out or give --bundle")
        if self.inference_precision is not None and self.bundle is None:
            raise ValueError(f"inference precision: only a bundle has one, got {self.inference_precision}; leave --inference-precision out")
        if self.threads is not None and self.bundle is None:
            raise ValueError(f"threads: only a bundle is told how many, got {self.threads}; leave --threads out or give --bundle")
        if self.region is not None and self.bundle is None:
            raise ValueError(f"region: only a bundle judges one, got {self.region}; leave --region out or give --bundle")
        for name, pixels in (("tile", self.tile), ("tile overlap", self.tile_overlap)):
            if pixels is not None and self.bundle is None:
                raise ValueError(f"{name}: only a bundle sees pictures in tiles, got {pixels}; leave --{name.replace(' ', '-')} out")
        ours = self.bundle is not None or self.checkpoint is not None
        kind = "baseline" if self.detector is None else "detector"
        if self.device is not None and not ours:
            raise ValueError(f"device: a {kind} runs on the CPU, got {self.device}; leave --device out")
        thresholds = {"threshold": self.threshold, "relative threshold": self.relative_threshold}
        for name, value in thresholds.items():
            if value is not None and not ours:
                raise ValueError(f"{name}: a {kind}'s is fixed, got {value}; leave --{name.replace(' ', '-')} out")
        if self.fusion_weight is not None and self.checkpoint is None:
            raise ValueError(
                f"fusion weight: only a checkpoint's can be changed, got {self.fusion_weight}; "
                "leave --fusion-weight out or give --checkpoint"
            )
        for name, value in {**thresholds, "fusion weight": self.fusion_weight}.items():
            if value is not None and not 0 <= value <= 1:
                usual = 1 if name == "relative threshold" else 0.5
                raise ValueError(f"{name}: expected a number in 0..1, got {value}; {usual} is the paper's")


@dataclass(frozen=True)
class Question:
    """What every picture is asked.

    Attributes:
        mode: one of runtime.prompts.MODES; a mode that the model was not trained for is its own error.
        instruction: None for the mode's default.
        normal_text: describe-then-segment-plus only, and there required: a sentence on what a normal object looks like, for all categories
            or by category. It is put before the instruction (paper §4.3, table 4).
    """

    mode: str = DIRECT
    instruction: str | None = None
    normal_text: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        choose("--mode", self.mode, MODES)
        if self.mode == PLUS and not self.normal_text:
            raise ValueError(f"--normal-text: {PLUS} puts a sentence on the normal state before the instruction, got none; give one")
        if self.mode != PLUS and self.normal_text is not None:
            raise ValueError(f"--normal-text: only {PLUS} takes it, got mode {self.mode}; leave it out or give --mode {PLUS}")

    def check(self, categories: Iterable[str]) -> None:
        """ValueError where a category has no sentence."""
        if isinstance(self.normal_text, Mapping):
            lacking = sorted(set(categories) - self.normal_text.keys())
            if lacking:
                raise ValueError(f"--normal-text: expected a sentence for each category, got none for {', '.join(lacking)}; add them")

    def text(self, category: str, defaults: Mapping[str, str]) -> str | None:
        """The instruction for a picture of this category, given the model's by mode; None for the model's own."""
        if self.normal_text is None:
            return self.instruction
        instruction = self.instruction if self.instruction is not None else defaults.get(self.mode)
        if instruction is None:
            return None  # the model lacks the mode and says so itself
        normal = self.normal_text if isinstance(self.normal_text, str) else self.normal_text[category]
        return with_normal_state(instruction, normal)


def read_normal_text(text: str) -> str | dict[str, str]:
    """The sentence itself, or of FILE.json an object of sentences by category; ValueError, naming the file, for another content."""
    if not text.endswith(".json"):
        if os.path.exists(text) or (os.sep in text and not any(letter.isspace() for letter in text)):
            raise ValueError(f"--normal-text: expected a sentence or FILE.json, got the path {text}; give one of the two")
        return text
    try:
        sentences = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--normal-text: expected a readable file, got {error}; check the path") from error
    except ValueError as error:
        raise ValueError(f"{text}: expected JSON, got {error}; write an object of sentences by category") from error
    good = isinstance(sentences, dict) and all(isinstance(value, str) and value.strip() for value in sentences.values())
    if not good:
        raise ValueError(f"{text}: expected an object of sentences by category, got something else; write {{category: sentence}}")
    return dict(sentences)


@dataclass(frozen=True, eq=False)
class Predictor:
    """What predicts, a function of a picture, and who that is.

    Attributes:
        judged: for the result's reader. Always there: kind (bundle, checkpoint, baseline or detector), name (without its path), engine,
            inference_precision, device, threshold, relative_threshold and fusion_weight as they were used; None where there is no such
            thing. Models have theirs and a sha256, of the bundle's manifest or the weights; bundles precision and lmm as the
            manifest has them, and a recipe's sha256 where one set them.
        region: bool [H, W], what is judged of every picture; None for all of it.
    """

    predict: Predict
    judged: Mapping[str, Any]
    region: npt.NDArray[np.bool_] | None = None

    def __call__(self, item: Judged) -> Prediction:
        return self.predict(item)


def open_predictor(source: Source, question: Question | None = None, tell: Callable[[str], None] | None = None) -> Predictor:
    """What predicts; by default it is asked directly. `tell` is given a line before `auto` opens a bundle, which may take a minute."""
    asked = question or Question()
    if source.bundle is not None:
        return _bundle_predictor(source, asked, tell)
    if source.checkpoint is not None:
        return _checkpoint_predictor(source, asked)
    if asked != Question():
        kind = "baseline" if source.detector is None else "detector"
        raise ValueError(f"--mode, --instruction: a {kind} reads no words, got mode {asked.mode}; leave them out")
    if source.detector is not None:
        return _detector_predictor(source.detector)
    assert source.baseline is not None
    return _baseline_predictor(source.baseline)


def _bundle_predictor(source: Source, question: Question, tell: Callable[[str], None] | None) -> Predictor:
    from runtime import Segmenter

    engine = source.engine or "auto" if source.recipe is None else source.recipe.engine
    if tell is not None and engine == "auto":
        from runtime.cli.common import opening

        tell(opening(str(source.bundle)))

    settings: dict[str, Any] = {
        "inference_precision": source.inference_precision,
        "threshold": source.threshold,
        "relative_threshold": source.relative_threshold,
        "tile": source.tile,
        "tile_overlap": source.tile_overlap,
        "region": source.region,
        "threads": source.threads or 0,
    }
    if source.recipe is not None:
        segmenter = source.recipe.open()
    else:
        segmenter = Segmenter(source.bundle or "", engine=engine, device=source.device or "cpu", **settings)
    defaults = segmenter.bundle.manifest.prompts.instructions

    def predict(item: Judged) -> Prediction:
        if source.recipe is not None:
            return _prediction(segmenter(item.image, **source.recipe.request))
        return _prediction(segmenter(item.image, question.text(item.category, defaults), question.mode))

    manifest = segmenter.bundle.manifest
    judged = {
        "kind": "bundle",
        "name": segmenter.bundle.folder.resolve().name,
        "manifest_sha256": segmenter.bundle.id,
        "model": manifest.model,
        "precision": manifest.precision,
        "lmm": manifest.lmm,
        "engine": segmenter.engine,
        "inference_precision": segmenter.inference_precision,
        "device": segmenter.device,
        "threshold": segmenter.rule.threshold,
        "relative_threshold": segmenter.rule.relative_threshold,
        "fusion_weight": manifest.fusion_weight,
    }
    if source.recipe is not None:
        judged["recipe_sha256"] = source.recipe.sha256
    return Predictor(predict, judged, segmenter.region)


def _checkpoint_predictor(source: Source, question: Question) -> Predictor:
    import agvas
    from agvas.checkpoint import checkpoint_folder, open_checkpoint, weight_files
    from agvas.training.device import check_device
    from runtime.bundle import sha256_of
    from runtime.images import read_image

    if source.device is not None:
        check_device(source.device)  # first: a 7B is read for minutes
    if source.fusion_weight is not None:
        _check_fusion(open_checkpoint(source.checkpoint or "").config)
    model = agvas.load(source.checkpoint or "")
    if source.device is not None:
        model = model.to(source.device)
    # The thresholds are read from the config at every picture, the weight was copied from it when the decoder was made.
    decoder = model.config.mask_decoder
    decoder = dataclasses.replace(decoder, **dataclasses.asdict(decoder.mask_rule.changed(source.threshold, source.relative_threshold)))
    if source.fusion_weight is not None:
        decoder = dataclasses.replace(decoder, fusion_weight=source.fusion_weight)
        model.mask_decoder.fusion_weight = source.fusion_weight
    model.config = dataclasses.replace(model.config, mask_decoder=decoder)
    defaults = model.config.prompts.instructions

    def predict(item: Judged) -> Prediction:
        return _prediction(model.segment(read_image(item.image), question.text(item.category, defaults), question.mode))

    folder = checkpoint_folder(source.checkpoint or "")
    hashes = [sha256_of(file) for file in weight_files(folder)]  # of one in shards or parts, the sha256 of theirs in a row
    judged = {
        "kind": "checkpoint",
        "name": folder.resolve().name,
        "weights_sha256": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "model": model.config.name,
        "engine": "torch",
        "inference_precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": source.device or "cpu",
        "threshold": decoder.threshold,
        "relative_threshold": decoder.relative_threshold,
        "fusion_weight": decoder.fusion_weight,
    }
    return Predictor(predict, judged)


def _check_fusion(config: AGVASConfig) -> None:
    if len(config.mask_decoder.roles) < len(ROLES):
        raise ValueError(
            f"fusion weight: expected a checkpoint with all of {', '.join(ROLES)}, whose maps it weighs, got {config.name} with "
            f"{', '.join(config.mask_decoder.roles)} alone; leave --fusion-weight out"
        )


def _prediction(result: Any) -> Prediction:
    """Of a model's result. Resampling leaves [0, 1] by rounding, which is undone here; more is left, to be refused."""
    anomaly_map = np.asarray(result.anomaly_map)
    if anomaly_map.size and anomaly_map.min() >= -MAP_SLACK and anomaly_map.max() <= 1 + MAP_SLACK:
        anomaly_map = anomaly_map.clip(0, 1)
    return Prediction(anomaly_map, np.asarray(result.mask), float(result.score), str(result.text))


def _detector_predictor(path: Path) -> Predictor:
    """Its masks are its own, by the threshold that anomalib put into its graph."""
    from benchmarks.detectors import Detector
    from runtime.bundle import sha256_of
    from runtime.images import read_image

    detector = Detector(path)

    def predict(item: Judged) -> Prediction:
        found = detector(read_image(item.image))
        return Prediction(found.anomaly_map(), found.mask(), found.score)

    judged = {
        "kind": "detector",
        "name": path.stem,
        "weights_sha256": sha256_of(path.with_suffix(".bin")),
        "engine": "openvino",
        "inference_precision": detector.precision,
        "device": "cpu",
    }
    return Predictor(predict, judged | dict.fromkeys(("threshold", "relative_threshold", "fusion_weight")))


def _baseline_predictor(baseline: str) -> Predictor:
    from benchmarks import baselines
    from runtime.images import read_image

    name = next((known for known in baselines.BASELINES if known == baseline), None)
    if name is None:
        raise ValueError(f"baseline: expected one of {', '.join(baselines.BASELINES)}, got {baseline}")

    def predict(item: Judged) -> Prediction:
        anomaly_map = baselines.anomaly_map(name, read_image(item.image))
        return Prediction(anomaly_map, anomaly_map > baselines.THRESHOLD, float(anomaly_map.max()))

    judged = {"kind": "baseline", "name": baseline, "threshold": baselines.THRESHOLD, "device": "cpu"}
    return Predictor(predict, judged | dict.fromkeys(("engine", "inference_precision", "relative_threshold", "fusion_weight")))
