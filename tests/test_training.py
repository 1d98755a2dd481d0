"""Training: losses against slow loops, batches whose targets lie on their images, and runs that can be stopped at any time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from agvas import AGVAS, load
from agvas.config import nano, tiny
from agvas.mask_decoder import Maps
from agvas.training import cli, trainer
from agvas.training import pool as pool_module
from agvas.training.losses import MaskLossWeights, mask_loss, text_loss
from agvas.training.pool import Batch, PoolSettings, SamplePool, draw_batch
from agvas.training.trainer import Diverged, TrainSettings, learning_rate, new_model, train, warmup_decay

# --- losses ---


def random_maps(batch: int = 2, side: int = 5, seed: int = 0) -> tuple[Maps, Tensor, Tensor]:
    """Maps, targets with fractions, and a picture that fills a part of each square."""
    generator = torch.Generator().manual_seed(seed)
    absolute = 3 * torch.randn(batch, side, side, generator=generator)
    relative = 3 * torch.randn(batch, 2, side, side, generator=generator)
    probabilities = relative.softmax(1)
    maps = Maps(absolute, relative, absolute.sigmoid(), probabilities, probabilities[:, 1])
    target = (torch.rand(batch, side, side, generator=generator) * 2 - 0.5).clamp(0, 1)
    valid = torch.zeros(batch, side, side)
    valid[0, :3] = 1
    valid[1:, :, :4] = 1
    return maps, target * valid, valid


def slow_mask_loss(maps: Maps, target: Tensor, valid: Tensor, bce_weight: float, dice_weight: float) -> float:
    """Equation 10 cell by cell, in double precision, from probabilities."""
    total = 0.0
    batch, side, _ = target.shape
    for b in range(batch):
        for anchor in ("NOR", "ANO", "SEG"):
            bce = overlap = said = wanted = cells = 0.0
            for row in range(side):
                for column in range(side):
                    if not valid[b, row, column]:
                        continue
                    normal, anomalous = (math.exp(float(x)) for x in maps.logit_relative[b, :, row, column])
                    t = float(target[b, row, column])
                    if anchor == "SEG":
                        p = 1 / (1 + math.exp(-float(maps.logit_absolute[b, row, column])))
                    elif anchor == "ANO":
                        p = anomalous / (normal + anomalous)
                    else:
                        p, t = normal / (normal + anomalous), 1 - t
                    bce -= t * math.log(p) + (1 - t) * math.log(1 - p)
                    overlap, said, wanted, cells = overlap + p * t, said + p, wanted + t, cells + 1
            total += bce_weight * bce / cells + dice_weight * (1 - (2 * overlap + 1) / (said + wanted + 1))
    return total / batch


@pytest.mark.parametrize(("bce", "dice"), [(0.5, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_mask_loss_is_the_papers_cell_by_cell(bce: float, dice: float) -> None:
    maps, target, valid = random_maps()
    got = mask_loss(maps, target, valid, MaskLossWeights(bce, dice))
    assert float(got) == pytest.approx(slow_mask_loss(maps, target, valid, bce, dice), rel=1e-5)


def test_the_default_weights_are_the_papers() -> None:
    assert MaskLossWeights() == MaskLossWeights(bce=0.5, dice=2.0)
    assert TrainSettings().late_weights == MaskLossWeights(bce=0.5, dice=2.0)


def test_padding_changes_no_loss_and_gets_no_gradient() -> None:
    maps, target, valid = random_maps()
    before = mask_loss(maps, target, valid, MaskLossWeights())
    padding = valid == 0
    absolute = torch.where(padding, 50.0, maps.logit_absolute).requires_grad_()
    relative = torch.where(padding[:, None], torch.tensor([-30.0, 20.0])[:, None, None], maps.logit_relative).requires_grad_()
    changed = maps._replace(logit_absolute=absolute, logit_relative=relative)
    after = mask_loss(changed, torch.where(padding, 1.0, target), valid, MaskLossWeights())
    torch.testing.assert_close(before, after)
    after.backward()
    assert absolute.grad is not None and relative.grad is not None
    assert (absolute.grad[padding] == 0).all() and (absolute.grad[~padding] != 0).all()
    assert (relative.grad[:, 1][padding] == 0).all() and (relative.grad[:, 1][~padding] != 0).all()


def test_a_large_picture_weighs_no_more_than_a_small_one() -> None:
    maps, target, valid = random_maps()
    alone = [mask_loss(Maps(*(part[b : b + 1] for part in maps)), target[b : b + 1], valid[b : b + 1], MaskLossWeights()) for b in (0, 1)]
    torch.testing.assert_close(mask_loss(maps, target, valid, MaskLossWeights()), torch.stack(alone).mean())


def test_an_empty_target_asks_for_an_empty_map() -> None:
    valid = torch.ones(1, 8, 8)
    dice = MaskLossWeights(bce=0, dice=1)

    def loss(anomalous: float) -> float:
        absolute = torch.full((1, 8, 8), anomalous)
        relative = torch.stack([-absolute, absolute], dim=1)
        maps = Maps(absolute, relative, absolute, relative, absolute)
        return float(mask_loss(maps, torch.zeros(1, 8, 8), valid, dice))

    assert loss(-20) == pytest.approx(0, abs=1e-5)
    assert loss(20) == pytest.approx(3 * (1 - 1 / 65), abs=1e-4)  # 64 cells said, none wanted, and one of smoothing
    assert loss(-20) < loss(-2) < loss(0) < loss(20)


def test_the_text_loss_is_the_mean_cross_entropy_of_every_answer_token() -> None:
    logits = 3 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    answer = (4, 0, 6)
    expected = 0.0
    for b in range(2):
        for place, token in enumerate(answer):
            row = [math.exp(float(logit)) for logit in logits[b, place]]
            expected -= math.log(row[token] / sum(row)) / 6
    assert float(text_loss(logits, answer)) == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [warmup_decay(step, 4, 10) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert warmup_decay(0, 0, 1) == 1
    assert [warmup_decay(step, 100, 2) for step in range(2)] == [0.01, 0.02]  # a run shorter than its warm-up


def test_each_phase_warms_up_and_falls_on_its_own() -> None:
    settings = TrainSettings(encoder_steps=4, encoder_learning_rate=8.0, steps=5, learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(step, settings) for step in range(9)] == pytest.approx([4, 8, 8, 4, 0.5, 1, 1, 2 / 3, 1 / 3])


# --- pool and batches ---


def l_shape(side: int) -> np.ndarray:
    """No turn and no mirror of it is itself."""
    mask = np.zeros((side, side), bool)
    mask[side // 4 : 7 * side // 8, side // 4 : side // 2] = True
    mask[5 * side // 8 : 7 * side // 8, side // 4 : 13 * side // 16] = True
    return mask


@pytest.fixture(scope="module")
def bright_pool(tmp_path_factory: pytest.TempPathFactory) -> SamplePool:
    """Two samples whose defect is what is bright."""
    folder, side = tmp_path_factory.mktemp("pool"), 160
    masks = np.stack([l_shape(side), l_shape(side)[::-1]])
    np.save(folder / "masks.npy", masks)
    np.save(folder / "images.npy", np.where(masks[..., None], 190, 60).astype(np.uint8) + np.zeros(3, np.uint8))
    return SamplePool(folder, PoolSettings(2, 1, side, 0))


MAP_SIDE = 4 * nano().pixel.grid


@pytest.fixture(scope="module")
def bright_batch(bright_pool: SamplePool) -> Batch:
    return draw_batch(bright_pool, nano().preprocessing, MAP_SIDE, 24, np.random.default_rng(1))


def test_a_batch_has_the_models_shapes(bright_batch: Batch) -> None:
    config = nano()
    pixel, semantic = config.preprocessing.pixel_size, config.preprocessing.semantic_size
    assert [tuple(part.shape) for part in vars(bright_batch).values()] == [
        (24, 3, pixel, pixel),
        (24, 3, semantic, semantic),
        (24, MAP_SIDE, MAP_SIDE),
        (24, MAP_SIDE, MAP_SIDE),
    ]
    assert {part.dtype for part in vars(bright_batch).values()} == {torch.float32}


def test_the_same_generator_draws_the_same_batch(bright_pool: SamplePool, bright_batch: Batch) -> None:
    again = draw_batch(bright_pool, nano().preprocessing, MAP_SIDE, 24, np.random.default_rng(1))
    other = draw_batch(bright_pool, nano().preprocessing, MAP_SIDE, 24, np.random.default_rng(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(bright_batch).values(), vars(again).values()))
    assert not torch.equal(bright_batch.pixel_image, other.pixel_image)


def shrunk(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture.astype(np.float32)).resize((width, height), Image.Resampling.BOX))


def test_targets_lie_on_what_is_bright_through_every_crop_and_turn(bright_batch: Batch) -> None:
    compared = 0
    for pixel, semantic, target, valid in zip(*(part.numpy() for part in vars(bright_batch).values())):
        rows, columns = int(valid[:, 0].sum()), int(valid[0].sum())
        inside = target[:rows, :columns]
        if not 0.05 < inside.mean() < 0.95:
            continue
        compared += 1
        seen = shrunk(pixel.mean(0), MAP_SIDE, MAP_SIDE)[:rows, :columns]
        squashed = shrunk(inside, 40, 40)
        assert np.corrcoef(seen.ravel(), inside.ravel())[0, 1] > 0.97
        assert np.corrcoef(shrunk(semantic.mean(0), 40, 40).ravel(), squashed.ravel())[0, 1] > 0.97
    assert compared >= 12


def test_what_is_valid_is_where_the_picture_is(bright_batch: Batch) -> None:
    scale = nano().preprocessing.pixel_size / MAP_SIDE
    shapes = set()
    for pixel, _, target, valid in zip(*(part.numpy() for part in vars(bright_batch).values())):
        assert set(np.unique(valid)) <= {0, 1}
        rows, columns = int(valid[:, 0].sum()), int(valid[0].sum())
        assert valid.sum() == rows * columns
        assert not target[valid == 0].any()
        assert 0 <= target.min() <= target.max() <= 1
        drawn = (pixel != 0).any(axis=0)
        height, width = drawn.any(axis=1).sum(), drawn.any(axis=0).sum()
        assert abs(rows * scale - height) <= scale / 2
        assert abs(columns * scale - width) <= scale / 2
        shapes.add(int(np.sign(int(height) - int(width))))
    assert shapes == {-1, 0, 1}  # tall, square and wide


def test_every_turn_and_mirror_is_drawn(bright_pool: SamplePool) -> None:
    """Of the whole picture: eight ways to lie, told apart by where the L's mass is."""
    batch = draw_batch(bright_pool, tiny().preprocessing, 8, 150, np.random.default_rng(3))
    seen = {tuple(np.round(shrunk(target, 4, 4) > 0.4).ravel().tolist()) for target in batch.target.numpy()}
    masks = [np.rot90(m, k) for m in (l_shape(160), l_shape(160)[:, ::-1]) for k in range(4)]
    assert {tuple((shrunk(m, 4, 4) > 0.4).ravel().tolist()) for m in masks} <= seen


@pytest.fixture
def marked_pool(tmp_path: Path) -> SamplePool:
    """Two plain samples without a defect, then one that is all defect."""
    masks = np.zeros((3, 32, 32), bool)
    masks[2] = True
    np.save(tmp_path / "masks.npy", masks)
    np.save(tmp_path / "images.npy", np.full((3, 32, 32, 3), 99, np.uint8))
    return SamplePool(tmp_path, PoolSettings(3, 2, 32, 0))


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 1.0, 1.0), (0.75, 0.1, 0.4), (1.0, 0.0, 0.0)])
def test_the_plain_samples_have_the_share_of_a_batch_that_was_asked_for(
    marked_pool: SamplePool, share: float, low: float, high: float
) -> None:
    batch = draw_batch(marked_pool, tiny().preprocessing, 8, 60, np.random.default_rng(0), share)
    assert low <= batch.target.amax(dim=(1, 2)).mean().item() <= high


@pytest.mark.parametrize("plain", [0, 3])
def test_a_pool_of_one_kind_is_drawn_from_whatever_the_share(marked_pool: SamplePool, plain: int) -> None:
    marked_pool.plain = plain
    for share in (0.0, 1.0):
        batch = draw_batch(marked_pool, tiny().preprocessing, 8, 40, np.random.default_rng(0), share)
        assert 0 < batch.target.amax(dim=(1, 2)).mean().item() < 1


def test_pictures_are_continued_by_their_mirror_image_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 20, 3), np.uint8)
    mask = rng.random((20, 20)) < 0.5
    sides = []
    for _ in range(60):
        larger, larger_mask = pool_module._mirror(image, mask, rng)
        side = len(larger)
        sides.append(side)
        assert larger.shape == (side, side, 3) and larger_mask.shape == (side, side)
        np.testing.assert_array_equal(larger[:20, :20], image)
        np.testing.assert_array_equal(larger[20:, :20], image[::-1][: side - 20])
        np.testing.assert_array_equal(larger_mask[:20, 20:], mask[:, ::-1][:, : side - 20])
    assert 20 <= sum(side == 20 for side in sides) <= 40
    assert max(sides) > 36


def test_a_crop_keeps_the_defect_more_often_than_chance() -> None:
    mask = np.zeros((100, 100), bool)
    mask[:20, :20] = True
    image = np.zeros((100, 100, 3), np.uint8)

    def kept(crop: Any) -> float:
        rng = np.random.default_rng(0)
        return float(np.mean([crop(image, mask, rng)[1].sum() >= mask.sum() / 3 for _ in range(200)]))

    assert kept(pool_module._crop_with_defect) > 0.97 > 0.85 > kept(pool_module._crop)


def stand_in_samples(seeds: Iterable[int], height: int, width: int, workers: int, plain: bool = False) -> Iterator[SimpleNamespace]:
    for seed in seeds:
        rng = np.random.default_rng([seed, plain])
        yield SimpleNamespace(image=rng.integers(0, 256, (height, width, 3), np.uint8), mask=rng.random((height, width)) < 0.5)


def test_plain_samples_come_first_in_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "make_samples", stand_in_samples)
    pool = SamplePool.make(tmp_path, PoolSettings(samples=5, plain=2, side=6, seed=40), 0)
    for index in range(5):
        (expected,) = stand_in_samples([40 + index], 6, 6, 0, plain=index < 2)
        np.testing.assert_array_equal(pool.images[index], expected.image)
        np.testing.assert_array_equal(pool.masks[index], expected.mask)


@pytest.mark.parametrize("plain", [120, 60])
def test_an_interrupted_pool_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: int) -> None:
    settings = PoolSettings(samples=230, plain=plain, side=6, seed=40)
    monkeypatch.setattr(pool_module, "make_samples", stand_in_samples)
    whole = SamplePool.make(tmp_path / "whole", settings, 0)
    made: list[int] = []

    def interrupted(seeds: Iterable[int], *size: int, plain: bool = False) -> Iterator[SimpleNamespace]:
        for seed, sample in zip(seeds, stand_in_samples(seeds, *size, plain=plain)):
            if len(made) == 160:
                made.append(-1)
                raise KeyboardInterrupt
            made.append(seed)
            yield sample

    monkeypatch.setattr(pool_module, "make_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SamplePool.make(tmp_path / "parts", settings, 0)
    parts = SamplePool.make(tmp_path / "parts", settings, 0)
    # The first hundred were on record, the next sixty were not.
    assert made == [*range(40, 200), -1, *range(140, 270)]
    np.testing.assert_array_equal(parts.images, whole.images)
    np.testing.assert_array_equal(parts.masks, whole.masks)
    SamplePool.make(tmp_path / "parts", settings, 0)
    assert len(made) == 160 + 1 + 130  # a finished pool is only opened


def test_a_pool_of_other_settings_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "make_samples", stand_in_samples)
    settings = PoolSettings(samples=3, plain=1, side=6, seed=40)
    SamplePool.make(tmp_path, settings, 0)
    for change in ({"samples": 4}, {"plain": 2}, {"side": 7}, {"seed": 41}):
        with pytest.raises(ValueError, match="holds another pool"):
            SamplePool.make(tmp_path, replace(settings, **change), 0)
    with pytest.raises(ValueError, match="remove the folder"):
        SamplePool(tmp_path, replace(settings, samples=4))


def test_light_falls_off_towards_the_sides_of_a_quarter_of_the_pictures_and_leaves_their_middle() -> None:
    image = np.full((60, 80, 3), 120, np.uint8)
    shaded = [pool_module._shade_sides(image, np.random.default_rng(seed)) for seed in range(400)]
    changed = [result for result in shaded if not np.array_equal(result, image)]
    assert 60 < len(changed) < 140
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in changed)
    difference = np.mean([np.abs(result.astype(int) - 120) for result in changed], axis=0)
    for side in (difference[0, 20:60], difference[-1, 20:60], difference[15:45, 0], difference[15:45, -1]):
        assert side.mean() > 10 * difference[25:35, 35:45].mean()


# --- the trainer ---

SETTINGS = TrainSettings(
    config="tiny",
    encoder_steps=4,
    steps=3,
    batch=2,
    warmup_steps=2,
    plain_until=2,
    save_every=2,
    pool=PoolSettings(samples=8, plain=3, side=64, seed=5),
)
STEPS = SETTINGS.encoder_steps + SETTINGS.steps


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "pool"
    SamplePool.make(folder, SETTINGS.pool, 0)
    return folder


@pytest.fixture
def run_folder(small_pool: Path, tmp_path: Path) -> Path:
    """A run's folder whose pool is already made."""
    shutil.copytree(small_pool, tmp_path / "run" / "pool")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def uninterrupted(small_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(small_pool, folder / "pool")
    return train(SETTINGS, folder, workers=0).state_dict()


def recorded_draws(monkeypatch: pytest.MonkeyPatch, failure: BaseException | float = 1.0, after: int = STEPS) -> list[float]:
    """The argument `plain_share` of every batch drawn, one a step. After so many, drawing raises `failure` or multiplies targets by it."""
    drawn: list[float] = []

    def draw(*arguments: Any) -> Batch:
        drawn.append(arguments[5])
        batch = draw_batch(*arguments)
        if len(drawn) <= after:
            return batch
        if isinstance(failure, BaseException):
            raise failure
        return replace(batch, target=batch.target * failure)

    monkeypatch.setattr(trainer, "draw_batch", draw)
    return drawn


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        # One thread, one order of summation; the slack is a hundredth of the smallest step's.
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    run_folder: Path, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first save, in the first phase, where the second begins, in it, and right after a save."""
    recorded_draws(monkeypatch, KeyboardInterrupt(), step)
    with pytest.raises(KeyboardInterrupt):
        train(SETTINGS, run_folder, workers=0)
    assert (run_folder / "state.safetensors").exists() == (step >= 2)
    assert not (run_folder / "checkpoint").exists()
    drawn = recorded_draws(monkeypatch)
    assert_same_weights(train(SETTINGS, run_folder, workers=0).state_dict(), uninterrupted)
    assert len(drawn) == STEPS - step // 2 * 2  # it went on from the last save, not from the start
    assert [json.loads(line)["step"] for line in (run_folder / "log.jsonl").read_text().splitlines()] == [0]  # every twentieth, once


def test_a_finished_run_takes_no_more_steps(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(SETTINGS, run_folder, workers=0).state_dict()
    drawn = recorded_draws(monkeypatch)
    assert_same_weights(train(SETTINGS, run_folder, workers=0).state_dict(), expected)
    assert not drawn


def test_the_second_phase_moves_what_the_first_one_trained_at_a_share_of_the_rate(small_pool: Path, tmp_path: Path) -> None:
    def weights(name: str, settings: TrainSettings) -> dict[str, Tensor]:
        shutil.copytree(small_pool, tmp_path / name / "pool")
        train(settings, tmp_path / name, workers=0)
        return load_file(tmp_path / name / "state.safetensors")

    first = weights("first", replace(SETTINGS, steps=0))
    runs = {share: weights(str(share), replace(SETTINGS, learned_share=share)) for share in (0.0, 0.1, 1.0)}
    for part in ("pixel_encoder.layers.0.mlp.lin1.weight", "mask_decoder.upscaling.0.weight"):
        moved = {share: (run[f"parts.model.{part}"] - first[f"parts.model.{part}"]).abs().mean().item() for share, run in runs.items()}
        assert moved[0.0] == 0 < moved[0.1] < 0.2 * moved[1.0]
    rest = "parts.model.language.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(runs[0.0][rest], first[rest])


def test_the_first_phase_moves_the_pixel_encoder_and_the_upscaling_alone(run_folder: Path) -> None:
    start = new_model("tiny", SETTINGS.seed).state_dict()
    trained = train(replace(SETTINGS, steps=0), run_folder, workers=0).state_dict()
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    read = ("pixel_encoder.", "mask_decoder.upscaling.")  # and the norms that stand between the two
    assert moved == {name for name in start if name.startswith(read) or "layer_norm4" in name}


def test_the_second_phase_begins_with_the_maps_the_first_one_ended_with(run_folder: Path) -> None:
    """The decoder's anomaly logit is the first phase's own, but for the tenth of the hypernetworks' weights that is kept."""
    settings = replace(SETTINGS, encoder_steps=15, steps=0, batch=4, warmup_steps=5, save_every=1000)
    pool = SamplePool.make(run_folder / "pool", settings.pool, 0)
    model = new_model("tiny", settings.seed)
    run = trainer._Run(model, settings, run_folder)
    batch = draw_batch(pool, model.config.preprocessing, 28, 4, np.random.default_rng(0))
    before = run._encoder_losses(batch)["mask"]
    run._hand_over()
    for hypernetwork in model.mask_decoder.hypernetworks:
        torch.nn.init.zeros_(hypernetwork.proj_out.weight)
    prompt = model.prompt_encoder.encode()
    assert prompt.draft is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(batch.pixel_image, batch.semantic_image, prompt, prompt.draft).maps
    after = trainer.anchor_loss(maps.logit_absolute, batch.target, batch.valid, trainer.ENCODER_WEIGHTS)
    assert after.item() == pytest.approx(before.item(), rel=0.02)  # bfloat16


def test_plain_samples_come_alone_until_their_step(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = recorded_draws(monkeypatch)
    train(SETTINGS, run_folder, workers=0)
    assert drawn == [1.0] * 2 + [SETTINGS.plain_share] * 5


def test_training_moves_every_part_of_the_model(uninterrupted: dict[str, Tensor]) -> None:
    start = new_model("tiny", SETTINGS.seed).state_dict()
    unmoved = [name for name, tensor in uninterrupted.items() if torch.equal(tensor, start[name])]
    assert unmoved == ["mask_decoder.frequencies"]  # SAM's random frequencies are drawn once


def test_a_stem_learns_alone_before_the_vit_behind_it(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stemmed = replace(tiny(), pixel=replace(tiny().pixel, stem="convolutional"))
    monkeypatch.setitem(trainer.NAMED, "tiny", lambda: stemmed)
    start = new_model("tiny", SETTINGS.seed).state_dict()
    trained = train(replace(SETTINGS, steps=0), run_folder, workers=0).state_dict()
    moved = {name for name, tensor in trained.items() if name.startswith("pixel_encoder.") and not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if name.startswith("pixel_encoder.patch_embed.")}
    assert any(name.endswith("running_mean") for name in moved)  # the average keeps the norms' statistics too


def test_a_few_steps_lower_both_losses(run_folder: Path) -> None:
    settings = replace(SETTINGS, encoder_steps=15, steps=40, batch=4, warmup_steps=5, learning_rate=4e-3, save_every=1000)
    before = new_model("tiny", settings.seed).eval()
    after = train(settings, run_folder, workers=0)
    batch = draw_batch(
        SamplePool(run_folder / "pool", settings.pool), before.config.preprocessing, 28, 8, np.random.default_rng(9)
    )

    @torch.no_grad()
    def losses(model: AGVAS) -> tuple[float, float]:
        prompt = model.prompt_encoder.encode()
        assert prompt.draft is not None
        output = model(batch.pixel_image, batch.semantic_image, prompt, prompt.draft)
        return (
            float(text_loss(output.logits, prompt.draft)),
            float(mask_loss(output.maps, batch.target, batch.valid, settings.early_weights)),
        )

    (text_before, mask_before), (text_after, mask_after) = losses(before), losses(after)
    assert text_after < 0.7 * text_before
    assert mask_after < 0.95 * mask_before
    assert not after.training
    on_disk = load(run_folder / "checkpoint").state_dict()
    assert all(torch.equal(tensor.half().float(), on_disk[name]) for name, tensor in after.state_dict().items())


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_last_save(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_draws(monkeypatch, math.nan, 4)
    with pytest.raises(Diverged, match="nan at step 4"):
        train(SETTINGS, run_folder, workers=0)
    with safe_open(run_folder / "state.safetensors", "pt") as file:
        assert file.metadata() == {"step": "4"}
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run_folder / "state.safetensors").values())
    assert not (run_folder / "checkpoint").exists()


def test_a_folder_holds_one_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_draws(monkeypatch, RuntimeError("stopped"), 0)
    with pytest.raises(RuntimeError, match="stopped"):
        train(SETTINGS, run_folder, workers=0)
    for other in (replace(SETTINGS, seed=1), replace(SETTINGS, steps=8), replace(SETTINGS, text_weight=0.2)):
        with pytest.raises(ValueError, match="describes another run"):
            train(other, run_folder, workers=0)


def test_agvas_train_makes_a_checkpoint_that_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    arguments = ["--config", "tiny", "--steps", "2", "--batch", "2", "--samples", "4", "--workers", "0", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"saved {output / 'checkpoint'}\n"
    result = load(output / "checkpoint").segment(picture())
    assert result.mask.shape == picture().shape[:2]
    arguments[3] = "3"
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("agvas-train: ")
