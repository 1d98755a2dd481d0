"""MATLAB files, read by scipy, the one file that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agvas.training.sources.errors import DatasetError


def read_matlab(path: Path) -> dict[str, Any]:
    """Variables by name; structs as objects whose attributes are their fields, single cells unpacked."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        said = f'{path}: MATLAB files need scipy, which is not installed; pip install "agvas[train]"'
        raise ModuleNotFoundError(said, name="scipy") from error
    try:
        return dict(loadmat(path, squeeze_me=True, struct_as_record=False))
    except Exception as error:  # scipy raises ValueError, TypeError, zlib.error and more on damaged files
        found = str(error) or type(error).__name__
        raise DatasetError(path, None, "a MATLAB file (version 7 or older)", found, "download it again") from error
