"""AG-VAS-7B on a GPU with random weights: latency and memory of the PyTorch reference and of the exported stages on onnxruntime's CUDA.

    python -m benchmarks.full_size_gpu prepare --output graphs                            # anywhere: needs no GPU and no weights
    python -m benchmarks.full_size_gpu measure --graphs graphs --work DIR --output JSON   # on the GPU; 45 GB in DIR, /dev/shm for instance
    python -m benchmarks.full_size_gpu profile --work DIR --output TEXT                   # there, afterwards
    python -m benchmarks.full_size_gpu floors --json JSON                                 # anywhere: how far each stage is from its floor

What is prepared are the stages' graphs as agvas-export writes them, some MB, and a list of what each place in their weight files holds. The
values are drawn on the GPU where they are measured, by name and seed, so nothing large travels. Weights have the scales of trained ones
and the language model says the fixed answer (benchmarks.random_checkpoint); masks mean nothing, so no mask is judged: each stage's
numbers are compared with the fp32 reference's instead. The language model's integers come from plain rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agvas.config import AGVASConfig, LanguageConfig, ov_7b, tiny
from benchmarks.environment import environment
from benchmarks.random_checkpoint import TABLE, reduced, scale_of, spoken_rows, tokenizer_of
from engines.cache import CUDA_FORM
from runtime.bundle import EMBEDDINGS
from runtime.contract import AXIS_NAMES, STAGES
from runtime.errors import RequestError

SIZES = ("7b", "reduced", "small")
LMMS = ("float", "gptq4")
GROUP = 128
# Of a tensor up to here, and of tables of positions, the values are the CPU generator's, the same everywhere: graphs hold some of them, or
# constants made of them.
SMALL = 1 << 20
# Initializers from here on lie in the weight file; smaller ones in the graph.
EXTERNAL_FROM = 1 << 18
ALIGNMENT = 4096
PICTURES = [(8_000_000_003 + i, 480, 640) for i in range(4)]
TORCH = ("torch-fp32", "torch-bf16", "torch-fp32-one-pass", "torch-bf16-one-pass")
OURS = ("float", "float-plain", "gptq4", "gptq4-plain")
REFERENCE = "torch-fp32-one-pass"
GPU = "cuda:0"


def config_of(size: str) -> AGVASConfig:
    """The paper's model, one of its widths with two layers of each kind, or a small one, which shows that the command runs."""
    if size == "small":
        return dataclasses.replace(tiny(), name="small", language=LanguageConfig(512, 128, 3, 4, 2, 256, max_positions=512))
    return reduced(ov_7b()) if size == "reduced" else ov_7b()


class Weights:
    """A model's weights by name, bfloat16 as published ones are; the same for the same name, wherever they are drawn."""

    def __init__(self, config: AGVASConfig, device: str) -> None:
        from agvas.model import AGVAS

        self.config, self.device = config, device
        with torch.device("meta"):
            self.skeleton = AGVAS(config, tokenizer_of(config)).eval()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        self.rows = spoken_rows(self.skeleton)

    def __call__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        small = math.prod(shape) <= SMALL or "pos" in name
        if not small and self.device == "cpu" and self.config.name == ov_7b().name:
            raise ValueError(f"{name} is to be drawn on the GPU")
        device = "cpu" if small else self.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        mean, scale = scale_of(name, shape, 2 * self.config.language.layers)
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).add_(mean).to(torch.bfloat16)
        for row, spoken in self.rows.get(name, {}).items():
            values[row] = spoken.to(values)
        return values.to(self.device)


def prepare(size: str, output: Path) -> None:
    """Write every stage's graphs, float and with integers, and what their weight files hold."""
    import onnx_ir as ir

    from agvas.checkpoint import OpenedCheckpoint
    from agvas.weights import LazyTensor
    from calibration.weights import LazyQuantizedWeight
    from export.adapters import axis_sizes, name_in_stage
    from export.bundle import write_cuda_form
    from export.integer_weights import store_integers
    from export.onnx_writer import export_stage, stage_module
    from export.passes import lower_precision
    from export.quantisation import language_linears
    from export.stage_weights import all_weights, stage_weights

    config = config_of(size)
    weights = Weights(config, "cpu")

    def lazy(name: str) -> LazyTensor:
        return LazyTensor(weights.shapes[name], torch.bfloat16, lambda: weights(name))

    tensors = {name: lazy(name) for name in weights.shapes}
    names = {id(tensor): name for name, tensor in tensors.items()}
    skeleton = weights.skeleton
    everything = all_weights(OpenedCheckpoint(output, config, skeleton.tokenizer, tensors))
    output.mkdir(parents=True)
    (output / "size.json").write_text(json.dumps({"size": size}))
    for stage in STAGES:
        _say(f"export {stage}")
        graph = export_stage(stage_module(skeleton, stage), stage, axis_sizes(config), stage_weights(everything, skeleton, stage))
        for lmm in LMMS if stage == "language" else LMMS[:1]:
            made = graph.clone()
            if lmm == "gptq4":

                def never() -> Any:
                    raise ValueError("integers are drawn on the GPU")

                linears = {str(name_in_stage(stage, name)): name for name in language_linears(skeleton)}
                shapes = {local: weights.shapes[f"{name}.weight"] for local, name in linears.items()}
                store_integers(made, {local: LazyQuantizedWeight(shape, 4, GROUP, never) for local, shape in shapes.items()})
                integers = {local: f"{name}.weight" for local, name in linears.items()}
            else:
                integers = {}
            lower_precision(made, "fp16")
            folder = output / lmm / stage
            folder.mkdir(parents=True)
            places = list(_place(made, stage, names, integers))
            ir.save(made, folder / f"{stage}.onnx")
            (folder / f"{stage}.json").write_text(json.dumps(places))
            write_cuda_form(folder, stage)


def _place(model: Any, stage: str, names: dict[int, str], integers: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Give each large initializer its place in the weight file; tell what is to stand there. Small ones are read into the graph."""
    import onnx_ir as ir

    from export.streamed_tensor import StreamedTensor

    offset = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        length = math.ceil(tensor.nbytes)
        told: dict[str, Any] = {}
        if isinstance(tensor, StreamedTensor) and id(tensor.view.source) in names:
            told = {"kind": "float", "source": names[id(tensor.view.source)], "order": list(tensor.view.order)}
        elif (local := name.removesuffix("_float16").rpartition("."))[0] in integers and local[2] in ("codes", "scales"):
            told = {"kind": local[2], "source": integers[local[0]]}
        if not told or (length < EXTERNAL_FROM and told["kind"] == "float"):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
            continue
        shape = tensor.shape.numpy()
        value.const_value = ir.ExternalTensor(f"{stage}.data", offset, length, tensor.dtype, shape=ir.Shape(shape), name=name)
        yield told | {"offset": offset, "length": length, "dtype": tensor.dtype.name}
        offset += -(-length // ALIGNMENT) * ALIGNMENT


def fill(graphs: Path, work: Path, weights: Weights) -> float:
    """Draw the weight files on the GPU; seconds that took."""
    import shutil

    started = time.monotonic()
    shutil.copy(graphs / "size.json", work)
    for places in sorted(graphs.glob("*/*/*.json")):
        stage, folder = places.stem, work / places.parent.relative_to(graphs)
        folder.mkdir(parents=True, exist_ok=True)
        for graph in places.parent.glob("*.onnx"):
            shutil.copy(graph, folder)
        with open(folder / f"{stage}.data", "wb") as file:
            rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for place in json.loads(places.read_text()):
                source = place["source"]
                if place["kind"] == "float":
                    tensor = weights(source).permute(place["order"]).to(_torch_type(place["dtype"]))
                else:
                    if source not in rounded:
                        rounded = {source: round_to_int4(weights(source).float())}
                    tensor = (
                        packed(rounded[source][0].T) if place["kind"] == "codes" else rounded[source][1].T.to(_torch_type(place["dtype"]))
                    )
                array = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
                if array.nbytes != place["length"]:
                    raise ValueError(f"{source}: expected {place['length']} bytes, made {array.nbytes}")
                file.seek(place["offset"])
                array.tofile(file)
    np.save(work / EMBEDDINGS, weights(TABLE).to(torch.float16).cpu().numpy())
    return time.monotonic() - started


def _torch_type(name: str) -> torch.dtype:
    return {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32}[name]


def round_to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] in -8..7 and float16 scales [N, K / group], by the largest value of each group."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, inputs // GROUP, GROUP)
    scales = (groups.abs().amax(dim=2) / 7).to(torch.float16)
    codes = (groups / scales.float()[..., None]).round_().clamp_(-8, 7).to(torch.int8)
    return codes.reshape(outputs, inputs), scales


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two to a byte, the first in the low half, as ONNX has int4."""
    pairs = codes.contiguous().reshape(-1, 2).view(torch.uint8)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


# --- candidates, each in a process of its own ---------------------------------------------------------------------------------------------


def reference(kind: str, weights: Weights, work: Path, calls: int) -> dict[str, Any]:
    """The PyTorch reference: generating as the paper does, or with the fixed answer as a draft in one pass."""
    from agvas.checkpoint import fill_buffers
    from benchmarks.bench_candidates import ModuleClock
    from export.pictures import procedural_picture
    from runtime import preprocess

    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    began = time.monotonic()
    model = weights.skeleton
    model.load_state_dict({name: weights(name).to(dtype) for name in weights.shapes}, assign=True)
    fill_buffers(model)
    model = model.to(GPU).eval()
    load = time.monotonic() - began
    clock, prompt = ModuleClock(model, GPU), model.prompt_encoder.encode()
    assert prompt.draft is not None
    kept: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def one_pass(image: np.ndarray) -> None:
        pixel, semantic, frame = preprocess.encoder_images(image, weights.config.preprocessing)
        batch = [torch.from_numpy(array).to(GPU, dtype)[None] for array in (pixel, semantic)]
        vision = model.see(*batch)
        answer: tuple[int, ...] = prompt.draft or ()
        embeddings = model.input_embeddings(vision, [prompt], [answer[:-1]])
        states = model.language.model(inputs_embeds=embeddings).last_hidden_state[:, -len(answer) :]
        logits = model.language.lm_head(states)
        said = logits[0].argmax(-1).tolist() == list(answer)
        anchors = model.prompt_encoder.find_anchors(answer)
        assert said and anchors, "the random model does not say the fixed answer"
        shift = 1 + model.prompt_encoder.state_shift
        chosen = states[:, [index + shift for index in anchors]]
        maps = model.mask_decoder(chosen, vision.pixel_embeddings)
        anomaly_map = preprocess.restore(maps.anomaly_map[0].float().cpu().numpy(), frame)
        if not kept:
            found = {"pixel_embeddings": vision.pixel_embeddings, "image_embeddings": vision.image_embeddings}
            found |= {"aligned_embeddings": vision.aligned_embeddings, "anchor_states": chosen}
            kept.update({name: value.float().cpu().numpy() for name, value in found.items() if value is not None})
            kept["map"] = anomaly_map

    def call(image: np.ndarray) -> dict[str, float]:
        clock.clear()
        one_pass(image) if "one-pass" in kind else model.segment(image)
        return clock.spent()

    told = timed(call, [procedural_picture(*picture) for picture in PICTURES], calls)
    if kind == REFERENCE:
        np.savez(work / "reference.npz", **kept)  # type: ignore[arg-type]
    elif kept:
        told["relative_error"] = errors(kept, work)
    return told | {"load_seconds": round(load, 1), "torch_reserved_bytes": torch.cuda.max_memory_reserved() if GPU != "cpu" else None}


def ours(kind: str, weights: Weights, work: Path, calls: int) -> dict[str, Any]:
    """The exported stages through runtime.pipeline on onnxruntime's CUDA provider."""
    from engines import EngineOptions, open_engine
    from export.adapters import axis_sizes
    from export.pictures import procedural_picture
    from runtime.pipeline import Pipeline

    config, lmm = weights.config, kind.partition("-")[0]
    ending = ".onnx" if kind.endswith("plain") else CUDA_FORM
    began, stages = time.monotonic(), {}
    loads: dict[str, float] = {}
    for stage, spec in STAGES.items():
        folder = work / (lmm if stage == "language" else LMMS[0]) / stage
        path = folder / f"{stage}{ending}"
        started = time.monotonic()
        stages[stage] = open_engine(path, spec.fixed({"B": 1}, AXIS_NAMES), "onnxruntime", EngineOptions(GPU))
        loads[stage] = round(time.monotonic() - started, 1)
    load = time.monotonic() - began
    table = np.load(work / EMBEDDINGS, mmap_mode="r")
    prompts = weights.skeleton.prompt_encoder
    pipeline = Pipeline(stages, config.preprocessing, prompts, table, axis_sizes(config))
    prompt = prompts.encode()
    kept: dict[str, np.ndarray] = {}
    verified: list[bool] = []

    def call(image: np.ndarray) -> dict[str, float]:
        trace = pipeline.run(image, prompt)
        verified.append(trace.verified)
        if not kept and trace.anchor_states is not None:
            names = ("pixel_embeddings", "image_embeddings", "aligned_embeddings")
            kept.update({name: np.asarray(trace.tensors[name]) for name in names})
            kept.update({"anchor_states": trace.anchor_states, "map": trace.anomaly_map})
        return {name: ms for name, ms in trace.timings.items() if name != "total"}

    told = timed(call, [procedural_picture(*picture) for picture in PICTURES], calls)
    told["load_seconds_by_stage"] = loads
    told["captured"] = {name: bool(getattr(stage, "_captures", False)) for name, stage in stages.items()}
    return told | {"load_seconds": round(load, 1), "answers_verified": all(verified), "relative_error": errors(kept, work)}


def profile(work: Path, output: Path) -> None:
    """Kernels of the 16-bit encoders and language stage by time on the GPU, milliseconds and calls a picture (torch.profiler)."""
    import onnxruntime

    from engines import EngineOptions
    from engines.onnxruntime import OnnxRuntimeEngine
    from export.adapters import axis_sizes, example_inputs

    config, lines = config_of(json.loads((work / "size.json").read_text())["size"]), [f"onnxruntime {onnxruntime.__version__}"]
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if GPU != "cpu" else [])
    free = {"B": 1, "N": min(1540, config.language.max_positions - 1), "K": 0, "R": 9}
    for stage in ("pixel_encoder", "language", "semantic_encoder"):
        path = work / LMMS[0] / stage / f"{stage}{CUDA_FORM}"
        engine = OnnxRuntimeEngine(path, STAGES[stage].fixed({"B": 1}, AXIS_NAMES), EngineOptions(GPU))
        inputs = example_inputs(stage, axis_sizes(config), free)
        feeds = {tensor.name: value.numpy() for tensor, value in zip(STAGES[stage].inputs, inputs, strict=True)}
        for _ in range(3):
            engine.run(feeds)
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(2):
                engine.run(feeds)
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        lines += ["", f"{stage}: {sum(event.self_device_time_total for event in events) / 2e3:.1f} ms in all"]
        lines += [f"{event.self_device_time_total / 2e3:8.3f} ms {event.count / 2:6.0f}  {event.key[:96]}" for event in events[:28]]
    output.write_text("\n".join(lines) + "\n")


def errors(kept: dict[str, np.ndarray], work: Path) -> dict[str, float]:
    """Of the first picture, against the fp32 reference."""
    from runtime.parity import relative_error

    path = work / "reference.npz"
    if not path.exists():
        return {}
    with np.load(path) as file:
        return {name: relative_error(value, file[name]) for name, value in kept.items()}


def timed(call: Callable[[np.ndarray], dict[str, float]], pictures: list[np.ndarray], calls: int, warm_up: int = 5) -> dict[str, Any]:
    """Milliseconds of calls one after the other, a decoded picture to the map in memory."""
    stages: list[dict[str, float]] = []
    samples: list[float] = []
    for number in range(warm_up + calls):
        started = time.perf_counter()
        spent = call(pictures[number % len(pictures)])
        if number >= warm_up:
            samples.append((time.perf_counter() - started) * 1e3)
            stages.append(spent)
    ordered = sorted(samples)
    return {
        "calls": calls,
        "p50_ms": round(statistics.median(ordered), 2),
        "p90_ms": round(ordered[math.ceil(0.9 * len(ordered)) - 1], 2),
        "max_ms": round(ordered[-1], 2),
        "stages_p50_ms": {name: round(statistics.median(one.get(name, 0.0) for one in stages), 2) for name in stages[0]},
        "gpu_memory_bytes": gpu_memory(),
        "samples_ms": [round(value, 2) for value in samples],
    }


def _let_go() -> None:
    """Give back the GPU's memory that this process keeps for later."""
    if GPU != "cpu":
        torch.cuda.empty_cache()


def gpu_memory() -> int | None:
    """Bytes in use on the whole GPU, which nothing else should be using; None where there is none."""
    if GPU == "cpu":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={GPU.split(':')[1]}"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) << 20


def measure(graphs: Path, work: Path, output: Path, candidates: list[str], calls: int, limit: float | None) -> int:
    """Every candidate in a process of its own, one after the other; the result is written after each."""
    size = json.loads((graphs / "size.json").read_text())["size"]
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"size": size, "picture": list(PICTURES[0][1:]), "gpu_idle_bytes": gpu_memory(), "candidates": {}}
    if any(candidate in OURS for candidate in candidates) and not (work / "filled.json").exists():
        seconds = fill(graphs, work, Weights(config_of(size), GPU))
        (work / "filled.json").write_text(json.dumps({"seconds": seconds}))
        _say(f"weight files drawn in {seconds:.0f} s")
        _let_go()
    failed = False
    for candidate in candidates:
        own = ["--graphs", graphs, "--work", work, "--output", output, "--candidates", candidate, "--calls", calls, "--child"]
        own += ["--device", GPU]
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.full_size_gpu", "measure", *map(str, own)]
        try:
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=limit)
        except subprocess.SubprocessError as error:
            failed = True
            result["candidates"][candidate] = {"failed": type(error).__name__}
        else:
            result["candidates"][candidate] = json.loads(finished.stdout.splitlines()[-1])
        told = {key: value for key, value in result["candidates"][candidate].items() if key != "samples_ms"}
        _say(f"{candidate} ({time.monotonic() - started:.0f} s): {json.dumps(told)}")
        result["environment"] = environment()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


def floors(path: Path) -> str:
    """Markdown: each stage's median and how many times the floor of the run's GPU it takes, of what has one.

    Candidates in one pass, that is: a floor is of one pass, and generating makes nine. fp32 has none, since only the tensor cores' peaks
    are known; nor have resizing and what is between stages, which are in the total.

    Raises:
        RequestError: it is no result of `measure`, or its GPU's peaks are not known.
    """
    told = json.loads(path.read_text())
    if not isinstance(told, dict) or not isinstance(runs := told.get("runs", [told]), list) or "candidates" not in runs[0]:
        raise RequestError(f"{path}: expected what full_size_gpu measure wrote, got other JSON; give its --output")
    return "\n\n".join(_floors_of(run) for run in runs)


def _floors_of(run: dict[str, Any]) -> str:
    from benchmarks.devices import device_of
    from benchmarks.roofline import against_floor

    config, device = config_of(run["size"]), device_of(run["environment"]["gpu"][0]["name"])
    columns: dict[str, dict[str, Any]] = {}
    for name, one in run["candidates"].items():
        if "p50_ms" not in one or name not in (*OURS, "torch-bf16-one-pass"):
            continue
        form = {"precision": "bf16", "lmm": "float"} if name in TORCH else {"precision": "fp16", "lmm": name.partition("-")[0]}
        columns[name] = against_floor(config, device, {"p50_ms": one["p50_ms"], "stages_ms": one["stages_p50_ms"], **form})
    lines = [
        f"| {device.name}: stage, ms (times its floor) | floor, ms | {' | '.join(columns)} |",
        f"| --- | --- |{' --- |' * len(columns)}",
    ]
    for stage in (*STAGES, "total"):
        rows = [told["total"] if stage == "total" else told["stages"][stage] for told in columns.values()]
        cells = [f"{row['ms']:.1f} ({row['times']:.1f})" for row in rows]
        lines.append(f"| {stage} | {min(row['floor_ms'] for row in rows):.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every candidate was measured, 1 when one failed, 2 for a file that `floors` cannot read."""
    global GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    making = tasks.add_parser("prepare")
    making.add_argument("--size", choices=SIZES, default="7b")
    making.add_argument("--output", type=Path, required=True)
    measuring = tasks.add_parser("measure")
    measuring.add_argument("--graphs", type=Path, required=True)
    measuring.add_argument("--work", type=Path, required=True)
    measuring.add_argument("--output", type=Path, required=True)
    measuring.add_argument("--candidates", nargs="+", choices=(*TORCH, *OURS), default=[REFERENCE, *TORCH[:2], TORCH[3], *OURS])
    measuring.add_argument("--calls", type=int, default=30)
    measuring.add_argument("--limit", type=float, help="seconds that one candidate may take; default: any")
    measuring.add_argument("--device", default=GPU, help="cpu tries the command out at the reduced size")
    measuring.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    showing = tasks.add_parser("profile", help="kernels by time, of what measure left in --work")
    showing.add_argument("--work", type=Path, required=True)
    showing.add_argument("--output", type=Path, required=True)
    showing.add_argument("--device", default=GPU)
    comparing = tasks.add_parser("floors", help="stages of what measure wrote against the least time that the GPU needs")
    comparing.add_argument("--json", type=Path, required=True, help="what measure wrote")
    options = parser.parse_args(arguments)
    GPU = getattr(options, "device", GPU)
    if options.task == "prepare":
        prepare(options.size, options.output)
        return 0
    if options.task == "floors":
        try:
            print(floors(options.json))
        except (OSError, ValueError) as error:
            print(f"full_size_gpu: {error}", file=sys.stderr)
            return 2
        return 0
    if options.task == "profile":
        profile(options.work, options.output)
        return 0
    if not options.child:
        return measure(options.graphs, options.work, options.output, options.candidates, options.calls, options.limit)
    weights = Weights(config_of(json.loads((options.graphs / "size.json").read_text())["size"]), GPU)
    (candidate,) = options.candidates
    run = reference if candidate in TORCH else ours
    print(json.dumps(run(candidate, weights, options.work, options.calls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
