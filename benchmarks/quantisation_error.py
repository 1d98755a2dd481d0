"""How far GPTQ and plain rounding move the anchor states, on pictures that calibration never saw.

    python -m benchmarks.quantisation_error --checkpoint nano --output benchmarks/results/quantisation_error_nano.json

Both quantise the same linears to the same bits and groups, and both are computed by the fake-quantised reference in fp32, so nothing but
the choice of integers tells them apart. The answer is given (direct mode's draft): states at the same tokens are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agvas import AGVAS, load
from agvas.config import nano
from agvas.model import Features
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from benchmarks.environment import environment
from calibration.calibrate import CalibrationSettings, calibrate, common_group
from calibration.gptq import GPTQSettings, round_to_nearest, search_scales
from calibration.pictures import calibration_pictures
from calibration.plan import read_plan
from calibration.truth import fake_quantize, linear_of
from calibration.weights import QuantizedWeight
from runtime import preprocess
from runtime.cli.common import Progress

HELD_OUT_SEED = 9_500_000_000  # calibration counts from 9,000,000,000
TARGET = 0.25  # at least this much below plain rounding


def wide_random(layers: int = 4) -> AGVAS:
    """nano with a language model twice as wide, that groups of 128 divide, and random weights of a fixed seed."""
    torch.manual_seed(0)
    config = nano()
    language = dataclasses.replace(config.language, width=256, mlp_width=512, heads=4, key_value_heads=2, layers=layers)
    config = dataclasses.replace(config, name="wide-random", language=language)
    return AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], language.vocabulary)).eval()


def seen(model: AGVAS, images: Sequence[np.ndarray]) -> list[Features]:
    """What the encoders make of each picture: the same for every candidate."""
    features = []
    with torch.inference_mode():
        for image in images:
            pixel, semantic = (torch.from_numpy(part)[None] for part in preprocess.encoder_images(image, model.config.preprocessing)[:2])
            features.append(model.encode(pixel, semantic))
    return features


def anchor_states(model: AGVAS, features: Sequence[Features]) -> np.ndarray:
    """float32 [pictures, K, D], with the draft as the answer."""
    prompt = model.prompt_encoder.encode()
    assert prompt.draft is not None  # direct mode has one
    nothing = torch.empty(0)  # the pictures themselves are not looked at again
    with torch.inference_mode():
        states = [model(nothing, nothing, [prompt], [prompt.draft], each).anchor_states[0].numpy() for each in features]
    return np.stack(states)


def relative_errors(states: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """‖s - s*‖ / ‖s*‖ of each picture."""
    return np.linalg.norm(states - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))


def searched_rounding(weight: torch.Tensor, settings: GPTQSettings) -> QuantizedWeight:
    """Rounding to nearest with the best scale for the weight itself: what a search alone gains, without any picture."""
    scales = search_scales(weight, torch.ones(weight.shape[1]), settings)
    group = settings.group_of(weight.shape[1])
    most = (1 << (settings.bits - 1)) - 1
    codes = (weight.unflatten(1, (-1, group)) / scales.float()[:, :, None]).round().clamp(-most - 1, most).flatten(1)
    return QuantizedWeight(codes.to(torch.int8).numpy(), scales.numpy(), settings.bits, group)


def summary(errors: np.ndarray) -> dict[str, float]:
    return {"mean": round(float(errors.mean()), 5), "median": round(float(np.median(errors)), 5), "worst": round(float(errors.max()), 5)}


def measure(
    model: AGVAS, weights: Mapping[str, QuantizedWeight], settings: GPTQSettings, images: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Errors of the given weights and of two plain roundings of the same linears."""
    features = seen(model, images)
    wanted = anchor_states(model, features)
    candidates: dict[str, Mapping[str, QuantizedWeight]] = {
        "gptq": weights,
        "round_to_nearest": {name: round_to_nearest(linear_of(model, name).weight.detach(), settings) for name in weights},
        "round_to_nearest_searched": {name: searched_rounding(linear_of(model, name).weight.detach(), settings) for name in weights},
    }
    errors = {name: relative_errors(anchor_states(fake_quantize(model, which), features), wanted) for name, which in candidates.items()}
    lower = 1 - errors["gptq"].mean() / errors["round_to_nearest"].mean()
    return {
        "anchor_state_error": {name: summary(values) for name, values in errors.items()},
        "below_round_to_nearest": round(float(lower), 4),
        "below_round_to_nearest_searched": round(float(1 - errors["gptq"].mean() / errors["round_to_nearest_searched"].mean()), 4),
        "pictures_where_gptq_is_better": round(float((errors["gptq"] < errors["round_to_nearest"]).mean()), 4),
        "passed": bool(lower >= TARGET),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when GPTQ's error is at least a quarter below plain rounding's, 1 when it is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="nano", help="nano, a checkpoint folder, or wide-random (default nano)")
    parser.add_argument("--plan", type=Path, help="a plan that agvas-calibrate made for it (default: calibrate now)")
    parser.add_argument("--samples", type=int, default=64, help="calibration pictures (default 64)")
    parser.add_argument("--held-out", type=int, default=64, help="pictures to judge on (default 64)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, help="inputs that share a scale (default 128, or 64 or 32 where the model is narrower)")
    parser.add_argument("--answer-share", type=float, default=CalibrationSettings().answer_share)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    model = wide_random() if options.checkpoint == "wide-random" else load(options.checkpoint)
    weights: Mapping[str, QuantizedWeight]
    if options.plan:
        plan, weights = read_plan(options.plan, model)
    else:
        group = common_group(model) if options.group is None else options.group
        settings = CalibrationSettings(GPTQSettings(bits=options.bits, group=group), options.answer_share)
        with Progress() as progress:
            plan, weights, _ = calibrate(model, calibration_pictures(None, options.samples), settings, progress)
    held_out = calibration_pictures(None, options.held_out, HELD_OUT_SEED)
    result: dict[str, Any] = {
        "model": plan.model,
        "settings": dataclasses.asdict(plan.settings) | {"answer_share": plan.answer_share},
        "calibration_pictures": len(plan.images),
        "held_out_pictures": len(held_out),
    }
    result |= measure(model, weights, plan.settings, held_out)
    result["environment"] = environment()
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
