"""agvas-build: a bundle's TensorRT engines, built for the GPUs named (or the one here), cached, and verified where they can run.

TensorRT for RTX builds ahead of time for GPUs that are not here; TensorRT builds on the GPU itself, a Jetson's for instance.

Exit codes: 0 built (and verified, or said not to be), 1 built but the masks are wrong (the engines are set aside), 2 not built,
130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from engines import EngineError
from engines.tensorrt_library import TENSORRT_ENGINES
from runtime.bundle import Bundle
from runtime.cli.common import Progress, add_version, close_stdout, json_line, open_streams, say
from runtime.command_line import Parser, on_stderr, warnings_as_lines
from runtime.engine_builds import BuildSettings, build_engines
from runtime.errors import AgvasError, RequestError

CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]")


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    parser = Parser(
        prog="agvas-build",
        description="Build a bundle's engines with TensorRT or TensorRT for RTX, and verify them where they can run.",
        epilog="Exit codes: 0 built; 1 built, but the masks are not the reference's; 2 not built; 130 interrupted. "
        "Engines lie in $AGVAS_CACHE/engines (by default in the user's cache folder); what is there already is not built again.",
        allow_abbrev=False,
    )
    add_version(parser)
    parser.add_argument("--bundle", required=True, metavar="DIR", help="folder that agvas-export wrote")
    parser.add_argument("--engine", required=True, help=f"{' or '.join(TENSORRT_ENGINES)}")
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y,...",
        help="GPUs to build for, e.g. 8.6,8.9,12.0 (tensorrt-rtx builds ahead of time); default: the GPU here",
    )
    parser.add_argument("--device", default="cuda:0", help="the GPU here to build for and verify on (default cuda:0)")
    parser.add_argument("--workspace", type=int, metavar="MB", help="most scratch memory a layer may take on the GPU (default: no limit)")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=1,
        metavar="N",
        help="most pictures in one call, for programs that call open_engine; agvas-segment and a Segmenter run one at a time (default 1)",
    )
    parser.add_argument("--stages", metavar="NAME,...", help="build these stages only, to try one")
    parser.add_argument("--rebuild", action="store_true", help="build again what is in the cache")
    parser.add_argument("--force", action="store_true", help="go on where memory or disk will not do by the estimate")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    try:
        settings = _settings(arguments)
        with warnings_as_lines(on_stderr("agvas-build")), Progress(quiet=arguments.quiet) as progress:
            report = build_engines(Bundle(arguments.bundle), settings, progress)
        say(json_line(report) if arguments.json else "\n".join(_table(report)))
        return 1 if report["verified"] is False else 0
    except KeyboardInterrupt:
        print("agvas-build: interrupted; engines built so far stay, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        close_stdout()
        return 2
    except (AgvasError, EngineError, OSError) as error:
        print(f"agvas-build: {error}", file=sys.stderr)
        if arguments.json:
            say(json_line({"bundle": arguments.bundle, "engine": arguments.engine, "error": str(error)}))
        return 2


def _settings(arguments: argparse.Namespace) -> BuildSettings:
    capabilities = tuple(part.strip() for part in (arguments.compute_capability or "").split(",") if part.strip())
    for capability in capabilities:
        if not CAPABILITY.fullmatch(capability):
            raise RequestError(f"--compute-capability: expected numbers like 8.6,8.9,12.0, got {capability!r}")
    if arguments.compute_capability is not None and not capabilities:
        raise RequestError("--compute-capability: expected numbers like 8.6,8.9,12.0, got none; leave it out for the GPU here")
    return BuildSettings(
        engine=arguments.engine,
        capabilities=tuple(dict.fromkeys(capabilities)),
        device=arguments.device,
        workspace_mb=arguments.workspace,
        max_batch=arguments.max_batch,
        rebuild=arguments.rebuild,
        force=arguments.force,
        stages=tuple(part.strip() for part in (arguments.stages or "").split(",") if part.strip()),
    )


def _table(report: dict[str, Any]) -> list[str]:
    lines = [f"bundle    {report['bundle']}", f"engine    {report['engine']} {report['version']}"]
    for entry in report["engines"]:
        fused = "?" if entry["attention_fused"] is None else entry["attention_fused"]
        took = "in the cache" if entry["cached"] else f"{entry['seconds']:.1f} s"
        lines.append(
            f"          {entry['stage']:<16}  {entry['capability']:>4}  {entry['bytes'] / 1e6:8.1f} MB  attention fused {fused} of "
            f"{entry['attention']}  {took}"
        )
        if entry["unfused"]:
            lines.append(f"          {'':<16}        not fused: {', '.join(entry['unfused'])}")
    in_16_bit = not {"fp16", "bf16"}.isdisjoint(report["precision"].values())  # if not all of it: the mask decoder of bf16 is fp32
    if not in_16_bit and any(entry["attention"] and entry["attention_fused"] != entry["attention"] for entry in report["engines"]):
        lines.append("note      TensorRT fuses attention in 16 bit alone: export with --precision fp16 or bf16 for faster engines")
    verdict, note = {None: "built", True: "verified", False: "FAILED"}[report["verified"]], report["note"]
    note = note.removeprefix("built, ") if report["verified"] is None else note  # not said twice
    return [*lines, f"{verdict:<9} {note}; {report['seconds']:.1f} s"]


if __name__ == "__main__":
    sys.exit(main())
