"""agvas-bench: a bundle's latency, memory and masks against the PyTorch reference and others, so that others can repeat it.

The command parses, measures (bench_measure.py), plans (roofline.py) or compares (bench_statistics.py), and prints. The last line of
stdout is JSON without raw samples, unless --json FILE has it all, with them. No candidate runs in this process.

Exit codes: 0 done, 1 --compare found something slower or worse, 2 it could not be run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_result import check_run, read_result
from engines import ENGINES, EngineError
from runtime.cli.common import AUTO, Progress, engine_options, json_line
from runtime.command_line import Parser, on_stderr, warnings_as_lines
from runtime.errors import AgvasError, OutputError, RequestError
from runtime.writing import write_result

__all__ = ["main"]

DESCRIPTION = """Time a bundle, batch 1, closed loop: decoded uint8 picture in memory to full-size mask and score in memory."""
EPILOG = """\
candidates for --against: torch (the reference with generate, fp32, as the paper runs it), torch-bf16, torch-single-pass and
torch-bf16-single-pass (the fixed answer verified in one pass, as bundles do it), plain-onnx (plain torch.onnx export, onnxruntime's
defaults), the folder of another bundle, or another package's detector, model.xml as anomalib 2 exports it to OpenVINO (timed alone:
its masks are its own); each may be given once or more.

  agvas-bench --bundle bundle --against torch --against torch-bf16 --against plain-onnx --json run.json --report report
  agvas-bench --bundle bundle --images my_parts/ --fps 10 --quick
  agvas-bench --compare before.json after.json --threshold 1.05        (exit code 1 where something got worse)
  agvas-bench --roofline --model ov_7b                                 (what each device could do at best)
  agvas-bench --roofline --json run.json                               (and how far a run is from what its own machine could do)

--compare fails (1), too, where masks got worse (mean IoU by more than 0.002, the least by 0.02, more flips), where memory rose by more
than a tenth, and where a candidate or a stage that counts is gone; other conditions are told.

the full setting is MLPerf's single stream: 50 warm-ups, at least 1,024 queries and 60 s of the bundle's own time; --quick has 40 queries.
procedural pictures are drawn by OpenCV and need a reference for their masks: PyTorch and --checkpoint (of nano's bundle, nano itself).
Where one is missing, the bundle's golden pictures, a dozen or so, take their place; the table's last lines say which it was.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.compare:
            return _compare(options)
        if options.roofline:
            return _roofline(options)
        return _measure(options)
    except KeyboardInterrupt:
        print("agvas-bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (AgvasError, EngineError, ValueError, OSError) as error:
        print(f"agvas-bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="agvas-bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="folder that agvas-export wrote")
    parser.add_argument("--engine", default=AUTO, help=f"{AUTO} (default), {', '.join(ENGINES)}")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:N, of all candidates")
    parser.add_argument(
        "--inference-precision", help="graph, bf16, int8 or bf16+int8, of bundles; default: graph for a named engine, any for auto"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads of every candidate (default: the usable CPUs)")
    parser.add_argument("--against", action="append", default=[], metavar="WHAT", help="see below; repeatable")
    parser.add_argument("--checkpoint", metavar="DIR", help="that the bundle was exported from (default nano, where the bundle is nano's)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures of yours (default: procedural ones of 480 x 640; see below)")
    parser.add_argument("--pictures", type=int, metavar="N", help="distinct pictures, no more than --queries (default 64; --quick 8)")
    parser.add_argument("--queries", type=int, metavar="N", help="timed calls of each candidate (default 1024; --quick 40)")
    parser.add_argument("--seconds", type=float, metavar="S", help="and at least so much time of the bundle's own (default 60; --quick 0)")
    parser.add_argument("--quick", action="store_true", help="a few calls, to see that it runs; no figures to publish")
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second of a line: tells how many come too late")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result with raw samples (stdout's last line: without)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.html, report.md, plots and result.json (needs matplotlib)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what got slower or worse from A to B")
    parser.add_argument("--threshold", type=float, default=1.05, help="of --compare: slower from this ratio on (default 1.05)")
    parser.add_argument("--roofline", action="store_true", help="work of each stage, floors of devices; with --model, --bundle or --json")
    parser.add_argument("--model", metavar="NAME", help="of --roofline: ov_7b, nano, tiny, or a checkpoint's folder")
    parser.set_defaults(low_memory=False, remeasure=False)  # what engine_options reads, and what a latency is never measured with
    return parser


def _measure(options: argparse.Namespace) -> int:
    from benchmarks.bench_measure import FULL, QUICK, Request, measure

    if options.bundle is None:
        raise RequestError("--bundle: expected the folder that agvas-export wrote, got none; or give --compare or --roofline")
    if options.threads < 0:
        raise RequestError(f"--threads: expected 1 or more, got {options.threads}; leave it out for all usable CPUs")
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise RequestError(f"--fps: expected a number above 0, got {options.fps:g}; leave it out where no line waits")
    if options.seconds is not None and not 0 <= options.seconds < math.inf:
        raise RequestError(f"--seconds: expected 0 or more, got {options.seconds:g}; leave it out for the default")
    options.threads = options.threads or usable_cpus()
    engine_options(options)  # refuses what no engine has, before anything is made
    changes = {name: getattr(options, name) for name in ("pictures", "queries", "seconds") if getattr(options, name) is not None}
    if any(value < 1 for name, value in changes.items() if name != "seconds"):
        raise RequestError(f"--pictures, --queries: expected 1 or more, got {changes}; leave them out for the defaults")
    if options.report is not None:
        from benchmarks.report import check_plots

        check_plots()  # now, not after ten minutes of measuring
    for path in (options.json, options.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: expected an existing folder to write into, got {path.parent}; make it first")
        if path is not None and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise OutputError(f"{path}: expected a place that can be written to; choose another")
    request = Request(
        bundle=options.bundle,
        engine=options.engine,
        device=options.device,
        inference_precision=options.inference_precision,
        threads=options.threads,
        against=tuple(options.against),
        checkpoint=options.checkpoint,
        images=options.images,
        fps=options.fps,
        effort=dataclasses.replace(QUICK if options.quick else FULL, **changes),
    )
    with warnings_as_lines(on_stderr("agvas-bench")), Progress(tell=on_stderr("agvas-bench")) as progress:
        result = measure(request, progress)
    from benchmarks.report import markdown, write_report

    print(markdown(result))
    if options.json is not None:
        write_result(options.json, json.dumps(json.loads(json_line(result)), indent=1) + "\n")
    if options.report is not None:
        print(f"report: {write_report(result, options.report)}")
    print(json_line(without_samples(result)))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.bench_statistics import compare, comparison_table

    before, after = (read_result(path) for path in options.compare)
    comparison = compare(before, after, options.threshold)
    print(comparison_table(comparison))
    print(json_line(comparison))
    return 1 if comparison["slower"] or comparison["worse"] else 0


def _roofline(options: argparse.Namespace) -> int:
    from benchmarks.roofline import against_floor, machine_of, measured_table, roofline, table, this_machine

    config, tokens, told = _config(options), None, None
    if options.json is not None:
        told = read_result(options.json)
        if told.get("model") != config.name:
            raise RequestError(f"{options.json}: expected a run of {config.name}, got one of {told.get('model')}; give that run's --bundle")
        run, tokens = check_run(told), told.get("text_tokens")
    if options.bundle is not None:
        from benchmarks.bench_measure import text_tokens
        from runtime.bundle import Bundle

        tokens = text_tokens(Bundle(options.bundle, check_hashes=False))
    machine = machine_of(told) if told is not None else this_machine(options.threads or usable_cpus())
    result = roofline(config, machine, tokens)
    print(table(result))
    if told is not None:
        result["measured"] = against_floor(config, machine, run, tokens)
        print("\n" + measured_table(result["measured"]))
    print(json_line(result))
    return 0


def _config(options: argparse.Namespace) -> Any:
    """The configuration to plan for: --model's, or that of the bundle's or run's checkpoint."""
    from agvas.config import NAMED, AGVASConfig

    name = options.model or options.checkpoint
    if name is None and options.bundle is not None:
        from runtime.bundle import Bundle

        name = Bundle(options.bundle, check_hashes=False).manifest.model
    if name is None and options.json is not None:
        name = str(read_result(options.json).get("model"))
    if name is None:
        raise RequestError("--roofline: expected --model, --bundle or --json to say which model, got none; try --model ov_7b")
    if name in NAMED:
        return NAMED[name]()
    path = Path(name) / "config.json"
    if not path.is_file():
        raise RequestError(f"--model: expected {', '.join(NAMED)} or a checkpoint's folder, got {name}; give --model DIR")
    return AGVASConfig.from_json(path.read_text())


def usable_cpus() -> int:
    """CPUs this process may use, which in a container are not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_samples(result: Mapping[str, Any]) -> dict[str, Any]:
    """What fits on a line."""
    runs = {name: {key: value for key, value in run.items() if key != "samples"} for name, run in result["runs"].items()}
    return dict(result) | {"runs": runs}


if __name__ == "__main__":
    sys.exit(main())
