"""Verification: a bundle's golden traces pass where nothing changed, and where something did the broken gates are named."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from engines import EngineFailed, EngineOptions, StageSpec
from runtime import verify as verify_module
from runtime.bundle import Bundle, FileRecord, Manifest, sha256_of
from runtime.contract import STAGES
from runtime.errors import BundleCorrupt
from runtime.parity import GATES, Outcome, Parity, compare, relative_error, together
from runtime.pipeline import Stage
from runtime.verify import (
    Verification,
    compare_on_images,
    gates_for,
    open_pipeline,
    peak_rss_bytes,
    run_outcome,
    summary,
    trace_count,
    verify,
)

HERE = ("onnxruntime", "openvino")
RNG = np.random.default_rng(0)


def verified(folder: Path, engine: str = "onnxruntime") -> Verification:
    bundle, options = Bundle(folder), EngineOptions()
    return verify(bundle, open_pipeline(bundle, engine, options), options)


def sealed(folder: Path) -> Path:
    """Make the manifest tell the sizes and hashes of the files as they are now."""
    path = folder / "manifest.json"
    manifest = Manifest.from_json(path.read_text())
    files = {name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in manifest.files}
    path.write_text(replace(manifest, files=files).to_json())
    return folder


def perturbed(folder: Path, stage: str, strength: float) -> Path:
    """The bundle with noise on a stage's weights, its manifest in order."""
    path = folder / stage / f"{stage}.data"
    weights = np.fromfile(path, np.float32)
    noise = np.random.default_rng(1).normal(0, strength, weights.size)
    (weights + noise).astype(np.float32).tofile(path)
    return sealed(folder)


@pytest.mark.parametrize("engine", HERE)
def test_a_bundle_gives_its_own_golden_masks(engine: str, tiny_bundle: Path) -> None:
    verification = verified(tiny_bundle, engine)
    parity = verification.parity
    assert verification.passed and not verification.failures
    assert (parity.mask_iou_min, parity.flips, parity.answers_changed) == (1.0, 0, 0)
    assert parity.images == parity.compared == trace_count(Bundle(tiny_bundle).golden()) >= 3
    assert parity.map_max_abs < 1e-5 and parity.anchor_cosine_min > 0.999999
    assert {"pixel_embeddings", "aligned_embeddings", "logits", "anomaly_map"} <= verification.stage_errors.keys()
    assert max(verification.stage_errors.values()) < 1e-5


def test_progress_counts_the_traces(tiny_bundle: Path) -> None:
    bundle, seen = Bundle(tiny_bundle), list[tuple[int, int]]()
    pipeline = open_pipeline(bundle, "onnxruntime", EngineOptions())
    verify(bundle, pipeline, EngineOptions(), lambda done, total: seen.append((done, total)))
    count = trace_count(bundle.golden())
    assert seen == [(done + 1, count) for done in range(count)]


@pytest.mark.parametrize("engine", HERE)
def test_other_weights_under_a_manifest_in_order_fail_the_gates_by_name(
    engine: str, copy_of_bundle: Callable[[], Path]
) -> None:
    verification = verified(perturbed(copy_of_bundle(), "mask_decoder", 0.1), engine)
    assert not verification.passed
    assert any("maps differ" in failure for failure in verification.failures)
    # The stage where the difference begins is told apart from those before it.
    assert verification.stage_errors["anomaly_map"] > 1e-3 > verification.stage_errors["pixel_embeddings"]


def test_a_difference_too_small_for_the_masks_is_still_found_in_the_maps(copy_of_bundle: Callable[[], Path]) -> None:
    verification = verified(perturbed(copy_of_bundle(), "pixel_encoder", 3e-3))
    assert verification.parity.map_max_abs > 1e-4
    assert any("maps differ by up to" in failure for failure in verification.failures)


def test_a_language_model_that_says_something_else_is_found_in_the_answers(copy_of_bundle: Callable[[], Path]) -> None:
    verification = verified(perturbed(copy_of_bundle(), "language", 0.5))
    assert not verification.passed
    assert any("answers" in failure for failure in verification.failures)


def test_traces_of_another_map_fail_though_the_engine_is_right(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    golden = Bundle(folder).golden()
    golden["1.map"] = np.ones_like(golden["1.map"]) - golden["1.map"]
    np.savez(folder / "golden.npz", **golden)  # type: ignore[arg-type]
    verification = verified(sealed(folder))
    assert any("mask IoU" in failure for failure in verification.failures)
    assert any("maps differ" in failure for failure in verification.failures)


class Changed:
    """A stage that ends in `error`, or computes NaN where there is none."""

    def __init__(self, stage: Stage, error: EngineFailed | None = None) -> None:
        self.stage, self.error = stage, error

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.error:
            raise self.error
        return {name: np.full(output.shape, np.nan, np.float32) for name, output in self.stage.run(feeds).items()}


@pytest.mark.parametrize(("stage", "output"), [("spam", "aligned_embeddings"), ("language", "logits")])
def test_nan_before_the_map_is_told_once_with_its_stage_and_the_tensors_up_to_there(stage: str, output: str, tiny_bundle: Path) -> None:
    bundle, options = Bundle(tiny_bundle), EngineOptions()
    pipeline = open_pipeline(bundle, "onnxruntime", options)
    pipeline.stages = {**pipeline.stages, stage: Changed(pipeline.stages[stage])}
    verification = verify(bundle, pipeline, options)
    told = [failure for failure in verification.failures if "computed NaN" in failure]
    assert not verification.passed and len(told) == 1
    assert told[0].startswith(f"an engine gave no map: stage {stage} computed NaN or infinity in ")
    assert np.isnan(verification.stage_errors[output]) and verification.stage_errors["pixel_embeddings"] < 1e-5
    assert "anomaly_map" not in verification.stage_errors


def test_an_engine_that_cannot_compute_is_no_verdict_and_on_ones_own_pictures_tells_why(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, options = Bundle(tiny_bundle), EngineOptions()
    pipeline, other = (open_pipeline(bundle, "onnxruntime", options) for _ in range(2))
    pipeline.stages = {**pipeline.stages, "spam": Changed(pipeline.stages["spam"], EngineFailed("out of memory on the GPU"))}
    with pytest.raises(EngineFailed, match="out of memory on the GPU"):
        verify(bundle, pipeline, options)
    Image.fromarray(picture()).save(tmp_path / "part.png")
    parity = compare_on_images(pipeline, other, [tmp_path / "part.png"] * 2, bundle.manifest.mask_rule, None)
    assert [failure for failure in GATES["fp16"].failures(parity) if "memory" in failure] == [
        "an engine gave no map: out of memory on the GPU"
    ]


def test_the_maps_of_ones_own_pictures_are_not_kept(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a line's pictures there may be thousands, each with maps of tens of MB."""
    maps: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def watched(*arguments: Any) -> tuple[Outcome, dict[str, np.ndarray]]:
        outcome, tensors = run_outcome(*arguments)
        maps.append(weakref.ref(outcome.anomaly_map))
        return outcome, tensors

    monkeypatch.setattr(verify_module, "run_outcome", watched)
    bundle = Bundle(tiny_bundle)
    pipeline = open_pipeline(bundle, "onnxruntime", EngineOptions())
    Image.fromarray(picture()).save(tmp_path / "part.png")
    paths = [tmp_path / "part.png"] * 4
    rule = bundle.manifest.mask_rule
    parity = compare_on_images(pipeline, pipeline, paths, rule, lambda *_: alive.append(sum(one() is not None for one in maps)))
    assert parity.images == 4 and len(maps) == 8
    assert max(alive) <= 2


def test_a_bundle_without_traces_cannot_be_verified(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    np.savez(folder / "golden.npz")
    with pytest.raises(BundleCorrupt, match="holds no trace; export the bundle again"):
        verified(sealed(folder))


def test_the_peak_of_memory_is_this_programs_alone() -> None:
    """getrusage gives a program that is started the peak of the one that started it."""
    ours = peak_rss_bytes()
    command = [sys.executable, "-c", "from runtime.verify import peak_rss_bytes; print(peak_rss_bytes())"]
    started = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert ours is not None and 10 << 20 < int(started.stdout) < ours


def test_the_summary_tells_what_masks_are_cut_by(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    path = folder / "manifest.json"
    path.write_text(replace(Manifest.from_json(path.read_text()), threshold=0.37, relative_threshold=0.61).to_json())
    told = summary(Bundle(folder), verified(folder))
    assert (told["threshold"], told["relative_threshold"]) == (0.37, 0.61)


def test_the_summary_is_json_without_nan(copy_of_bundle: Callable[[], Path]) -> None:
    folder = perturbed(copy_of_bundle(), "language", 0.5)
    text = json.dumps(summary(Bundle(folder), verified(folder)), allow_nan=False)
    assert json.loads(text)["passed"] is False


# The comparison


def outcome(
    anomaly_map: np.ndarray, states: np.ndarray | None = None, answer: tuple[int, ...] = (1, 2), threshold: float = 0.5
) -> Outcome:
    anomaly_map = np.asarray(anomaly_map, np.float32)
    states = np.eye(3, 5, dtype=np.float32) if states is None else states
    return Outcome(anomaly_map > threshold, anomaly_map, states, answer)


def said_nothing(size: tuple[int, int] = (2, 2)) -> Outcome:
    return Outcome(np.zeros(size, bool), np.zeros(size, np.float32), None, (9,))


def parity_of(ours: Outcome, reference: Outcome) -> Parity:
    return compare([ours], [reference])


def test_the_same_outcome_is_perfect() -> None:
    one = outcome(RNG.random((7, 5)))
    parity = parity_of(one, one)
    assert (parity.mask_iou_mean, parity.mask_iou_min, parity.map_max_abs, parity.map_mean_abs) == (1, 1, 0, 0)
    assert parity.anchor_cosine_min == pytest.approx(1)
    assert not any(gates.failures(parity) for gates in GATES.values())


def test_two_empty_masks_overlap_wholly_and_are_no_flip() -> None:
    parity = parity_of(outcome([[0.1, 0.2]]), outcome([[0.3, 0.4]]))
    assert (parity.mask_iou_min, parity.flips) == (1, 0)
    assert parity.map_max_abs == pytest.approx(0.2)


def test_iou_is_shared_over_joint_pixels_and_the_least_is_kept() -> None:
    a, b, c = outcome([[1, 1, 1, 0]]), outcome([[0, 1, 1, 1]]), outcome([[1, 0, 0, 0]])
    parity = compare([a, a, c], [b, a, b])
    assert parity.mask_iou_mean == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert (parity.mask_iou_min, parity.flips) == (0, 0)


def test_pictures_taken_one_by_one_have_the_parity_of_all_at_once() -> None:
    ours = [outcome(RNG.random((7, 5)), RNG.random((3, 5))) for _ in range(3)] + [said_nothing((7, 5)), outcome(np.full((7, 5), np.nan))]
    reference = [outcome(RNG.random((7, 5)), RNG.random((3, 5)), (1, index)) for index in range(4)] + [outcome(np.zeros((7, 5)))]
    one_by_one = together([compare([a], [b]) for a, b in zip(ours, reference)])
    assert one_by_one.to_json() == compare(ours, reference).to_json()
    assert (one_by_one.images, one_by_one.answers_changed, one_by_one.anchors_changed, one_by_one.not_finite) == (5, 3, 1, 1)
    with pytest.raises(ValueError, match="at least one picture"):
        together([])


def squares(*sides: int) -> list[Outcome]:
    """Masks of a square in the corner of a picture of 256 x 256, where a cell of nano's map is four pixels."""
    maps = [np.zeros((256, 256), np.float32) for _ in sides]
    for anomaly_map, side in zip(maps, sides):
        anomaly_map[:side, :side] = 0.9
    return [outcome(anomaly_map) for anomaly_map in maps]


def test_specks_that_differ_by_less_than_a_cell_are_equal_and_counted() -> None:
    two, one = squares(2, 1)  # four pixels and one: three apart
    parity = compare([two, two], [one, two])
    assert (parity.mask_iou_mean, parity.mask_iou_min, parity.specks, parity.flips) == (1, 1, 1, 0)


def test_nothing_larger_farther_or_empty_is_a_speck() -> None:
    none, one, two, three, four, five = squares(0, 1, 2, 3, 4, 5)
    for ours, reference, iou in ((three, two, 4 / 9), (five, four, 16 / 25), (none, one, 0.0)):  # 5 and 9 apart; a flip
        parity = parity_of(ours, reference)
        assert (parity.mask_iou_min, parity.specks) == (pytest.approx(iou), 0)
    moved = outcome(np.roll(two.anomaly_map, 100, axis=0))  # as small, elsewhere
    assert (parity_of(moved, two).mask_iou_min, parity_of(moved, two).specks) == (0, 0)
    assert parity_of(none, one).flips == 1
    shorter = five.anomaly_map.copy()
    shorter[0, 0] = 0
    assert parity_of(outcome(shorter), five).mask_iou_min == pytest.approx(24 / 25)  # one pixel, of a mask that is no speck


@pytest.mark.parametrize("turned", [False, True])
def test_a_flip_is_a_mask_empty_in_one_of_the_two(turned: bool) -> None:
    pair = [outcome([[0.6, 0]]), outcome([[0.4, 0]])]
    parity = parity_of(*(reversed(pair) if turned else pair))
    assert (parity.flips, parity.mask_iou_min) == (1, 0)
    for gates in GATES.values():
        assert any("flipped" in failure for failure in gates.failures(parity))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
def test_a_map_that_is_not_finite_fails_every_gate_wherever_it_stands(bad: float, position: int) -> None:
    good, spoilt = outcome([[0.2, 0.9]]), outcome([[0.2, bad]])
    ours = [good, good]
    ours[position] = spoilt
    parity = compare(ours, [good, good])
    assert parity.not_finite == 1
    assert not np.isfinite(parity.map_max_abs)
    for gates in GATES.values():
        assert any("1 maps hold NaN or infinity" in failure for failure in gates.failures(parity))
    json.dumps(parity.to_json(), allow_nan=False)


def test_the_cosine_is_the_least_of_the_three_anchors_over_all_pictures() -> None:
    states = RNG.normal(size=(3, 5)).astype(np.float32)
    turned = states.copy()
    turned[1] *= -3
    same = outcome([[0.0]], states)
    assert parity_of(same, outcome([[0.0]], states * 2)).anchor_cosine_min == pytest.approx(1)
    assert compare([same, same], [outcome([[0.0]], turned), same]).anchor_cosine_min == pytest.approx(-1)


def test_anchors_that_neither_said_agree_and_that_one_said_do_not() -> None:
    spoke = outcome(np.zeros((2, 2)))
    assert parity_of(said_nothing(), said_nothing()).anchor_cosine_min == 1
    assert parity_of(said_nothing(), spoke).anchor_cosine_min == -1
    assert parity_of(spoke, said_nothing()).anchor_cosine_min == -1


def test_a_changed_answer_breaks_the_fp32_gate_and_no_other() -> None:
    parity = parity_of(outcome([[0.9]], answer=(1, 2)), outcome([[0.9]], answer=(1, 3)))
    assert parity.answers_changed == 1
    assert any("1 answers changed" in failure for failure in GATES["fp32"].failures(parity))
    assert not GATES["fp16"].failures(parity) and not GATES["bf16"].failures(parity)


@pytest.mark.parametrize("lists", [([], []), ([said_nothing()], []), ([], [said_nothing()])])
def test_there_must_be_pairs_to_compare(lists: tuple[list[Outcome], list[Outcome]]) -> None:
    with pytest.raises(ValueError, match="equally long, non-empty"):
        compare(*lists)


def test_the_relative_error_is_scale_free() -> None:
    reference = RNG.normal(size=(4, 5)).astype(np.float32)
    assert relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(reference * 1.01e6, reference * 1e6) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(np.zeros(3), np.zeros(3)) == 0


# Which gates hold


@pytest.mark.parametrize(
    ("stages", "inference_precision", "gates"),
    [
        ({}, "graph", "fp32"),
        ({"language": "fp16"}, "graph", "fp16"),
        ({"language": "bf16", "spam": "fp16"}, "graph", "bf16"),
        ({}, "bf16", "bf16"),
        ({}, "bf16+int8", "int8"),
        ({"spam": "fp16"}, "bf16", "bf16"),
    ],
)
def test_the_coarsest_precision_of_graphs_and_engine_decides(
    stages: dict[str, str], inference_precision: str, gates: str, copy_of_bundle: Callable[[], Path]
) -> None:
    folder = copy_of_bundle()
    path = folder / "manifest.json"
    manifest = Manifest.from_json(path.read_text())
    path.write_text(replace(manifest, precision=manifest.precision | stages).to_json())
    assert gates_for(Bundle(folder), EngineOptions(inference_precision=inference_precision)) == gates


def test_the_map_is_drawn_in_the_graphs_precision_whatever_the_engine_is_asked_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def opened(graph: Path, spec: StageSpec, engine: str, options: EngineOptions) -> None:
        asked[spec.name] = options.inference_precision

    monkeypatch.setattr(verify_module, "open_engine", opened)
    open_pipeline(Bundle(tiny_bundle, check_hashes=False), "openvino", EngineOptions(inference_precision="bf16"))
    assert asked == dict.fromkeys(STAGES, "bf16") | {"mask_decoder": "graph"}
