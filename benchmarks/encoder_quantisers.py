"""Whose 8-bit encoders are best? Ours against onnxruntime's static quantiser and NNCF; a person runs it in an environment that has NNCF.

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0 && ENVIRONMENT/bin/pip install '.[export]' nncf==3.4.0
    ENVIRONMENT/bin/python -m benchmarks.encoder_quantisers --float FP32_BUNDLE --integers INT8_BUNDLE \\
        --output benchmarks/results/encoder_quantisers.json

Every candidate replaces both encoders of the fp32 bundle, calibrated on the same procedural pictures, and is judged by the masks of the
whole chain and the encoders' outputs on other ones, against the fp32 graphs on the same engine. Time is a ratio to those, both encoders
together, in turns. NNCF's models run on OpenVINO alone; the others are ONNX and run on both engines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.other_work import counted, in_words, other_work
from calibration.pictures import calibration_pictures
from engines import Engine, EngineOptions, open_engine
from export.pictures import parity_pictures
from runtime import preprocess
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.parity import compare
from runtime.selection import REST
from runtime.verify import open_pipeline, run_outcome

ENCODERS = {"pixel_encoder": "pixel_image", "semantic_encoder": "semantic_image"}
CALIBRATION, PAIRS = 64, 30

Feeds = dict[str, list[dict[str, np.ndarray]]]  # by encoder


def feeds_of(bundle: Bundle, pictures: Sequence[np.ndarray]) -> Feeds:
    """What each encoder reads of each picture."""
    feeds: Feeds = {stage: [] for stage in ENCODERS}
    for picture in pictures:
        pixel, semantic, _ = preprocess.encoder_images(picture, bundle.manifest.preprocessing)
        for (stage, name), image in zip(ENCODERS.items(), (pixel, semantic)):
            feeds[stage].append({name: image[None]})
    return feeds


def by_onnxruntime(graph: Path, feeds: list[dict[str, np.ndarray]], output: Path, kinds: list[str] | None) -> Path:
    """onnxruntime's static quantiser in QDQ form, symmetric, weights by channel: of the operators named, or of all it knows."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    quantize_static(
        str(graph),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=kinds,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return output


def by_nncf(graph: Path, feeds: list[dict[str, np.ndarray]], output: Path, without: list[str]) -> Path:
    """NNCF's post-training quantisation for transformers, leaving operators of some types alone."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(graph))
    scope = nncf.IgnoredScope(types=without, validate=False) if without else None
    quantised = nncf.quantize(
        model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds), ignored_scope=scope
    )
    openvino.save_model(quantised, str(output.with_suffix(".xml")), compress_to_fp16=False)
    return output.with_suffix(".xml")


# By name: (engines, made of an encoder's graph, its calibration inputs and a path without suffix).
Maker = Callable[[Path, list[dict[str, np.ndarray]], Path], Path]
CANDIDATES: dict[str, tuple[tuple[str, ...], Maker]] = {
    "onnxruntime, matrix products": (
        ("onnxruntime", "openvino"),
        lambda graph, feeds, path: by_onnxruntime(graph, feeds, path.with_suffix(".onnx"), ["MatMul"]),
    ),
    "onnxruntime, all it knows": (
        ("onnxruntime", "openvino"),
        lambda graph, feeds, path: by_onnxruntime(graph, feeds, path.with_suffix(".onnx"), None),
    ),
    "nncf": (("openvino",), lambda graph, feeds, path: by_nncf(graph, feeds, path, [])),
    "nncf, no convolutions": (("openvino",), lambda graph, feeds, path: by_nncf(graph, feeds, path, ["Convolution"])),
}


def judge(
    bundle: Bundle, engine: str, graphs: Mapping[str, Path], pictures: Sequence[np.ndarray], feeds: Feeds, threads: int
) -> dict[str, Any]:
    """Masks, outputs and time of the fp32 bundle's chain with these encoders in it, against itself."""
    options, rule = EngineOptions(threads=threads), bundle.manifest.mask_rule
    exact, changed = (open_pipeline(bundle, engine, options) for _ in range(2))
    ours: dict[str, Engine] = {stage: open_engine(graph, STAGES[stage], engine, options) for stage, graph in graphs.items()}
    changed.stages = dict(changed.stages) | ours
    parity = compare(
        [run_outcome(changed, picture, rule)[0] for picture in pictures],
        [run_outcome(exact, picture, rule)[0] for picture in pictures],
    )
    errors = {}
    for stage in ENCODERS:
        for name in (output.name for output in STAGES[stage].outputs):
            pairs = [(ours[stage].run(feed)[name], exact.stages[stage].run(feed)[name]) for feed in feeds[stage]]
            errors[name] = float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))

    def seconds(stages: Mapping[str, Any], number: int) -> float:
        time.sleep(REST)
        started = time.perf_counter()
        for stage in ENCODERS:
            stages[stage].run(feeds[stage][number % len(feeds[stage])])
        return time.perf_counter() - started

    before = counted(())
    ratio = statistics.median(seconds(ours, i) / seconds(exact.stages, i) for i in range(PAIRS))
    busy = other_work(before, counted(()))
    return {"relative_error": errors, "time_ratio": round(ratio, 3), "other_work": busy, "parity": parity.to_json()}


def measure(float_folder: Path, integer_folder: Path, count: int, threads: int) -> dict[str, Any]:
    machine = environment(threads)  # now: its load average is of others' work alone
    exact, ours = Bundle(float_folder), Bundle(integer_folder)
    pictures = parity_pictures(None, count)
    feeds = feeds_of(exact, pictures)
    shown = feeds_of(exact, calibration_pictures(None, CALIBRATION))
    rows = []
    with tempfile.TemporaryDirectory() as work:
        made: dict[str, tuple[tuple[str, ...], dict[str, Path]]] = {
            "ours": (("onnxruntime", "openvino"), {stage: ours.graph(stage) for stage in ENCODERS})
        }
        for number, (name, (engines, make)) in enumerate(CANDIDATES.items()):
            graphs = {stage: make(exact.graph(stage), shown[stage], Path(work) / f"{stage}-{number}") for stage in ENCODERS}
            made[name] = engines, graphs
        for name, (engines, graphs) in made.items():
            for engine in engines:
                row = {"quantiser": name, "engine": engine} | judge(exact, engine, graphs, pictures, feeds, threads)
                rows.append(row)
                print(f"{name} on {engine}: {row['parity']['mask_iou_mean']:.4f}, time {row['time_ratio']}", file=sys.stderr)
                print(in_words(row["other_work"]), file=sys.stderr)
    return {
        "images": count,
        "calibration_images": CALIBRATION,
        "kept_float": sorted(ours.manifest.quantisation.get("kept_float", {})),
        "rows": rows,
        "versions": {name: version(name) for name in ("nncf", "openvino", "onnxruntime")},
        "environment": machine,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| quantiser | engine | IoU mean | IoU min | flips | pixel embeddings | semantic features | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        parity, errors = row["parity"], row["relative_error"]
        lines.append(
            f"| {row['quantiser']} | {row['engine']} | {parity['mask_iou_mean']:.4f} | {parity['mask_iou_min']:.4f} | {parity['flips']} | "
            f"{errors['pixel_embeddings']:.3f} | {errors['semantic_features']:.3f} | {row['time_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float", type=Path, required=True, metavar="BUNDLE", dest="exact", help="exported with --precision fp32")
    parser.add_argument("--integers", type=Path, required=True, metavar="BUNDLE", help="exported with --precision int8")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if find_spec("nncf") is None:
        print("nncf is not installed; pip install nncf into an environment of its own", file=sys.stderr)
        return 2
    result = measure(options.exact, options.integers, options.images, options.threads)
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
