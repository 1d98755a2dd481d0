"""What of a model becomes integers in a bundle, and the torch model that computes with those integers.

The language model's weights come from a plan (agvas-calibrate), a GPTQ checkpoint, plain rounding where that is asked for, or a
calibration made here; the encoders' linear layers take 8-bit weights by plain rounding and input ranges from calibration pictures. All but
a calibration made here are read or rounded when they are asked for, layer by layer. Choosing the codes is calibration's, writing them into
graphs is integer_weights.py's, putting layers back to float is gate.py's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agvas.model import AGVAS
from agvas.weights import LazyTensor, LazyTensors
from calibration.calibrate import CalibrationSettings, calibrate, common_group
from calibration.gptq import GPTQSettings, rounded_to_nearest
from calibration.gptq_checkpoint import open_gptq_checkpoint
from calibration.observers import Ranges
from calibration.pictures import calibration_pictures
from calibration.plan import PLAN, QuantPlan, check_there, open_plan, read_ranges
from calibration.truth import linear_of, put_weight
from calibration.weights import IntegerWeight
from export.adapters import name_in_stage
from runtime import preprocess
from runtime.errors import RequestError

ENCODERS = ("pixel_encoder", "semantic_encoder")
# bits and group (0: one scale an output; of gptq4 the largest that fits, see common_group) of the language model's weights.
LMM = {"gptq4": GPTQSettings(bits=4, group=128), "int8": GPTQSettings(bits=8, group=0)}
EIGHT_BITS = GPTQSettings(bits=8, group=0)
LAYERS, HEAD = "language.model.layers", "language.lm_head"
# What stands in the place of a calibration's folder where plain rounding is asked for.
RTN = Path("rtn")
# Pictures that export calibrates on where it is given no plan.
PICTURES = 64


@dataclass(frozen=True, eq=False)
class Quantisation:
    """Which linear layers are integers, by their names in AGVAS.

    Attributes:
        weights: integer weights.
        ranges: largest absolute input of those of them whose input is rounded to 8 bit as well.
        source: where they come from, for the manifest.
    """

    weights: Mapping[str, IntegerWeight] = field(default_factory=dict)
    ranges: Mapping[str, float] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def only(self, names: Iterable[str]) -> Quantisation:
        """What is left when only these layers are integers."""
        chosen = set(names)
        return Quantisation(
            {name: weight for name, weight in self.weights.items() if name in chosen},
            {name: most for name, most in self.ranges.items() if name in chosen},
            self.source,
        )

    def without(self, names: Iterable[str]) -> Quantisation:
        """What is left when these layers stay float."""
        return self.only(self.weights.keys() - set(names))

    def in_stage(self, stage: str) -> tuple[dict[str, IntegerWeight], dict[str, float]]:
        """Weights and ranges of a stage's layers, by their names in its graph."""
        weights = {local: weight for name, weight in self.weights.items() if (local := name_in_stage(stage, name))}
        ranges = {local: most for name, most in self.ranges.items() if (local := name_in_stage(stage, name))}
        return weights, ranges

    def in_words(self) -> dict[str, str]:
        """By layer: int4, groups of 128, and the like."""
        words = {}
        for name, weight in self.weights.items():
            whole = weight.bits == 8 and weight.group == weight.shape[1]
            groups = "one scale an output" if whole else f"groups of {weight.group}"
            inputs = f", inputs int8 to ±{self.ranges[name]:.4g}" if name in self.ranges else ""
            words[name] = f"int{weight.bits}, {groups}{inputs}"
        return words


def quantise(
    model: AGVAS,
    tensors: LazyTensors,
    lmm: str,
    encoders: bool,
    calibration: Path | None,
    head: str = "float",
    progress: Callable[[str, int, int], None] | None = None,
) -> Quantisation:
    """Choose the integers.

    Args:
        model: in memory, or on the meta device where it does not fit: it is then not computed with, and a calibration has to be given.
        tensors: the checkpoint's.
        lmm: float, int8 or gptq4.
        encoders: whether both encoders' linear layers go to 8 bit.
        calibration: a plan's folder or, for gptq4 and int8 without `encoders`, a GPTQ checkpoint; RTN for plain rounding, which the
            manifest tells; None calibrates on procedural pictures.
        head: float or int8: the language model's head, by plain rounding with one scale a token of the vocabulary.
        progress: told (what, steps done, steps in all) of a calibration made here.

    Raises:
        PlanError, GPTQCheckpointError: the folder is neither, or was made for another model.
        RequestError: a plan of other bits than asked for, or without the encoders' ranges; a layer that no group of 128, 64 or 32 divides;
            no calibration for a model that is not in memory.
    """
    weights: dict[str, IntegerWeight] = {}
    ranges: dict[str, np.ndarray] = {}
    source: dict[str, Any] = {}
    if calibration is None and (lmm != "float" or encoders) and next(model.parameters()).is_meta:
        raise RequestError(
            "--calibration: this model is exported without being held in memory, so it cannot be calibrated here; "
            "give a plan of agvas-calibrate, a GPTQ checkpoint, or rtn for plain rounding"
        )
    if calibration == RTN:
        if encoders:
            raise RequestError("--calibration: expected a plan of agvas-calibrate for --precision int8, got rtn, which tells no ranges")
        if lmm != "float":
            settings = _settings(model, lmm)
            weights = {name: rounded_to_nearest(tensors[f"{name}.weight"], settings, name) for name in language_linears(model)}
            source = {"method": "round to nearest, nothing calibrated", "settings": asdict(settings)}
    elif calibration is not None:
        weights, ranges, source = _read(tensors, calibration, lmm, encoders)
    elif lmm != "float":
        settings = _settings(model, lmm)
        made = calibrate(model, calibration_pictures(None, PICTURES), CalibrationSettings(settings), progress)
        weights, ranges, source = dict(made.weights), made.ranges, _told(made.plan)
    elif encoders:
        pictures = calibration_pictures(None, PICTURES)
        ranges, source = encoder_ranges(model, pictures, progress), {"pictures": len(pictures)}
    inputs: dict[str, float] = {}
    if encoders:
        for name in encoder_linears(model):
            if name not in ranges:
                raise RequestError(f"--calibration: expected the range of what {name} reads, got none; run agvas-calibrate again")
            weights[name] = rounded_to_nearest(tensors[f"{name}.weight"], EIGHT_BITS, name)
            inputs[name] = float(ranges[name].max())
    if head == "int8":
        weights[HEAD] = rounded_to_nearest(tensors[f"{HEAD}.weight"], EIGHT_BITS, HEAD)
        source |= {"head": "int8, round to nearest"}
    return Quantisation(weights, inputs, source)


def language_linears(model: AGVAS) -> list[str]:
    """Names of the linear layers of the language model's decoder layers."""
    return [name for name, layer in model.language.model.layers.named_modules(prefix=LAYERS) if isinstance(layer, nn.Linear)]


def fake_quantised_tensors(tensors: LazyTensors, quantisation: Quantisation) -> dict[str, LazyTensor]:
    """A checkpoint's tensors with what the integers stand for in the place of the weights: `fake_quantised` without its memory."""

    def dequantised(weight: IntegerWeight) -> LazyTensor:
        return LazyTensor(weight.shape, torch.float32, lambda: torch.from_numpy(weight.read().dequantized()))

    return {**tensors, **{f"{name}.weight": dequantised(weight) for name, weight in quantisation.weights.items()}}


def encoder_linears(model: AGVAS) -> list[str]:
    """Names of both encoders' linear layers."""
    return [
        f"{stage}.{name}"
        for stage in ENCODERS
        for name, layer in model.get_submodule(stage).named_modules()
        if isinstance(layer, nn.Linear)
    ]


def encoder_ranges(
    model: AGVAS, pictures: Sequence[np.ndarray], progress: Callable[[str, int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """Largest absolute input of each channel of both encoders' linear layers, float32 [K]."""
    seen = Ranges()
    with torch.inference_mode(), seen.watching(model.pixel_encoder, ENCODERS[0]), seen.watching(model.semantic_encoder, ENCODERS[1]):
        for number in range(len(pictures)):
            pixel, semantic, _ = preprocess.encoder_images(pictures[number], model.config.preprocessing)
            model.encode(torch.from_numpy(pixel)[None], torch.from_numpy(semantic)[None])
            if progress:
                progress("calibrating", number + 1, len(pictures))
    return seen.channels


def fake_quantised(model: AGVAS, quantisation: Quantisation) -> AGVAS:
    """A copy of the model that computes in float what the integers stand for: the oracle of the quantised graphs."""
    twin = copy.deepcopy(model)
    for name, weight in quantisation.weights.items():
        put_weight(twin, name, weight.read())
    round_inputs_of(twin, {name: most for name, most in quantisation.ranges.items() if name in quantisation.weights})
    return twin


@contextmanager
def one_layer(model: AGVAS, quantisation: Quantisation, name: str, rounds_inputs: bool = False) -> Iterator[None]:
    """While it lasts, one layer of the model computes with its integers.

    Args:
        rounds_inputs: its input, where it has no calibrated range, is rounded to 8 bits as well, a token by its own largest number: no
            finer than what engines do while running (inference precision int8), who take a block of 32 or 128 of a token's numbers.
    """
    layer = linear_of(model, name)
    kept, handle = layer.weight, None
    if name in quantisation.ranges:
        handle = layer.register_forward_pre_hook(_rounding(quantisation.ranges[name]))
    elif rounds_inputs:
        handle = layer.register_forward_pre_hook(_rounding_tokens)
    try:
        put_weight(model, name, quantisation.weights[name].read())
        yield
    finally:
        layer.weight = kept
        if handle:
            handle.remove()


def round_inputs_of(module: nn.Module, ranges: Mapping[str, float]) -> None:
    """Let the named linear layers round their inputs to 8 bit."""
    for name, most in ranges.items():
        linear_of(module, name).register_forward_pre_hook(_rounding(most))


def _rounding(most: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    scale = float(np.float32(most / 127))
    return lambda _, inputs: ((inputs[0] / scale).round().clamp(-128, 127) * scale,)


def _rounding_tokens(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = inputs[0].abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((inputs[0] / scale).round() * scale,)


def _settings(model: AGVAS, lmm: str) -> GPTQSettings:
    """Bits and group for this model. Raises RequestError where no group fits."""
    settings = LMM[lmm] if LMM[lmm].group == 0 else replace(LMM[lmm], group=common_group(model))
    _check_groups(model, settings)
    return settings


def _check_groups(model: AGVAS, settings: GPTQSettings) -> None:
    for name in language_linears(model):
        try:
            settings.group_of(linear_of(model, name).in_features, name)
        except ValueError as error:
            reason = str(error).split(";")[0]
            remedy = "make a plan with agvas-calibrate --group and give it as --calibration, or use --lmm int8"
            raise RequestError(f"--lmm: {reason}; {remedy}") from error


def check_calibration(folder: Path) -> None:
    """Raises PlanError where neither a plan nor a GPTQ checkpoint lies: it costs nothing, and can be told before a checkpoint is loaded."""
    if folder != RTN and not _is_gptq_checkpoint(folder):
        check_there(folder)


def _is_gptq_checkpoint(folder: Path) -> bool:
    return not (folder / PLAN).is_file() and (folder / "config.json").is_file()


def _read(
    tensors: LazyTensors, folder: Path, lmm: str, encoders: bool
) -> tuple[dict[str, IntegerWeight], dict[str, np.ndarray], dict[str, Any]]:
    ranges: dict[str, np.ndarray] = {}
    if not _is_gptq_checkpoint(folder):
        plan, planned = open_plan(folder, tensors)
        weights, source = dict[str, IntegerWeight](planned), _told(plan)
        if encoders:
            ranges = read_ranges(folder)
    else:
        if encoders:
            raise RequestError(
                f"--calibration: {folder} is a GPTQ checkpoint, which tells nothing of the encoders; give a plan of agvas-calibrate"
            )
        weights, source = dict[str, IntegerWeight](open_gptq_checkpoint(folder, tensors)), {"gptq_checkpoint": True}
    if lmm == "float":
        return {}, ranges, source
    bits = {weight.bits for weight in weights.values()}
    if bits != {LMM[lmm].bits}:
        raise RequestError(
            f"--calibration: expected weights in {LMM[lmm].bits} bits for --lmm {lmm}, got {sorted(bits)} in {folder}; "
            f"run agvas-calibrate --bits {LMM[lmm].bits}"
        )
    return weights, ranges, source


def _told(plan: QuantPlan) -> dict[str, Any]:
    """A plan in the manifest: its hash and what a reader asks first."""
    return {
        "sha256": hashlib.sha256(repr(asdict(plan)).encode()).hexdigest(),
        "weights_sha256": plan.weights_sha256,
        "settings": asdict(plan.settings),
        "answer_share": plan.answer_share,
        "pictures": len(plan.images),
        "tokens": plan.tokens,
    }
