"""Another package's detector beside ours: a model that anomalib 2 exported to OpenVINO, run here without anomalib.

agvas-bench times it (`--against model.xml`), agvas-eval judges it (`--detector model.xml`). It gets a picture as anomalib's own inferencer
gives it, RGB in 0..1 at the picture's size; resizing and normalising are in its graph. What comes out is small and is resized to the
picture. make_detectors.py makes such models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.errors import RequestError

__all__ = ["SUFFIX", "Detected", "Detector", "existing_model"]

SUFFIX = ".xml"
OUTPUTS = ("anomaly_map", "pred_mask", "pred_score")


@dataclass(frozen=True, eq=False)
class Detected:
    """What a detector says of one picture, as small as it comes: [h, w], float32 and bool, and the picture's score.

    A trained detector's numbers are in 0..1, as anomalib normalises them.
    """

    small_map: npt.NDArray[np.float32]
    small_mask: npt.NDArray[np.bool_]
    score: float
    size: tuple[int, int]

    def mask(self) -> npt.NDArray[np.bool_]:
        """At the picture's size, by the nearest of its pixels."""
        return np.asarray(Image.fromarray(self.small_mask).resize(self.size[::-1], Image.Resampling.NEAREST))

    def anomaly_map(self) -> npt.NDArray[np.float32]:
        """At the picture's size, bilinear."""
        return np.asarray(Image.fromarray(self.small_map).resize(self.size[::-1], Image.Resampling.BILINEAR))


class Detector:
    """A detector on OpenVINO's CPU device; a picture, uint8 RGB [H, W, 3], → Detected.

    Attributes:
        path: its .xml; `bytes` on disk, weights beside it included.
        precision: that OpenVINO computes in here, its default for the model and the processor.

    Raises:
        RequestError: no such file, OpenVINO is not installed or cannot read it, or a model of another form.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        self.path = existing_model(Path(path))
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise RequestError(f'{path}: needs OpenVINO, which is not installed; pip install "agvas[openvino]"') from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        try:
            model = openvino.Core().read_model(self.path)
            _check(self.path, model)
            compiled = openvino.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise RequestError(f"{path}: OpenVINO cannot read it ({str(error).strip().splitlines()[-1]}); export it again") from error
        sides = compiled.input(0).partial_shape[2:]
        self._fixed = None if any(side.is_dynamic for side in sides) else tuple(side.get_length() for side in sides)
        self._request = compiled.create_infer_request()
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.bytes = sum(part.stat().st_size for part in (self.path, self.path.with_suffix(".bin")) if part.is_file())

    def __call__(self, image: npt.NDArray[np.uint8]) -> Detected:
        if self._fixed is None or self._fixed == image.shape[:2]:
            resized = image
        else:
            resized = np.asarray(Image.fromarray(image).resize(self._fixed[::-1], Image.Resampling.BILINEAR))
        pixels = np.ascontiguousarray((resized.astype(np.float32) / 255).transpose(2, 0, 1)[None])
        self._request.infer({0: pixels})
        found = {name: self._request.get_tensor(name).data for name in OUTPUTS}
        height, width = found["anomaly_map"].shape[-2:]
        return Detected(
            np.array(found["anomaly_map"], np.float32).reshape(height, width),
            np.array(found["pred_mask"]).reshape(height, width) > 0,
            float(found["pred_score"].item()),
            image.shape[:2],
        )


def existing_model(path: Path) -> Path:
    """The path itself; RequestError where there is no such file, or one of another suffix."""
    if path.suffix != SUFFIX or not path.is_file():
        raise RequestError(f"{path}: expected a detector's OpenVINO model, model.xml; anomalib's export writes it, check the path")
    return path


def _check(path: Path, model: Any) -> None:
    named = {name for output in model.outputs for name in output.get_names()}
    if lacking := [name for name in OUTPUTS if name not in named]:
        raise RequestError(
            f"{path}: expected a detector as anomalib 2 exports it, with outputs {', '.join(OUTPUTS)}, got none called "
            f"{', '.join(lacking)}; export it with anomalib 2"
        )
    if len(model.inputs) != 1 or len(shape := model.inputs[0].get_partial_shape()) != 4 or shape[1] != 3:
        shapes = [str(entry.get_partial_shape()) for entry in model.inputs]
        raise RequestError(f"{path}: expected one input of [batch, 3, height, width], got {', '.join(shapes)}; export it with anomalib 2")
