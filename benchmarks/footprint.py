"""What the runtime costs a target: megabytes and seconds to import before it runs, and each bundle's stages in bytes and memory.

    python -m benchmarks.footprint --output benchmarks/results/footprint.json
    python -m benchmarks.footprint --output footprint_stages.json BUNDLE...

Without bundles it makes a fresh virtual environment per engine from this checkout and measures in it; needs a package index. With bundles
it measures each stage of theirs in a process of its own, on every engine that is installed and can run it.
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

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.other_work import counted, other_work
from engines import EngineError
from runtime.bundle import Bundle
from runtime.footprint import footprints
from runtime.selection import candidates_for

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
        before = counted(())
        runs = [json.loads(subprocess.run([python, "-c", PROBE], check=True, capture_output=True, cwd=folder).stdout) for _ in range(7)]
        busy = other_work(before, counted(()))
        return {
            "megabytes": round((_bytes(Path(folder)) - empty) / 1e6, 1),
            "import_seconds_median": round(statistics.median(run["seconds"] for run in runs), 3),
            "other_work": busy,
            "heavy_installed": runs[0]["heavy_installed"],
        }


def measure_bundles(folders: list[Path]) -> list[dict[str, Any]]:
    """Bytes and memory of every bundle's stages by engine and inference precision (runtime.footprint)."""
    rows = []
    for bundle in map(Bundle, folders):
        for engine, precision in tqdm(candidates_for(bundle, "cpu"), desc=bundle.folder.name, unit="engine"):
            row = {"precision": bundle.manifest.precision, "lmm": bundle.manifest.lmm, "engine": engine, "inference_precision": precision}
            try:
                rows.append(row | {"stages": footprints(bundle, engine, precision)})
            except EngineError as error:
                rows.append(row | {"error": str(error)})
    return rows


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    repository = Path(__file__).parent.parent
    result: dict[str, Any] = {"environment": environment()}
    if options.bundles:
        result["bundles"] = measure_bundles(options.bundles)
    else:
        result |= {extra: measure(extra, repository) for extra in EXTRAS}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
