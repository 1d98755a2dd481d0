"""What the runtime costs a target before it runs: seconds to import, and megabytes of an environment that can only run.

    python -m benchmarks.footprint --output benchmarks/results/footprint.json

Makes a fresh virtual environment per engine from this checkout and measures in it; needs a package index.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

EXTRAS = ("cpu", "openvino")
HEAVY = ("torch", "transformers", "onnx")
PROBE = f"""
import json, sys, time
started = time.perf_counter()
import runtime
seconds = time.perf_counter() - started
import importlib.util
present = [name for name in {HEAVY!r} if importlib.util.find_spec(name)]
print(json.dumps({{"seconds": seconds, "heavy_installed": present}}))
"""


def measure(extra: str, repository: Path) -> dict[str, Any]:
    """Size and import time of an environment with `agvas[extra]` and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        empty = _bytes(Path(folder))
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"{repository}[{extra}]"], check=True)
        runs = [json.loads(subprocess.run([python, "-c", PROBE], check=True, capture_output=True, cwd=folder).stdout) for _ in range(7)]
        return {
            "megabytes": round((_bytes(Path(folder)) - empty) / 1e6, 1),
            "import_seconds_median": round(statistics.median(run["seconds"] for run in runs), 3),
            "heavy_installed": runs[0]["heavy_installed"],
        }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    repository = Path(__file__).parent.parent
    result = {extra: measure(extra, repository) for extra in EXTRAS} | {"environment": environment()}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
