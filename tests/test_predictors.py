"""What predicts in an evaluation: what each source takes, is asked and tells of itself."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import agvas.checkpoint
from agvas.training.sources.manifest import read_manifest
from benchmarks.evaluation import evaluate
from benchmarks.predictors import Question, Source, open_predictor, read_normal_text
from runtime.masking import MaskRule


def test_exactly_one_source_of_predictions_is_asked_for() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Source()
    with pytest.raises(ValueError, match="exactly one"):
        Source(bundle=Path("b"), baseline="constant")


INSTRUCTIONS = {"direct": "Segment.", "describe-then-segment-plus": "Describe."}


@dataclass(frozen=True)
class FakeDecoder:
    threshold: float = 0.5
    relative_threshold: float = 1.0
    fusion_weight: float = 0.5

    @property
    def mask_rule(self) -> MaskRule:
        return MaskRule(self.threshold, self.relative_threshold)


@dataclass(frozen=True)
class FakeConfig:
    name: str = "fake"
    mask_decoder: FakeDecoder = FakeDecoder()
    prompts: Any = field(default_factory=lambda: SimpleNamespace(instructions=INSTRUCTIONS))


def test_the_fusion_weight_changes_a_real_models_map(parts: Path, tiny_checkpoint: Path) -> None:
    (item, *_) = read_manifest(parts)
    maps = [open_predictor(Source(checkpoint=str(tiny_checkpoint), fusion_weight=weight))(item).anomaly_map for weight in (0.0, 0.5, 1.0)]
    assert np.abs(maps[0] - maps[2]).max() > 1e-3
    assert np.allclose((maps[0] + maps[2]) / 2, maps[1], atol=1e-5)  # resampling is linear


class FakeModel:
    """Stands for runtime.Segmenter and for agvas's model: one object, asked in two ways."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        self.given, self.settings, self.overshoot = given, settings, np.float32(5e-5)
        self.asked: list[tuple[Any, ...]] = []
        told = {"model": "fake", "precision": {"spam": "fp16"}, "lmm": "float", "fusion_weight": 0.5}
        manifest = SimpleNamespace(prompts=SimpleNamespace(instructions=INSTRUCTIONS), **told)
        self.bundle = SimpleNamespace(manifest=manifest, folder=given[0], id="0a")
        self.engine, self.inference_precision, self.device = "openvino", "bf16", settings.get("device")
        self.rule = MaskRule(0.5, 0.8).changed(settings.get("threshold"), settings.get("relative_threshold"))
        self.config, self.mask_decoder = FakeConfig(), SimpleNamespace(fusion_weight=0.5)
        self.region = None

    def to(self, device: str) -> FakeModel:
        self.settings["device"] = device
        return self

    def parameters(self) -> Any:
        return iter([SimpleNamespace(dtype="torch.float32")])

    def segment(self, image: np.ndarray, *asked: Any) -> SimpleNamespace:
        self.asked.append(asked)
        mask = image[..., 0] == 255
        return SimpleNamespace(anomaly_map=mask.astype(np.float32) + self.overshoot, mask=mask, score=np.float32(0.25), text="said")

    def __call__(self, path: Path, *asked: Any) -> SimpleNamespace:
        with Image.open(path) as opened:
            return self.segment(np.asarray(opened), *asked)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """The models opened so far, by modules that stand in the place of runtime and agvas, on a machine with two GPUs."""
    models: list[FakeModel] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def make(*given: Any, **settings: Any) -> FakeModel:
        models.append(FakeModel(*given, **settings))
        return models[-1]

    images = SimpleNamespace(read_image=lambda path: np.asarray(Image.open(path)))
    monkeypatch.setitem(sys.modules, "runtime", SimpleNamespace(Segmenter=make))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "runtime.images", images)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "agvas", SimpleNamespace(load=make))  # type: ignore[arg-type]
    return models


def test_a_bundle_gets_the_settings_that_were_asked_for(opened: list[FakeModel]) -> None:
    open_predictor(Source(bundle=Path("b")))
    given = {"threshold": 0.2, "relative_threshold": 0.4, "tile": 500, "tile_overlap": 60, "region": "r.png", "threads": 2}
    none = dict.fromkeys(given) | {"threads": 0}
    open_predictor(Source(bundle=Path("b"), engine="openvino", device="cuda:1", inference_precision="bf16", **given))
    assert [model.given for model in opened] == [(Path("b"),)] * 2
    assert [model.settings for model in opened] == [
        {"engine": "auto", "device": "cpu", "inference_precision": None, **none},
        {"engine": "openvino", "device": "cuda:1", "inference_precision": "bf16", **given},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "nano", "inference_precision": "bf16"}, "only a bundle has one, got bf16"),
        ({"bundle": Path("b"), "fusion_weight": 0.3}, "only a checkpoint's"),
        ({"baseline": "median", "threshold": 0.3}, "^threshold: a baseline's is fixed"),
        ({"baseline": "median", "relative_threshold": 0.3}, "^relative threshold: a baseline's is fixed.*--relative-threshold"),
        ({"bundle": Path("b"), "relative_threshold": -0.1}, "relative threshold: expected a number in 0..1, got -0.1; 1 is"),
        ({"checkpoint": "nano", "tile": 500}, "^tile: only a bundle sees pictures in tiles, got 500; leave --tile out"),
        ({"checkpoint": "nano", "region": "r.png"}, "^region: only a bundle judges one, got r.png; leave --region out"),
        ({"checkpoint": "nano", "threads": 2}, "^threads: only a bundle is told how many, got 2; leave --threads out"),
        ({"baseline": "median", "tile_overlap": 5}, "^tile overlap: only a bundle.*leave --tile-overlap out"),
        ({"baseline": "medium"}, "did you mean 'median'"),
        ({"checkpoint": "nano", "threshold": 1.5}, "threshold: expected a number in 0..1, got 1.5"),
        ({"checkpoint": "nano", "fusion_weight": -1.0}, "fusion weight: expected a number in 0..1"),
    ],
)
def test_a_setting_that_its_source_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_a_checkpoints_threshold_and_fusion_weight_can_be_swept(opened: list[FakeModel]) -> None:
    open_predictor(Source(checkpoint="nano", threshold=0.2, relative_threshold=0.4, fusion_weight=0.9))
    (model,) = opened
    assert model.config.mask_decoder == FakeDecoder(threshold=0.2, relative_threshold=0.4, fusion_weight=0.9)
    assert model.mask_decoder.fusion_weight == 0.9


def test_what_was_judged_is_told_with_the_settings_that_were_used_and_without_paths(opened: list[FakeModel], tmp_path: Path) -> None:
    """`auto` chose an engine, and a threshold that was not given is the model's own."""
    bundle = open_predictor(Source(bundle=tmp_path / "line-3")).judged
    assert bundle == {
        "kind": "bundle",
        "name": "line-3",
        "manifest_sha256": "0a",
        "model": "fake",
        "precision": {"spam": "fp16"},
        "lmm": "float",
        "engine": "openvino",
        "inference_precision": "bf16",
        "device": "cpu",
        "threshold": 0.5,
        "relative_threshold": 0.8,
        "fusion_weight": 0.5,
    }
    checkpoint = open_predictor(Source(checkpoint="nano", threshold=0.2)).judged
    weights = (Path(agvas.checkpoint.__file__).parent / "nano" / "model.safetensors").read_bytes()
    assert checkpoint == {
        "kind": "checkpoint",
        "name": "nano",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": "fake",
        "engine": "torch",
        "inference_precision": "float32",
        "device": "cpu",
        "threshold": 0.2,
        "relative_threshold": 1.0,
        "fusion_weight": 0.5,
    }
    baseline = open_predictor(Source(baseline="median")).judged
    assert baseline == {
        "kind": "baseline",
        "name": "median",
        "engine": None,
        "inference_precision": None,
        "device": "cpu",
        "threshold": 0.5,
        "relative_threshold": None,
        "fusion_weight": None,
    }


@pytest.mark.parametrize("source", [Source(bundle=Path("b")), Source(checkpoint="nano")])
def test_every_picture_is_asked_the_question(parts: Path, opened: list[FakeModel], source: Source) -> None:
    evaluate(read_manifest(parts)[:1], open_predictor(source))
    evaluate(read_manifest(parts)[:1], open_predictor(source, Question("segment-then-explain", "Where is rust?")))
    plus = Question("describe-then-segment-plus", normal_text={"bolt": "A bolt is straight. ", "nut": "A nut is round."})
    evaluate(read_manifest(parts)[:2], open_predictor(source, plus))
    assert [model.asked for model in opened] == [
        [(None, "direct")],
        [("Where is rust?", "segment-then-explain")],
        [("A bolt is straight. Describe.", plus.mode), ("A nut is round. Describe.", plus.mode)],
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "guess"}, "expected one of direct"),
        ({"mode": "describe-then-segment-plus"}, "got none; give one"),
        ({"normal_text": "It is round."}, "only describe-then-segment-plus takes it"),
    ],
)
def test_a_question_that_no_mode_takes_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Question(**settings)


def test_normal_texts_are_read_from_a_file_and_lacking_categories_named(tmp_path: Path) -> None:
    path = tmp_path / "normal.json"
    path.write_text('{"bolt": "A bolt is straight."}')
    texts = read_normal_text(str(path))
    assert texts == {"bolt": "A bolt is straight."}
    assert read_normal_text("It is round.") == "It is round."
    for wrong, named in ((str(tmp_path / "normal.txt"), "got the path"), (str(tmp_path), "got the path"), ("gone.json", "gone.json")):
        with pytest.raises(ValueError, match=f"--normal-text: expected .*{named}"):
            read_normal_text(wrong)
    with pytest.raises(ValueError, match="got none for gear, nut"):
        Question("describe-then-segment-plus", normal_text=texts).check(["nut", "bolt", "gear"])
    for content in ("[1]", '{"bolt": 3}', '{"bolt": " "}', "bolt"):
        path.write_text(content)
        with pytest.raises(ValueError, match="normal.json"):
            read_normal_text(str(path))


@pytest.mark.parametrize("source", [Source(bundle=Path("b"), device="cpu"), Source(checkpoint="nano", device="cuda:0")])
def test_a_models_map_that_leaves_0_to_1_by_rounding_is_judged_and_one_that_leaves_it_by_more_refused(
    parts: Path, opened: list[FakeModel], source: Source
) -> None:
    predict = open_predictor(source)
    (model,) = opened
    assert model.settings.get("device") == source.device
    assert evaluate(read_manifest(parts), predict)["mean"]["ap"] == 1.0
    model.overshoot = np.float32(0.01)
    with pytest.raises(ValueError, match="to 1.01"):
        evaluate(read_manifest(parts), predict)
