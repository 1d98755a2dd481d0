"""What OpenVINO is told beforehand changes no result: sizes that a stage fixes, and means over a picture's blocks as convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from engines import EngineOptions
from engines.errors import TensorMismatch
from engines.openvino import OpenVinoEngine, known, pools_as_convolutions
from engines.spec import StageSpec, TensorSpec
from runtime.bundle import Bundle
from runtime.verify import open_pipeline

SPEC = StageSpec("a", (TensorSpec("image", "float32", ("B", 3, "S", "S")),), (TensorSpec("mean", "float32", ("B", 3, "G", "G")),))


def pooled(channels: int, stride: int = 4, pad: int = 0, batch: int = -1) -> openvino.Model:
    image = opset13.parameter([batch, channels, 8, 12], openvino.Type.f32, "image")
    image.output(0).set_names({"image"})
    mean = opset13.avg_pool(image, [stride, stride], [pad, pad], [pad, pad], [4, 4], True)
    return openvino.Model([mean], [image], "pool")


def kinds(model: openvino.Model) -> set[str]:
    return {node.get_type_name() for node in model.get_ops()}


def result(model: openvino.Model, image: np.ndarray) -> np.ndarray:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return np.array(openvino.Core().compile_model(model, "CPU", settings)([image])[0])


def test_a_stage_with_fixed_axes_refuses_other_sizes_and_keeps_the_rest_open() -> None:
    fixed = SPEC.fixed({"B": 1})
    assert fixed.inputs[0].shape == (1, 3, "S", "S") and SPEC.inputs[0].shape == ("B", 3, "S", "S")
    fixed.check_inputs({"image": np.zeros((1, 3, 5, 5), np.float32)})
    with pytest.raises(TensorMismatch, match="must be 1"):
        fixed.check_inputs({"image": np.zeros((2, 3, 5, 5), np.float32)})


def test_only_inputs_that_a_stage_fixes_and_the_graph_leaves_open_are_known() -> None:
    assert known(pooled(3), SPEC.fixed({"B": 1})).keys() == {"image"}
    assert known(pooled(3, batch=1), SPEC.fixed({"B": 1})) == {}
    loose = StageSpec("a", (TensorSpec("image", "float32", ("B", "C", "S", "S")),), ())
    assert known(pooled(3), loose) == {}


def test_what_the_graph_fixes_stays_fixed_where_the_stage_has_a_letter() -> None:
    assert known(pooled(3), SPEC.fixed({"B": 1}))["image"] == openvino.PartialShape([1, 3, 8, 12])
    image = opset13.parameter([-1, 3, 8, -1], openvino.Type.f32, "image")
    image.output(0).set_names({"image"})
    model = openvino.Model([opset13.relu(image)], [image], "open")
    assert known(model, SPEC.fixed({"B": 1}))["image"] == openvino.PartialShape([1, 3, 8, -1])


def test_a_pictures_encoder_is_compiled_for_one_size(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle, check_hashes=False)
    stage = open_pipeline(bundle, "openvino", EngineOptions()).stages["pixel_encoder"]
    assert isinstance(stage, OpenVinoEngine)
    size = bundle.manifest.preprocessing.pixel_size
    (image,) = stage._compiled._parts[0].inputs
    assert image.get_partial_shape() == openvino.PartialShape([1, 3, size, size])


def language_stage(bundle: Bundle) -> OpenVinoEngine:
    stage = open_pipeline(bundle, "openvino", EngineOptions()).stages["language"]
    assert isinstance(stage, OpenVinoEngine)
    return stage


def sizes_of(stage: OpenVinoEngine) -> list[str]:
    """Which of its two forms computes: of the first pass over a picture, and of one token after it."""
    told = []

    class Told:
        def __init__(self, name: str, compiled: Any) -> None:
            self.name, self.compiled = name, compiled

        def takes(self, feeds: dict[str, np.ndarray]) -> bool:
            return bool(self.compiled.takes(feeds))

        def run(self, *arguments: Any) -> dict[str, np.ndarray]:
            told.append(self.name)
            return self.compiled.run(*arguments)  # type: ignore[no-any-return]

    stage._compiled = Told("any", stage._compiled)  # type: ignore[assignment]
    stage._usual = Told("usual", stage._usual) if stage._usual else None  # type: ignore[assignment]
    return told


def test_the_usual_question_has_a_form_of_its_own_with_the_same_results(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle, check_hashes=False)
    pipeline = open_pipeline(bundle, "openvino", EngineOptions())
    stage = pipeline.stages["language"]
    assert isinstance(stage, OpenVinoEngine)
    told = sizes_of(stage)
    image, prompt = bundle.golden()["0.image"], pipeline.prompts.encode()
    usual = pipeline.run(image, prompt)
    assert told == ["usual"]
    stage._usual = None
    assert np.allclose(usual.anomaly_map, pipeline.run(image, prompt).anomaly_map, atol=1e-5)
    assert told == ["usual", "any"]


def test_other_words_go_through_the_form_that_takes_any_number_of_tokens(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle, check_hashes=False)
    pipeline = open_pipeline(bundle, "openvino", EngineOptions())
    told = sizes_of(pipeline.stages["language"])  # type: ignore[arg-type]
    pipeline.run(bundle.golden()["0.image"], pipeline.prompts.encode("Are there any scratches on the lower half of it?"))
    assert set(told) == {"any"}


def test_weights_are_held_twice_only_where_they_are_few(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(tiny_bundle, check_hashes=False)
    assert language_stage(bundle)._usual is not None
    monkeypatch.setattr("engines.openvino.TWICE_BYTES", 1000)
    assert language_stage(bundle)._usual is None


def test_a_stage_that_expects_sizes_takes_others_all_the_same() -> None:
    expecting = SPEC.expecting({"S": 8})
    assert expecting.usual == (("S", 8),) and expecting.inputs == SPEC.inputs
    expecting.check_inputs({"image": np.zeros((1, 3, 5, 5), np.float32)})
    assert expecting.fixed({"B": 1}).usual == (("S", 8),)


def test_means_over_blocks_of_a_picture_are_the_same_as_convolutions() -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 12)).astype(np.float32)
    model = pooled(3)
    pools_as_convolutions(model)
    assert "Convolution" in kinds(model) and "AvgPool" not in kinds(model)
    slow = image.reshape(2, 3, 2, 4, 3, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(result(model, image), slow, atol=1e-6)
    np.testing.assert_allclose(result(pooled(3), image), slow, atol=1e-6)


@pytest.mark.parametrize("model", [pooled(16), pooled(3, stride=2), pooled(3, pad=1)], ids=["many channels", "overlap", "padding"])
def test_other_means_stay_as_they_are(model: openvino.Model) -> None:
    pools_as_convolutions(model)
    assert "AvgPool" in kinds(model) and "Convolution" not in kinds(model)
