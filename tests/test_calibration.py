"""Calibration on a small random model: what it sees is what the reference computes, and an interrupted run goes on."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import of_four_modes, picture
from safetensors.torch import load_file, save_file
from torch import nn

from agvas import AGVAS, save
from agvas.checkpoint import load, open_checkpoint
from agvas.config import INSTRUCTIONS, ov_7b
from agvas.tokenizer import train_tokenizer
from agvas.weights import LazyTensor
from agvas.writing import FolderInUse
from calibration.calibrate import (
    HEAD,
    LAYERS,
    SHARING,
    Calibration,
    CalibrationSettings,
    _Run,
    calibrate,
    memory_needed,
    plan_to_make,
)
from calibration.conversations import conversation, modes_in_turn
from calibration.gptq import GPTQSettings
from calibration.gptq_checkpoint import write_gptq_checkpoint
from calibration.observers import HessianSum, Ranges, input_of
from calibration.pictures import calibration_pictures
from calibration.plan import PlanError, model_sha256
from calibration.truth import fake_quantize, linear_of
from runtime import preprocess
from runtime.errors import ImageError

GROUP = 32
# Every token counts the same, so that an oracle can be plain.
SETTINGS = CalibrationSettings(GPTQSettings(group=GROUP), answer_share=None)
PICTURES = [picture(seed, 40 + seed, 60) for seed in range(5)]


@pytest.fixture(scope="module")
def model() -> AGVAS:
    return of_four_modes()


@pytest.fixture(scope="module")
def calibrated(model: AGVAS) -> Calibration:
    return calibrate(model, PICTURES, SETTINGS)


def linears(model: AGVAS) -> list[str]:
    return [f"{LAYERS}.{index}.{name}" for index in range(len(model.language.model.layers)) for names in SHARING for name in names]


def embeddings(model: AGVAS) -> list[torch.Tensor]:
    """What the language model reads of each picture, by the reference's own functions: [1, N, D]."""
    result = []
    encoder = model.prompt_encoder
    for number, mode in enumerate(modes_in_turn(encoder, len(PICTURES))):
        images = preprocess.encoder_images(PICTURES[number], model.config.preprocessing)[:2]
        pixel, semantic = (torch.from_numpy(image)[None] for image in images)
        _, prompt, answer = conversation(encoder, mode, number)
        with torch.inference_mode():
            result.append(model.input_embeddings(model.see(pixel, semantic), [prompt], [answer]))
    return result


def watch(model: AGVAS, run: Any) -> dict[str, list[torch.Tensor]]:
    """Inputs of every linear of the model while `run` runs, by plain hooks."""
    inputs: dict[str, list[torch.Tensor]] = {}
    named = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2)))
        for name, layer in named
    ]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    return inputs


def test_every_linear_of_the_decoder_layers_is_quantised_and_recorded_in_order(model: AGVAS, calibrated: Calibration) -> None:
    assert list(calibrated.weights) == [record.name for record in calibrated.plan.linears] == linears(model)
    for name, weight in calibrated.weights.items():
        assert weight.codes.shape == tuple(linear_of(model, name).weight.shape) and (weight.bits, weight.group) == (4, GROUP)
    assert len(set(calibrated.plan.images)) == len(PICTURES)
    assert calibrated.plan.tokens == sum(embedding.shape[1] for embedding in embeddings(model))
    assert calibrated.plan.weights_sha256 == model_sha256(model)


def test_the_model_itself_stays_as_it_was(model: AGVAS) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, PICTURES[:2], SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ranges_and_errors_are_those_of_the_inputs_that_the_quantised_model_sees(model: AGVAS, calibrated: Calibration) -> None:
    """The oracle hooks the whole fake-quantised model at once; calibration went layer by layer over the disk.

    Linears that share an input are quantised after it was seen, so each input is that of the model quantised up to there: with all linears
    quantised the inputs are the same.
    """
    truth = fake_quantize(model, calibrated.weights)
    seen = watch(truth, lambda: [truth.language(inputs_embeds=rows, logits_to_keep=0) for rows in embeddings(model)])
    for record in calibrated.plan.linears:
        inputs = torch.cat(seen[record.name])
        np.testing.assert_allclose(calibrated.ranges[record.name], inputs.abs().amax(dim=0).numpy(), rtol=1e-4, atol=1e-5)
        weight = linear_of(model, record.name).weight.detach()
        exact = inputs @ weight.T
        error = (inputs @ torch.from_numpy(calibrated.weights[record.name].dequantized()).T - exact).norm() / exact.norm()
        assert record.error == pytest.approx(float(error), rel=1e-2)
    head = torch.cat(seen[HEAD])
    np.testing.assert_allclose(calibrated.ranges[HEAD], head.abs().amax(dim=0).numpy(), rtol=1e-4, atol=1e-5)


def test_ranges_of_the_encoders_are_those_of_the_reference_on_every_picture(model: AGVAS, calibrated: Calibration) -> None:
    seen = {name: inputs for name, inputs in watch(model, lambda: embeddings(model)).items() if name.split(".")[0].endswith("_encoder")}
    assert len(seen) > 10 and all(len(inputs) == len(PICTURES) for inputs in seen.values())
    for name, inputs in seen.items():
        np.testing.assert_array_equal(calibrated.ranges[name], torch.cat(inputs).abs().amax(dim=0).numpy())
    assert {name for name in calibrated.ranges if not name.startswith("language.")} == seen.keys()


def test_outputs_are_closer_than_after_plain_rounding(calibrated: Calibration) -> None:
    ratios = [record.error / record.rounding_error for record in calibrated.plan.linears]
    assert np.mean(ratios) < 0.85 and max(ratios) < 1.05


def test_answers_make_the_share_of_the_hessians_that_was_asked_for(model: AGVAS, calibrated: Calibration) -> None:
    """Seen in the recorded error of a linear whose inputs no quantisation has touched: it is measured by the same Hessian."""
    share, name = 0.7, f"{LAYERS}.0.self_attn.q_proj"
    weighted = calibrate(model, PICTURES, dataclasses.replace(SETTINGS, answer_share=share))
    record = next(record for record in weighted.plan.linears if record.name == name)
    seen = watch(model, lambda: [model.language(inputs_embeds=rows) for rows in embeddings(model)])[name]
    weight, rounded = linear_of(model, name).weight.detach(), torch.from_numpy(weighted.weights[name].dequantized())
    lost = whole = 0.0
    for number, (mode, rows) in enumerate(zip(modes_in_turn(model.prompt_encoder, len(PICTURES)), seen, strict=True)):
        answer = len(conversation(model.prompt_encoder, mode, number).answer)
        tokens = len(rows)
        # A picture counts by its tokens; within it the answer makes the share.
        counts = torch.cat([torch.ones(tokens - answer), torch.full((answer,), share / (1 - share) * (tokens - answer) / answer)])
        assert float(counts[-answer:].sum() / counts.sum()) == pytest.approx(share)
        lost += float((counts * (rows @ (rounded - weight).T).square().sum(dim=1)).sum())
        whole += float((counts * (rows @ weight.T).square().sum(dim=1)).sum())
    assert record.error == pytest.approx((lost / whole) ** 0.5, rel=1e-2)
    assert not np.array_equal(weighted.weights[name].codes, calibrated.weights[name].codes)


def test_all_modes_the_checkpoint_knows_take_their_turn_and_answers_hold_its_anchors(model: AGVAS) -> None:
    encoder = model.prompt_encoder
    modes = modes_in_turn(encoder, 12)
    assert set(modes) == set(INSTRUCTIONS) and modes.count("direct") == 6
    for number, mode in enumerate(modes):
        _, _, answer = conversation(encoder, mode, number)
        assert encoder.find_anchors(answer) is not None and answer[-1] == encoder.end_id
    assert conversation(encoder, "direct", 3).answer == encoder.encode().draft
    assert conversation(encoder, modes[1], 1) == conversation(encoder, modes[1], 1)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(model: AGVAS, calibrated: Calibration, tmp_path: Path) -> None:
    steps = []

    def report(what: str, done: int, total: int) -> None:
        steps.append((what, done, total))

    pictures, layers, each = "see the pictures", "calibrate layer by layer", 5 * len(PICTURES)
    for stop in ((pictures, 3), (layers, each // 2), (layers, each + each // 2)):  # in the first layer, in the second

        def interrupt(what: str, done: int, total: int, stop: tuple[str, int] = stop) -> None:
            if (what, done) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model, PICTURES, SETTINGS, interrupt, tmp_path / "work")
    again = calibrate(model, PICTURES, SETTINGS, report, tmp_path / "work")
    assert again.plan == calibrated.plan
    for name, weight in calibrated.weights.items():
        assert np.array_equal(again.weights[name].codes, weight.codes) and np.array_equal(again.weights[name].scales, weight.scales)
    assert again.ranges.keys() == calibrated.ranges.keys()
    assert all(np.array_equal(again.ranges[name], values) for name, values in calibrated.ranges.items())
    assert steps[0][:2] == (layers, each) and steps[-1] == (layers, 2 * each, 2 * each)  # the first layer was not computed again
    assert not (tmp_path / "work" / "hidden" / "000").exists()


def test_decoder_layers_that_stay_in_the_file_until_their_turn_come_out_the_same(
    model: AGVAS, calibrated: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "checkpoint")
    opened, partly = open_checkpoint(tmp_path / "checkpoint"), load(tmp_path / "checkpoint", left=LAYERS)
    assert all(parameter.is_meta for parameter in partly.language.model.layers.parameters())
    assert sum(parameter.is_meta for parameter in partly.parameters()) == len(list(partly.language.model.layers.parameters()))
    alive: set[int] = set()
    most, original = 0, _Run._layer

    def counted(run: _Run, index: int) -> torch.nn.Module:
        nonlocal most
        layer = original(run, index)
        alive.add(index)
        weakref.finalize(layer, alive.discard, index)
        most = max(most, len(alive))
        return layer

    monkeypatch.setattr(_Run, "_layer", counted)
    planned = plan_to_make(partly, PICTURES, SETTINGS, model_sha256(opened.tensors))
    made = calibrate(partly, PICTURES, SETTINGS, work=tmp_path / "work", planned=planned, tensors=opened.tensors)
    assert most == 1 and all(parameter.is_meta for parameter in partly.language.model.layers.parameters())
    assert made.plan == calibrated.plan and made.weights.keys() == calibrated.weights.keys()
    for name, weight in made.weights.items():
        wanted = calibrated.weights[name]
        assert np.array_equal(weight.codes, wanted.codes) and np.array_equal(weight.scales, wanted.scales)
    assert all(np.array_equal(channels, calibrated.ranges[name]) for name, channels in made.ranges.items())
    write_gptq_checkpoint(partly, made.weights, tmp_path / "partly", floats=opened.tensors)
    write_gptq_checkpoint(model, calibrated.weights, tmp_path / "whole")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "partly" / file.name).read_bytes(), file.name


def test_what_is_left_in_the_file_needs_the_file(model: AGVAS, tmp_path: Path) -> None:
    save(model, tmp_path / "checkpoint")
    partly = load(tmp_path / "checkpoint", left=LAYERS)
    with pytest.raises(ValueError, match="language.model.layers.0 is on the meta device: expected the checkpoint's tensors, got none"):
        calibrate(partly, PICTURES[:1], SETTINGS, planned=plan_to_make(partly, PICTURES[:1], SETTINGS, "of the checkpoint"))


def test_a_layer_in_the_file_that_is_no_number_is_named(model: AGVAS, tmp_path: Path) -> None:
    save(model, tmp_path / "checkpoint")
    state, name = load_file(tmp_path / "checkpoint" / "model.safetensors"), f"{LAYERS}.1.mlp.up_proj.weight"
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "checkpoint" / "model.safetensors")
    opened, partly = open_checkpoint(tmp_path / "checkpoint"), load(tmp_path / "checkpoint", left=LAYERS)
    planned = plan_to_make(partly, PICTURES[:1], SETTINGS, "of the checkpoint")
    with pytest.raises(ValueError, match=f"{name} holds 1 NaN or infinite values of"):
        calibrate(partly, PICTURES[:1], SETTINGS, planned=planned, tensors=opened.tensors)


def test_the_memory_of_the_papers_model_is_what_one_layer_and_the_encoders_take() -> None:
    with torch.device("meta"):
        state = AGVAS(ov_7b(), train_tokenizer(["a"], 300)).state_dict()
    tensors = {name: LazyTensor(tuple(tensor.shape), torch.bfloat16, lambda: pytest.fail("read")) for name, tensor in state.items()}
    layer = 2 * 4 * 233_057_792 + 4 * 4 * 18944**2
    held = sum(tensor.numel() for name, tensor in state.items() if not name.startswith(LAYERS))
    assert memory_needed(tensors, torch.bfloat16) == pytest.approx(1.4e9 + 2 * held + 2 * 233_057_792 + layer, rel=1e-3)
    assert memory_needed(tensors, torch.bfloat16) < 14e9 < memory_needed(tensors, torch.float32) < 20e9
    assert memory_needed(tensors, torch.bfloat16, "cuda:0") < memory_needed(tensors, torch.bfloat16) - 6e9


def test_another_calibrations_work_folder_is_refused(model: AGVAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(model, PICTURES[:2], SETTINGS, work=tmp_path / "work")
    with pytest.raises(PlanError, match=r"work.*settings differ.*remove"):
        calibrate(model, PICTURES[:2], CalibrationSettings(GPTQSettings(group=32, damping=0.1), None), work=tmp_path / "work")
    with pytest.raises(PlanError, match="images"):
        calibrate(model, PICTURES[1:3], SETTINGS, work=tmp_path / "work")
    monkeypatch.setattr("calibration.calibrate.versions", lambda: {"torch": "1.0"})
    with pytest.raises(PlanError, match=r"work.*\(versions differ\)"):
        calibrate(model, PICTURES[:2], SETTINGS, work=tmp_path / "work")
    monkeypatch.undo()
    preprocessing = dataclasses.replace(model.config.preprocessing, pixel_mean=(1.0, 2.0, 3.0))
    other = AGVAS(dataclasses.replace(model.config, preprocessing=preprocessing), model.tokenizer).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(PlanError, match=r"work.*\(config differ\)"):
        calibrate(other, PICTURES[:2], SETTINGS, work=tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(PlanError, match="other files"):
        calibrate(model, PICTURES[:2], SETTINGS, work=tmp_path / "other")


@pytest.mark.parametrize("full_at", ["state.json.partial", "layers"])
def test_a_disk_that_is_full_from_the_start_leaves_a_work_folder_to_go_on_in(
    model: AGVAS, full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def write_text(path: Path, *_: Any) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def mkdir(path: Path, *arguments: Any, **named: Any) -> None:
        if path.name == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        if full_at == "layers":
            patched.setattr(Path, "mkdir", mkdir)
        else:
            patched.setattr(Path, "write_text", write_text)
        calibrate(model, PICTURES[:1], SETTINGS, work=tmp_path / "work")
    assert any((tmp_path / "work").iterdir())
    calibrate(model, PICTURES[:1], SETTINGS, work=tmp_path / "work")


def test_a_work_folder_that_another_process_works_in_is_refused(model: AGVAS, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    work = tmp_path / "work"
    work.mkdir()
    opened = os.open(work, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    with pytest.raises(FolderInUse, match="work: another calibration is at work in it; wait for it"):
        calibrate(model, PICTURES[:1], SETTINGS, work=work)
    os.close(opened)
    calibrate(model, PICTURES[:1], SETTINGS, work=work)


def test_a_group_that_does_not_divide_a_layer_is_refused_before_any_work(model: AGVAS, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .*groups of 128 divide, got 64; choose a group of 64"):
        calibrate(model, PICTURES, CalibrationSettings(), work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_that_overflows_is_refused_where_it_does(model: AGVAS) -> None:

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.language.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: weight: expected finite"):
        calibrate(broken, PICTURES[:2], SETTINGS)
    with torch.no_grad():
        broken.semantic_encoder.projector.linear_2.bias[0] = torch.inf
    with pytest.raises(ValueError, match="picture 1: the encoders put out NaN or infinity"):
        calibrate(broken, PICTURES[:2], SETTINGS)


def test_no_pictures_and_settings_out_of_range_are_refused(model: AGVAS) -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibrate(model, [], SETTINGS)
    with pytest.raises(ValueError, match="answer_share"):
        CalibrationSettings(answer_share=1.0)


def test_a_hessian_sum_is_the_weighted_mean_of_outer_products() -> None:
    rows, weights = torch.randn(7, 5, dtype=torch.float64), torch.tensor([1.0, 3, 1, 0.5, 1, 2, 0])
    total = HessianSum(5, torch.device("cpu"))
    total.add(rows[:4], weights[:4])
    total.add(rows[4:], weights[4:])
    wanted = sum(weight * torch.outer(row, row) for row, weight in zip(rows, weights)) / weights.sum()
    torch.testing.assert_close(total.mean().double(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least one token"):
        HessianSum(5, torch.device("cpu")).mean()


def test_ranges_take_up_what_is_known_and_hooks_go_when_the_watch_ends() -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    ranges = Ranges({"part.0": np.array([5.0, 0.0], np.float32)})
    with ranges.watching(layer, "part"):
        layer(torch.tensor([[1.0, -2.0]]))
    layer(torch.tensor([[9.0, 9.0]]))
    np.testing.assert_array_equal(ranges.channels["part.0"], [5, 2])
    assert ranges.channels["part.2"].shape == (3,)


def test_a_linear_that_is_never_reached_is_said() -> None:
    with pytest.raises(ValueError, match="never called"):
        input_of(nn.Linear(2, 2), lambda: None)


def test_a_folder_gives_pictures_from_all_over_it_and_too_few_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(10):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert [image[0, 0, 0] for image in calibration_pictures(tmp_path, 3)] == [0, 3, 6]
    with pytest.raises(ValueError, match="at least 11 pictures, got 10.*--samples"):
        calibration_pictures(tmp_path, 11)
    with pytest.raises(ImageError):
        calibration_pictures(tmp_path / "nowhere", 1)


def test_a_calibration_goes_on_in_its_own_type_alone(model: AGVAS, tmp_path: Path) -> None:
    calibrate(model, PICTURES[:1], SETTINGS, work=tmp_path)
    coarse = copy.deepcopy(model).bfloat16()
    with pytest.raises(PlanError, match="dtype differ"):
        calibrate(coarse, PICTURES[:1], SETTINGS, work=tmp_path, planned=plan_to_make(coarse, PICTURES[:1], SETTINGS, model_sha256(model)))
