"""The package's version, for records and `--version`: the installed one's, or what pyproject.toml says where it runs from its sources."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

PACKAGE = "agvas"
UNKNOWN = "unknown"  # of a copy of the folder alone


def package_version() -> str:
    """As in "0.1.0"; "unknown" where nothing tells it."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        pass
    try:
        text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return UNKNOWN
    found = re.search(r'^version = "([^"]+)"$', text, re.MULTILINE)
    ours = f'name = "{PACKAGE}"' in text  # and not that of a project into which runtime/ was copied
    return found[1] if found and ours else UNKNOWN
