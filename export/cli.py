"""agvas-export: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from agvas.interruption import terminated_as_interrupted
from runtime.command_line import Parser, on_stderr, warnings_as_lines

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WEIGHTS = ("float", "int8", "gptq4")
HEADS = ("float", "int8")
DEFAULT_LMM = "gptq4"
GATE_NAMES = ("mask_iou_mean", "mask_iou_min", "flips", "map_max_abs", "answers_changed", "anchor_cosine_min")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the bundle passed, 1 when parity failed, 2 when it could not be made, 130 when it was interrupted or terminated."""
    parser = Parser(prog="agvas-export", description=__doc__)
    parser.add_argument("--checkpoint", default="nano", help="nano (shipped) or a checkpoint folder (default nano)")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="fp32 (default), fp16 or bf16: the graphs' arithmetic; int8: both encoders' linear layers in 8 bit, all else fp32",
    )
    parser.add_argument("--lmm", default=DEFAULT_LMM, help=f"the language model's weights: float, int8 or gptq4 (default {DEFAULT_LMM})")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PLAN",
        help="folder of agvas-calibrate, or a GPTQ checkpoint; rtn: plain rounding, nothing calibrated (default: calibrate here)",
    )
    parser.add_argument(
        "--head", default="float", help="the language model's head: float (default) or int8 by plain rounding, half of 16 bit's size"
    )
    parser.add_argument(
        "--gate", metavar="NAME=LIMIT,...", help=f"other limits than the precision's: {', '.join(GATE_NAMES)}; flips is a share"
    )
    parser.add_argument(
        "--gate-budget",
        metavar="LAYERS[:SECONDS]",
        help="how many integer layers may go back to float when a gate fails, and for how long that is tried (default a quarter, an hour)",
    )
    parser.add_argument("--output", type=Path, default=Path("bundle"), help="the bundle's folder (default bundle)")
    parser.add_argument("--images", type=Path, help="folder of pictures to judge parity on (default: 64 procedural ones)")
    parser.add_argument(
        "--pictures", type=int, help="at most this many of them (default 64, or 2 for a model that does not fit the memory)"
    )
    parser.add_argument(
        "--parity",
        choices=("strict", "report", "none"),
        default="strict",
        help="strict: no bundle when masks leave the reference; report: write it with the failure on record; none: compare nothing, which "
        "the bundle then says (for trials of a model that takes hours to compare)",
    )
    parser.add_argument("--threshold", type=float, metavar="P", help="the bundle's, 0..1, in place of the checkpoint's")
    parser.add_argument("--relative-threshold", type=float, metavar="R", help="likewise; 1: a mask is what exceeds the threshold")
    parser.add_argument("--resume", action="store_true", help="keep finished stages when interrupted, and go on with those kept")
    parser.add_argument("--stream-reference", action="store_true", help="compute the reference layer by layer even where the model fits")
    parser.add_argument("--force", action="store_true", help="go on where memory or disk will not do by the estimate")
    parser.add_argument("--quiet", action="store_true", help="no steps and no progress bars on stderr, only errors and warnings")
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    with terminated_as_interrupted():
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    started = time.monotonic()
    from engines import EngineError
    from runtime.errors import AgvasError, ParityFailed, RequestError, choose
    from runtime.masking import MaskRule

    try:
        choose("--precision", options.precision, PRECISIONS)
        choose("--lmm", options.lmm, WEIGHTS)
        choose("--head", options.head, HEADS)
        if options.calibration and options.precision != "int8" and options.lmm == "float":
            if options.head == "int8":
                got = f"--lmm float, got {options.calibration}"
                raise RequestError(f"--calibration: expected none with {got}: --head int8 is rounded plainly; leave it out")
            raise RequestError("--calibration: nothing is in integers with --lmm float; add --lmm gptq4 or int8, or --precision int8")
        if options.pictures is not None and options.pictures < 1:
            raise RequestError(f"--pictures: expected at least 1, got {options.pictures}")
        MaskRule(0.5).changed(options.threshold, options.relative_threshold)  # wrong ones are told at once
        with warnings_as_lines(on_stderr("agvas-export")):
            return _export(options, started)
    except ParityFailed as error:
        print(f"agvas-export: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f'agvas-export: {error.name} is not installed; pip install "agvas[export]"', file=sys.stderr)
        return 2
    except (AgvasError, EngineError, ValueError, OSError) as error:
        print(f"agvas-export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        words = str(interruption) or "no bundle was written, an older one is untouched"
        print(f"agvas-export: interrupted; {words}", file=sys.stderr)
        return 130


def _export(options: argparse.Namespace, started: float) -> int:
    from engines import EngineError
    from export.bundle import export_bundle
    from export.gate import GateBudget
    from export.progress import Progress, counted
    from export.settings import ExportSettings
    from runtime.bundle import MANIFEST
    from runtime.cli.common import json_line
    from runtime.footprint import footprints
    from runtime.verify import peak_rss_bytes

    progress = Progress(options.quiet)
    if (Path(options.output) / MANIFEST).is_file():
        progress.note(f"{options.output} holds a bundle, which the new one will replace once it is whole")
    settings = ExportSettings(
        options.checkpoint,
        options.precision,
        options.output,
        options.parity == "strict",
        options.images,
        options.pictures,
        options.lmm,
        options.calibration,
        _gates(options.gate),
        GateBudget(*_budget(options.gate_budget)),
        options.head,
        options.parity != "none",
        True if options.stream_reference else None,
        True if options.resume else None,
        options.force,
        options.threshold,
        options.relative_threshold,
    )
    bundle, report = export_bundle(settings, progress)
    progress.end()
    seconds = time.monotonic() - started
    told = f"{bundle.folder}: {bundle.manifest.model}, {bundle.bytes / 1e6:.1f} MB in {seconds:.0f} s; "
    if report is None:
        passed, failures = None, list[str]()  # nothing was judged
        print(told + "not compared with the reference")
    else:
        chain, failures = report.chain, report.failures
        passed = not failures
        print(
            f"{told}against the reference on {chain.images} pictures ({report.engine}): mask IoU {chain.mask_iou_mean:.4f} "
            f"(least {chain.mask_iou_min:.4f}), {chain.flips} flips, maps within {chain.map_max_abs:.1e}: "
            f"{'passed' if passed else 'FAILED: ' + '; '.join(failures)}"
        )
        for mode, parity in report.modes.items():
            changed = counted(parity.answers_changed, "answer")
            print(
                f"  {mode}, {parity.images} pictures, not gated: {changed} changed, mask IoU "
                f"{parity.mask_iou_mean:.4f} (least {parity.mask_iou_min:.4f}), {parity.flips} flips"
            )
    stages: dict[str, dict[str, Any]] = {}
    try:
        # A model that is compared layer by layer would not fit whole, either.
        stages = footprints(bundle, report.engine) if report is not None and report.glue is not None else {}
    except EngineError as error:
        progress.note(f"memory by stage was not measured: {error}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{bundle.folder} was written all the same; its memory by stage was not measured") from None
    for stage, cost in stages.items():
        peak = cost["peak_rss_bytes"]
        memory = "" if peak is None else f", {(peak - (cost['idle_rss_bytes'] or 0)) / 1e6:.0f} MB of memory beside the engine's own"
        print(f"  {stage}: {cost['bytes'] / 1e6:.1f} MB on disk{memory}")
    kept = bundle.manifest.quantisation.get("kept_float", {})
    for name, why in kept.items():
        print(f"  kept in float: {name}, which {why}")
    if options.json:
        print(
            json_line(
                {
                    "bundle": str(bundle.folder),
                    "passed": passed,
                    "failures": failures,
                    "parity": None if report is None else report.chain.to_json(),
                    "modes": {} if report is None else {mode: parity.to_json() for mode, parity in report.modes.items()},
                    "bytes": bundle.bytes,
                    "stages": stages,
                    "kept_float": list(kept),
                    "peak_rss_bytes": peak_rss_bytes(),
                    "seconds": round(seconds, 3),
                }
            )
        )
    return 1 if failures else 0


def _gates(text: str | None) -> dict[str, float]:
    """ "mask_iou_mean=0.9,flips=0.05" → numbers. Raises RequestError naming what is wrong."""
    from runtime.errors import RequestError, choose

    gates = {}
    for part in (text or "").split(",") if text else []:
        name, _, limit = part.partition("=")
        choose("--gate", name.strip(), GATE_NAMES)
        try:
            gates[name.strip()] = float(limit)
        except ValueError:
            raise RequestError(f"--gate: expected {name.strip()}=NUMBER, got {part!r}") from None
        if not 0 <= gates[name.strip()] <= (sys.maxsize if name.strip() == "answers_changed" else 1):
            raise RequestError(f"--gate: expected a count for answers_changed and a number in 0..1 for the others, got {part!r}")
    return gates


def _budget(text: str | None) -> tuple[int | None, float]:
    """ "16:900" → layers and seconds. Raises RequestError."""
    from runtime.errors import RequestError

    layers, _, seconds = (text or "").partition(":")
    try:
        budget = (int(layers) if layers else None, float(seconds) if seconds else 3600.0)
    except ValueError:
        budget = (-1, 0.0)
    if (budget[0] is not None and budget[0] < 0) or not budget[1] >= 0:
        raise RequestError(f"--gate-budget: expected LAYERS or LAYERS:SECONDS, as 16 or 16:900, got {text!r}")
    return budget


if __name__ == "__main__":
    sys.exit(main())
