"""What is timed against what: a bundle on an engine, the PyTorch reference in four ways, a plain ONNX export of it, another's detector.

Each is one function from a picture to its mask and score, opened in the process that will be measured; nothing is shared between them
but the pictures. The reference is the code in agvas/, as it stands. It times nothing itself but the stages inside a call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineOptions
from runtime import preprocess
from runtime.errors import RequestError, choose
from runtime.masking import MaskRule

SINGLE_PASS = ("torch-single-pass", "torch-bf16-single-pass")
TORCH = ("torch", "torch-bf16", *SINGLE_PASS)
PLAIN = "plain-onnx"
BUNDLE = "bundle"
DETECTOR = "detector"
KINDS = (BUNDLE, *TORCH, PLAIN, DETECTOR)


@dataclass(frozen=True)
class Candidate:
    """One candidate.

    Attributes:
        kind: of KINDS.
        source: folder of the bundle or of the plain export, the checkpoint ("nano" or a folder), or a detector's .xml.
        engine, inference_precision: of a bundle, as Segmenter takes them.
        chosen: "now" or "before", when engine auto chose them; "" where they were named.
        device: cpu or cuda:N.
        threads: CPU threads of one call, the same for all candidates.
    """

    name: str
    kind: str
    source: str
    engine: str = ""
    inference_precision: str = "graph"
    device: str = "cpu"
    threads: int = 1
    chosen: str = ""

    def __post_init__(self) -> None:
        choose("candidate", self.kind, KINDS)


@dataclass
class Segmented:
    """What a call gives: bool [H, W], the map's maximum, and milliseconds by stage where the candidate tells them: until the host has a
    stage's outputs, and on the device.
    """

    mask: np.ndarray
    score: float
    stages: dict[str, float] = field(default_factory=dict)
    device_stages: dict[str, float] = field(default_factory=dict)


@dataclass
class Opened:
    """A candidate that is ready.

    Attributes:
        bytes: on disk of what it loaded.
        precision: that its encoders compute in.
        lmm: how the language model's weights are stored, of a bundle with integers: int8 or gptq4.
        stream: results of many pictures through overlapped stages; None where the candidate has no such thing.
    """

    segment: Callable[[np.ndarray], Segmented]
    bytes: int
    precision: str
    stream: Callable[[Iterable[np.ndarray]], Iterator[Any]] | None = None
    lmm: str = "float"


def open_candidate(candidate: Candidate) -> Opened:
    """Load it.

    Raises:
        RequestError: the candidate cannot do what was asked for; AgvasError, EngineError, CheckpointError: it cannot be loaded.
    """
    if candidate.kind == BUNDLE:
        return _bundle(candidate)
    if candidate.kind == DETECTOR:
        return _detector(candidate)
    return _plain(candidate) if candidate.kind == PLAIN else _torch(candidate)


def _bundle(candidate: Candidate) -> Opened:
    from runtime import Segmenter

    segmenter = Segmenter(
        candidate.source,
        candidate.engine,
        candidate.device,
        inference_precision=candidate.inference_precision,
        threads=candidate.threads,
        check_hashes=False,  # the parent has
    )

    def segment(image: np.ndarray) -> Segmented:
        result = segmenter(image)
        stages = {name: ms for name, ms in result.timings.items() if name != "total"}
        return Segmented(result.mask, result.score, stages, result.device_timings)

    manifest = segmenter.bundle.manifest
    inside = encoders_compute_in(manifest.precision["pixel_encoder"], EngineOptions(inference_precision=candidate.inference_precision))
    return Opened(segment, segmenter.bundle.bytes, inside, segmenter.stream, manifest.lmm)


def encoders_compute_in(stated: str, options: EngineOptions) -> str:
    """What encoders whose graphs state a precision multiply in: integers stay integers, and only bf16 is ever put in a float's place."""
    return "bf16" if options.in_bf16 and stated != "int8" else stated


def _torch(candidate: Candidate) -> Opened:
    import torch

    from agvas import load
    from agvas.checkpoint import checkpoint_folder

    if candidate.device != "cpu" and not torch.cuda.is_available():
        raise RequestError(
            f"{candidate.kind}: expected a PyTorch that computes on {candidate.device}, got {torch.__version__}, which does not; "
            f"install one for CUDA (pytorch.org), or leave {candidate.kind} out"
        )
    torch.set_num_threads(candidate.threads)
    dtype = torch.bfloat16 if "bf16" in candidate.kind else torch.float32
    model = load(candidate.source, dtype).to(candidate.device)
    settings = model.config
    prompt = model.prompt_encoder.encode()
    if candidate.kind in SINGLE_PASS and prompt.draft is None:
        raise RequestError(f"{candidate.kind}: the checkpoint has no fixed answer to verify in one pass; leave it out")
    clock = ModuleClock(model, candidate.device)

    def segment(image: np.ndarray) -> Segmented:
        clock.clear()
        result = one_pass(image) if candidate.kind in SINGLE_PASS else None
        if result is None:
            reference = model.segment(image)
            result = Segmented(reference.mask, reference.score)
        result.stages = clock.spent()
        return result

    @torch.inference_mode()
    def one_pass(image: np.ndarray) -> Segmented | None:
        """The fixed answer as a draft, verified; None where the model would have said something else."""
        assert prompt.draft is not None
        pixel_image, semantic_image, frame = preprocess.encoder_images(image, settings.preprocessing)
        batch = [torch.from_numpy(array).to(candidate.device, dtype).unsqueeze(0) for array in (pixel_image, semantic_image)]
        output = model(*batch, [prompt], [prompt.draft])
        if output.logits[0].argmax(dim=-1).tolist() != list(prompt.draft):
            return None
        anomaly_map = preprocess.restore(output.maps.anomaly_map[0].float().cpu().numpy(), frame)
        return Segmented(settings.mask_decoder.mask_rule.mask(anomaly_map), float(anomaly_map.max()))

    size = sum(path.stat().st_size for path in checkpoint_folder(candidate.source).iterdir() if path.is_file())
    return Opened(segment, size, "bf16" if dtype == torch.bfloat16 else "fp32")


class ModuleClock:
    """Milliseconds inside the reference's parts, by hooks, so that the reference itself stays as it is.

    The language model's are those of all its steps together. On a GPU its own events mark where parts begin and end, and are read when
    the picture is done: nothing waits for the GPU in between, which would slow the whole.
    """

    PARTS = ("pixel_encoder", "semantic_encoder", "spam", "language", "mask_decoder")

    def __init__(self, model: Any, device: str) -> None:
        self._marks: dict[str, list[Any]] = {}
        self._device = device
        for name in self.PARTS:
            part = getattr(model, name)
            if part is None:
                continue
            # A pass with a given answer calls Qwen2 and its head apart; generation calls the whole.
            for module in (part.model, part.lm_head) if name == "language" else (part,):
                module.register_forward_pre_hook(self._mark(name))
                module.register_forward_hook(self._mark(name))

    def clear(self) -> None:
        """Before a picture."""
        self._marks.clear()

    def spent(self) -> dict[str, float]:
        """After a picture, whose mask is in memory: milliseconds by part."""
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize(self._device)
        return {name: sum(map(self._between, marks[::2], marks[1::2])) for name, marks in self._marks.items()}

    def _mark(self, name: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            self._marks.setdefault(name, []).append(self._now())

        return mark

    def _now(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return (stop - start) * 1e3 if self._device == "cpu" else float(start.elapsed_time(stop))


def _plain(candidate: Candidate) -> Opened:
    """The one graph of bench_plain.py in a session with onnxruntime's defaults but for the number of threads."""
    import onnxruntime

    folder = Path(candidate.source)
    told = json.loads((folder / "plain.json").read_text())
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told["preprocessing"].items()}
    settings = preprocess.Preprocessing(**fields)
    rule = MaskRule(**told["mask_rule"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = candidate.threads
    if candidate.device == "cpu":
        providers: list[Any] = ["CPUExecutionProvider"]
    else:
        providers = [("CUDAExecutionProvider", {"device_id": int(candidate.device.split(":")[1])})]
    session = onnxruntime.InferenceSession(str(folder / "plain.onnx"), options, providers=providers)
    if candidate.device != "cpu" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RequestError(f"{PLAIN}: onnxruntime cannot start CUDA on {candidate.device}; check the driver, or measure on cpu")

    def segment(image: np.ndarray) -> Segmented:
        spent: dict[str, float] = {}
        with _clocked(spent, "preprocess"):
            pixel_image, semantic_image, frame = preprocess.encoder_images(image, settings)
        with _clocked(spent, "graph"):
            feeds = {"pixel_image": pixel_image[None], "semantic_image": semantic_image[None]}
            logits, small = session.run(["logits", "anomaly_map"], feeds)
        with _clocked(spent, "postprocess"):
            anomaly_map = preprocess.restore(small[0], frame)
            mask, score = rule.mask(anomaly_map), float(anomaly_map.max())
            if logits[0].argmax(axis=-1).tolist() != told["draft"]:  # another answer: a plain graph has no way to generate it
                raise RequestError(f"{PLAIN}: the model says something else than the fixed answer on this picture; leave {PLAIN} out")
        return Segmented(mask, score, spent)

    return Opened(segment, sum(path.stat().st_size for path in folder.iterdir()), "fp32")


def _detector(candidate: Candidate) -> Opened:
    from benchmarks.detectors import Detector

    detector = Detector(candidate.source, candidate.threads)

    def segment(image: np.ndarray) -> Segmented:
        spent: dict[str, float] = {}
        with _clocked(spent, "graph"):
            found = detector(image)
        with _clocked(spent, "postprocess"):
            mask = found.mask()
        return Segmented(mask, found.score, spent)

    return Opened(segment, detector.bytes, detector.precision)


@contextmanager
def _clocked(spent: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[name] = (time.perf_counter() - started) * 1e3
