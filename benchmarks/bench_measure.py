"""One measurement: candidates in processes of their own take turns on the same pictures; times, memory and masks come out of one run.

Batch 1, closed loop: a picture is given when the one before is done. Candidates alternate picture by picture in a rotating order, so
that a machine whose speed drifts drifts for all of them; ratios are taken pair by pair. Masks are kept of the same calls that
are timed and compared with the PyTorch reference's (or the bundle's golden traces where there is no torch).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.bench_candidates import BUNDLE, DETECTOR, PLAIN, TORCH, Candidate
from benchmarks.bench_power import PowerSampler
from benchmarks.bench_statistics import Show, deadline, paired_ratio, percentiles
from benchmarks.ceilings import ceilings
from benchmarks.detectors import SUFFIX, existing_model
from benchmarks.environment import environment
from benchmarks.other_work import counted, other_work
from engines import EngineFailed, EngineOptions
from runtime.bundle import Bundle
from runtime.errors import RequestError, choose
from runtime.parity import Outcome, compare
from runtime.picture_files import find_images
from runtime.selection import REST, choose_engine
from runtime.verify import golden_outcome, trace_count

ROOT = Path(__file__).parents[1]
OURS = "ours"
REFERENCE = "reference"
SIZE = (480, 640)
CHECKED, SAME = 4, 0.98  # golden pictures that tell whether a checkpoint is the bundle's, and the mean mask IoU from which it is
PICTURE_SEED = 500  # after the first of export's pictures, which calibrated or judged other things
_NOT_JUDGED = {"mask_iou_mean": None, "mask_iou_min": None, "flips": None, "judged": 0}  # another model has masks of its own


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        warmups: calls of each candidate before the clock counts.
        queries, seconds: turns of each candidate, and time that ours is busy: both are reached.
        pictures: distinct ones, at most; never more than queries, so that each is seen.
        frames: of the throughput measurement; 0 leaves it out.
    """

    warmups: int
    queries: int
    seconds: float
    pictures: int
    frames: int


# MLPerf inference's single stream asks for 1,024 queries and 60 s.
FULL = Effort(warmups=50, queries=1024, seconds=60.0, pictures=64, frames=512)
QUICK = Effort(warmups=5, queries=40, seconds=0.0, pictures=8, frames=60)


def is_full(effort: Effort, distinct: int) -> bool:
    """Whether figures may be published: no less of anything than in the full setting, on as many pictures that differ."""
    reached = (effort.warmups, effort.queries, effort.seconds, distinct)
    return all(had >= wanted for had, wanted in zip(reached, (FULL.warmups, FULL.queries, FULL.seconds, FULL.pictures), strict=True))


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        engine, device, inference_precision, threads: of the bundles; the device and threads of all candidates.
        against: of TORCH, PLAIN, a bundle's folder, or a detector's .xml.
        checkpoint: that the bundle was exported from; needed for all but bundles, and for masks of pictures that are not golden.
        images: a folder, or None for procedural pictures (golden ones where there is no reference to make masks, or no OpenCV).
        fps: pace of a line, for deadlines.
    """

    bundle: Path
    engine: str
    device: str
    inference_precision: str | None
    threads: int
    against: tuple[str, ...]
    checkpoint: str | None
    images: Path | None
    fps: float | None
    effort: Effort


def measure(request: Request, show: Show) -> dict[str, Any]:
    """Run it.

    Returns:
        agvas-bench's JSON with raw samples, see bench.py.

    Raises:
        RequestError, BundleError, EngineError: what was asked for cannot be had; EngineFailed also for a candidate that fails.
    """
    bundle = Bundle(request.bundle)
    reference = _reference(request, bundle)
    where = torch_device(request) if reference is not None else request.device
    if reference is not None:
        _check_reference(reference, bundle, where, request.threads, show)
    told = environment(request.threads, bundle.id)  # now: what the machine did before the candidates made it busy
    with tempfile.TemporaryDirectory(prefix="agvas-bench-") as work, contextlib.ExitStack() as open_children:
        candidates = _candidates(request, Path(work), show)
        pictures, source = _pictures(request, bundle, reference is not None, Path(work))
        golden = _golden_pictures(bundle, Path(work)) if reference is None and bundle.compared else []
        sampler = open_children.enter_context(PowerSampler(request.device))
        children: dict[str, _Child] = {}
        for done, candidate in enumerate(candidates):
            show("opening candidates", done, len(candidates))
            child = children[candidate.name] = open_children.enter_context(_opened(candidate, Path(work)))
            sampler.watch(child.pid)
            child.first(pictures[0])
        show("opening candidates", len(candidates), len(candidates))
        pids = [child.pid for child in children.values()]
        before = counted(pids)
        samples = _take_turns(children, pictures, request.effort, Path(work), show)
        busy = other_work(before, counted(pids))
        streamed = {name: _streamed(child, pictures, request.effort) for name, child in children.items()}
        for name, child in children.items():
            for index, path in enumerate(golden):
                child.segment(path, Path(work) / f"{name}-golden-{index}.npz")
        truth: list[np.ndarray] | None = _golden_masks(bundle) if bundle.compared else None
        if reference:
            truth = _reference_masks(reference, pictures, samples, Path(work), where, request.threads, show)
        kept = "golden-" if reference is None else ""
        quality = {
            name: _NOT_JUDGED if truth is None or child.candidate.kind == DETECTOR else _quality(Path(work), f"{name}-{kept}", truth)
            for name, child in children.items()
        }
        runs = {
            name: _run(child, samples[name], len(pictures), streamed[name], quality[name], sampler, request.fps)
            for name, child in children.items()
        }
        sizes = sorted({tuple(Image.open(path).size[::-1]) for path in pictures})
        distinct = len({hashlib.sha256(path.read_bytes()).digest() for path in pictures})
    spreads = {
        f"{name}/{OURS}": paired_ratio([s["ms"] for s in taken], [s["ms"] for s in samples[OURS]])
        for name, taken in samples.items()
        if name != OURS
    }
    show("the processor's ceilings", 0, 1)
    best = _ceilings(request) if request.device == "cpu" else None
    show("the processor's ceilings", 1, 1)
    return {
        "runs": runs,
        "ratios": {name: spread["median"] for name, spread in spreads.items()},
        "ratio_spreads": spreads,
        "mask_iou_mean": runs[OURS]["mask_iou_mean"],
        "flips": runs[OURS]["flips"],
        "reference": reference_in_words(reference, bundle, where, request.device),
        "model": bundle.manifest.model,
        "text_tokens": text_tokens(bundle),
        "pictures": {"source": source, "count": distinct, "sizes": sizes[:8]},
        "effort": asdict(request.effort),
        "full": is_full(request.effort, distinct),
        "other_work": busy,
        "ceilings": best,
        "power": sampler.summary(),
        "environment": told,
    }


def _ceilings(request: Request) -> dict[str, Any]:
    """As ceilings.py says, or {"reason"}: what has been measured by now is not lost for want of them."""
    try:
        return ceilings(request.threads, min(1.0, request.effort.seconds))
    except EngineFailed as error:
        return {"reason": str(error)}


def text_tokens(bundle: Bundle) -> int:
    """Tokens of a language pass that are no image's: prompt, default instruction and draft."""
    prompt = bundle.prompt_encoder().encode()
    return len(prompt.prefix + prompt.suffix + (prompt.draft or ())[:-1])


def reference_in_words(reference: str | None, bundle: Bundle, where: str, asked: str) -> str:
    if reference:
        elsewhere = "" if where == asked else f", on the {where}: the PyTorch here does not compute on {asked}"
        return f"torch fp32 with generate, {Path(reference).name}{elsewhere}"
    return "the bundle's golden traces" if bundle.compared else "nothing: the bundle was exported without a comparison"


def _reference(request: Request, bundle: Bundle) -> str | None:
    """The checkpoint that makes reference masks; None where there is none or no torch, and nothing asked for it."""
    checkpoint = request.checkpoint or ("nano" if bundle.manifest.model == "nano" else None)
    asked = [name for name in request.against if name in (*TORCH, PLAIN)]
    has_torch = importlib.util.find_spec("torch") is not None
    if asked and checkpoint is None:
        raise RequestError(f"--against {asked[0]}: which checkpoint was {bundle.folder} exported from? Give --checkpoint DIR")
    if (asked or request.checkpoint) and not has_torch:
        named = f"--against {', '.join(asked)}" if asked else "--checkpoint"
        raise RequestError(f'{named}: needs PyTorch, which is not installed; pip install "agvas[export]", or leave it out')
    return _absolute(checkpoint) if checkpoint and has_torch else None


def torch_device(request: Request) -> str:
    """Where the reference computes the masks that others are judged by: on the device that was asked for, or, beside a PyTorch that cannot
    compute there, on the CPU, where its masks are as good.

    Raises:
        RequestError: PyTorch is itself to be timed on that device.
    """
    if request.device == "cpu":
        return "cpu"
    number = request.device.partition(":")[2]
    # In a process of its own: this one loads no PyTorch.
    asked = f"import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.device_count() > {int(number)})"
    finished = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    version, _, able = finished.stdout.strip().rpartition(" ")
    if able == "True":
        return request.device
    if timed := [name for name in request.against if name in TORCH]:
        raise RequestError(
            f"--against {timed[0]}: expected a PyTorch that computes on {request.device}, got {version or 'one that does not load'}, which "
            f"does not; install one for CUDA (pytorch.org), or leave {', '.join(timed)} out"
        )
    return "cpu"


def _check_reference(checkpoint: str, bundle: Bundle, device: str, threads: int, show: Show) -> None:
    """RequestError where the checkpoint does not draw the bundle's golden masks: one of the same name that was tuned, for instance."""
    if not bundle.compared:  # exported with --parity none: it has no golden pictures to tell by
        return
    golden = _golden_masks(bundle)[:CHECKED]
    show("checking the reference", 0, len(golden))
    with tempfile.TemporaryDirectory(prefix="agvas-bench-") as name:
        work = Path(name)
        with _opened(Candidate(REFERENCE, "torch", checkpoint, device=device, threads=threads), work) as child:
            for index, path in enumerate(_golden_pictures(bundle, work)[:CHECKED]):
                child.segment(path, work / f"{index}.npz")
                show("checking the reference", index + 1, len(golden))
        agreed = float(_quality(work, "", golden)["mask_iou_mean"])
    if agreed < SAME:
        raise RequestError(
            f"--checkpoint {Path(checkpoint).name}: expected the one that {bundle.folder} was exported from, got one with other masks "
            f"(mean IoU {agreed:.3f} on {len(golden)} golden pictures); give --checkpoint DIR"
        )


def _candidates(request: Request, work: Path, show: Show) -> list[Candidate]:
    """Ours first; engines chosen, plain graphs exported."""
    common: dict[str, Any] = {"device": request.device, "threads": request.threads}
    found = [_bundle_candidate(OURS, request.bundle, request, common, show)]
    for asked in dict.fromkeys(request.against):
        checkpoint = _absolute(request.checkpoint or "nano")
        if asked in TORCH:
            found.append(Candidate(asked, asked, checkpoint, **common))
        elif asked == PLAIN:
            show("plain torch.onnx export", 0, 2)
            _run_module("benchmarks.bench_plain", checkpoint, str(work / "plain"))
            show("plain torch.onnx export", 2, 2)
            found.append(Candidate(PLAIN, PLAIN, str(work / "plain"), **common))
        else:
            path, taken = Path(asked).absolute(), {REFERENCE, PLAIN, *TORCH, *(candidate.name for candidate in found)}
            name = path.stem if asked.endswith(SUFFIX) else path.resolve().name
            name = name if name not in taken else f"{name} {len(found)}"
            if asked.endswith(SUFFIX):
                if request.device != "cpu":
                    raise RequestError(f"--against {asked}: a detector runs on the cpu alone, got --device {request.device}; leave it out")
                found.append(Candidate(name, DETECTOR, str(existing_model(path)), "openvino", **common))
                continue
            if not path.is_dir():
                choose("--against", asked, (*TORCH, PLAIN), "or give the folder of a bundle, or a detector's model.xml")
            found.append(_bundle_candidate(name, Path(asked), request, common, show))
    return found


def _absolute(checkpoint: str) -> str:
    """As the processes that measure find it, which do not run where this one does; "nano" is a name."""
    return checkpoint if checkpoint == "nano" else str(Path(checkpoint).absolute())


def _bundle_candidate(name: str, folder: Path, request: Request, common: Mapping[str, Any], show: Show) -> Candidate:
    engine, precision, chosen = request.engine, request.inference_precision or "graph", ""
    if engine == "auto":
        # Chosen here, so that the process that is measured opens one engine and nothing else.
        options = EngineOptions(request.device, request.threads)
        show(f"choosing the engine of {name}", 0, 1)
        _, choice = choose_engine(Bundle(folder), options, request.inference_precision)
        engine, precision, chosen = choice.engine, choice.inference_precision, "before" if choice.remembered else "now"
    return Candidate(name, BUNDLE, str(folder.absolute()), engine, precision, chosen=chosen, **common)


def _pictures(request: Request, bundle: Bundle, has_reference: bool, work: Path) -> tuple[list[Path], str]:
    """Files of the distinct pictures, and what they are."""
    count = min(request.effort.pictures, request.effort.queries)
    if request.images is not None:
        # Absolute, since the processes that measure do not run where this one does.
        return [path.absolute() for path in find_images([str(request.images)])[:count]], request.images.resolve().name
    if not bundle.compared and not has_reference:
        raise RequestError(f"--images: {bundle.folder} has no golden pictures (--parity none); give pictures, or --checkpoint DIR")
    if not has_reference or importlib.util.find_spec("cv2") is None:
        return _golden_pictures(bundle, work)[:count], "golden"
    from export.pictures import FIRST_SEED, procedural_picture

    folder = work / "pictures"
    folder.mkdir()
    found = []
    for index in range(count):
        found.append(folder / f"{index:04}.png")
        Image.fromarray(procedural_picture(FIRST_SEED + PICTURE_SEED + index, *SIZE)).save(found[-1])
    return found, "procedural"


def _golden_pictures(bundle: Bundle, work: Path) -> list[Path]:
    folder = work / "golden"
    folder.mkdir(exist_ok=True)
    golden, found = bundle.golden(), []
    for index in range(trace_count(golden)):
        found.append(folder / f"{index:04}.png")
        Image.fromarray(golden[f"{index}.image"]).save(found[-1])
    return found


class _Child:
    """A candidate's process."""

    def __init__(self, candidate: Candidate, process: subprocess.Popen[str], began: float, errors: Path) -> None:
        self.candidate = candidate
        self.pid = process.pid
        self.first_result_ms = 0.0
        self._process, self._began, self._errors = process, began, errors
        self.told = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        return self._answer()

    def segment(self, path: Path, keep: Path | None = None) -> dict[str, Any]:
        return self.ask({"image": str(path), "keep": str(keep) if keep else None})

    def first(self, path: Path) -> None:
        """The first picture, timed from the start of the process."""
        self.segment(path)
        self.first_result_ms = (time.perf_counter() - self._began) * 1e3

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._errors.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise EngineFailed(f"candidate {self.candidate.name} ended ({self._process.poll()}): {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"candidate {self.candidate.name}: {answer['error']}")
        return answer


@contextlib.contextmanager
def _opened(candidate: Candidate, work: Path) -> Iterator[_Child]:
    errors = work / f"{candidate.name}.stderr"
    command = [sys.executable, "-m", "benchmarks.bench_child", json.dumps(asdict(candidate))]
    began = time.perf_counter()
    with open(errors, "w") as file, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT
    ) as process:
        try:
            yield _Child(candidate, process, began, errors)
        finally:
            process.kill()


def _take_turns(
    children: Mapping[str, _Child], pictures: Sequence[Path], effort: Effort, work: Path, show: Show
) -> dict[str, list[dict[str, Any]]]:
    """Answers of every child, query by query; the first mask of each picture is kept."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    names, busy, turn = list(children), 0.0, -effort.warmups
    while turn < effort.queries or busy < effort.seconds:
        path = pictures[turn % len(pictures)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(REST)
            keep = work / f"{name}-{turn}.npz" if 0 <= turn < len(pictures) else None
            answer = children[name].segment(path, keep)
            if turn >= 0:
                samples[name].append(answer)
                busy += answer["ms"] / 1e3 if name == OURS else 0.0
        turn += 1
        if turn > 0:
            missing = (effort.seconds - busy) / (busy / turn)
            show("measuring", turn, max(effort.queries, turn + round(max(0.0, missing))))
        else:
            show("warm-up", effort.warmups + turn, effort.warmups)
    return samples


def _streamed(child: _Child, pictures: Sequence[Path], effort: Effort) -> float | None:
    """Frames per second through overlapped stages; None where the candidate has no stream."""
    if not (effort.frames and child.told["streams"]):
        return None
    paths = [str(path) for path in pictures[:16]]
    child.ask({"stream": paths, "count": 8})
    return float(child.ask({"stream": paths, "count": effort.frames})["fps"])


def _reference_masks(
    checkpoint: str, pictures: Sequence[Path], samples: Mapping[str, Any], work: Path, device: str, threads: int, show: Show
) -> list[np.ndarray]:
    """Masks of torch fp32 with generate: of the candidate where it took part, else of a process for this alone."""
    if "torch" in samples:
        return [_mask(work / f"torch-{index}.npz") for index in range(len(pictures))]
    found = []
    with _opened(Candidate(REFERENCE, "torch", checkpoint, device=device, threads=threads), work) as child:
        for index, path in enumerate(pictures):
            child.segment(path, work / f"{REFERENCE}-{index}.npz")
            found.append(_mask(work / f"{REFERENCE}-{index}.npz"))
            show("reference masks", index + 1, len(pictures))
    return found


def _golden_masks(bundle: Bundle) -> list[np.ndarray]:
    golden = bundle.golden()
    return [golden_outcome(golden, index, bundle.manifest.mask_rule).mask for index in range(trace_count(golden))]


def _mask(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return np.asarray(file["mask"])


def _quality(work: Path, prefix: str, truth: Sequence[np.ndarray]) -> dict[str, Any]:
    """Agreement of a candidate's kept masks with the reference's, as export's parity counts it."""
    ours = [_outcome(_mask(work / f"{prefix}{index}.npz")) for index in range(len(truth))]
    parity = compare(ours, [_outcome(mask) for mask in truth])
    return {"mask_iou_mean": parity.mask_iou_mean, "mask_iou_min": parity.mask_iou_min, "flips": parity.flips, "judged": len(truth)}


def _outcome(mask: np.ndarray) -> Outcome:
    return Outcome(mask, mask.astype(np.float32), None, ())


def _run(
    child: _Child,
    taken: Sequence[dict[str, Any]],
    pictures: int,
    fps: float | None,
    quality: Mapping[str, Any],
    sampler: PowerSampler,
    pace: float | None,
) -> dict[str, Any]:
    """One candidate's entry of "runs"; "unsteady" counts pictures whose mask was not the same every time."""
    times = [sample["ms"] for sample in taken]
    stages, device_stages = (
        # A picture whose answer lacks its anchors goes through fewer stages than others.
        {name: [round(sample[kind].get(name, 0.0), 4) for sample in taken] for name in dict.fromkeys(n for s in taken for n in s[kind])}
        for kind in ("stages", "device_stages")
    )
    gaps = [sample["ms"] - sum(sample["stages"].values()) for sample in taken]
    masks: dict[int, set[int]] = {}
    for index, sample in enumerate(taken):
        masks.setdefault(index % pictures, set()).add(sample["checksum"])
    candidate = child.candidate
    memory = sampler.device_memory(child.pid)
    entry = {
        **percentiles(times),
        "stages_ms": {name: round(float(np.median(values)), 4) for name, values in stages.items()},
        "device_stages_ms": {name: round(float(np.median(values)), 4) for name, values in device_stages.items()},
        "gap_ms": round(float(np.median(gaps)), 4),
        "queries": len(times),
        "peak_rss_bytes": taken[-1]["peak_rss_bytes"],
        "device_memory_bytes": memory,
        "bytes": child.told["bytes"],
        "load_ms": round(child.told["load_ms"], 1),
        "first_result_ms": round(child.first_result_ms, 1),
        "disk_ms": round(float(np.median([sample["disk_ms"] for sample in taken])), 4),
        "decode_ms": round(float(np.median([sample["decode_ms"] for sample in taken])), 4),
        "stream_fps": None if fps is None else round(fps, 3),
        "kind": candidate.kind,
        "engine": candidate.engine or ("onnxruntime" if candidate.kind == PLAIN else "torch"),
        "inference_precision": candidate.inference_precision,
        "chosen": candidate.chosen,
        "precision": child.told["precision"],
        "lmm": child.told["lmm"],
        "device": candidate.device,
        **quality,
        "unsteady": sum(len(found) > 1 for found in masks.values()),
        "samples": {
            "ms": [round(value, 4) for value in times],
            "stages_ms": stages,
            "device_stages_ms": device_stages,
        },
    }
    if memory is None:
        entry["device_memory_reason"] = sampler.memory_reason or "NVML does not list this process"
    if pace is not None:
        entry["deadline"] = deadline(times, pace)
    return entry


def _run_module(*arguments: str) -> None:
    finished = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineFailed(f"{arguments[0]} failed: {last}")
