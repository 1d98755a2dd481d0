"""agvas-export with integers: one graph for the engines, a manifest that tells, and a gate that leaves a good bundle or none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import picture, teach
from PIL import Image

import export.bundle as writer
import export.judging as judging
import export.quantisation as export_quantisation
from agvas import AGVAS, save
from agvas.config import LanguageConfig, tiny
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from calibration.calibrate import CalibrationSettings, calibrate
from calibration.gptq import GPTQSettings
from calibration.gptq_checkpoint import write_gptq_checkpoint
from calibration.plan import read_plan, write_plan
from calibration.truth import linear_of
from calibration.weights import QuantizedWeight
from engines import EngineOptions, EngineUnavailable
from engines.openvino import bytes_saturate, natively_bf16
from export.bundle import export_bundle
from export.cli import main
from export.gate import GateBudget
from export.half_range import HalfRange
from export.progress import Progress
from export.quantisation import encoder_linears, quantise
from export.settings import ExportSettings
from runtime import Segmenter
from runtime.bundle import SCHEMA_VERSION, Bundle, Manifest
from runtime.contract import STAGES
from runtime.errors import BundleVersionError, ParityFailed
from runtime.footprint import WHOLE, footprints
from runtime.parity import GATES
from runtime.selection import INTEGER_CANDIDATES, candidates_for
from runtime.verify import golden_limits, limits, open_pipeline, verify

QUIET = Progress(quiet=True)
LAX = {"mask_iou_mean": 0.9, "mask_iou_min": 0.5, "anchor_cosine_min": 0.9}


@pytest.fixture(scope="session")
def wide_model() -> AGVAS:
    """The tiny model with a language model that groups of 128 divide; it says the template."""
    torch.manual_seed(3)
    config = replace(tiny(), name="wide", language=LanguageConfig(512, 128, 2, 4, 2, 256, max_positions=512))
    model = AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], config.language.vocabulary))
    draft = model.prompt_encoder.encode().draft
    assert draft is not None
    return teach(model, draft, steps=60)


@pytest.fixture(scope="session")
def wide(wide_model: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its checkpoint, pictures, a gptq4 plan, also as a GPTQ checkpoint, an 8-bit plan and the fp32 bundle."""
    folder = tmp_path_factory.mktemp("wide")
    save(wide_model, folder / "checkpoint")
    (folder / "pictures").mkdir()
    for seed in range(3):
        Image.fromarray(picture(seed)).save(folder / "pictures" / f"{seed}.png")
    for bits, group in ((4, 128), (8, 0)):
        settings = CalibrationSettings(GPTQSettings(bits=bits, group=group))
        made = calibrate(wide_model, [picture(seed) for seed in range(4, 6)], settings)
        write_plan(folder / f"plan{bits}", *made)
    write_gptq_checkpoint(wide_model, read_plan(folder / "plan4")[1], folder / "checkpoint4")
    export_bundle(ExportSettings(str(folder / "checkpoint"), "fp32", folder / "fp32", images=folder / "pictures"), QUIET)
    return folder


@pytest.fixture
def ready(wide: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExportSettings]:
    """Graphs come from the session's fp32 bundle; returns settings of an export of it."""
    monkeypatch.setattr(writer, "export_stage", lambda module, stage, sizes, weights: ir.load(wide / "fp32" / stage / f"{stage}.onnx"))

    def settings(output: Path, precision: str = "fp32", **changes: object) -> ExportSettings:
        base = ExportSettings(str(wide / "checkpoint"), precision, output, images=wide / "pictures")
        return replace(base, **changes)  # type: ignore[arg-type]

    return settings


def stored_bytes(bundle: Bundle, stage: str) -> int:
    return sum(path.stat().st_size for path in (bundle.folder / stage).iterdir())


def linears_of(graph: Path) -> dict[ir.DataType, int]:
    """Bytes of the constants that products multiply with, by type."""
    found: dict[ir.DataType, int] = {}
    for node in ir.load(graph).graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        producer = weight.producer() if weight is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            weight = producer.inputs[0]
        if weight is not None and weight.const_value is not None:
            found[weight.dtype] = found.get(weight.dtype, 0) + len(weight.const_value.tobytes())
    return found


# One graph for the engines


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gptq4_bundle_holds_4_bit_linears_and_segments_on_every_engine_as_the_fake_quantised_model(
    precision: str, ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path
) -> None:
    settings = ready(tmp_path / "bundle", precision, lmm="gptq4", calibration=wide / "plan4", strict=False)
    bundle, report = export_bundle(settings, QUIET)
    assert bundle.manifest.lmm == "gptq4" and bundle.manifest.precision == dict.fromkeys(STAGES, precision)
    opsets = {stage: ir.load(bundle.graph(stage)).opset_imports[""] for stage in STAGES}
    assert opsets == dict.fromkeys(STAGES, 20) | {"language": 21}
    layers = bundle.manifest.quantisation["layers"]
    assert len(layers) == 2 * 7 and set(layers.values()) == {"int4, groups of 128"}
    assert bundle.manifest.quantisation["plan"]["settings"]["bits"] == 4 and len(bundle.manifest.quantisation["plan"]["sha256"]) == 64
    sizes = linears_of(bundle.graph("language"))
    in_four_bits = sum(weight.numel() for name, weight in wide_model.named_parameters() if name.removesuffix(".weight") in layers) // 2
    assert sizes[ir.DataType.INT4] == in_four_bits
    # What came of rounding is in (2), and (3) is conversion alone.
    tolerance = {"fp32": 1e-4, "fp16": 5e-3}[precision]
    assert report.stages["language"]["states"] < tolerance and report.quantisation["language"]["states"] > 5e-3
    assert report.quantisation["pixel_encoder"]["pixel_embeddings"] == 0
    maps = [Segmenter(bundle.folder, engine=engine)(picture()).anomaly_map for engine in ("onnxruntime", "openvino")]
    np.testing.assert_allclose(maps[0], maps[1], atol={"fp32": 1e-4, "fp16": 2e-2}[precision])


def test_int4_linears_take_no_more_than_three_tenths_of_16_bit(ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path) -> None:
    bundle, _ = export_bundle(ready(tmp_path / "bundle", "fp16", lmm="gptq4", calibration=wide / "plan4", strict=False), QUIET)
    graph = ir.load(bundle.graph("language")).graph
    ours = sum(len(value.const_value.tobytes()) for name, value in graph.initializers.items() if name.endswith(("codes", "scales")))
    numbers = sum(value.const_value.size for name, value in graph.initializers.items() if name.endswith("codes"))
    assert ours <= 0.3 * 2 * numbers
    # Each constant is on disk once, and the float weights are not.
    on_disk = sum(len(value.const_value.tobytes()) for value in graph.initializers.values())
    assert stored_bytes(bundle, "language") < 1.2 * on_disk + 400_000


def test_int8_weights_have_one_scale_an_output_and_engines_may_round_activations(
    ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path
) -> None:
    bundle, report = export_bundle(ready(tmp_path / "bundle", lmm="int8", calibration=wide / "plan8"), QUIET)
    assert not report.failures and report.chain.mask_iou_min > 0.97
    assert report.int8_inputs.mask_iou_min > 0.95 and report.int8_inputs.map_max_abs > report.chain.map_max_abs
    assert json.loads((bundle.folder / "parity.json").read_text())["int8_inputs"] == report.int8_inputs.to_json()
    assert set(bundle.manifest.quantisation["layers"].values()) == {"int8, one scale an output"}
    assert {*INTEGER_CANDIDATES} < {*candidates_for(bundle, "cpu")}
    wanted = wide_model.segment(picture()).anomaly_map
    for engine in ("onnxruntime",) if bytes_saturate() else ("onnxruntime", "openvino"):
        exact, rounded = (
            Segmenter(bundle.folder, engine=engine, inference_precision=precision)(picture()).anomaly_map for precision in ("graph", "int8")
        )
        assert np.abs(exact - rounded).max() > 0, "int8 was asked for and nothing was rounded"
        np.testing.assert_allclose(rounded, wanted, atol=0.05)
    if natively_bf16() and not bytes_saturate():
        both = Segmenter(bundle.folder, engine="openvino", inference_precision="bf16+int8")(picture()).anomaly_map
        alone = Segmenter(bundle.folder, engine="openvino", inference_precision="bf16")(picture()).anomaly_map
        assert np.abs(both - alone).max() > 0, "only bf16 was computed in"
        np.testing.assert_allclose(both, wanted, atol=0.1)
    chosen = Segmenter(bundle.folder).choice
    assert chosen is not None
    tried = {f"{chosen.engine}/{chosen.inference_precision}", *chosen.rejected}
    assert tried == {f"{engine}/{precision}" for engine, precision in candidates_for(bundle, "cpu")}


def test_encoders_in_8_bit_round_their_linears_inputs_and_leave_attention_and_the_rest_in_float(
    ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_quantisation, "PICTURES", 2)
    bundle, report = export_bundle(ready(tmp_path / "bundle", "int8", strict=False), QUIET)
    names = encoder_linears(wide_model)
    assert bundle.manifest.precision == {stage: "int8" if "encoder" in stage else "fp32" for stage in STAGES}
    assert bundle.manifest.lmm == "float" and bundle.manifest.quantisation["layers"].keys() == set(names)
    assert all("inputs int8 to ±" in words for words in bundle.manifest.quantisation["layers"].values())
    for stage in STAGES:
        graph = ir.load(bundle.graph(stage)).graph
        count = sum(node.op_type == "QuantizeLinear" for node in graph)
        assert (count > 0) == ("encoder" in stage)
        read = [node.inputs[0].producer() for node in graph if node.op_type == "MatMul"]
        rounded = [producer for producer in read if producer is not None and producer.op_type == "DequantizeLinear"]
        assert len(rounded) == sum(name.startswith(stage) for name in names)
    assert report.quantisation["pixel_encoder"]["pixel_embeddings"] > 10 * report.stages["pixel_encoder"]["pixel_embeddings"]
    with pytest.raises(EngineUnavailable, match="int8 .* has none"):
        Segmenter(bundle.folder, engine="onnxruntime", inference_precision="int8")


def test_without_a_plan_export_calibrates_by_itself(
    ready: Callable[..., ExportSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_quantisation, "PICTURES", 2)
    bundle, _ = export_bundle(ready(tmp_path / "bundle", lmm="gptq4", strict=False), QUIET)
    assert bundle.manifest.quantisation["plan"]["pictures"] == 2 and len(bundle.manifest.quantisation["layers"]) == 14


# The gate decides


def spoilt_plan(wide: Path, wide_model: AGVAS, folder: Path, *names: str) -> Path:
    """An 8-bit plan whose named layers compute nothing."""
    made = calibrate(wide_model, [picture(4)], CalibrationSettings(GPTQSettings(bits=8, group=0)))
    for name in names:
        whole = made.weights[name]
        made.weights[name] = QuantizedWeight(np.zeros_like(whole.codes), whole.scales, 8, whole.group)
    write_plan(folder, *made)
    return folder


SPOILT = ("language.model.layers.0.mlp.down_proj", "language.model.layers.1.self_attn.o_proj", "language.model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_that_costs_masks_is_put_back_to_float_and_told(
    precision: str,
    ready: Callable[..., ExportSettings],
    wide: Path,
    wide_model: AGVAS,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = spoilt_plan(wide, wide_model, tmp_path / "plan", SPOILT[0])
    bundle, report = export_bundle(ready(tmp_path / "bundle", precision, lmm="int8", calibration=plan), Progress())
    assert not report.failures
    told = capsys.readouterr().err
    assert "try with all layers asked for in integers" in told and "try with 1 layer put back to float" in told
    kept = bundle.manifest.quantisation["kept_float"]
    assert list(kept) == [SPOILT[0]] and "changed the anomaly map by" in kept[SPOILT[0]]
    assert SPOILT[0] not in bundle.manifest.quantisation["layers"] and len(bundle.manifest.quantisation["layers"]) == 13
    gate = json.loads((bundle.folder / "parity.json").read_text())["gate"]
    assert list(gate["kept_float"]) == [SPOILT[0]] and next(iter(gate["sensitivity"])) == SPOILT[0]
    assert [(trial["kept_float"], bool(trial["failures"])) for trial in gate["trials"]] == [(0, True), (1, False)]
    options = EngineOptions()
    assert verify(bundle, open_pipeline(bundle, "onnxruntime", options), options).passed


def test_layer_by_layer_inputs_in_8_bits_are_not_judged_and_export_says_so(
    ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ready(tmp_path / "bundle", lmm="int8", calibration=wide / "plan8", pictures=1, streamed=True)
    bundle, report = export_bundle(settings, Progress())
    told = "not with the language model's inputs in 8 bits: the model was not held in memory"
    assert json.loads((bundle.folder / "parity.json").read_text())["gate"]["not_judged"] == told
    assert f"judged {told}" in capsys.readouterr().err and report is not None and report.int8_inputs is None


OUTLIERS = ("language.model.layers.1.mlp.gate_proj", "language.model.layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def with_outliers(wide_model: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an 8-bit plan of the wide model where one number in 32 that OUTLIERS read is huge, with weights of zero."""
    model, folder = copy.deepcopy(wide_model), tmp_path_factory.mktemp("outliers")
    with torch.no_grad():
        for name in OUTLIERS:
            linear_of(model, name).weight[:, ::32] = 0
        model.language.model.layers[1].post_attention_layernorm.weight[::32] = 1e5
    save(model, folder / "checkpoint")
    write_plan(folder / "plan8", *calibrate(model, [picture(4)], CalibrationSettings(GPTQSettings(bits=8, group=0))))
    return folder


def test_a_layer_whose_inputs_are_lost_in_8_bits_goes_back_to_float_and_no_other(
    with_outliers: Path, wide: Path, tmp_path: Path
) -> None:
    checkpoint, pictures = str(with_outliers / "checkpoint"), wide / "pictures"
    settings = ExportSettings(checkpoint, "fp32", tmp_path / "bundle", images=pictures, lmm="int8", calibration=with_outliers / "plan8")
    bundle, report = export_bundle(settings, QUIET)
    gate = json.loads((bundle.folder / "parity.json").read_text())["gate"]
    assert all(failure.startswith("with inputs in 8 bits, ") for trial in gate["trials"] for failure in trial["failures"])
    assert bundle.manifest.quantisation["kept_float"].keys() == set(OUTLIERS)
    assert report is not None and not report.failures and report.int8_inputs is not None
    options = EngineOptions(inference_precision="int8")
    assert verify(bundle, open_pipeline(bundle, "onnxruntime", options), options).passed


def test_a_chain_that_fails_with_all_the_budget_spent_makes_no_bundle(
    ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path
) -> None:
    plan = spoilt_plan(wide, wide_model, tmp_path / "plan", *SPOILT)
    settings = ready(tmp_path / "out" / "bundle", lmm="int8", calibration=plan, budget=GateBudget(layers=1))
    with pytest.raises(ParityFailed, match="though 1 layer went back to float, and no more than 1 layer") as failed:
        export_bundle(settings, QUIET)
    assert not list((tmp_path / "out").iterdir())
    told = str(failed.value).partition("; the most sensitive, alone in integers: ")[2]
    layers, _, advice = told.partition(". No bundle was written; try a larger --gate-budget, ")
    assert "agvas-calibrate" in advice and "--lmm float" in advice
    assert {layer.partition(" changed the anomaly map by ")[0] for layer in layers.split(", ")} == set(SPOILT)


def test_the_chosen_layers_are_in_the_bundle_though_fewer_were_tried_last(
    ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path
) -> None:
    needed = {*(f"language.model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")), SPOILT[2]}
    plan = spoilt_plan(wide, wide_model, tmp_path / "plan", *needed)
    settings = ready(tmp_path / "bundle", lmm="int8", calibration=plan, budget=GateBudget(layers=4))
    bundle, report = export_bundle(settings, QUIET)
    trials = json.loads((bundle.folder / "parity.json").read_text())["gate"]["trials"]
    assert [(trial["kept_float"], bool(trial["failures"])) for trial in trials] == [(0, True), (1, True), (2, True), (4, False), (3, True)]
    assert report is not None and not report.failures
    assert bundle.manifest.quantisation["kept_float"].keys() == needed and not needed & bundle.manifest.quantisation["layers"].keys()


@pytest.mark.parametrize(
    ("precision", "lmm", "head", "remedies"),
    [
        ("fp32", "float", "float", ["--precision fp32"]),
        ("fp32", "int8", "float", ["a plan", "--lmm float"]),
        ("fp16", "int8", "float", ["a plan", "--lmm float", "--precision fp32"]),
        ("int8", "float", "float", ["a plan", "--precision fp16"]),
        ("int8", "int8", "int8", ["a plan", "--lmm float", "--head float", "--precision fp16"]),
    ],
)
def test_where_no_layer_was_looked_for_what_helps_against_the_integers_is_named(
    precision: str, lmm: str, head: str, remedies: list[str], ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path
) -> None:
    settings = ready(tmp_path / "bundle", precision, lmm=lmm, head=head, pictures=1, streamed=True)
    if settings.calibrates:
        settings = replace(settings, calibration=wide / "plan8")
    with pytest.raises(ParityFailed, match="No bundle was written; try ") as failed:
        export_bundle(replace(settings, gates={"mask_iou_mean": 1.1}), QUIET)
    advice = str(failed.value).partition("; try ")[2].partition(", or --parity report to write it all the same")[0]
    assert advice.replace("--calibration with a plan that agvas-calibrate made of your own pictures", "a plan").split(", ") == remedies


def test_where_the_integers_passed_and_something_else_did_not_other_integers_are_no_advice(
    ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HalfRange, "failures", lambda ranges: ["fp16: spam reaches 7.0e+04"])
    with pytest.raises(ParityFailed, match="reaches 7.0e.04. No bundle was written; try --precision fp32, or --parity report"):
        export_bundle(ready(tmp_path / "bundle", "fp16", lmm="int8", calibration=wide / "plan8"), QUIET)


def test_where_no_layer_may_go_back_none_is_measured(
    ready: Callable[..., ExportSettings], wide: Path, wide_model: AGVAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "sensitivities", lambda *_: pytest.fail("measured"))
    plan = spoilt_plan(wide, wide_model, tmp_path / "plan", SPOILT[0])
    with pytest.raises(ParityFailed, match="though 0 layers went back to float, and no more than 0 layer"):
        export_bundle(ready(tmp_path / "bundle", lmm="int8", calibration=plan, budget=GateBudget(layers=0)), QUIET)


def test_a_layer_that_changed_nothing_stays_integer_whatever_fails(ready: Callable[..., ExportSettings], tmp_path: Path) -> None:
    settings = ready(tmp_path / "bundle", head="int8", pictures=1, gates={"map_max_abs": -1.0}, strict=False)
    bundle, report = export_bundle(settings, QUIET)
    gate = json.loads((bundle.folder / "parity.json").read_text())["gate"]
    assert report.failures and gate["sensitivity"] == {"language.lm_head": 0.0}
    assert gate["kept_float"] == {} and gate["stopped"] == "no layer has a measured effect" and len(gate["trials"]) == 1
    assert "language.lm_head" in bundle.manifest.quantisation["layers"]
    with pytest.raises(ParityFailed, match=r"and no layer has a measured effect\. No bundle was written; try --head float, or"):
        export_bundle(replace(settings, output=tmp_path / "strict", strict=True), QUIET)


def test_what_rounding_the_encoders_inputs_costs_is_quantisation_in_memory_and_layer_by_layer(
    ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path
) -> None:
    settings = ready(tmp_path / "bundle", "int8", lmm="float", calibration=wide / "plan8", pictures=2, strict=False)
    whole, streamed = (export_bundle(replace(settings, streamed=how), QUIET)[1] for how in (False, True))
    assert whole is not None and streamed is not None
    for stage in ("pixel_encoder", "semantic_encoder"):
        for name, error in whole.quantisation[stage].items():
            assert streamed.quantisation[stage][name] == pytest.approx(error, rel=0.02)
            assert streamed.stages[stage][name] < 0.1 * error, "conversion is not what costs"


def test_other_gates_are_kept_in_the_manifest_and_hold_on_the_target(
    ready: Callable[..., ExportSettings], wide: Path, tmp_path: Path
) -> None:
    bundle, _ = export_bundle(ready(tmp_path / "bundle", lmm="gptq4", calibration=wide / "plan4", gates=LAX, strict=False), QUIET)
    assert limits(bundle, EngineOptions()) == replace(GATES["gptq4"], **LAX)
    rounding = EngineOptions(inference_precision="int8")
    assert limits(bundle, rounding).mask_iou_mean == 0.9
    stricter = asdict(replace(GATES["gptq4"], mask_iou_mean=0.999))
    asked: Any = SimpleNamespace(manifest=replace(bundle.manifest, gates=stricter))
    assert limits(asked, rounding).mask_iou_mean == 0.999, "inputs in 8 bits are no coarser than weights in 4"


def test_golden_pictures_are_judged_by_what_export_lost_on_them_and_a_failed_export_excuses_nothing(
    wide: Path, tmp_path: Path
) -> None:
    bundle = Bundle(wide / "fp32")
    golden = bundle.manifest.parity["golden"] | {"mask_iou_mean": 0.9, "mask_iou_min": 0.7, "flips": 1, "images": 10}
    for passed in (True, False):
        bundle.manifest = replace(bundle.manifest, parity=bundle.manifest.parity | {"golden": golden, "passed": passed})
        gates = golden_limits(bundle, EngineOptions())
        assert gates == (replace(GATES["fp32"], mask_iou_mean=0.89, mask_iou_min=0.7 - 0.05, flips=0.1) if passed else GATES["fp32"])


# What does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmm", "gptq4", "--calibration", "plan8"], "expected weights in 4 bits for --lmm gptq4, got [8]"),
        (["--lmm", "int8", "--calibration", "plan4"], "agvas-calibrate --bits 8"),
        (["--lmm", "int8", "--precision", "int8", "--calibration", "plan4"], "agvas-calibrate --bits 8"),
        (["--lmm", "int8", "--calibration", "checkpoint4"], "expected weights in 8 bits for --lmm int8, got [4]"),
        (["--lmm", "gptq4", "--precision", "int8", "--calibration", "checkpoint4"], "tells nothing of the encoders"),
        (["--lmm", "gptq4", "--precision", "int8", "--calibration", "rtn"], "got rtn, which tells no ranges"),
        (["--lmm", "gptq4", "--calibration", "pictures"], "expected a plan"),
        (["--lmm", "float", "--calibration", "plan4"], "--calibration: nothing is in integers with --lmm float"),
        (
            ["--lmm", "float", "--head", "int8", "--calibration", "rtn"],
            "--calibration: expected none with --lmm float, got rtn: --head int8 is rounded plainly; leave it out",
        ),
        (["--lmm", "gptq4", "--gate", "iou=1"], "--gate: expected one of mask_iou_mean"),
        (["--lmm", "gptq4", "--gate", "flips=few"], "--gate: expected flips=NUMBER"),
        (["--lmm", "gptq4", "--gate", "flips=inf"], "a number in 0..1 for the others, got 'flips=inf'"),
        (["--lmm", "gptq4", "--gate", "mask_iou_mean=nan"], "a number in 0..1 for the others, got 'mask_iou_mean=nan'"),
        (["--lmm", "gptq4", "--gate", "answers_changed=-1"], "expected a count for answers_changed"),
        (["--lmm", "gptq4", "--gate-budget", "all"], "--gate-budget: expected LAYERS or LAYERS:SECONDS"),
    ],
)
def test_what_cannot_be_met_is_told_before_the_work(
    arguments: list[str], message: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "export_stage", None)
    monkeypatch.setattr(writer, "outcome_of_reference", None)
    monkeypatch.chdir(wide)
    assert main(["--checkpoint", str(wide / "checkpoint"), "--output", str(tmp_path / "bundle"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_calibration_that_is_not_there_is_told_before_the_checkpoint_is_opened(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "open_checkpoint", None)
    arguments = ["--checkpoint", str(wide / "checkpoint"), "--output", str(tmp_path / "bundle"), "--calibration", str(tmp_path / "plan")]
    assert main([*arguments, "--lmm", "gptq4"]) == 2
    assert f"{tmp_path / 'plan'}: expected a plan" in capsys.readouterr().err


def test_a_width_that_groups_do_not_divide_is_named_with_a_way_out(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "export_stage", None)
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "bundle"), "--lmm", "gptq4"]) == 2
    told = capsys.readouterr().err
    assert "language.model.layers.0.self_attn.q_proj: expected inputs that groups of 128 divide, got 24" in told
    assert "agvas-calibrate --group" in told and "--lmm int8" in told


def test_4_bits_are_the_default_in_the_largest_groups_that_a_narrow_model_allows(
    wide_model: AGVAS, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExportSettings] = []

    def export(settings: ExportSettings, progress: Progress) -> None:
        asked.append(settings)
        raise ParityFailed("stopped here")

    monkeypatch.setattr(writer, "export_bundle", export)
    assert main(["--checkpoint", str(wide / "checkpoint"), "--output", str(tmp_path / "bundle")]) == 1
    assert asked[0].lmm == "gptq4"
    monkeypatch.setattr(export_quantisation, "PICTURES", 2)
    for width, group in ((128, 128), (96, 32)):
        config = replace(wide_model.config, language=LanguageConfig(512, width, 1, 4, 2, 256, max_positions=512))
        made = quantise(AGVAS(config, wide_model.tokenizer).eval(), {}, asked[0].lmm, False, None)
        assert {(weight.bits, weight.group) for weight in made.weights.values()} == {(4, group)}


def test_a_plan_of_another_model_is_refused(tiny_checkpoint: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--lmm", "gptq4", "--calibration", str(wide / "plan4")]
    assert main(["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "b"), *plan]) == 2
    assert "run agvas-calibrate on this checkpoint" in capsys.readouterr().err


# Bundles of before and after


def test_a_bundle_from_before_quantisation_opens_and_a_later_one_does_not(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    for name in ("gates", "quantisation"):
        del fields[name]
    path.write_text(json.dumps(fields | {"schema_version": 1}))
    assert Bundle(folder).manifest.lmm == "float" and not Bundle(folder).manifest.integer_weights
    path.write_text(json.dumps(fields | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(BundleVersionError, match="install a newer agvas"):
        Bundle(folder)


def test_gates_that_a_manifest_misspells_are_refused(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text()
    with pytest.raises(Exception, match="does not describe a bundle.*iou"):
        Manifest.from_json(json.dumps(json.loads(text) | {"gates": {"iou": 1}}))


def test_the_embedding_table_is_mapped_not_read(tiny_bundle: Path) -> None:
    assert isinstance(Bundle(tiny_bundle).embeddings(), np.memmap)


def test_footprints_tell_disk_and_memory_of_every_stage_and_of_all(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    found = footprints(bundle, "onnxruntime")
    assert list(found) == [*STAGES, WHOLE]
    assert found[WHOLE]["bytes"] == bundle.bytes > sum(found[stage]["bytes"] or 0 for stage in STAGES)
    for cost in found.values():
        assert cost["idle_rss_bytes"] and cost["peak_rss_bytes"]
        assert 10 << 20 < cost["idle_rss_bytes"] < cost["peak_rss_bytes"] < 1 << 30
