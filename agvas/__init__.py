"""AG-VAS in PyTorch: model, checkpoints and training. The truth that exported graphs are compared with.

Names are looked up on first use: a command line below this package prints its help without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agvas.checkpoint import CheckpointError, load, save
    from agvas.config import AGVASConfig
    from agvas.model import AGVAS, Segmented

_HOMES = {
    "AGVAS": "agvas.model",
    "AGVASConfig": "agvas.config",
    "CheckpointError": "agvas.checkpoint",
    "Segmented": "agvas.model",
    "load": "agvas.checkpoint",
    "save": "agvas.checkpoint",
}

__all__ = ["AGVAS", "AGVASConfig", "CheckpointError", "Segmented", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agvas' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
