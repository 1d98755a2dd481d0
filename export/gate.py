"""The gate that decides: which integer layers go back to float until the masks pass, and no more of them.

Every layer is made integer alone on a few pictures, and what that does to the anomaly map is its sensitivity. When the whole chain fails
its gates, the most sensitive layers go back to float, twice as many each time; between the first number that passes and the last that
failed, the fewest are looked for by halving. Each trial is the exported chain itself, judged on all pictures: nothing passes by estimate.
A layer without any effect stays integer: in float it changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agvas.model import AGVAS, Features
from export.adapters import PARTS
from export.quantisation import Quantisation, one_layer
from runtime import preprocess
from runtime.parity import Outcome
from runtime.prompts import Prompt

# Pictures that sensitivities are measured on: the hardest of those that parity is judged on.
MEASURED = 4


@dataclass(frozen=True)
class GateBudget:
    """How far a search may go: layers that may stay float at most (None: a quarter of them), and seconds, those of measuring the layers
    included, after which no trial begins."""

    layers: int | None = None
    seconds: float = 3600.0

    def most(self, layers: int) -> int:
        """Layers that may go back to float, of so many."""
        return min(layers, max(1, layers // 4) if self.layers is None else self.layers)


@dataclass(frozen=True)
class Kept:
    """What a search found.

    Attributes:
        names: layers to be left float, the most sensitive first.
        failures: gates that are broken with them; empty when it passed.
        trials: (layers left float, gates broken) of every trial.
        stopped: why the search went no further, where it did not pass.
    """

    names: tuple[str, ...] = ()
    failures: list[str] = field(default_factory=list)
    trials: list[tuple[int, list[str]]] = field(default_factory=list)
    stopped: str = ""


def search(
    order: Sequence[str],
    trial: Callable[[Sequence[str]], list[str]],
    budget: GateBudget,
    failures: list[str],
    started: float | None = None,
    layers: int | None = None,
) -> Kept:
    """The fewest of the first layers of `order` that have to stay float, where all in integers failed.

    Args:
        order: the layers that may go back to float, the most sensitive first: those with an effect (with_effect).
        failures: gates broken with every layer in integers.
        trial: gates broken when these layers are left float. It is taken to pass with more layers where it passed with fewer; where it
            does not, more layers than needed stay float, and what is returned has passed all the same.
        started: time.monotonic() from which the budget's seconds count; None is now.
        layers: how many are in integers, with an effect or without, of which the budget may be a share; None is those of `order`.
    """
    started = time.monotonic() if started is None else started
    trials = [(0, failures)]

    def broken(count: int) -> list[str]:
        trials.append((count, trial(order[:count])))
        return trials[-1][1]

    def stopped(count: int) -> str:
        """Why no more layers than these are tried; empty where they are."""
        if count == most and (count < len(order) or not most):
            return f"no more than {most} layers may stay float (--gate-budget)"
        if time.monotonic() - started > budget.seconds:
            return f"{budget.seconds:g} seconds were spent (--gate-budget)"
        return "" if count < len(order) else f"no {'other ' if count else ''}layer has a measured effect"

    most, failed, count = budget.most(len(order) if layers is None else layers), 0, 0
    while failures:
        failed = count
        if why := stopped(count):
            return Kept(tuple(order[:count]), failures, trials, why)
        count = min(most, len(order), max(1, 2 * count))
        failures = broken(count)
    while count - failed > 1 and time.monotonic() - started <= budget.seconds:
        middle = (count + failed) // 2
        if broken(middle):
            failed = middle
        else:
            count = middle
    return Kept(tuple(order[:count]), [], trials)


@torch.inference_mode()
def sensitivities(
    model: AGVAS,
    quantisation: Quantisation,
    images: Sequence[np.ndarray],
    reference: Sequence[Outcome],
    progress: Callable[[], None] = lambda: None,
    until: float = math.inf,
    rounds_inputs: bool = False,
) -> dict[str, float]:
    """What each layer, made integer alone, does to the anomaly map: mean absolute difference over the pictures; infinite where the
    model would then answer otherwise.

    Args:
        images: uint8 RGB [H, W, 3] each.
        reference: the reference's outcome of each; one without anchors counts for nothing.
        until: of time.monotonic(); layers that it has no time for are left out.
        rounds_inputs: measure each with its input in 8 bits as well (export.quantisation.one_layer).
    """
    prompt = model.prompt_encoder.encode()
    cases = []
    for image, outcome in zip(images, reference, strict=True):
        if outcome.anchor_states is None:
            continue
        pixel, semantic, _ = preprocess.encoder_images(image, model.config.preprocessing)
        inputs = torch.from_numpy(pixel)[None], torch.from_numpy(semantic)[None]
        features = model.encode(*inputs)
        cases.append((inputs, outcome.answer, features, *_read(model, inputs, prompt, outcome.answer, features)))
    found = {}
    for name in quantisation.weights:
        if time.monotonic() > until:
            break
        seen_anew = not any(name.startswith(f"{whole}.") for whole in PARTS["language"].values())
        effects = []
        with one_layer(model, quantisation, name, rounds_inputs):
            for inputs, answer, features, wanted, said in cases:
                ours, says = _read(model, inputs, prompt, answer, None if seen_anew else features)
                effects.append(float((ours - wanted).abs().mean()) if torch.equal(says, said) else math.inf)
        found[name] = float(np.mean(effects)) if effects else 0.0
        progress()
    return found


def by_sensitivity(found: Mapping[str, float]) -> list[str]:
    """Names, the most sensitive first; NaN, which is worse than any number, before all."""
    return sorted(found, key=lambda name: -np.nan_to_num(found[name], nan=np.inf))


def with_effect(found: Mapping[str, float]) -> list[str]:
    """Names by sensitivity, without those that changed nothing: what putting back to float can help."""
    return [name for name in by_sensitivity(found) if found[name] != 0]


def _read(
    model: AGVAS, inputs: tuple[Tensor, Tensor], prompt: Prompt, answer: tuple[int, ...], features: Features | None
) -> tuple[Tensor, Tensor]:
    """The anomaly map under the answer, and what the model says at each of its places [1, A]."""
    output = model(*inputs, [prompt], [answer], features)
    return output.maps.anomaly_map, output.logits.argmax(-1)
