"""Segmenter: a bundle and an engine behind one call. What an integrator holds.

Opening checks the bundle, opens every stage, and for `auto` measures which engine to use; calling is thread-safe. It reads pictures
and judges maps; the chain between is runtime.pipeline's.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from engines import ENGINES, INFERENCE_PRECISIONS, EngineError, EngineOptions
from runtime.bundle import Bundle
from runtime.deadline import Step, Worker, calling_back, check_deadline
from runtime.errors import AgvasError, ImageError, RequestError, check_whole, choose
from runtime.images import DIM, PIXEL_LIMIT, Picture, rgb_and_words, tell
from runtime.inspection import Inspection, check_callback
from runtime.one_at_a_time import give_back
from runtime.pipeline import Chain, Pipeline
from runtime.preprocess import lost_detail, one_tone
from runtime.prompts import DIRECT, Prompt
from runtime.region import as_region, read_region
from runtime.segmentation import Segmentation
from runtime.selection import Choice, choose_engine
from runtime.stream import DEPTH, Streamed, in_steps
from runtime.tiling import TiledPipeline, Tiling
from runtime.verify import open_pipeline


@dataclass(frozen=True, eq=False)
class _Read:
    """A picture as uint8 RGB [H, W, 3] and as the encoders take it, what may have spoiled it in words, and what reading it took."""

    rgb: np.ndarray
    prepared: Any
    warnings: tuple[str, ...]
    milliseconds: float


class Segmenter:
    """Segments anomalies in pictures with an exported AG-VAS.

    Its engines go with `close()`, at the end of a `with`, or with the object. A bundle that failed export's comparison with the reference,
    or was never compared, is told by one warning.

    Args:
        bundle: folder that agvas-export wrote.
        engine: "auto" for the fastest installed one that reproduces the golden masks here (measured once, then remembered),
            or "onnxruntime", "openvino", or on a GPU "tensorrt", "tensorrt-rtx" where agvas-build has built for it.
        device: "cpu" or "cuda:N". Nothing else is used when it cannot be had.
        inference_precision: "graph", "bf16" (engine "openvino"), "int8" (engines "onnxruntime" and "openvino", where the language
            model's weights are integers) or "bf16+int8" (both, "openvino"), see engines.EngineOptions; None means "graph" for a named
            engine and any for `auto`.
        threads: CPU threads of one call; 0 leaves it to the engine.
        threshold: a picture is anomalous where its map exceeds it, 0..1; None takes the bundle's.
        relative_threshold: in an anomalous picture, the share of the map's maximum above which a pixel belongs to the mask, 0..1 (1: above
            `threshold`); None takes the bundle's. See runtime.masking.MaskRule.
        tile: side in pixels of the square tiles that larger pictures are seen in, each by an inference of its own; None sees every picture
            whole, at the model's size. See runtime.tiling.
        tile_overlap: of neighbouring tiles at least, pixels; None for an eighth of `tile`.
        region: what a fixed camera's pictures are judged in alone, as Segmentation.within does: bool [H, W], or uint8 of 0 and 1 or 255,
            of the pictures' size, or the path of such a picture; None for all of them. Tiles that do not meet it are not computed.
        pixel_limit: largest picture, in pixels.
        check_hashes: read every file of the bundle to compare its sha256 (about a second per GB).
        low_memory: one stage in memory at a time, for models whose stages together do not fit. Every picture opens every stage again;
            needs a named engine.
        remeasure: let `auto` measure the engines now, whatever it has found in an earlier, perhaps busier, hour.

    Raises:
        BundleError: the bundle is missing, altered or of another version.
        EngineError: the engine or device cannot be had, or cannot run this bundle.
        RequestError: a setting out of range.
        ImageError: a region's file that is no picture.

    Attributes:
        rule: how masks are cut from maps.
        engine: name of the engine in use.
        inference_precision: its precision.
        choice: why, when `auto` chose; None otherwise.
        tiling: how pictures are cut; None where they are not.
        region: bool [H, W]; None where pictures are judged whole.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        engine: str = "auto",
        device: str = "cpu",
        *,
        inference_precision: str | None = None,
        threads: int = 0,
        threshold: float | None = None,
        relative_threshold: float | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        region: np.ndarray | str | os.PathLike[str] | None = None,
        pixel_limit: int = PIXEL_LIMIT,
        check_hashes: bool = True,
        low_memory: bool = False,
        remeasure: bool = False,
    ) -> None:
        if not isinstance(bundle, (str, os.PathLike)) or not os.fspath(bundle):
            raise RequestError(f"bundle: expected the folder that agvas-export wrote, got {bundle!r}")
        choose("engine", engine, ("auto", *ENGINES))
        if not isinstance(device, str):
            raise RequestError(f"device: expected cpu or cuda:N (cuda:0 is the first GPU), got {device!r}")
        check_whole("threads", threads)
        if threads > (processors := os.cpu_count() or threads):
            warnings.warn(f"threads: {threads} on {processors} processors wait for one another; 0 leaves it to the engine", stacklevel=2)
        check_whole("pixel_limit", pixel_limit)
        for name, given in (("check_hashes", check_hashes), ("low_memory", low_memory), ("remeasure", remeasure)):
            if not isinstance(given, (bool, np.bool_)):  # "no" would be taken for yes
                raise RequestError(f"{name}: expected True or False, got {given!r}")
        if inference_precision is not None:
            choose("inference_precision", inference_precision, INFERENCE_PRECISIONS)
        try:
            options = EngineOptions(device, threads, inference_precision or "graph", low_memory)
        except ValueError as error:
            raise RequestError(str(error)) from error
        if low_memory and engine == "auto":
            raise RequestError("low_memory: expected a named engine, got auto, which would hold all of them to compare; name onnxruntime")
        if remeasure and engine != "auto":
            raise RequestError(f"remeasure: expected engine auto, got {engine}, which is taken as it is; leave one of them out")
        if pixel_limit < 1:
            raise RequestError(f"pixel_limit: expected at least 1, got {pixel_limit}")
        if tile is None and tile_overlap is not None:
            raise RequestError("tile_overlap: expected tile beside it, got none; say how large the tiles are")
        self.tiling = None if tile is None else Tiling(tile, tile_overlap)
        self.region = None if region is None else read_region(region) if isinstance(region, (str, os.PathLike)) else as_region(region)
        self.bundle = Bundle(Path(bundle), check_hashes=check_hashes)
        if (doubt := self.bundle.doubt) is not None:
            warnings.warn(doubt, stacklevel=2)
        self.rule = self.bundle.manifest.mask_rule.changed(threshold, relative_threshold)
        self.pixel_limit = pixel_limit
        self.device = device
        self.choice: Choice | None = None
        self._pipeline: Pipeline | None
        if engine == "auto":
            self._pipeline, self.choice = choose_engine(self.bundle, options, inference_precision, remeasure=remeasure)
            self.engine, self.inference_precision = self.choice.engine, self.choice.inference_precision
        else:
            self._pipeline = open_pipeline(self.bundle, engine, options)
            self.engine, self.inference_precision = engine, options.inference_precision
        self._chain: Chain | None = self._pipeline if self.tiling is None else TiledPipeline(self._pipeline, self.tiling, self.region)
        self._worker = Worker()

    def close(self) -> None:
        """Let the engines go, and give their memory back; closing twice does nothing more.

        Calls that run in other threads, inspections and streams that were begun before keep the engines until they end. The engines'
        libraries keep some memory for themselves until the process ends.
        """
        self._pipeline = self._chain = None
        self._worker = Worker()  # the thread of the one before ends
        give_back()

    def __repr__(self) -> str:
        model, (threshold, relative) = self.bundle.manifest.model, (self.rule.threshold, self.rule.relative_threshold)
        return (
            f"<Segmenter of {self.bundle.folder} ({model}, {self.bundle.id[:12]}…) on {self.engine} ({self.inference_precision}), device "
            f"{self.device}, threshold {threshold:g}, relative {relative:g}{'' if self._chain is not None else ', closed'}>"
        )

    def __reduce__(self) -> str:
        raise RequestError("segmenter: its engines belong to this process and cannot be sent to another or copied; open one there")

    def __enter__(self) -> Segmenter:
        self._opened()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _opened(self) -> Chain:
        chain = self._chain
        if chain is None:
            raise RequestError("segmenter: expected an open one, got one whose engines close() has let go; make a new Segmenter")
        return chain

    def __call__(
        self,
        image: Picture,
        instruction: str | None = None,
        mode: str = DIRECT,
        *,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], object] | None = None,
        deadline: float | None = None,
    ) -> Segmentation:
        """Segment one picture: a path, a picture file's content as bytes, a PIL image or uint8 RGB [H, W, 3].

        Args:
            instruction: what to look for, in words; None for the mode's default.
            mode: "direct", or another the checkpoint was trained for.
            normal_state: for mode describe-then-segment-plus, a sentence on what a normal object looks like.
            max_new_tokens: longest answer; None for the checkpoint's limit, which is also the most.
            on_text: called with each new piece of the answer as the model writes it: whole letters, anchors written out; joined, the
                pieces are the result's text. What it raises ends the call and reaches the caller.
            deadline: seconds from now until a result or an error is there; None waits as long as it takes. Such calls take turns in a
                thread of the segmenter's, where `on_text` is called, too; an array must stay as it is until that thread is done with it,
                which after a missed deadline it may not be: give a copy of a buffer that is written again.

        Raises:
            ImageError: a picture that cannot be read, see runtime.images, or is not of the region's size.
            RequestError: see PromptEncoder.encode; `on_text` for a picture in tiles; no such deadline; the segmenter is closed.
            EngineFailed: the engine could not compute, or computed NaN or a map outside 0..1.
            DeadlineMissed: it took longer than `deadline`.
        """
        prompt = self.request(instruction, mode, normal_state=normal_state, max_new_tokens=max_new_tokens)  # before the picture is read
        check_callback(on_text)
        if deadline is None:
            return self.inspect(image).answer(prompt, on_text)
        seconds, chain = check_deadline(deadline), self._opened()

        def work(step: Step) -> Segmentation:
            step("reading and resizing the picture")
            read = self._read(chain, image)
            step("looking at the picture")
            inspection = self._look(chain, read)
            step("answering")
            if on_text is None:
                return inspection.answer(prompt)

            def tell_in_time(piece: str) -> None:
                with calling_back():
                    on_text(piece)

            return inspection.answer(prompt, tell_in_time)

        return self._worker.call(work, seconds)

    def inspect(self, image: Picture) -> Inspection:
        """Look at one picture, to ask about it more than once: `inspection.ask(...)` takes what a call takes but the image.

        Raises:
            ImageError: a picture that cannot be read, or is not of the region's size.
            RequestError: the segmenter is closed.
            EngineFailed: the engine could not compute.
        """
        chain = self._opened()
        return self._look(chain, self._read(chain, image))

    def _read(self, chain: Chain, image: Picture) -> _Read:
        started = time.perf_counter()
        rgb, words = rgb_and_words(image, pixel_limit=self.pixel_limit)
        if self.region is not None and self.region.shape != rgb.shape[:2]:  # before seconds are spent on it
            own, wanted = (f"{width} × {height}" for height, width in (rgb.shape[:2], self.region.shape))
            named = f"{os.fspath(image)}: " if isinstance(image, (str, os.PathLike)) else ""
            raise ImageError(f"{named}the region is {wanted} pixels, this picture {own}; give a region of the pictures' size")
        if DIM not in words:  # which has another cause and remedy
            words += one_tone(rgb, self.region)
        milliseconds = (time.perf_counter() - started) * 1e3
        prepared = chain.prepare(rgb)
        words += lost_detail(prepared.frame)
        tell(words)
        return _Read(rgb, prepared, words, milliseconds)

    def _look(self, chain: Chain, read: _Read) -> Inspection:
        return Inspection(
            chain,
            read.rgb,
            chain.look(read.prepared),
            self.rule,
            f"{self.engine} ({self.inference_precision})",
            region=self.region,
            warnings=read.warnings,
            read_milliseconds=read.milliseconds,
        )

    def stream(
        self,
        images: Iterable[Picture],
        instruction: str | None = None,
        mode: str = DIRECT,
        *,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
        depth: int = DEPTH,
    ) -> Iterator[Streamed]:
        """Segment many pictures with the steps of neighbours overlapped: more pictures a second than one call after the other where a step
        leaves the processor idle, as reading files or a GPU does; where every step keeps all cores busy it gains nothing.

        Results come in the order of the pictures, each as soon as it is there. A picture that cannot be read or segmented, or for which
        memory runs out, gives its error in its place (`Streamed.error`) and the stream goes on; an error of `images` itself is raised after
        the results before it. Arrays, buffers and PIL images are copied before the next one is asked for: a camera may write its one buffer
        again. Close the iterator (or use it up) to free its threads; `images` is closed with it where it is a generator, and left as it is
        where it is an object of yours.

        Args:
            images: in any form a call takes; read ahead, in another thread.
            depth: pictures on their way at most, at least 1. The sum of their steps' times is a picture's latency.
            instruction, mode, normal_state, max_new_tokens: as in a call, the same for all.

        Raises:
            RequestError: one picture in place of several, or nothing to go through; no whole number of pictures on their way; see
                PromptEncoder.encode; the segmenter is closed. At once, before a picture is read.
        """
        one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
        if isinstance(images, one) or (isinstance(images, np.ndarray) and images.ndim < 4):
            # Iterated, one frame would be judged row by row, and a path letter by letter.
            raise RequestError(
                f"images: expected several pictures, got one {type(images).__name__}; put it into a list, or list() a stack of grey frames"
            )
        if not hasattr(images, "__iter__") and not hasattr(images, "__getitem__"):  # iter() itself might begin to read
            raise RequestError(f"images: expected several pictures, got {images!r}; give a list, a generator or an iterable of them")
        check_whole("depth", depth)
        if depth < 1:
            raise RequestError(f"depth: expected 1 or more pictures on their way, got {depth}; {DEPTH} keeps every step busy")
        prompt = self.request(instruction, mode, normal_state=normal_state, max_new_tokens=max_new_tokens)
        chain = self._opened()

        def read(image: Picture | _Read) -> _Read:
            return image if isinstance(image, _Read) else self._read(chain, image)

        def look(read: _Read) -> Inspection:
            return self._look(chain, read)

        def answer(inspection: Inspection) -> Segmentation:
            return inspection.answer(prompt)

        def own(image: Picture) -> Picture | _Read:
            if isinstance(image, Image.Image):  # which may be drawn into, look into a buffer, or be at its next page
                return self._read(chain, image)
            if isinstance(image, np.ndarray):
                return image.copy()
            return bytes(image) if isinstance(image, (bytearray, memoryview)) else image

        def results() -> Iterator[Streamed]:
            outcomes = in_steps(images, (read, look, answer), (AgvasError, EngineError, MemoryError), depth, own)
            with closing(outcomes):
                for index, (result, error) in enumerate(outcomes):
                    yield Streamed(index, result, error)

        return results()

    def request(
        self,
        instruction: str | None = None,
        mode: str = DIRECT,
        *,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """A request checked and encoded, for `Inspection.answer`; with many pictures, once for all of them.

        Raises:
            RequestError: see PromptEncoder.encode; the segmenter is closed.
        """
        return self._opened().prompts.encode(instruction, mode, normal_state, max_new_tokens)
