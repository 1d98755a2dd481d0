"""agvas-verify: does this machine's engine still give the masks of the PyTorch reference? Says it in numbers.

Replays the traces in the bundle's golden.npz (runtime.verify). With pictures of one's own, whose reference is not in
the bundle, this engine is compared with another one on this machine that computes in the graphs' own precision, under
the same gates.

Exit codes: 0 every gate held, 1 one was broken, 2 it could not be verified, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import ENGINES, EngineError, EngineFailed, EngineOptions, EngineUnavailable
from engines.tensorrt_cache import hashes
from engines.tensorrt_library import TENSORRT_ENGINES
from runtime.bundle import Bundle
from runtime.cli.common import (
    AUTO,
    Progress,
    add_engine_arguments,
    close_stdout,
    describe,
    engine_options,
    json_line,
    open_streams,
    opening,
    say,
)
from runtime.command_line import Parser, on_stderr, warnings_as_lines
from runtime.engine_builds import judge
from runtime.errors import AgvasError, RequestError
from runtime.images import read_image
from runtime.picture_files import find_images
from runtime.pipeline import Pipeline
from runtime.selection import CPU_CANDIDATES, CUDA_CANDIDATES, choose_engine, forget_choice
from runtime.verify import compare_on_images, gates_for, limits, open_pipeline, summary, verify

# What a picture without a reference is compared with, in this order.
REFERENCES = ("onnxruntime", "openvino")
BISECT = "export/bisect.py"  # what --bisect starts


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    parser = Parser(
        prog="agvas-verify",
        description="Replay a bundle's golden traces on this machine's engine; compare the masks with the reference's.",
        epilog="Exit codes: 0 every gate held; 1 one was broken; 2 it could not be verified; 130 interrupted.",
        allow_abbrev=False,
    )
    add_engine_arguments(parser)
    parser.add_argument("--images", metavar="DIR", help="also compare with another engine on the pictures that lie in there")
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="find the first stage, then the first layer, where this engine leaves fp32 onnxruntime (needs agvas[bisect])",
    )
    parser.add_argument("--against", metavar="DIR", help="with --bisect: another bundle of this checkpoint whose graphs are right")
    parser.add_argument("--tolerance", type=float, metavar="X", help="with --bisect: relative error allowed (default: by precision)")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    try:
        options = engine_options(arguments)
        tell = on_stderr("agvas-verify")
        with warnings_as_lines(tell), Progress(quiet=arguments.quiet) as progress:
            if arguments.bisect:
                if arguments.images is not None:
                    raise RequestError("--images: not with --bisect, which works on the golden pictures; leave one of them out")
                if options.low_memory:
                    raise RequestError("--low-memory: not with --bisect, which opens all stages of a chain; leave one of them out")
                if arguments.tolerance is not None and not 0 < arguments.tolerance < math.inf:
                    raise RequestError(f"--tolerance: expected a number above 0, got {arguments.tolerance}")
                report = bisect_bundle(
                    arguments.bundle, arguments.engine, options, arguments.against, arguments.tolerance, progress=progress
                )
                say(json_line(report) if arguments.json else "\n".join(_finding(report)))
                return 0 if report["passed"] else 1
            if arguments.against is not None or arguments.tolerance is not None:
                raise RequestError("--against, --tolerance: expected with --bisect; add it, or leave them out")
            if arguments.engine == AUTO and not arguments.quiet:
                tell(opening(arguments.bundle))
            report = verify_bundle(
                arguments.bundle,
                arguments.engine,
                options,
                precision=arguments.inference_precision,
                images=arguments.images,
                remeasure=arguments.remeasure,
                progress=progress,
            )
        say(json_line(report) if arguments.json else "\n".join(_table(report)))
        return 0 if report["passed"] else 1
    except KeyboardInterrupt:
        print("agvas-verify: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        close_stdout()
        return 2
    except (AgvasError, EngineError, OSError) as error:
        print(f"agvas-verify: {error}", file=sys.stderr)
        if arguments.json:
            say(json_line({"bundle": arguments.bundle, "passed": False, "error": str(error)}))
        return 2


def verify_bundle(
    folder: str | Path,
    engine: str = AUTO,
    options: EngineOptions | None = None,
    *,
    precision: str | None = None,
    images: str | Path | None = None,
    remeasure: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Verify a bundle on one engine.

    Args:
        engine: "auto" for the one that Segmenter would choose. Where it would find none that passes, the first one that
            opens is verified, so that there are numbers to look at; "auto_failed" then has the reasons. A choice that was
            remembered and fails now is forgotten: the next one to ask for "auto" measures again.
        precision: the inference precision that "auto" is held to; None for any.
        images: pictures to compare with another engine on.
        remeasure: "auto" measures now, whatever is remembered.
        progress: called with (work, steps done, steps in all).

    Returns:
        runtime.verify.summary and "model", "engine", "device", "inference_precision", "gates"; of a TensorRT engine "set_aside", the new
        names of engines that failed, and "notes", what could not be written to their cache; with `images` also "images_parity" with
        "against", "passed" and "failures", counted in the whole's.

    Raises:
        AgvasError: the bundle or the pictures cannot be read.
        EngineError: the engine cannot be had or cannot compute a golden picture, or there is no other to compare with.
    """
    # Listed first: a wrong folder should not be told after minutes of verifying.
    pictures = find_images(images) if images is not None else []
    for path in pictures:
        read_image(path)  # now: what cannot be read should not end a verification that is half done
    bundle = Bundle(folder)
    options = options or EngineOptions()
    asked, asked_options = engine, options
    before = hashes() if engine in (AUTO, *TENSORRT_ENGINES) else {}
    pipeline, engine, options, why = _open(bundle, engine, options, precision, remeasure)
    against = _open_reference(bundle, engine, options) if pictures else None
    try:
        verification = verify(bundle, pipeline, options, _labelled(progress, "golden traces"))
    except EngineFailed as error:
        if why:  # it has this engine's reason beside the others'
            raise EngineUnavailable(why) from error
        if asked == AUTO and (kept := _forgotten(bundle, asked_options, precision)):
            raise EngineFailed(f"{error}; {kept}") from error
        raise
    report = summary(bundle, verification)
    if asked == AUTO and not verification.passed:
        report["failures"] += filter(None, [_forgotten(bundle, asked_options, precision)])
    report["model"] = bundle.manifest.model
    report["engine"] = engine
    report["device"] = options.device
    report["inference_precision"] = options.inference_precision
    report["gates"] = gates_for(bundle, options)
    if engine in TENSORRT_ENGINES:
        aside, report["notes"] = judge(bundle, engine, options.device, verification, before)
        report["set_aside"] = [path.name for path in aside]
    if why:
        report["auto_failed"] = why
    if against is not None:
        other, other_engine, other_options = against
        shown = _labelled(progress, "pictures")
        parity = compare_on_images(pipeline, other, pictures, bundle.manifest.mask_rule, shown)
        failures = limits(bundle, options).failures(parity)
        report["images_parity"] = {
            **parity.to_json(),
            "against": describe(other_engine, other_options),
            "passed": not failures,
            "failures": failures,
        }
        report["passed"] = report["passed"] and not failures
        report["failures"] = [*report["failures"], *(f"pictures: {failure}" for failure in failures)]
    return report


def bisect_bundle(
    folder: str | Path,
    engine: str,
    options: EngineOptions,
    against: str | Path | None = None,
    tolerance: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Find where an engine leaves the reference, in a process of its own (export.bisect), which needs the extra agvas[bisect].

    Returns:
        "bundle", "engine", "passed" (nothing found), "finding" (fields of export.bisect.Finding, or None), "stage_errors", "tolerance".

    Raises:
        RequestError: no engine by name.
        EngineUnavailable: this installation lacks what does it.
        EngineFailed: it could not be done; the message is the other process's.
    """
    if engine == AUTO:
        raise RequestError(f"--bisect: expected one engine by name ({', '.join(ENGINES)}), got {AUTO}; say which one is wrong")
    Bundle(folder)  # a bundle that is none is told here, by name
    root = Path(__file__).parents[2]
    if not (root / BISECT).is_file():
        raise EngineUnavailable(
            f"--bisect: expected {BISECT} beside the runtime, found none in {root} (the Jetson's container has engines and runtime alone); "
            "bisect on this device in the environment that engines/jetson/setup.sh makes, with pip install onnx onnxruntime"
        )
    command = [sys.executable, "-m", "export.bisect", "--bundle", str(Path(folder).absolute()), "--engine", engine]
    command += ["--device", options.device, "--threads", str(options.threads), "--inference-precision", options.inference_precision]
    if against is not None:
        Bundle(against)
        command += ["--against", str(Path(against).absolute())]
    if tolerance is not None:
        command += ["--tolerance", str(tolerance)]
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root)
        try:
            assert process.stdout
            for line in process.stdout:
                told: dict[str, Any] = {}
                with suppress(ValueError):  # a library's own words
                    told = json.loads(line) if line.startswith("{") else {}
                if "phase" in told and progress:
                    progress(told["phase"], told["step"], told["steps"])
                last = last if "phase" in told else told or last
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if "stage_errors" not in last:
            errors.seek(0)
            reason = last.get("error") or (errors.read().strip().splitlines() or [f"it ended with exit code {process.returncode}"])[-1]
            raise EngineFailed(reason if reason.startswith("--bisect") else f"--bisect: {reason}")
    return {"bundle": str(folder), "engine": engine, "passed": last["finding"] is None, **last}


def _finding(report: dict[str, Any]) -> list[str]:
    lines = [f"stages    largest relative error of each, fed by the reference; {report['tolerance']:g} allowed"]
    width = max(map(len, report["stage_errors"]))
    lines += [f"          {stage:<{width}}  {error:.1e}" for stage, error in report["stage_errors"].items()]
    found = report["finding"]
    if not any(report["stage_errors"].values()):
        lines.append("          no error at all: onnxruntime on the CPU, with which engines are compared, was compared with itself")
    if found is None:
        return [*lines, "found     nothing: every stage is within tolerance when fed by the reference"]
    lines.append(f"picture   number {found['picture']} of the golden ones was followed")
    lines.append(
        f"found     stage {found['stage']}: {found['operator']} {found['node'] or ''} makes {found['output']}, error {found['error']:.1e}"
    )
    if found["module"]:
        lines.append(f"          exported from module {found['module']}")
    lines += [f"          its input {name} is right, error {error:.1e}" for name, error in found["input_errors"].items()]
    if found["in_fusion"]:
        lines.append("          the error went when inner tensors were shown: a fusion that ends here is wrong, no single layer")
    return lines


def _open(
    bundle: Bundle, engine: str, options: EngineOptions, precision: str | None, remeasure: bool
) -> tuple[Pipeline, str, EngineOptions, str]:
    """Pipeline, engine and options in use, and why `auto` could choose none."""
    to_judge = replace(options, to_judge=True)
    if engine != AUTO:
        return open_pipeline(bundle, engine, to_judge), engine, options, ""
    try:
        pipeline, choice = choose_engine(bundle, options, precision, remeasure=remeasure)
    except EngineUnavailable as error:
        for name, computes_in in CPU_CANDIDATES if options.device == "cpu" else CUDA_CANDIDATES:
            # What the graphs state is verified, not a coarser precision that auto tries because it is faster.
            if computes_in == "graph":
                with suppress(EngineError):
                    return open_pipeline(bundle, name, to_judge), name, options, str(error)
        raise
    return pipeline, choice.engine, replace(options, inference_precision=choice.inference_precision), ""


def _forgotten(bundle: Bundle, options: EngineOptions, precision: str | None) -> str:
    """Forget what `auto` has chosen; why it goes on choosing that, where it cannot be forgotten."""
    try:
        forget_choice(bundle, options, precision)
    except OSError as error:
        return f"the Segmenter goes on choosing this engine: {error}; remove that file"
    return ""


def _open_reference(bundle: Bundle, engine: str, options: EngineOptions) -> tuple[Pipeline, str, EngineOptions]:
    """The first engine on the CPU, in the graphs' precision, that is not the one under test."""
    exact = EngineOptions("cpu", options.threads, "graph", options.low_memory)
    reasons = []
    for name in REFERENCES:
        if (name, exact) == (engine, options):
            continue
        try:
            return open_pipeline(bundle, name, exact), name, exact
        except EngineError as error:
            reasons.append(f"{name}: {error}")
    raise EngineUnavailable(
        f"--images: expected another engine than {describe(engine, options)} to compare with, got none "
        f"({' | '.join(reasons)}); install one, or verify without --images"
    )


def _labelled(progress: Callable[[str, int, int], None] | None, label: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(label, done, total)


def _table(report: dict[str, Any]) -> list[str]:
    parity = report["parity"]
    lines = [
        f"bundle    {report['bundle']}: model {report['model']}, {report['bytes'] / 1e6:.1f} MB",
        f"engine    {report['engine']}, precision {report['inference_precision']}, device {report['device']}",
        f"masks     by the bundle's threshold {report['threshold']:g}, relative threshold {report['relative_threshold']:g}",
    ]
    if "auto_failed" in report:
        lines.append(f"          auto would use none here: {report['auto_failed']}")
    lines += _parity_lines(f"golden    {parity['images']} pictures against the PyTorch reference", parity)
    if report["stage_relative_errors"]:
        width = max(map(len, report["stage_relative_errors"]))
        lines.append("tensors   largest relative error, each stage fed by this engine's own predecessors")
        lines += [f"          {name:<{width}}  {_number(error, '.1e')}" for name, error in report["stage_relative_errors"].items()]
    if "images_parity" in report:
        pictures = report["images_parity"]
        lines += _parity_lines(f"pictures  {pictures['images']} against {pictures['against']}", pictures)
    lines += [f"broken    {failure}" for failure in report["failures"]]
    lines += [f"set aside {name}: it will not be used; --bisect finds where it goes wrong" for name in report.get("set_aside", ())]
    lines += [f"note      {note}" for note in report.get("notes", ())]
    verdict, peak = "passed" if report["passed"] else "FAILED", report["peak_rss_bytes"]
    memory = "" if peak is None else f", {peak / 1e6:.0f} MB of memory"  # Windows does not tell
    lines.append(f"{verdict}    gates {report['gates']}; {report['seconds']:.1f} s{memory}")
    return lines


def _parity_lines(title: str, parity: dict[str, Any]) -> list[str]:
    most, mean = (_number(parity[f"map_{kind}_abs"], ".1e") for kind in ("max", "mean"))
    return [
        title,
        f"          mask IoU        mean {parity['mask_iou_mean']:.4f}, least {parity['mask_iou_min']:.4f}",
        f"          flips           {parity['flips']} between empty and not empty",
        f"          answers         {parity['answers_changed']} changed",
        f"          maps            up to {most} apart, {mean} on average",
        f"          anchor states   cosine at least {_number(parity['anchor_cosine_min'], '.6f')}",
    ]


def _number(value: float | None, form: str) -> str:
    """`value` in a format; None is what the report has of NaN and infinity."""
    return "NaN" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
