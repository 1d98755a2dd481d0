"""Finds where an engine leaves the reference: the first stage, then the first layer in it.

One golden picture is followed, through its first language pass: the one whose mask the engine's whole chain gets most wrong. Engines that
have to be built are built as their turn comes: there the first picture is followed, and that one where every stage is right on it. Each
stage is fed what the reference fed it, so a stage is blamed for its own error alone. In the first one that leaves tolerance,
intermediate tensors are marked as outputs of the ONNX graph, and the engine's values are compared with onnxruntime's on the same graph
raised to fp32. Few are marked at a time, since every one costs memory and keeps the engine from fusing across it; where the
error goes once a tensor is visible, it was in a fusion, and that is told. Needs onnx and onnxruntime, no torch.

    python -m export.bisect --bundle DIR --engine NAME      # agvas-verify --bisect starts it: a crash here must not take that along
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines import Engine, EngineError, EngineFailed, EngineOptions, EngineUnavailable, open_engine
from engines.cuda import capability_here, device_index
from engines.spec import StageSpec, TensorSpec
from engines.tensorrt_cache import FAILED, KERNELS, EngineKey, build_into_cache, engines_folder, hash_of
from engines.tensorrt_library import TENSORRT_ENGINES, version
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.engine_builds import profiles
from runtime.errors import AgvasError
from runtime.one_at_a_time import Turn, TurnStage, give_back
from runtime.parity import Outcome, compare, relative_error
from runtime.pipeline import Pipeline, Stage
from runtime.verify import check_precision, golden_outcome, run_outcome, stage_options, trace_count

try:
    import onnx
except ImportError as error:
    NEEDED = f'--bisect takes the graphs apart with onnx, which cannot be had ({error}); pip install "agvas[bisect]"'
    if __name__ == "__main__":  # told as `main` tells what goes wrong, and not as a traceback
        print(json.dumps({"error": NEEDED}), flush=True)
        sys.exit(2)
    raise EngineUnavailable(NEEDED) from error

# Relative error that a stage or layer may have by the coarsest type it computes in: about ten times what was measured on nano's stages, so
# that rounding is not blamed, and far below what a wrong kernel does (TensorRT issue 4837: the masks were empty).
TOLERANCES = {"int8": 0.3, "bf16": 0.15, "fp16": 0.03, "fp32": 1e-3}
MARKED = 8  # tensors made visible in one try
LOW = ("FLOAT16", "BFLOAT16")
SCOPES = "pkg.torch.onnx.name_scopes"

Arrays = dict[str, np.ndarray]
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finding:
    """Where the error begins.

    Attributes:
        stage: first stage out of tolerance.
        stage_error: largest relative error of its outputs.
        node, operator, output: the first layer whose output leaves tolerance though its inputs do not; None where no layer did alone.
        module: the torch module it was exported from, where the graph says.
        error: relative error of that output.
        input_errors: of its inputs, where they were compared.
        in_fusion: the error went away when inner tensors were made visible: it is in a fusion of layers, this one among them.
        tolerance: what was allowed.
        tries: engines built or opened to find it.
        picture: number of the golden picture that was followed.
    """

    stage: str
    stage_error: float
    node: str | None
    operator: str | None
    output: str | None
    module: str | None
    error: float | None
    input_errors: dict[str, float]
    in_fusion: bool
    tolerance: float
    tries: int
    picture: int = 0


def bisect(
    bundle: Bundle,
    engine: str,
    options: EngineOptions,
    *,
    against: Bundle | None = None,
    tolerance: float | None = None,
    progress: Told | None = None,
) -> tuple[Finding | None, dict[str, float]]:
    """The first stage and layer of `bundle` on an engine that leave tolerance.

    Args:
        against: the bundle whose graphs, raised to fp32, are right; None takes the bundle's own. Of the same checkpoint.
        tolerance: relative error allowed; None goes by the coarsest type in the bundle.

    Returns:
        The finding, None where every stage is within tolerance; and the largest relative error of each stage looked at.

    Raises:
        EngineError: the engine or onnxruntime cannot be had, or cannot run the graphs.
    """
    check_precision(bundle, options)
    allowed = tolerance if tolerance is not None else tolerance_for(bundle, options)
    errors: dict[str, float] = {}
    shapes = profiles(bundle)
    with tempfile.TemporaryDirectory(prefix="agvas-bisect-") as name:
        folder = Path(name)
        twins: dict[str, _Graph] = {}
        copies: dict[str, _Graph] = {}
        for picture in _pictures(bundle, engine, options, shapes, progress):
            give_back()
            twins = twins or {stage: _Graph.raised((against or bundle).graph(stage), folder / "reference" / stage) for stage in STAGES}
            turn = Turn()  # a reference in fp32 is twice a bundle in 16 bit: one stage of it is in memory at a time
            reference = {stage: TurnStage(turn, twin.path, STAGES[stage], "onnxruntime", EngineOptions()) for stage, twin in twins.items()}
            seen = _record(against or bundle, bundle.golden()[f"{picture}.image"], reference)
            turn.close()
            for number, (stage, spec) in enumerate(STAGES.items()):
                if progress:
                    progress("stages", number, len(STAGES))
                feeds, wanted = seen[stage]
                if stage not in copies:
                    copies[stage] = _Graph.copied(bundle.graph(stage), folder / "engine" / stage)
                ours = copies[stage]
                outputs = ours.open(spec, engine, options, shapes[stage]).run(feeds)
                each = {tensor: _error(outputs[tensor], wanted[tensor]) for tensor in wanted}
                errors[stage] = max(errors.get(stage, 0.0), *each.values())
                bad = [tensor for tensor, error in each.items() if not error <= allowed]
                if bad:
                    probe = _Probe(ours, twins[stage], spec, engine, options, shapes[stage], feeds, bad[0], progress)
                    return replace(search(ours, probe, stage, max(each.values()), bad[0], allowed), picture=picture), errors
    return None, errors


def tolerance_for(bundle: Bundle, options: EngineOptions) -> float:
    """TOLERANCES of the coarsest type that the bundle or the engine computes in."""
    types = {*bundle.manifest.precision.values(), *options.coarser}
    return next(TOLERANCES[name] for name in TOLERANCES if name in types or name == "fp32")


class _Graph:
    """One ONNX graph in a folder of ours, and what depends on what in it."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path = path
        self.model = model
        graph = model.graph
        self.producer = {output: node for node in graph.node for output in node.output if output}
        self.order = {output: number for number, node in enumerate(graph.node) for output in node.output if output}
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
        known = {number: name for name, number in onnx.TensorProto.DataType.items()}
        self.types = {name: known[number] for name, number in types.items()}
        self._variants = 0

    @classmethod
    def copied(cls, graph: Path, folder: Path) -> _Graph:
        """A copy of the stage's files, beside which graphs with other outputs can be written."""
        shutil.copytree(graph.parent, folder)
        model = onnx.load(folder / graph.name, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model)
        return cls(folder / graph.name, inferred)

    @classmethod
    def raised(cls, graph: Path, folder: Path) -> _Graph:
        """The graph computing in fp32 throughout, with the same names: every 16-bit constant, cast and type becomes fp32."""
        model = onnx.load(graph)
        to_float, low = onnx.TensorProto.FLOAT, {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

        def raise_tensor(tensor: Any) -> None:
            if tensor.data_type in low:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

        for tensor in model.graph.initializer:
            raise_tensor(tensor)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in low:
                    attribute.i = to_float
                if attribute.type == onnx.AttributeProto.TENSOR:
                    raise_tensor(attribute.t)
        for value in (*model.graph.value_info, *model.graph.output, *model.graph.input):
            if value.type.tensor_type.elem_type in low:
                value.type.tensor_type.elem_type = to_float
        folder.mkdir(parents=True)
        location = f"{graph.stem}.data"
        onnx.save(model, folder / graph.name, save_as_external_data=True, location=location, size_threshold=1024)
        return cls(folder / graph.name, onnx.load(folder / graph.name, load_external_data=False))

    def floats(self) -> set[str]:
        """Computed tensors of a float type."""
        return {name for name in self.producer if self.types.get(name) in ("FLOAT", *LOW)}

    def inputs_of(self, tensor: str) -> list[str]:
        """Computed tensors that the tensor's node reads."""
        return [name for name in self.producer[tensor].input if name in self.producer]

    def before(self, tensor: str) -> set[str]:
        """Every computed tensor that it depends on."""
        found: set[str] = set()
        waiting = self.inputs_of(tensor)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.inputs_of(name)
        return found

    def showing(self, tensors: Iterable[str], keep: str) -> tuple[Path, tuple[TensorSpec, ...]]:
        """Write a variant whose outputs are `keep` and the tensors, all fp32; its path and outputs."""
        variant = onnx.ModelProto()
        variant.CopyFrom(self.model)
        kept = next(value for value in self.model.graph.output if value.name == keep)
        del variant.graph.output[:]
        variant.graph.output.add().CopyFrom(kept)
        specs = [TensorSpec(keep, "float32", ())]
        for name in tensors:
            shown = name
            if self.types[name] != "FLOAT":
                shown = f"{name}_shown"
                variant.graph.node.append(onnx.helper.make_node("Cast", [name], [shown], to=onnx.TensorProto.FLOAT))
            variant.graph.output.append(onnx.helper.make_tensor_value_info(shown, onnx.TensorProto.FLOAT, None))
            specs.append(TensorSpec(shown, "float32", ()))
        self._variants += 1
        path = self.path.with_name(f"{self.path.stem}-{self._variants}.onnx")
        onnx.save(variant, path)
        return path, tuple(specs)

    def open(self, spec: StageSpec, engine: str, options: EngineOptions, profile: Any = None, path: Path | None = None) -> Engine:
        """The graph, or a variant of it, on an engine; TensorRT's is built first."""
        return _open(path or self.path, spec, engine, options, profile)


def _open(graph: Path, spec: StageSpec, engine: str, options: EngineOptions, profile: Any) -> Engine:
    if engine in TENSORRT_ENGINES:
        key = EngineKey(spec.name, hash_of(graph), engine, version(engine), capability_here(options.device))
        build_into_cache(key, graph, profile, device=device_index(options.device))
    return open_engine(graph, spec, engine, replace(stage_options(spec.name, options), to_judge=True))


class _Probe:
    """Errors of inner tensors, by running variants of both graphs that show them."""

    def __init__(
        self,
        ours: _Graph,
        twin: _Graph,
        spec: StageSpec,
        engine: str,
        options: EngineOptions,
        profile: Any,
        feeds: Arrays,
        target: str,
        progress: Told | None,
    ) -> None:
        self._ours, self._twin, self._spec = ours, twin, spec
        self._engine, self._options, self._profile = engine, options, profile
        self._feeds, self._target, self._progress = feeds, target, progress
        self.candidates = ours.floats() & twin.floats()
        self.tries = 0

    def __call__(self, tensors: Sequence[str]) -> dict[str, float]:
        """Relative error of each tensor and of the stage's bad output, computed beside them."""
        self.tries += 1
        if self._progress:
            self._progress("layers", self.tries, self.tries + 1)
        ours = self._run(self._ours, tensors, self._engine, self._options)
        wanted = self._run(self._twin, tensors, "onnxruntime", EngineOptions())
        return {name: _error(ours[name], wanted[name]) for name in wanted}

    def _run(self, graph: _Graph, tensors: Sequence[str], engine: str, options: EngineOptions) -> Arrays:
        path, outputs = graph.showing(tensors, self._target)
        spec = StageSpec(self._spec.name, self._spec.inputs, outputs)
        found = graph.open(spec, engine, options, self._profile, path).run(self._feeds)
        return dict(zip((self._target, *tensors), (found[output.name] for output in outputs)))


def search(graph: _Graph, probe: _Probe, stage: str, stage_error: float, target: str, allowed: float, marked: int = MARKED) -> Finding:
    """Go up from a bad output to the first layer whose inputs are good, `marked` tensors a try.

    An error is taken to persist downstream, so whatever a good tensor depends on is good until the end, when the inputs of the layer
    found are compared themselves.
    """
    known: dict[str, float] = {target: stage_error}
    bad, in_fusion = target, False
    while not in_fusion:
        good = {name for name, error in known.items() if error <= allowed}
        presumed = set().union(*(graph.before(name) for name in good)) if good else set()
        open_ones = (graph.before(bad) & probe.candidates) - known.keys() - presumed
        if not open_ones:
            open_ones = (set(_float_inputs(graph, bad, probe.candidates)) & probe.candidates) - known.keys()
        if not open_ones:
            break
        ordered = sorted(open_ones, key=graph.order.__getitem__)
        found = probe(_spread(ordered, marked))
        in_fusion = found.pop(target) <= allowed
        known |= found
        worse = [name for name, error in found.items() if not error <= allowed]
        if worse:
            bad = min(worse, key=graph.order.__getitem__)
    node = graph.producer[bad]
    module = module_of(next((entry.value for entry in node.metadata_props if entry.key == SCOPES), ""))
    return Finding(
        stage=stage,
        stage_error=stage_error,
        node=node.name or None,
        operator=node.op_type,
        output=bad,
        module=module or None,
        error=known[bad],
        input_errors={name: known[name] for name in _float_inputs(graph, bad, probe.candidates) if name in known},
        in_fusion=in_fusion,
        tolerance=allowed,
        tries=probe.tries,
    )


def module_of(scopes: str) -> str:
    """The torch module that a node was exported from, by its SCOPES; "" where they do not tell."""
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return parts[-2] if len(parts) >= 2 else ""


def _float_inputs(graph: _Graph, tensor: str, candidates: set[str]) -> list[str]:
    """What a tensor's node reads, seen through nodes that the other graph lacks (casts): the nearest tensors that can be compared."""
    found = []
    for name in graph.inputs_of(tensor):
        found += [name] if name in candidates else _float_inputs(graph, name, candidates)
    return found


def _spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly, the last always among them."""
    if len(names) <= count:
        return list(names)
    return [names[math.ceil((index + 1) * len(names) / count) - 1] for index in range(count)]


def _error(ours: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error; infinite where the shapes differ or a number is none, unless the reference has none there either."""
    ours = np.asarray(ours)  # a GPU's engine keeps some outputs where they are (engines.Resident)
    if ours.shape != wanted.shape:
        return math.inf
    finite = np.isfinite(wanted)
    if not np.isfinite(ours[finite]).all():
        return math.inf
    return relative_error(np.where(finite, ours, 0), np.where(finite, wanted, 0))


def _pictures(bundle: Bundle, engine: str, options: EngineOptions, shapes: Mapping[str, Any], progress: Told | None) -> Iterator[int]:
    """Numbers of the golden pictures to follow, the next one where every stage is right on the one before.

    That is the one that the engine's chain gets most wrong. A chain needs every stage, and to build one may take minutes: where they must
    be built another comes before it, on which a stage may be found wrong before those behind it are built.

    Of those to which the reference said its anchors, since only they go through every stage.
    """
    wanted = _outcomes_with_anchors(bundle)
    followed = [next(iter(wanted), 0)] if engine in TENSORRT_ENGINES else []
    yield from followed
    worst = _worst_picture(bundle, wanted, engine, options, shapes, progress)
    if worst not in followed:
        yield worst


def _outcomes_with_anchors(bundle: Bundle) -> dict[int, Outcome]:
    """What the reference made of the golden pictures to which it said its anchors, by number."""
    golden, rule = bundle.golden(), bundle.manifest.mask_rule
    outcomes = {index: golden_outcome(golden, index, rule) for index in range(trace_count(golden))}
    return {index: outcome for index, outcome in outcomes.items() if outcome.anchor_states is not None}


def _worst_picture(
    bundle: Bundle,
    wanted: Mapping[int, Outcome],
    engine: str,
    options: EngineOptions,
    shapes: Mapping[str, Any],
    progress: Told | None,
) -> int:
    """Number of the golden picture that the engine's chain gets most wrong: no map, no anchors, a flip, then by mask and by map."""
    golden, rule = bundle.golden(), bundle.manifest.mask_rule
    stages = {stage: _open(bundle.graph(stage), spec, engine, options, shapes[stage]) for stage, spec in STAGES.items()}
    pipeline = _pipeline(bundle, stages)
    worst: dict[int, tuple[float, ...]] = {0: ()}
    for number, index in enumerate(wanted):
        if progress:
            progress("golden pictures", number, len(wanted))
        outcome, _ = run_outcome(pipeline, golden[f"{index}.image"], rule)
        parity = compare([outcome], [wanted[index]])
        worst[index] = (parity.not_finite, parity.anchors_changed, parity.flips, 1 - parity.mask_iou_mean, parity.map_max_abs)
    return max(worst, key=worst.__getitem__)


def _pipeline(bundle: Bundle, stages: Mapping[str, Any]) -> Pipeline:
    manifest = bundle.manifest
    return Pipeline(stages, manifest.preprocessing, bundle.prompt_encoder(), bundle.embeddings(), manifest.sizes)


def _record(bundle: Bundle, image: np.ndarray, stages: Mapping[str, Stage]) -> dict[str, tuple[Arrays, Arrays]]:
    """What each stage was first fed on a picture, and gave."""
    seen: dict[str, tuple[Arrays, Arrays]] = {}

    class Recorder:
        def __init__(self, stage: str) -> None:
            self.stage = stage

        def run(self, feeds: Arrays) -> Arrays:
            outputs = stages[self.stage].run(feeds)
            seen.setdefault(self.stage, (dict(feeds), outputs))
            return outputs

    pipeline = _pipeline(bundle, {stage: Recorder(stage) for stage in STAGES})
    pipeline.run(image, pipeline.prompts.encode())
    if missing := [stage for stage in STAGES if stage not in seen]:
        raise EngineFailed(f"the reference's answer has no anchors, so {', '.join(missing)} was not run; nothing to compare")
    return seen


def borrow(bundle: Bundle, engine: str, device: str, cache: Path) -> None:
    """Put what the user's cache has of a bundle's engines, those that failed as well, into another one as links.

    So they are not built again, and the ones that gave wrong masks are those that are looked at. A build in the other cache replaces a
    link and not what it leads to.
    """
    if engine not in TENSORRT_ENGINES:
        return
    folder = cache / engines_folder().name
    folder.mkdir(parents=True)
    for stage in STAGES:
        path = EngineKey(stage, bundle.graph_hash(stage), engine, version(engine), capability_here(device)).path
        aside = path.with_name(path.name + FAILED)
        for suffix in (path.suffix, ".json", KERNELS):
            failed = aside if suffix == path.suffix else aside.with_name(aside.name + suffix)
            built = path.with_suffix(suffix) if path.is_file() else failed
            if built.is_file():
                (folder / path.with_suffix(suffix).name).symlink_to(built.absolute())


def main(argv: Sequence[str] | None = None) -> int:
    """Print progress lines and, last, one line of JSON: {"finding", "stage_errors", "tolerance"} or {"error"}."""
    parser = argparse.ArgumentParser(
        prog="python -m export.bisect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--inference-precision", default="graph")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--tolerance", type=float)
    arguments = parser.parse_args(argv)

    def told(phase: str, done: int, total: int) -> None:
        print(json.dumps({"phase": phase, "step": done, "steps": total}), flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="agvas-bisect-cache-") as cache:
            bundle = Bundle(arguments.bundle, check_hashes=False)
            options = EngineOptions(arguments.device, arguments.threads, arguments.inference_precision)
            borrow(bundle, arguments.engine, options.device, Path(cache))
            os.environ["AGVAS_CACHE"] = cache  # engines of marked graphs are of no use to anyone afterwards
            against = None if arguments.against is None else Bundle(arguments.against, check_hashes=False)
            finding, errors = bisect(bundle, arguments.engine, options, against=against, tolerance=arguments.tolerance, progress=told)
            allowed = arguments.tolerance if arguments.tolerance is not None else tolerance_for(bundle, options)
    except (AgvasError, EngineError, OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    found = None if finding is None else asdict(finding)
    print(json.dumps({"finding": found, "stage_errors": errors, "tolerance": allowed}, default=str), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
