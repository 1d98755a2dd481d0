"""The comparisons that isolate where an exported chain leaves the reference, and the traces a target replays.

(1) the runtime's pipeline over torch stages against AGVAS.segment: the glue; (3) each exported stage fed the reference's inputs:
conversion and precision; (4) the whole exported chain against AGVAS.segment: what a user gets. (2), where there are integers: the
fake-quantised torch stages against the float ones, and (3) is then against the fake-quantised. (5), told and not gated: the chain in the
modes whose words come from the model, where one other word, as good as the first, may move a mask. (6), of a language model in 8 bit: (4)
once more with its inputs rounded to 8 bits while running, gated like (4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from agvas.model import AGVAS, Segmented
from engines.spec import StageSpec
from export.adapters import axis_sizes
from export.half_range import HalfRange
from export.onnx_writer import stage_module
from runtime.contract import STAGES
from runtime.masking import MaskRule
from runtime.parity import Gates, Outcome, Parity, compare, finite, relative_error, together, worst
from runtime.pipeline import Pipeline, Stage
from runtime.prompts import DIRECT, PLUS
from runtime.verify import NOT_TRACED, outcome_of, run_outcome

# Pictures that go into the bundle: enough for a target to notice flipped masks; every stage's tensors, which are large, of a few.
GOLDEN_PICTURES = 12
TRACED_PICTURES = 3
# That the modes beside direct are compared on: the reference writes every word of theirs.
WORDS_PICTURES = 8
NORMAL_STATE = "A normal surface is even and undamaged, without foreign material."  # of describe-then-segment-plus
# Distance from where a mask begins, as a probability, within which 16-bit arithmetic moves a pixel from one side to the other.
NEAR = 0.02


class TorchStage:
    """A stage's adapter behind the engines' interface."""

    def __init__(self, module: nn.Module, spec: StageSpec) -> None:
        self.module = module
        self.spec = spec

    @torch.inference_mode()
    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.module(*(torch.from_numpy(feeds[spec.name]) for spec in self.spec.inputs))
        return {spec.name: output.numpy() for spec, output in zip(self.spec.outputs, outputs, strict=True)}


class RecordingStage:
    """Passes through to a stage and keeps the feeds and outputs of its first call."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.feeds: dict[str, np.ndarray] | None = None
        self.outputs: dict[str, np.ndarray] = {}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.stage.run(feeds)
        if self.feeds is None:
            self.feeds, self.outputs = feeds, outputs
        return outputs


@dataclass(frozen=True)
class ParityReport:
    """parity.json.

    Attributes:
        glue: comparison (1); None where the reference was computed layer by layer, which leaves no AGVAS.segment to compare with.
        stages: comparison (3): largest relative error over the traced pictures, by stage and output.
        chain: comparison (4).
        failures: broken gates in words; export fails when there are any.
        engine: what ran the exported graphs.
        golden: comparison (4) on the golden pictures alone.
        quantisation: comparison (2) as `stages` tells it; empty where nothing is in integers.
        layers: comparison (3) inside the language model: relative error of each layer's keys and values.
        fp16_range: the largest magnitude of each fp16 stage, see half_range.py; beyond fp16's end it is a failure.
        modes: comparison (5), by mode.
        int8_inputs: comparison (6); None where it was not made.
    """

    glue: Parity | None
    stages: dict[str, dict[str, float]]
    chain: Parity
    failures: list[str]
    engine: str
    golden: Parity
    quantisation: dict[str, dict[str, float]]
    layers: dict[str, list[float]] = field(default_factory=dict)
    fp16_range: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, Parity] = field(default_factory=dict)
    int8_inputs: Parity | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "passed": not self.failures,
            "failures": self.failures,
            "reference": "layer by layer" if self.glue is None else "whole",
            "glue": None if self.glue is None else self.glue.to_json(),
            "stages": finite(self.stages),
            "chain": self.chain.to_json(),
            "golden": self.golden.to_json(),
            "quantisation": finite(self.quantisation),
            "layers": finite(self.layers),
            "fp16_range": finite(self.fp16_range),
            "modes": {mode: parity.to_json() for mode, parity in self.modes.items()},
            "int8_inputs": None if self.int8_inputs is None else self.int8_inputs.to_json(),
        }


def torch_stages(model: AGVAS) -> dict[str, TorchStage]:
    """The reference's modules as stages."""
    return {name: TorchStage(stage_module(model, name), spec) for name, spec in STAGES.items()}


def pipeline_over(model: AGVAS, stages: Mapping[str, Stage]) -> Pipeline:
    """The runtime's own chain over given stages, with the rest from the reference."""
    table = model.language.get_input_embeddings().weight.detach().float().numpy()
    return Pipeline(stages, model.config.preprocessing, model.prompt_encoder, table, axis_sizes(model.config))


def measure(
    model: AGVAS,
    exported: Pipeline,
    engine: str,
    images: Sequence[np.ndarray],
    gates: Gates,
    glue_gates: Gates,
    progress: Callable[[], None],
    reference: Sequence[Outcome] = (),
    twin: AGVAS | None = None,
    ranges: HalfRange | None = None,
) -> tuple[ParityReport, dict[str, np.ndarray]]:
    """Run every picture through the reference, the torch pipeline and the exported chain.

    Args:
        images: uint8 RGB [H, W, 3] each; the golden ones are asked for twice.
        reference: the reference's outcomes where they are known.
        twin: the fake-quantised model, where there are integers.
        ranges: shown what the reference fed its stages on the traced pictures.

    Returns:
        The report, and the golden traces for the bundle (the reference's tensors) of the pictures hardest to keep.
    """
    rule = model.config.mask_decoder.mask_rule
    stages = torch_stages(model)
    torch_chain = pipeline_over(model, stages)
    prompt = model.prompt_encoder.encode()
    reference = reference or [outcome_of_reference(model.segment(image)) for image in images]
    glue: list[Parity] = []
    chain: list[Parity] = []
    for image, wanted_of_it in zip(images, reference, strict=True):
        glue.append(compare([outcome_of(torch_chain.run(image, prompt), rule)], [wanted_of_it]))
        chain.append(compare([run_outcome(exported, image, rule)[0]], [wanted_of_it]))
        progress()
    golden: dict[str, np.ndarray] = {}
    errors: dict[str, dict[str, float]] = {}
    quantisation: dict[str, dict[str, float]] = {}
    layers: dict[str, list[float]] = {}
    chosen = hardest(reference, rule)[:GOLDEN_PICTURES]
    for place, index in enumerate(chosen):
        image = images[index]
        tensors: Mapping[str, np.ndarray] = {}
        if place < TRACED_PICTURES:
            recorders = {name: RecordingStage(stage) for name, stage in stages.items()}
            tensors = pipeline_over(model, recorders).run(image, prompt).tensors
            # Where no anchors were said, the mask decoder did not run and has no feeds.
            feeds = {name: recorder.feeds for name, recorder in recorders.items() if recorder.feeds is not None}
            if ranges is not None:
                ranges.note(feeds)
            wanted = {name: recorders[name].outputs for name in feeds}
            if twin is not None:
                float_outputs, twins = wanted, torch_stages(twin)
                wanted = {name: twins[name].run(fed) for name, fed in feeds.items()}
                note_errors(wanted, float_outputs, quantisation)
            ours = {name: exported.stages[name].run(fed) for name, fed in feeds.items()}
            note_errors(ours, wanted, errors)
            layer_errors(ours, wanted, layers)
        golden |= golden_of(place, image, reference[index], tensors)
    glue_parity, chain_parity = together(glue), together(chain)
    failures = [f"glue: {failure}" for failure in glue_gates.failures(glue_parity)]
    failures += chain_failures(gates, chain_parity)
    on_golden = together([chain[index] for index in chosen])
    return ParityReport(glue_parity, errors, chain_parity, failures, engine, on_golden, quantisation, layers), golden


def measure_modes(
    model: AGVAS, exported: Pipeline, images: Sequence[np.ndarray], progress: Callable[[], None] = lambda: None
) -> dict[str, Parity]:
    """Comparison (5) on these pictures, uint8 RGB [H, W, 3] each, in every mode of the checkpoint but direct."""
    rule, found = model.config.mask_decoder.mask_rule, {}
    for mode in other_modes(model):
        normal = NORMAL_STATE if mode == PLUS else None
        prompt, parts = model.prompt_encoder.encode(None, mode, normal), []
        for image in images:
            wanted = outcome_of_reference(model.segment(image, None, mode, normal_state=normal))
            parts.append(compare([outcome_of(exported.run(image, prompt), rule)], [wanted]))
            progress()
        found[mode] = together(parts)
    return found


def other_modes(model: AGVAS) -> list[str]:
    """The checkpoint's modes beside direct."""
    return [mode for mode in model.config.prompts.instructions if mode != DIRECT]


# No engine or precision changes this.
NOTHING_FOUND = (
    "the reference's mask is empty on all {} pictures, so that no mask can be compared; give pictures with defects that the model finds "
    "(--images), or a lower --threshold"
)


def chain_failures(gates: Gates, parity: Parity) -> list[str]:
    """Gates that the whole chain broke, in words."""
    failures = [f"chain: {failure}" for failure in gates.failures(parity)]
    if parity.compared and not parity.non_empty:
        failures.append(f"chain: {NOTHING_FOUND.format(parity.images)}")
    return failures


def hardest(reference: Sequence[Outcome], rule: MaskRule) -> list[int]:
    """Indices of the pictures, those first whose masks an engine's rounding is most likely to change.

    That is where many pixels for the mask's size lie near its level, or, of an empty mask, where the map comes closest to it. Two
    pictures with a mask alternate with one without, as long as there are both.
    """

    def risk(outcome: Outcome) -> tuple[float, bool]:
        """The risk, and whether there is a mask."""
        score, size = float(outcome.anomaly_map.max()), np.count_nonzero(outcome.mask)
        near = np.count_nonzero(np.abs(outcome.anomaly_map - rule.level(score)) < NEAR)
        return (near / size if size else score), bool(size)

    risks = [risk(outcome) for outcome in reference]
    ranked = sorted(range(len(risks)), key=lambda index: -risks[index][0])
    found = [index for index in ranked if risks[index][1]]
    empty = [index for index in ranked if not risks[index][1]]
    order = []
    while found or empty:
        order += found[:2] + empty[:1]
        del found[:2], empty[:1]
    return order


def outcome_of_reference(segmented: Segmented) -> Outcome:
    return Outcome(segmented.mask, segmented.anomaly_map, segmented.anchor_states, segmented.answer_ids)


def golden_of(index: int, image: np.ndarray, outcome: Outcome, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Picture, answer, states and map are AGVAS.segment's own; the tensors between come from the torch stages."""
    arrays = {
        "image": image,
        "answer": np.asarray(outcome.answer, np.int64),
        "map": outcome.anomaly_map,
        **{f"tensor.{name}": tensor for name, tensor in tensors.items() if name not in NOT_TRACED},
    }
    if outcome.anchor_states is not None:
        arrays["anchor_states"] = outcome.anchor_states
    return {f"{index}.{name}": array for name, array in arrays.items()}


def note_errors(
    ours: Mapping[str, dict[str, np.ndarray]], wanted: Mapping[str, dict[str, np.ndarray]], errors: dict[str, dict[str, float]]
) -> None:
    """Raise `errors` to the relative errors of these outputs, by stage and tensor."""
    for name, outputs in wanted.items():
        known = errors.setdefault(name, {})
        for key, value in outputs.items():
            known[key] = worst(known.get(key), relative_error(ours[name][key], value))


def layer_errors(
    ours: Mapping[str, Mapping[str, np.ndarray]], wanted: Mapping[str, Mapping[str, np.ndarray]], found: dict[str, list[float]]
) -> None:
    """Note each decoder layer's relative error of keys and values [L, B, H, N, C]: what all layers before it put out is in them."""
    for name in NOT_TRACED:
        pairs = zip(ours["language"][name], wanted["language"][name], strict=True)
        errors = [relative_error(layer, reference) for layer, reference in pairs]
        found[name] = [worst(known, error) for known, error in zip(found.get(name, [None] * len(errors)), errors, strict=True)]  # type: ignore[list-item]
