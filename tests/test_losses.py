"""The objective: the losses against slow loops, and who is supervised by what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agvas.mask_decoder import Maps
from agvas.training.losses import MaskLossWeights, image_loss, mask_loss, text_loss
from agvas.training.objective import ObjectiveSettings


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
    assert ObjectiveSettings().mask == MaskLossWeights(bce=0.5, dice=2.0)
    assert ObjectiveSettings().text == 1


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


def test_the_text_loss_is_the_mean_over_answers_of_their_tokens_mean_cross_entropy() -> None:
    logits = 3 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    answers = ((4, 0, 6), (5,))
    expected = 0.0
    for b, answer in enumerate(answers):
        for place, token in enumerate(answer):
            row = [math.exp(float(logit)) for logit in logits[b, place]]
            expected -= math.log(row[token] / sum(row)) / len(answer) / 2
    assert float(text_loss(logits, answers)) == pytest.approx(expected, rel=1e-6)


def test_what_stands_behind_a_shorter_answer_changes_no_loss() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    changed = logits.clone()
    changed[1, 2:] = 50.0
    assert text_loss(changed, ((1, 2, 3, 4), (5, 6))) == text_loss(logits, ((1, 2, 3, 4), (5, 6)))


def test_an_anchor_that_is_not_supervised_gets_no_gradient() -> None:
    """A general picture teaches [SEG] alone, a conversation none."""
    maps, target, valid = random_maps(batch=3)
    absolute, relative = maps.logit_absolute.requires_grad_(), maps.logit_relative.requires_grad_()
    loss = mask_loss(maps, target, valid, MaskLossWeights(), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    loss.backward()
    assert [bool(absolute.grad[b].any()) for b in range(3)] == [True, True, False]
    assert [bool(relative.grad[b].any()) for b in range(3)] == [True, False, False]


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_however_it_is_split() -> None:
    maps, target, valid = random_maps(batch=4)
    flags = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])

    def part(rows: slice) -> Tensor:
        return mask_loss(
            Maps(*(each[rows] for each in maps)), target[rows], valid[rows], MaskLossWeights(), flags[0][rows], flags[1][rows]
        )

    torch.testing.assert_close((part(slice(0, 2)) + part(slice(2, 4))) / 2, part(slice(0, 4)))


def test_an_ablations_loss_is_that_of_the_anchors_it_has() -> None:
    maps, target, valid = random_maps()
    whole = mask_loss(maps, target, valid, MaskLossWeights())
    alone = mask_loss(maps._replace(logit_relative=None), target, valid, MaskLossWeights())
    contrast = mask_loss(maps._replace(logit_absolute=None), target, valid, MaskLossWeights())
    torch.testing.assert_close(alone + contrast, whole)
    assert 0 < alone < whole


def slow_image_loss(maps: Maps, target: Tensor, valid: Tensor, cells: int) -> float:
    """The strongest cells of each picture, sorted one by one."""
    total = 0.0
    for b in range(len(target)):
        defect = float(target[b].max()) > 0.25
        places = [(row, column) for row in range(target.shape[1]) for column in range(target.shape[2]) if valid[b, row, column]]
        for logit in (maps.logit_absolute[b], maps.logit_relative[b, 1] - maps.logit_relative[b, 0]):
            strongest = sorted((float(logit[place]) for place in places), reverse=True)[:cells]
            probability = 1 / (1 + math.exp(-sum(strongest) / cells))
            total -= math.log(probability if defect else 1 - probability)
    return total / len(target)


def test_the_image_loss_is_that_of_the_strongest_cells_inside_the_picture() -> None:
    maps, target, valid = random_maps()
    target[1] = 0  # a normal picture
    assert float(image_loss(maps, target, valid, cells=4)) == pytest.approx(slow_image_loss(maps, target, valid, 4), rel=1e-5)


def test_the_image_loss_asks_a_normal_picture_for_an_empty_map_and_a_defective_one_for_a_full_cell() -> None:
    maps, target, valid = random_maps()
    target[1] = 0
    maps.logit_absolute.requires_grad_(True)
    image_loss(maps, target, valid, relative=torch.zeros(2), cells=3).backward()
    gradient = maps.logit_absolute.grad
    assert gradient is not None
    assert (gradient[0] < 0).sum() == 3 and not (gradient[0] > 0).any()  # up, in the three strongest cells alone
    assert (gradient[1] > 0).sum() == 3 and not (gradient[1] < 0).any()
    assert not gradient[valid == 0].any()


def test_more_cells_than_a_picture_has_are_all_of_it() -> None:
    maps, target, valid = random_maps()
    least = int(valid.sum(dim=(1, 2)).min())
    assert torch.equal(image_loss(maps, target, valid, cells=1000), image_loss(maps, target, valid, cells=least))
