"""What a bundle costs in memory: bytes on disk and peak resident memory, by stage or as a whole.

A process tells only the peak of all it ever did, so each measurement is a process of its own, which opens one stage, runs it once and
says what that took. Stages are fed zeros of the sizes that a picture gives them: memory does not depend on values.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineFailed, EngineOptions, open_engine
from runtime.bundle import Bundle
from runtime.contract import AXIS_NAMES, STAGES
from runtime.verify import open_pipeline, peak_rss_bytes, stage_options

WHOLE = "whole"
ROWS = 8  # of the language stage: the answer's


def footprints(bundle: Bundle, engine: str, precision: str = "graph") -> dict[str, dict[str, Any]]:
    """Bytes on disk and memory of every stage, each alone, and of the whole chain ("whole").

    Returns:
        By stage: "bytes", "peak_rss_bytes" of a process that ran it once, "idle_rss_bytes" of that process before it opened the stage
        (Python and the engine's library). The last two are None where the system does not tell.

    Raises:
        EngineFailed: a stage could not be run.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage in (*STAGES, WHOLE):
        size = bundle.bytes if stage == WHOLE else sum(path.stat().st_size for path in (bundle.folder / stage).iterdir())
        found[stage] = {"bytes": size, **_measured(bundle.folder, stage, engine, precision)}
    return found


def _measured(folder: Path, stage: str, engine: str, precision: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "runtime.footprint", str(folder.absolute()), stage, engine, precision]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineFailed(f"{engine} could not run {stage} in a process of its own: {last}")
    told: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return told


def _run(folder: str, stage: str, engine: str, precision: str) -> None:
    """Run one stage, or the whole chain, once in this process."""
    bundle = Bundle(folder, check_hashes=False)
    options = EngineOptions(inference_precision=precision)
    _import(engine)
    idle = peak_rss_bytes()
    if stage == WHOLE:
        pipeline = open_pipeline(bundle, engine, options)
        pipeline.run(bundle.golden()["0.image"], pipeline.prompts.encode())
    else:
        spec = STAGES[stage].fixed({"B": 1}, AXIS_NAMES)
        open_engine(bundle.graph(stage), spec, engine, stage_options(stage, options)).run(_zeros(stage, bundle.manifest.sizes))
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), "idle_rss_bytes": idle}))


def _import(engine: str) -> None:
    """Load the engine's library, so that it counts as idle memory."""
    if engine == "openvino":
        import engines.openvino  # noqa: F401
    elif engine == "onnxruntime":
        import engines.onnxruntime  # noqa: F401


def _zeros(stage: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    axes = sizes | {"B": 1, "N": 2 * sizes["T"] + 64, "K": 0, "R": ROWS}
    return {
        spec.name: np.zeros([axis if isinstance(axis, int) else axes[axis] for axis in spec.shape], spec.dtype)
        for spec in STAGES[stage].inputs
    }


if __name__ == "__main__":
    _run(*sys.argv[1:])
