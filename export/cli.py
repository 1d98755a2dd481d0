"""agvas-export: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WEIGHTS = ("float", "int8", "gptq4")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the bundle passed, 1 when parity failed, 2 when it could not be made."""
    parser = argparse.ArgumentParser(prog="agvas-export", description=__doc__)
    parser.add_argument("--checkpoint", default="nano", help="nano (shipped) or a checkpoint folder (default nano)")
    parser.add_argument("--precision", default="fp32", help="fp32, fp16 or bf16: the graphs' arithmetic (default fp32)")
    parser.add_argument("--lmm", default="float", help="the language model's weights: float (default)")
    parser.add_argument("--output", type=Path, default=Path("bundle"), help="the bundle's folder (default bundle)")
    parser.add_argument("--images", type=Path, help="folder of pictures to judge parity on (default: 64 procedural ones)")
    parser.add_argument("--pictures", type=int, default=64, help="at most this many of them (default 64)")
    parser.add_argument(
        "--parity",
        choices=("strict", "report"),
        default="strict",
        help="strict: no bundle when masks leave the reference; report: write it with the failure on record",
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    from engines import EngineError
    from runtime.errors import AgvasError, ParityFailed, RequestError, choose

    try:
        choose("--precision", options.precision, PRECISIONS)
        choose("--lmm", options.lmm, WEIGHTS)
        if options.precision == "int8" or options.lmm != "float":
            raise RequestError("--precision int8 and --lmm int8 or gptq4 need quantisation, which this version lacks; use fp16 or bf16")
        if options.pictures < 1:
            raise RequestError(f"--pictures: expected at least 1, got {options.pictures}")
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
    except KeyboardInterrupt:
        print("agvas-export: interrupted; no bundle was written, an older one is untouched", file=sys.stderr)
        return 130


def _export(options: argparse.Namespace, started: float) -> int:
    from export.bundle import ExportSettings, export_bundle
    from export.progress import Progress
    from runtime.cli.common import json_line
    from runtime.verify import peak_rss_bytes

    progress = Progress()
    settings = ExportSettings(
        options.checkpoint,
        options.precision,
        options.output,
        options.parity == "strict",
        options.images,
        options.pictures,
    )
    bundle, report = export_bundle(settings, progress)
    progress.end()
    chain, passed = report.chain, not report.failures
    seconds = time.monotonic() - started
    print(
        f"{bundle.folder}: {bundle.bytes / 1e6:.1f} MB in {seconds:.0f} s; against the reference on {chain.images} pictures "
        f"({report.engine}): mask IoU {chain.mask_iou_mean:.4f} (least {chain.mask_iou_min:.4f}), {chain.flips} flips, "
        f"maps within {chain.map_max_abs:.1e}: {'passed' if passed else 'FAILED: ' + '; '.join(report.failures)}"
    )
    if options.json:
        print(
            json_line(
                {
                    "bundle": str(bundle.folder),
                    "passed": passed,
                    "failures": report.failures,
                    "parity": chain.to_json(),
                    "bytes": bundle.bytes,
                    "peak_rss_bytes": peak_rss_bytes(),
                    "seconds": round(seconds, 3),
                }
            )
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
