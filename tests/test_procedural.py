"""Tests of the procedural training samples, through the doors that training uses.

They check promises (determinism, shares, masks that cover what was changed), not looks: looks are judged by eye on contact sheets.
"""

from itertools import count, islice

import cv2
import numpy as np
import pytest

from agvas.training.backgrounds import background
from agvas.training.defects import KINDS, add_defect
from agvas.training.procedural import make_sample, make_samples

HEIGHT, WIDTH = 89, 113


def test_a_sample_is_a_function_of_seed_and_size():
    first, again, other = make_sample(5, HEIGHT, WIDTH), make_sample(5, HEIGHT, WIDTH), make_sample(6, HEIGHT, WIDTH)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask) and first.kind == again.kind
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("height, width", [(HEIGHT, WIDTH), (32, 48), (48, 32), (256, 64)])
def test_samples_have_the_size_asked_for_and_consistent_labels(height, width):
    for seed in range(25):
        sample = make_sample(seed, height, width)
        assert sample.image.shape == (height, width, 3) and sample.image.dtype == np.uint8
        assert sample.mask.shape == (height, width) and sample.mask.dtype == bool
        assert sample.label == bool(sample.mask.any()) == (sample.kind in KINDS) and sample.seed == seed


def test_two_in_five_are_normal_and_many_defects_are_large():
    samples = [make_sample(seed, 96, 96) for seed in range(150)]
    normal = sum(not sample.label for sample in samples)
    assert 40 <= normal <= 80  # 60 expected; binomial deviation 6.0, plus the rare defect that could not be drawn
    areas = np.array([sample.mask.mean() for sample in samples if sample.label])
    assert (areas > 0.05).mean() > 0.25 and (areas < 0.02).mean() > 0.2 and areas.max() < 0.95


def test_many_backgrounds_are_grey_and_none_is_blank():
    images = [background(np.random.default_rng(seed), 64, 80) for seed in range(120)]
    grey = sum(bool((image == image[..., :1]).all()) for image in images)
    assert 25 <= grey <= 75
    assert np.mean([image.std() > 2 for image in images]) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_what_its_mask_covers_and_little_else(kind):
    inside, outside, drawn = [], [], 0
    for seed in range(8):
        rng = np.random.default_rng([seed, 77])
        image = background(rng, 128, 144)
        changed, mask, named = add_defect(image, rng, kind)
        assert named == kind and changed.shape == image.shape and changed.dtype == np.uint8 and mask.shape == image.shape[:2]
        drawn += bool(mask.any())
        near = cv2.dilate(mask.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
        change = np.abs(changed.astype(int) - image).max(axis=2)
        inside.append(change[near].sum())
        outside.append(change[~near].sum())
    assert drawn == 8
    assert sum(inside) > 3 * sum(outside)


def test_grey_images_stay_grey_and_tiny_ones_work():
    grey = np.repeat(np.random.default_rng(0).integers(60, 190, (32, 48, 1), dtype=np.uint8), 3, axis=2)
    for kind in KINDS:
        changed, mask, _ = add_defect(grey, np.random.default_rng(3), kind)
        assert (changed == changed[..., :1]).all() and mask.any()


def test_an_object_region_confines_surface_defects():
    region = np.zeros((96, 96), bool)
    region[20:70, 30:80] = True
    for seed in range(10):
        rng = np.random.default_rng(seed)
        _, mask, _ = add_defect(background(rng, 96, 96), rng, "stain", region)
        assert not (mask & ~region).any()


def test_processes_give_the_same_samples_in_order_from_endless_seeds():
    alone = list(make_samples(range(3, 9), 40, 56, workers=0))
    shared = list(islice(make_samples(count(3), 40, 56, workers=2), 6))
    assert [sample.seed for sample in shared] == list(range(3, 9))
    assert all(np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) for a, b in zip(alone, shared))
