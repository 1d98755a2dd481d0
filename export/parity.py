"""The comparisons that isolate where an exported chain leaves the reference, and the traces a target replays.

(1) the runtime's pipeline over torch stages against AGVAS.segment: the glue; (3) each exported stage fed the reference's inputs:
conversion and precision; (4) the whole exported chain against AGVAS.segment: what a user gets. (2), quantisation against float,
belongs to quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from agvas.model import AGVAS, Segmented
from engines.spec import StageSpec
from export.adapters import axis_sizes
from export.onnx_writer import stage_module
from runtime.contract import STAGES
from runtime.parity import Gates, Outcome, Parity, compare, finite, relative_error, worst
from runtime.pipeline import Pipeline, Stage
from runtime.verify import NOT_TRACED, outcome_of, run_outcome

# Pictures that go into the bundle: enough for a target to notice flipped masks; every stage's tensors, which are large, of a few.
GOLDEN_PICTURES = 12
TRACED_PICTURES = 3


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
        glue: comparison (1).
        stages: comparison (3): largest relative error over the traced pictures, by stage and output.
        chain: comparison (4).
        failures: broken gates in words; export fails when there are any.
        engine: what ran the exported graphs.
    """

    glue: Parity
    stages: dict[str, dict[str, float]]
    chain: Parity
    failures: list[str]
    engine: str

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "passed": not self.failures,
            "failures": self.failures,
            "glue": self.glue.to_json(),
            "stages": finite(self.stages),
            "chain": self.chain.to_json(),
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
    images: Iterable[np.ndarray],
    gates: Gates,
    glue_gates: Gates,
    progress: Callable[[], None],
) -> tuple[ParityReport, dict[str, np.ndarray]]:
    """Run every picture through the reference, the torch pipeline and the exported chain.

    Returns:
        The report, and the golden traces for the bundle (the reference's tensors).
    """
    threshold = model.config.mask_decoder.threshold
    stages = torch_stages(model)
    reference: list[Outcome] = []
    glue: list[Outcome] = []
    chain: list[Outcome] = []
    golden: dict[str, np.ndarray] = {}
    errors: dict[str, dict[str, float]] = {}
    for index, image in enumerate(images):
        prompt = model.prompt_encoder.encode()
        segmented = model.segment(image)
        reference.append(outcome_of_reference(segmented))
        recorders = {name: RecordingStage(stage) for name, stage in stages.items()}
        trace = pipeline_over(model, recorders).run(image, prompt)
        glue.append(outcome_of(trace, threshold))
        chain.append(run_outcome(exported, image, threshold)[0])
        traced = index < TRACED_PICTURES
        if index < GOLDEN_PICTURES:
            golden |= _golden(index, image, segmented, trace.tensors if traced else {})
        if traced:
            _stage_errors(exported, recorders, errors)
        progress()
    glue_parity, chain_parity = compare(glue, reference), compare(chain, reference)
    failures = [f"glue: {failure}" for failure in glue_gates.failures(glue_parity)]
    failures += [f"chain: {failure}" for failure in gates.failures(chain_parity)]
    if chain_parity.compared and not chain_parity.non_empty:
        failures.append(
            f"chain: the reference's mask is empty on all {chain_parity.images} pictures, so no mask was compared; "
            "give pictures with defects that the model finds (--images)"
        )
    return ParityReport(glue_parity, errors, chain_parity, failures, engine), golden


def outcome_of_reference(segmented: Segmented) -> Outcome:
    return Outcome(segmented.mask, segmented.anomaly_map, segmented.anchor_states, segmented.answer_ids)


def _golden(index: int, image: np.ndarray, segmented: Segmented, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Picture, answer, states and map are AGVAS.segment's own; the tensors between come from the torch stages."""
    arrays = {
        "image": image,
        "answer": np.asarray(segmented.answer_ids, np.int64),
        "map": segmented.anomaly_map,
        **{f"tensor.{name}": tensor for name, tensor in tensors.items() if name not in NOT_TRACED},
    }
    if segmented.anchor_states is not None:
        arrays["anchor_states"] = segmented.anchor_states
    return {f"{index}.{name}": array for name, array in arrays.items()}


def _stage_errors(exported: Pipeline, recorders: Mapping[str, RecordingStage], errors: dict[str, dict[str, float]]) -> None:
    for name, recorder in recorders.items():
        if recorder.feeds is None:
            continue  # no anchors were said: the mask decoder did not run
        outputs = exported.stages[name].run(recorder.feeds)
        known = errors.setdefault(name, {})
        for key, value in outputs.items():
            known[key] = worst(known.get(key), relative_error(value, recorder.outputs[key]))
