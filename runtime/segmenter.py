"""Segmenter: a bundle and an engine behind one call. What an integrator holds.

Opening checks the bundle, opens every stage, and for `auto` measures which engine to use; calling is thread-safe. It reads pictures
and judges maps; the chain between is runtime.pipeline's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from engines import ENGINES, INFERENCE_PRECISIONS, EngineFailed, EngineOptions
from runtime.bundle import Bundle
from runtime.errors import RequestError, choose
from runtime.images import PIXEL_LIMIT, as_rgb
from runtime.prompts import DIRECT
from runtime.segmentation import Segmentation
from runtime.selection import Choice, choose_engine
from runtime.verify import open_pipeline


class Segmenter:
    """Segments anomalies in pictures with an exported AG-VAS.

    Args:
        bundle: folder that agvas-export wrote.
        engine: "auto" for the fastest installed one that reproduces the golden masks here (measured once, then remembered),
            or "onnxruntime", "openvino".
        device: "cpu" or "cuda:N". Nothing else is used when it cannot be had.
        inference_precision: "graph" or "bf16" (engine "openvino"); None means "graph" for a named engine and either for `auto`.
        threads: CPU threads of one call; 0 leaves it to the engine.
        threshold: in 0..1; None takes the bundle's.
        pixel_limit: largest picture, in pixels.
        check_hashes: read every file of the bundle to compare its sha256 (about a second per GB).

    Raises:
        BundleError: the bundle is missing, altered or of another version.
        EngineError: the engine or device cannot be had, or cannot run this bundle.
        RequestError: a setting out of range.

    Attributes:
        engine: name of the engine in use.
        inference_precision: its precision.
        choice: why, when `auto` chose; None otherwise.
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
        pixel_limit: int = PIXEL_LIMIT,
        check_hashes: bool = True,
    ) -> None:
        choose("engine", engine, ("auto", *ENGINES))
        if inference_precision is not None:
            choose("inference_precision", inference_precision, INFERENCE_PRECISIONS)
        try:
            options = EngineOptions(device, threads, inference_precision or "graph")
        except ValueError as error:
            raise RequestError(str(error)) from error
        self.bundle = Bundle(Path(bundle), check_hashes=check_hashes)
        self.threshold = self.bundle.manifest.threshold if threshold is None else threshold
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold <= 1:
            raise RequestError(f"threshold: expected a probability in 0..1, got {threshold!r}")
        self.pixel_limit = pixel_limit
        self.device = device
        self.choice: Choice | None = None
        if engine == "auto":
            self._pipeline, self.choice = choose_engine(self.bundle, options, inference_precision)
            self.engine, self.inference_precision = self.choice.engine, self.choice.inference_precision
        else:
            self._pipeline = open_pipeline(self.bundle, engine, options)
            self.engine, self.inference_precision = engine, options.inference_precision

    def __call__(
        self,
        image: str | os.PathLike[str] | Image.Image | np.ndarray,
        instruction: str | None = None,
        mode: str = DIRECT,
    ) -> Segmentation:
        """Segment one picture: a path, a PIL image or uint8 RGB [H, W, 3].

        Args:
            instruction: what to look for, in words; None for the mode's default.
            mode: "direct", or another the checkpoint was trained for.

        Raises:
            ImageError: a picture that cannot be read, see runtime.images.
            RequestError: see PromptEncoder.encode.
            EngineFailed: the engine could not compute, or computed NaN.
        """
        prompt = self._pipeline.prompts.encode(instruction, mode)
        rgb = as_rgb(image, pixel_limit=self.pixel_limit)
        trace = self._pipeline.run(rgb, prompt)
        score = float(trace.anomaly_map.max())
        if not math.isfinite(score):  # NumPy's maximum of anything with a NaN is NaN; a NaN would pass every threshold as OK
            raise EngineFailed(
                f"engine {self.engine} ({self.inference_precision}) computed an anomaly map with NaN or infinity; "
                "agvas-verify tells in which stage it begins. Use another engine, or a bundle of higher precision"
            )
        mask = trace.anomaly_map > np.float32(self.threshold)
        return Segmentation(
            mask=mask,
            anomaly_map=trace.anomaly_map,
            score=score,
            is_anomalous=bool(mask.any()),
            text=self._pipeline.prompts.decode(trace.answer),
            answer_verified=trace.verified,
            anchors_found=trace.anchor_states is not None,
            threshold=self.threshold,
            timings=trace.timings,
            image=rgb,
        )
