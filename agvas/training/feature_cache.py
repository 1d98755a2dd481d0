"""What frozen encoders said of an image, kept on disk: they say the same at every step, and cost most of it.

Keyed by the encoders' weights, the type they compute in and the preprocessed images themselves, so that neither another checkpoint or
precision nor an augmented picture can meet a stale entry. It pays where the same pictures come again unchanged; random crops never do. An
entry of the 7B model is 9 MB in bf16 (256 x 64 x 64 pixel embeddings, 729 x 1152 and 729 x 3584 features).
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agvas.model import AGVAS, Features
from agvas.training.batch import Batch
from agvas.writing import disk_errors


class FeatureCache:
    """Features of images by content, under `folder`; processes may share it.

    Raises:
        ValueError: encoders that are being trained.
    """

    def __init__(self, folder: Path, model: AGVAS) -> None:
        if any(parameter.requires_grad for part in (model.pixel_encoder, model.semantic_encoder) for parameter in part.parameters()):
            raise ValueError("the feature cache needs frozen encoders, these are trained; leave the cache out")
        self.folder = folder / fingerprint(model.pixel_encoder, model.semantic_encoder)

    @torch.no_grad()
    def features(self, model: AGVAS, batch: Batch) -> Features:
        """Of the batch's images, as model.encode gives them; what was not there yet is computed and kept."""
        kind = batch.pixel_image.device.type
        computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else batch.pixel_image.dtype
        folder = self.folder / str(computed_in).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{_hash(p, s)}.safetensors" for p, s in zip(batch.pixel_image, batch.semantic_image)]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            for i, parts in zip(missing, zip(*model.encode(batch.pixel_image[missing], batch.semantic_image[missing]))):
                partial = paths[i].with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
                with disk_errors(partial):
                    save_file({name: part.contiguous().clone() for name, part in zip(Features._fields, parts)}, partial)
                os.replace(partial, paths[i])
        entries = [load_file(path, device=str(batch.pixel_image.device)) for path in paths]
        return Features(*(torch.stack([entry[name] for entry in entries]) for name in Features._fields))


def fingerprint(*parts: nn.Module) -> str:
    """Of all weights and buffers, by name."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _hash(*images: Tensor) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(_bytes(image))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
