"""Which devices can be asked for: the CPU, or a CUDA device that is there. Nothing takes another's place in silence."""

from __future__ import annotations

import torch

KINDS = ("cpu", "cuda")


def check_device(device: str) -> None:
    """ValueError for a device that is none or is not there: before anything is made for it."""
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}; use --device cpu") from error
    if asked.type not in KINDS:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}, which nothing here was written for; use --device cpu")
    if asked.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected a CUDA device, got {device}, and torch {torch.__version__} sees none; use --device cpu")
    count = torch.cuda.device_count()
    if asked.index is not None and asked.index >= count:
        found = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"device: expected one that is there, got {device}, and torch sees {found}; name one of these")
