"""What each way of making it faster pays, one at a time, with and without it in turns in one run; and what was predicted beforehand.

    python -m benchmarks.levers --bundle BUNDLE --threads 2 --output benchmarks/results/levers.json
    python -m benchmarks.levers --render benchmarks/results/levers.json

writes levers.md beside the JSON; --render writes it again, measuring nothing. A lever that is in the runtime is switched off here to be
measured; one that is not, for want of a gain, is built here alone, so that a new engine version can be asked again. Ratios are of pairs, on
one process's pipelines. A lever that is called exact must give the same maps: exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.bench_statistics import paired_ratio
from benchmarks.environment import environment
from benchmarks.other_work import counted, in_words, other_work
from engines import EngineError, EngineOptions, open_engine
from engines.spec import StageSpec
from export.pictures import FIRST_SEED, procedural_picture
from runtime import preprocess
from runtime.bundle import Bundle
from runtime.contract import AXIS_NAMES, STAGES
from runtime.pipeline import Pipeline, Prepared, Trace, Vision
from runtime.preprocess import Frame
from runtime.selection import REST
from runtime.stream import in_steps
from runtime.verify import open_pipeline, verify

SIZE, LARGE_SIZE = (480, 640), (2000, 3000)
# Largest difference of two maps, which span 1, that sums in another order make: 2.9e-5 was seen in bfloat16, 2e-7 in float32.
EXACT = 3e-4

Run = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Lever:
    """One way of making it faster.

    Attributes:
        predicted: gain expected beforehand, and why.
        kept: whether the runtime has it.
        make: opens both forms: (without, with), each a function of a picture.
        size: of the pictures.
        exact: maps must be the same but for the order of sums (EXACT).
    """

    name: str
    predicted: str
    kept: bool
    make: Callable[[Bundle, int], tuple[Run, Run]]
    size: tuple[int, int] = SIZE
    exact: bool = True


def _pipeline(bundle: Bundle, threads: int, engine: str = "openvino", precision: str | None = None) -> Pipeline:
    if precision is None:
        precision = "bf16" if engine == "openvino" and _has_bf16() else "graph"
    return open_pipeline(bundle, engine, EngineOptions(threads=threads, inference_precision=precision))


@functools.cache
def _has_bf16() -> bool:
    from engines.openvino import natively_bf16

    return natively_bf16()


def _runs(*pipelines: Pipeline) -> tuple[Run, Run]:
    without, having = (functools.partial(_map_of, pipeline, pipeline.prompts.encode()) for pipeline in pipelines)
    return without, having


def _map_of(pipeline: Pipeline, prompt: Any, image: np.ndarray) -> np.ndarray:
    return pipeline.run(image, prompt).anomaly_map


def _static_shapes(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    def as_it_is(spec: StageSpec, sizes: Any, names: Any = None) -> StageSpec:
        return spec

    with mock.patch.object(StageSpec, "fixed", as_it_is):
        without = _pipeline(bundle, threads)
    return _runs(without, _pipeline(bundle, threads))


def _pools(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    with mock.patch("engines.openvino.pools_as_convolutions"):
        without = _pipeline(bundle, threads)
    return _runs(without, _pipeline(bundle, threads))


def _large_maps(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    without, having = _runs(*[_pipeline(bundle, threads)] * 2)

    def by_pillow(image: np.ndarray) -> np.ndarray:
        with mock.patch.object(preprocess, "LARGE", sys.maxsize):
            return np.asarray(without(image))

    return by_pillow, having


def _way_back_alone(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    side = bundle.manifest.sizes["M"]
    small = np.random.default_rng(0).random((side, side), np.float32)

    def restored(image: np.ndarray) -> np.ndarray:
        return preprocess.restore(small, _frame(image, bundle))

    def by_pillow(image: np.ndarray) -> np.ndarray:
        with mock.patch.object(preprocess, "LARGE", sys.maxsize):
            return restored(image)

    return by_pillow, restored


def _frame(image: np.ndarray, bundle: Bundle) -> Frame:
    return preprocess.frame_of(image.shape[0], image.shape[1], bundle.manifest.preprocessing.pixel_size)


def _sessions(change: Callable[[Any], None]) -> Callable[[Bundle, int], tuple[Run, Run]]:
    """onnxruntime with its session options changed after ours were set."""

    def make(bundle: Bundle, threads: int) -> tuple[Run, Run]:
        import onnxruntime

        original = onnxruntime.InferenceSession

        def session(path: str, settings: Any, **rest: Any) -> Any:
            change(settings)
            return original(path, settings, **rest)

        with mock.patch.object(onnxruntime, "InferenceSession", session):
            changed = _pipeline(bundle, threads, "onnxruntime")
        return _runs(_pipeline(bundle, threads, "onnxruntime"), changed)

    return make


def _spin(settings: Any) -> None:
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1")


def _no_arena(settings: Any) -> None:
    settings.enable_cpu_mem_arena = False


def _one_picture(settings: Any) -> None:
    settings.add_free_dimension_override_by_name("batch", 1)


class _Uncopied:
    """OpenVINO's outputs handed on as they lie in its request: right as long as nobody keeps a result beyond the next picture."""

    def __init__(self, engine: Any) -> None:
        self.spec = engine.spec
        self._outputs = [output.name for output in engine.spec.outputs]
        self._requests = [compiled.create_infer_request() for compiled in engine._compiled]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        passed: Any = dict(feeds)
        for request in self._requests:
            request.infer(passed, share_inputs=True)
            passed = {index: request.get_output_tensor(index).data for index in range(len(request.model_outputs))}
        return {name: self._requests[-1].get_tensor(name).data for name in self._outputs}


def _no_copies(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    without, having = _pipeline(bundle, threads), _pipeline(bundle, threads)
    having.stages = {name: _Uncopied(stage) for name, stage in having.stages.items()}
    return _runs(without, having)


class _SideBySide(Pipeline):
    """Both encoders at once."""

    def look(self, prepared: Prepared) -> Vision:
        trace = Trace()
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            other = Trace()
            semantic = beside.submit(self._stage, other, "semantic_encoder", semantic_image=prepared.semantic_image[None])
            self._stage(trace, "pixel_encoder", pixel_image=prepared.pixel_image[None])
            trace.tensors |= semantic.result()
        features, pixel_embeddings = trace.tensors["semantic_features"], trace.tensors["pixel_embeddings"]
        self._stage(trace, "spam", semantic_features=features, pixel_embeddings=pixel_embeddings)
        return Vision(prepared.frame, trace)


class _EarlyPicture(Pipeline):
    """The semantic image is made while the pixel encoder computes, instead of beside the pixel image."""

    def see(self, image: np.ndarray) -> Vision:
        trace, picture = Trace(), Image.fromarray(image)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            pixel_image, frame = preprocess.pixel_image(picture, self.preprocessing)
            semantic = beside.submit(preprocess.semantic_image, picture, self.preprocessing)
            self._stage(trace, "pixel_encoder", pixel_image=pixel_image[None])
            self._stage(trace, "semantic_encoder", semantic_image=semantic.result()[None])
        features, pixel_embeddings = trace.tensors["semantic_features"], trace.tensors["pixel_embeddings"]
        self._stage(trace, "spam", semantic_features=features, pixel_embeddings=pixel_embeddings)
        return Vision(frame, trace)


class _PromptsKept(Pipeline):
    """Embeddings of prompts looked up once."""

    @functools.cached_property
    def _kept(self) -> dict[tuple[int, ...], np.ndarray]:
        return {}

    def _embed(self, ids: tuple[int, ...]) -> np.ndarray:
        if ids not in self._kept:
            self._kept[ids] = super()._embed(ids)
        return self._kept[ids]


def _as(kind: type[Pipeline]) -> Callable[[Bundle, int], tuple[Run, Run]]:
    def make(bundle: Bundle, threads: int) -> tuple[Run, Run]:
        without = _pipeline(bundle, threads)
        having = kind(without.stages, without.preprocessing, without.prompts, without.embeddings, bundle.manifest.sizes)
        return _runs(without, having)

    return make


AS_IT_RUNS = "behind the first convolution, depthwise chains in fp32"
# Where OpenVINO's bf16 may begin, and what makes it so. A depthwise convolution never begins it by itself.
ROUNDING: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "from the first matrix product": lambda: mock.patch("engines.openvino.DENSE", ()),
    AS_IT_RUNS: contextlib.nullcontext,
    "behind the first convolution": lambda: mock.patch("engines.openvino.DEPTHWISE", ()),
    "throughout": lambda: mock.patch("engines.openvino.cut_before_rounding", lambda model: (None, model)),
}


def _rounding(without: str, having: str) -> Callable[[Bundle, int], tuple[Run, Run]]:
    def make(bundle: Bundle, threads: int) -> tuple[Run, Run]:
        pipelines = []
        for where in (without, having):
            with ROUNDING[where]():
                pipelines.append(_pipeline(bundle, threads, precision="bf16"))
        return _runs(*pipelines)

    return make


def _usual_sizes(bundle: Bundle, threads: int) -> tuple[Run, Run]:
    def as_it_is(spec: StageSpec, sizes: Any) -> StageSpec:
        return spec

    with mock.patch.object(StageSpec, "expecting", as_it_is):
        without = _pipeline(bundle, threads)
    return _runs(without, _pipeline(bundle, threads))


def _windows(_: Bundle, threads: int) -> tuple[Run, Run]:
    """The larger model's pixel encoder alone, since nano's windows divide its grid: as transformers computes it, and as it is exported."""
    import torch

    from agvas.encoders import pixel_encoder
    from benchmarks.midsize import midsize
    from export.adapters import PixelEncoderStage, axis_sizes
    from export.onnx_writer import export_stage, write

    config = midsize()
    torch.manual_seed(0)
    model: Any = SimpleNamespace(pixel_encoder=pixel_encoder(config.pixel).eval())
    torch.nn.init.ones_(model.pixel_encoder.neck.layer_norm2.weight)  # zeros at first, which would hide the layers
    spec = STAGES["pixel_encoder"].fixed({"B": 1}, AXIS_NAMES)
    options = EngineOptions(threads=threads, inference_precision="bf16" if _has_bf16() else "graph")

    def opened(folder: Path) -> Run:
        write(export_stage(PixelEncoderStage(model), "pixel_encoder", axis_sizes(config)), folder, "pixel_encoder")
        engine = open_engine(folder / "pixel_encoder.onnx", spec, "openvino", options)

        def run(image: np.ndarray) -> np.ndarray:
            return engine.run({"pixel_image": preprocess.encoder_images(image, config.preprocessing)[0][None]})["pixel_embeddings"]

        return run

    with tempfile.TemporaryDirectory() as folder:
        with mock.patch("export.adapters.without_padded_products", lambda encoder: encoder):
            without = opened(Path(folder) / "without")
        return without, opened(Path(folder) / "with")


LEVERS = (
    Lever(
        "SAM's windows without products over their filling, the larger model's pixel encoder",
        "2 %: 1.0 of its 35 GFLOP, and a copy that is three times as large",
        True,
        _windows,
    ),
    Lever(
        "openvino: sizes known when compiling",
        "5 %: no shape inference and no kernel look-up while running, above all in small stages",
        True,
        _static_shapes,
    ),
    Lever(
        "openvino: means over a picture's blocks as convolutions",
        "5 %: a reorder to 16 channels and a pool took 7.8 of 100 ms of a profile of nano's pixel encoder",
        True,
        _pools,
    ),
    Lever("maps of large pictures by rows, 2000 × 3000, a call", "15 %: the way back was 50 of 250 ms", True, _large_maps, LARGE_SIZE),
    Lever("the same, the way back alone", "4 times: two products a pixel instead of Pillow's loop", True, _way_back_alone, LARGE_SIZE),
    Lever("the same, the way back alone at 480 × 640", "nothing: Pillow's call is used there", True, _way_back_alone),
    Lever("openvino: outputs not copied between stages", "0.5 %: about 2 MB at 10 GB/s in nano", False, _no_copies),
    Lever("both encoders at once", "-5 %: they share the same cores", False, _as(_SideBySide)),
    Lever("semantic image made while the pixel encoder computes", "2 %: one resize of two leaves the line", False, _as(_EarlyPicture)),
    Lever("embeddings of prompts kept", "0.1 %: some dozens of rows of a memory map", False, _as(_PromptsKept)),
    Lever("onnxruntime: threads spin between stages", "0 %: the pool of one stage takes the cores from the next", False, _sessions(_spin)),
    Lever("onnxruntime: no arena", "-5 %: memory is asked for anew at each picture", False, _sessions(_no_arena)),
    Lever("onnxruntime: batch of one known when loading", "2 %: fewer shape nodes", False, _sessions(_one_picture)),
    Lever(
        "openvino: bf16 behind the first convolution, not from the first product, but for depthwise chains",
        "10 %: of nano's 30 ms before its first product 12 are such convolutions, and bf16's products are twice as fast",
        True,
        _rounding("from the first matrix product", AS_IT_RUNS),
        exact=False,
    ),
    Lever(
        "openvino: depthwise chains in bf16, too",
        "4 % for masks beyond the gates: fifty roundings in a row",
        False,
        _rounding(AS_IT_RUNS, "behind the first convolution"),
        exact=False,
    ),
    Lever(
        "openvino: bf16 throughout",
        "5 % for masks beyond the gates: the picture is rounded to 8 bits",
        False,
        _rounding(AS_IT_RUNS, "throughout"),
        exact=False,
    ),
    Lever(
        "openvino: the language stage compiled for direct mode's number of tokens as well",
        "1 % here, 5 % of the larger model: no shape inference while running, and elementwise operators fused",
        True,
        _usual_sizes,
    ),
)


def measure(lever: Lever, bundle: Bundle, threads: int, pairs: int, warmups: int) -> dict[str, Any]:
    """{"gain", "low", "high", …}: time without / time with, pair by pair, or {"error"} where the lever cannot be tried here."""
    row: dict[str, Any] = {"lever": lever.name, "predicted": lever.predicted, "kept": lever.kept, "picture": list(lever.size)}
    try:
        return row | _measured(lever, *lever.make(bundle, threads), pairs, warmups)
    except (EngineError, ImportError) as error:
        return row | {"error": str(error)}


def _measured(lever: Lever, without: Run, having: Run, pairs: int, warmups: int) -> dict[str, Any]:
    images = [procedural_picture(FIRST_SEED + 900 + index, *SIZE) for index in range(4)]
    if lever.size != SIZE:
        images = [np.asarray(Image.fromarray(image).resize(lever.size[::-1])) for image in images]
    times: tuple[list[float], list[float]] = ([], [])
    differ = 0.0
    for turn in tqdm(range(-warmups, pairs), desc=lever.name[:48], unit="pair"):
        image, maps = images[turn % len(images)], []
        order = (0, 1) if turn % 2 else (1, 0)
        for which in order:
            time.sleep(REST)
            started = time.perf_counter()
            maps.append((without, having)[which](image))
            spent = (time.perf_counter() - started) * 1e3
            if turn >= 0:
                times[which].append(spent)
        differ = max(differ, float(np.abs(maps[0] - maps[1]).max()))
    told = paired_ratio(*times)
    medians = {"without_ms": round(float(np.median(times[0])), 3), "with_ms": round(float(np.median(times[1])), 3)}
    gain = {"gain": told["median"], "low": told["low"], "high": told["high"]}
    return gain | medians | {"map_difference": differ, "exact": lever.exact}


def measure_stream(bundle: Bundle, threads: int, frames: int, rounds: int) -> dict[str, Any]:
    """Frames a second one call after the other against overlapped steps, as Segmenter.stream does."""
    pipeline = _pipeline(bundle, threads)
    prompt = pipeline.prompts.encode()
    images = [procedural_picture(FIRST_SEED + 900 + index, *SIZE) for index in range(4)]

    def camera() -> Iterator[np.ndarray]:
        for index in range(frames):
            yield images[index % len(images)]

    def alone() -> list[np.ndarray]:
        return [pipeline.run(image, prompt).anomaly_map for image in camera()]

    def streamed() -> list[np.ndarray]:
        steps: Sequence[Callable[[Any], Any]] = (pipeline.prepare, pipeline.look, lambda vision: pipeline.answer(vision, prompt))
        with contextlib.closing(in_steps(camera(), steps, ())) as results:
            return [result.anomaly_map for result, _ in results]

    times: tuple[list[float], list[float]] = ([], [])
    differ = 0.0
    for turn in tqdm(range(-1, rounds), desc="stream", unit="pair"):
        maps = []
        for which, run in enumerate((alone, streamed)):
            time.sleep(REST)
            started = time.perf_counter()
            maps.append(run())
            if turn >= 0:
                times[which].append((time.perf_counter() - started) * 1e3 / frames)
        differ = max(differ, *(float(np.abs(one - other).max()) for one, other in zip(*maps, strict=True)))
    told = paired_ratio(*times)
    return {
        "lever": "frames overlapped (Segmenter.stream), time for each frame",
        "predicted": "10 %: reading, resizing and the small stages fill what the pixel encoder's threads leave",
        "kept": True,
        "picture": list(SIZE),
        "gain": told["median"],
        "low": told["low"],
        "high": told["high"],
        "without_ms": round(float(np.median(times[0])), 3),
        "with_ms": round(float(np.median(times[1])), 3),
        "map_difference": differ,
        "exact": True,
    }


def inexact_masks(bundle: Bundle, threads: int) -> dict[str, Any]:
    """Golden masks of OpenVINO computing in bf16, by where that begins."""
    if not _has_bf16():
        return {"error": "this processor does not multiply in bfloat16"}
    options = EngineOptions(threads=threads, inference_precision="bf16")
    found = {}
    for name, patched in ROUNDING.items():
        with patched():
            verification = verify(bundle, open_pipeline(bundle, "openvino", options), options)
        found[name] = {"passed": verification.passed, **verification.parity.to_json()}
    return found


def inexact(result: dict[str, Any]) -> list[str]:
    """Levers that are called exact, whose maps differ by more than sums in another order."""
    return [row["lever"] for row in result["levers"] if row.get("exact") and not row["map_difference"] <= EXACT]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    machine = result["environment"]
    lines = [
        "# Ways of making it faster: predicted and measured",
        "",
        f"`python -m benchmarks.levers`, model {result['model']}, {result['threads']} threads, {machine['processor']}, "
        f"load average {machine['load_average'][0] if machine['load_average'] else 'not told'} at the beginning. "
        "Gain is time without / time with, the median of pairs taken in turns, and its 99 % interval; below 1 it costs.",
        *([in_words(result["other_work"])] if "other_work" in result else []),  # older results lack it
        *result.get("notes", []),
        "",
        "| lever | in the runtime | predicted | measured gain | interval | without, ms | with, ms | map difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["levers"]:
        start = f"| {row['lever']} | {'yes' if row['kept'] else 'no'} | {row['predicted']} |"
        if "error" in row:
            lines.append(f"{start} not tried: {row['error'][:90]} | | | | |")
            continue
        lines.append(
            f"{start} {row['gain']:.3f} | {row['low']:.3f} .. {row['high']:.3f} | {row['without_ms']:.2f} | {row['with_ms']:.2f} | "
            f"{row['map_difference']:.1e}{' NOT EXACT' if row['lever'] in inexact(result) else ''} |"
        )
    lines += _masks_by_rounding(result["masks_in_bf16"])
    return "\n".join([*lines, "", NOT_TRIED]) + "\n"


def _masks_by_rounding(told: dict[str, Any]) -> list[str]:
    """Lines of the page; none where only some levers were asked for."""
    if "error" in told:
        return ["", f"Golden masks in bf16 were not compared: {told['error']}."]
    lines = ["", f"Golden masks of OpenVINO in bf16, by where that begins; {AS_IT_RUNS} is how it runs:", ""] if told else []
    for name, each in told.items():
        verdict = "passed" if each["passed"] else "FAILED its gate"
        masks = f"mean IoU {each['mask_iou_mean']:.4f}, least {each['mask_iou_min']:.4f}, {each['flips']} flips"
        lines.append(f"- bf16 {name}: {masks}: {verdict}")
    return lines


NOT_TRIED = """\
`Segmenter.stream` is in the runtime though it gains nothing here: it is a way of calling that the caller chooses, and runtime/README.md
says that nothing is gained where the cores are busy. Whether it pays beside a GPU was not measured.

Not in the table, and why:

- SAM's windows without products over their filling in nano, whose windows divide its grid. A run before the table's, of the larger model's
  pixel encoder, too (`levers_windows.json`): 1.005 (1.000 to 1.009). Of ViT-H's encoder it is 5 % of the work.
- Keys and values of the prompt's beginning: five tokens stand before the picture.
- OpenVINO's bf16 behind the second to sixth convolution, depthwise chains in fp32: tried on 64 pictures with nano's present weights, mean
  IoU 0.9979 to 0.9983 as behind the first (0.9982), the gain falling from 13 % to 5 (a throw-away trial).
- Copies between stages on a GPU: with TensorRT what a stage computes for another stays there, 61 MB a picture at full size by arithmetic;
  with onnxruntime keys and values alone do (levers_gpu.md). No GPU has measured either."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--bundle", type=Path, help="an fp32 bundle of nano or mid-size")
    asked.add_argument("--render", type=Path, metavar="JSON", help="write the .md beside a result again, measuring nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--warmups", type=int, default=10)
    parser.add_argument("--only", metavar="TEXT", help="levers whose name has this in it")
    parser.add_argument("--output", type=Path, help="write the result as JSON, and a .md beside it")
    options = parser.parse_args(arguments)
    if options.render:
        options.render.with_suffix(".md").write_text(table(json.loads(options.render.read_text())))
        return 0
    bundle = Bundle(options.bundle)
    machine = environment(options.threads, bundle.id)
    before, rows = counted(()), []
    for lever in LEVERS:
        if options.only is None or options.only in lever.name:
            rows.append(measure(lever, bundle, options.threads, options.pairs, options.warmups))
    if options.only is None or options.only in "stream":
        rows.append(measure_stream(bundle, options.threads, frames=20, rounds=max(8, options.pairs // 10)))
    busy = other_work(before, counted(()))
    result = {
        "model": bundle.manifest.model,
        "threads": options.threads,
        "pairs": options.pairs,
        "levers": rows,
        "other_work": busy,
        "masks_in_bf16": inexact_masks(bundle, options.threads) if options.only is None else {},
        "environment": machine,
    }
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(table(result))
    if failed := inexact(result):
        print(f"levers: not exact: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
