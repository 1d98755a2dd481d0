"""nano's recipe at tiny size: three phases that hand over, resume, seeds and ablations, and agvas-train's own door."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file
from torch import Tensor

from agvas import AGVAS, CheckpointError, load
from agvas.config import ABLATIONS, ANCHORS, AGVASConfig, nano, tiny
from agvas.training import cli, recipe
from agvas.training.batch import Batch, collate
from agvas.training.language_pretraining import LanguagePretraining
from agvas.training.losses import anchor_losses
from agvas.training.pool import PoolSettings, ProceduralSource, SamplePool
from agvas.training.pretraining import PixelPretraining, hand_over
from agvas.training.recipe import FROZEN, Recipe, new_model, pieces_config, semantic_config, train_from_nothing
from export.bundle import export_bundle
from export.progress import Progress
from export.settings import ExportSettings

BASE = Recipe(config="tiny")
SMALL = replace(
    BASE,
    pool=PoolSettings(samples=8, plain=3, side=64, seed=5),
    pretraining=replace(
        BASE.pretraining, loop=replace(BASE.pretraining.loop, steps=4, global_batch=2, micro_batch=2, warmup_steps=2, save_every=2)
    ),
    language=replace(BASE.language, loop=replace(BASE.language.loop, steps=2, global_batch=2, micro_batch=2, warmup_steps=1)),
    tuning=replace(BASE.tuning, loop=replace(BASE.tuning.loop, steps=3, global_batch=2, micro_batch=2, warmup_steps=2, save_every=2)),
)


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "pool"
    SamplePool.make(folder, SMALL.pool, 0)
    return folder


@pytest.fixture
def run_folder(small_pool: Path, tmp_path: Path) -> Path:
    """A run's folder whose pool is already made."""
    shutil.copytree(small_pool, tmp_path / "run" / "pool")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained(small_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(small_pool, folder / "pool")
    return train_from_nothing(SMALL, folder, workers=0).state_dict(), folder


@pytest.mark.parametrize("calls", [3, 5, 8])
def test_a_run_stopped_in_any_phase_ends_where_an_uninterrupted_one_does(
    run_folder: Path, trained: tuple[dict[str, Tensor], Path], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    made = 0

    def stopping(*arguments: object) -> Batch:
        nonlocal made
        made += 1
        if made > calls:
            raise KeyboardInterrupt
        return collate(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "collate", stopping)
        patch.setattr("agvas.training.trainer.collate", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_from_nothing(SMALL, run_folder, workers=0)
    assert not (run_folder / "checkpoint").exists()
    got = train_from_nothing(SMALL, run_folder, workers=0).state_dict()
    for name, tensor in trained[0].items():
        torch.testing.assert_close(got[name], tensor, atol=0, rtol=0, msg=name)


def test_the_checkpoint_is_the_trained_model_in_16_bit(trained: tuple[dict[str, Tensor], Path]) -> None:
    weights, folder = trained
    on_disk = load(folder / "checkpoint")
    assert all(torch.equal(tensor.half().float(), on_disk.state_dict()[name]) for name, tensor in weights.items())
    assert on_disk.segment(picture()).mask.shape == picture().shape[:2]


def test_training_moves_every_part_of_the_model(trained: tuple[dict[str, Tensor], Path]) -> None:
    start = new_model("tiny", 0).state_dict()
    unmoved = [name for name, tensor in trained[0].items() if torch.equal(tensor, start[name])]
    assert unmoved == ["mask_decoder.frequencies"]  # SAM's random frequencies are drawn once


def test_another_seed_is_another_model_on_the_same_pool(run_folder: Path, trained: tuple[dict[str, Tensor], Path]) -> None:
    other = train_from_nothing(SMALL.with_seed(1), run_folder, workers=0).state_dict()
    assert not torch.equal(other["spam.query.weight"], trained[0]["spam.query.weight"])
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        train_from_nothing(SMALL.with_seed(2), run_folder, workers=0)


def test_pretraining_moves_the_pixel_encoder_and_what_reads_it_alone() -> None:
    model = new_model("tiny", 0)
    learned = {id(parameter) for parameter in PixelPretraining(model, SMALL.pretraining.weights, 0).learned()}
    moved = {name for name, parameter in model.named_parameters() if id(parameter) in learned}
    read = ("pixel_encoder.", "mask_decoder.upscaling.")  # and the norms that stand between the two
    assert moved == {name for name, _ in model.named_parameters() if name.startswith(read) or "layer_norm4" in name}


def test_a_stem_learns_alone_before_the_vit_behind_it() -> None:
    model = new_model("nano", 0)
    learned = {id(parameter) for parameter in PixelPretraining(model, SMALL.pretraining.weights, 0).learned()}
    moved = {name for name, parameter in model.named_parameters() if id(parameter) in learned and name.startswith("pixel_encoder.")}
    stem = {name for name, _ in model.named_parameters() if name.startswith("pixel_encoder.patch_embed.")}
    assert moved == {name for name in stem if not name.startswith(FROZEN)}


def test_language_pretraining_moves_what_reads_and_writes_alone() -> None:
    model = new_model("tiny", 0)
    learned = {id(parameter) for parameter in LanguagePretraining(model).learned()}
    moved = {name for name, parameter in model.named_parameters() if id(parameter) in learned}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith(("semantic_encoder.", "language."))}


@pytest.mark.parametrize("config", [tiny(), nano()])
def test_language_pretraining_looks_at_the_same_semantic_images_and_at_hardly_any_pixels(config: AGVASConfig, small_pool: Path) -> None:
    model = new_model(config.name, 0)
    source = ProceduralSource(SamplePool(small_pool, SMALL.pool), 56, 0.5, modes=SMALL.language.modes)
    samples = [source.sample(0, 0, index) for index in range(3)]
    whole, small = (collate(samples, each, model.prompt_encoder) for each in (config, semantic_config(config)))
    assert torch.equal(small.semantic_image, whole.semantic_image)
    assert small.answers == whole.answers
    assert small.pixel_image.shape[-1] == 4 * config.pixel.patch_size


def test_language_pretraining_lowers_the_loss_of_the_answers(small_pool: Path) -> None:
    model = new_model("tiny", 0)
    second = LanguagePretraining(model)
    source = ProceduralSource(SamplePool(small_pool, SMALL.pool), 56, 0.5, modes=SMALL.language.modes)
    batch = collate([source.sample(0, 0, index) for index in range(4)], semantic_config(model.config), model.prompt_encoder)
    optimizer = torch.optim.AdamW(second.learned(), lr=3e-3)
    losses = []
    for step in range(30):
        losses.append(second(batch, step)["text"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_tuning_begins_with_the_maps_that_pretraining_ended_with(small_pool: Path) -> None:
    """The decoder's anomaly logit is the kernel's own, but for the tenth of the hypernetworks' weights that is kept."""
    model = new_model("tiny", 0).eval()
    first = PixelPretraining(model, SMALL.pretraining.weights, 0)
    source = ProceduralSource(SamplePool(small_pool, SMALL.pool), 56, 0.5)
    batch = collate([source.sample(0, 0, index) for index in range(4)], model.config, model.prompt_encoder)
    with torch.no_grad():
        before = first(batch, 0)["mask"]
        hand_over(first.kernel, model)
        for hypernetwork in model.mask_decoder.hypernetworks:
            torch.nn.init.zeros_(hypernetwork.proj_out.weight)
        maps = model(batch.pixel_image, batch.semantic_image, batch.prompts, batch.answers).maps
    assert maps.logit_absolute is not None and maps.logit_relative is not None
    for logit in (maps.logit_absolute, maps.logit_relative[:, 1] - maps.logit_relative[:, 0]):
        after = anchor_losses(logit, batch.target, batch.valid, SMALL.pretraining.weights).mean()
        assert after.item() == pytest.approx(before.item(), rel=1e-4)


def test_a_stem_is_shown_pieces_and_any_other_encoder_whole_pictures() -> None:
    assert pieces_config(tiny(), 256) == tiny()
    pieces = pieces_config(nano(), 256)
    assert (pieces.preprocessing.pixel_size, pieces.pixel.grid) == (256, 16)
    assert pieces_config(nano(), None) == nano()
    for side in (250, 1024):
        with pytest.raises(ValueError, match=f"multiple of 16 up to 512 pixels, got {side}"):
            pieces_config(nano(), side)


# --- ablations ---


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_trains_segments_and_is_kept(run_folder: Path, ablation: str) -> None:
    model = train_from_nothing(replace(SMALL, ablation=ablation), run_folder, workers=0)
    loaded = load(run_folder / "checkpoint")
    assert loaded.config == model.config
    anchors = {"no-seg": ANCHORS[:2], "no-spam": ANCHORS}.get(ablation, ANCHORS[2:])
    assert loaded.config.prompts.anchors == anchors
    assert (loaded.spam is None) == (ablation in ("no-spam", "single-anchor"))
    assert len(loaded.mask_decoder.hypernetworks) == len(anchors)
    prompt = loaded.prompt_encoder.encode()
    assert prompt.draft is not None and loaded.prompt_encoder.decode(prompt.draft) == f"Sure, it is {''.join(anchors)}."
    vision = torch.randn(1, 3, 56, 56), torch.randn(1, 3, 45, 45)
    with torch.no_grad():
        maps = loaded(*vision, [prompt], [prompt.draft]).maps
    assert (maps.logit_absolute is None) == (ablation == "no-seg")
    assert (maps.logit_relative is None) == (ablation in ("no-relative", "single-anchor"))
    assert 0 <= maps.anomaly_map.min() <= maps.anomaly_map.max() <= 1
    assert loaded.segment(picture()).anomaly_map.shape == picture().shape[:2]


def test_an_ablation_has_no_bundle(run_folder: Path, tmp_path: Path) -> None:
    train_from_nothing(replace(SMALL, ablation="no-spam"), run_folder, workers=0)
    with pytest.raises(CheckpointError, match="is an ablation .tiny-no-spam. and has no bundle"):
        export_bundle(ExportSettings(str(run_folder / "checkpoint"), "fp32", tmp_path / "bundle"), Progress(False))
    assert not (tmp_path / "bundle").exists()


def test_an_unknown_ablation_is_refused() -> None:
    with pytest.raises(ValueError, match="one of no-seg, no-relative, no-spam, single-anchor, got 'no-sam'"):
        new_model("tiny", 0, "no-sam")


# --- the door ---

SHORT = ["--config", "tiny", "--steps", "2", "--batch", "4", "--micro-batch", "2", "--samples", "4", "--workers", "0"]


def run_cli(arguments: Sequence[str]) -> int:
    return cli.main([*arguments])


def test_agvas_train_makes_a_checkpoint_that_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run_cli([*SHORT, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"saved {output / 'checkpoint'}\n"
    assert load(output / "checkpoint").segment(picture()).mask.shape == picture().shape[:2]
    assert run_cli([*SHORT[:3], "3", *SHORT[4:], "--output", str(output)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "describes another run" in message and "tuning.loop.steps was 2, is 3" in message
    assert "learning_rate" not in message, "what is alike need not be read"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part.png").touch()
    for arguments in (["--config", "nano"], ["--checkpoint", "nano", "--mixture", "m.json"]):
        assert run_cli([*arguments, "--output", str(tmp_path)]) == 2
        assert f"--output {tmp_path}: expected a new or empty folder, or that of a run, got one with part.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["part.png"]


def test_nothing_is_trained_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    told = "--config, --checkpoint: expected one of the two, got none; give --checkpoint nano|DIR --mixture FILE.json to tune a model"
    monkeypatch.setattr(cli, "_from_nothing", begun.append)
    for arguments in ([], ["--mixture", "m.json"], ["--ablation", "no-seg"]):
        assert run_cli([*arguments, "--output", str(tmp_path / "run")]) == 2
        assert told in capsys.readouterr().err and not begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny", "--mixture", "m.json"], "--mixture is for tuning; give --checkpoint in place of --config"),
        (["--checkpoint", "nano"], "give --mixture FILE.json"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--micro-batch", "-2"], "--micro-batch: expected at least 1, got -2"),
        (["--checkpoint", "nano", "--samples", "3"], "--samples is for training from nothing"),
        (
            ["--config", "tiny", "--batch", "3", "--micro-batch", "2", "--samples", "2"],
            "global_batch: expected a multiple of 2 (processes 1 x micro_batch 2), got 3",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_cli([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_process_computes_with_no_more_than_its_share_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr("agvas.training.recipe.train_from_nothing", lambda recipe, *_, **__: asked.append(recipe))
    for processes, batch in (("1", 32), ("2", 16), ("4", 8)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert run_cli(["--config", "tiny", "--output", str(tmp_path / processes)]) == 0
        assert asked[-1].pretraining.loop.micro_batch == batch and asked[-1].pretraining.loop.global_batch == 32


def test_two_processes_train_the_model_that_one_does(tmp_path: Path) -> None:
    """The same micro-batches, summed by two processes instead of one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # accelerate launch --cpu starts one process
    root = Path(cli.__file__).parents[2]
    for name, command in {
        "one": [sys.executable, "-m", "agvas.training.cli"],
        "two": [sys.executable, *launch, "-m", "agvas.training.cli"],
    }.items():
        finished = subprocess.run(
            [*command, *SHORT, "--output", str(tmp_path / name)], env=environment, cwd=root, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert finished.stdout.count("saved") == 1
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4, msg=name)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [{line["processes"] for line in log} for log in logs] == [{1}, {2}]
    np.testing.assert_allclose([line["mask"] for line in logs[1]], [line["mask"] for line in logs[0]], rtol=1e-4)


def test_the_average_of_two_models_is_neither(trained: tuple[dict[str, Tensor], Path]) -> None:
    """What is kept is the average, not the last step."""
    state = load_file(trained[1] / "state.safetensors")
    name = "model.spam.query.weight"
    assert not torch.equal(state[f"average.{name}"], state[f"weights.{name}"])
    torch.testing.assert_close(trained[0]["spam.query.weight"], state[f"average.{name}"])


def test_a_model_is_the_same_for_the_same_seed() -> None:
    def weights(model: AGVAS) -> Tensor:
        return model.spam.query.weight  # type: ignore[union-attr]

    assert torch.equal(weights(new_model("tiny", 4)), weights(new_model("tiny", 4)))
    assert not torch.equal(weights(new_model("tiny", 4)), weights(new_model("tiny", 5)))
