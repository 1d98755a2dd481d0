"""agvas-calibrate: a checkpoint's language model in integers, as a plan that agvas-export takes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agvas.interruption import terminated_as_interrupted
from runtime.command_line import Parser, on_stderr, warnings_as_lines

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calibration.plan import QuantPlan
    from calibration.weights import QuantizedWeight

SAMPLES = 128


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the plan was written, 2 when it could not be, 130 when interrupted."""
    parser = Parser(
        prog="agvas-calibrate",
        description=__doc__,
        epilog="Interrupted? The same command goes on where it was: finished pictures and layers wait in OUTPUT.partial.",
    )
    parser.add_argument("--checkpoint", default="nano", help="nano (shipped) or a checkpoint folder (default nano)")
    parser.add_argument("--output", type=Path, required=True, metavar="PLAN", help="the plan's folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of calibration pictures (default: procedural ones)")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"how many pictures (default {SAMPLES})")
    parser.add_argument("--bits", type=int, default=4, help="of the weights, 4 or 8 (default 4)")
    parser.add_argument(
        "--group", type=int, help="inputs that share a scale; 0: one scale an output (default 128, or 64 or 32 where the model is narrower)"
    )
    parser.add_argument("--damping", type=float, default=0.01, help="share of the Hessian's mean diagonal added to it (default 0.01)")
    parser.add_argument("--answer-share", type=float, default=0.5, help="how much of the Hessians the answers make (default 0.5)")
    parser.add_argument("--device", default="cpu", help="where layers are computed and quantised: cpu (default) or cuda:N")
    parser.add_argument("--dtype", default="fp32", help="of encoders and embeddings in memory: fp32 (default), bf16 or fp16")
    parser.add_argument("--gptq-checkpoint", type=Path, metavar="DIR", help="also write the language model in the GPTQ checkpoint layout")
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    with terminated_as_interrupted():
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    from runtime.errors import AgvasError

    try:
        with warnings_as_lines(on_stderr("agvas-calibrate")):
            return _calibrate(options, time.monotonic())
    except ModuleNotFoundError as error:
        print(f'agvas-calibrate: {error.name} is not installed; pip install "agvas[export]"', file=sys.stderr)
        return 2
    except (AgvasError, ValueError, OSError) as error:
        print(f"agvas-calibrate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        words = str(interruption) or "no plan was written, the same command goes on where it was"
        print(f"agvas-calibrate: interrupted; {words}", file=sys.stderr)
        return 130


def _calibrate(options: argparse.Namespace, started: float) -> int:
    from runtime.cli.common import Progress, json_line
    from runtime.errors import RequestError, choose
    from runtime.verify import peak_rss_bytes

    choose("--dtype", options.dtype, ("fp32", "bf16", "fp16"))
    if not 0 < options.answer_share < 1:
        raise RequestError(f"--answer-share: expected between 0 and 1, got {options.answer_share}")
    if options.samples < 1:
        raise RequestError(f"--samples: expected at least 1, got {options.samples}")
    from dataclasses import replace

    from agvas.checkpoint import load, open_checkpoint
    from calibration.calibrate import (
        DTYPES,
        LAYERS,
        CalibrationSettings,
        calibrate,
        common_group,
        disk_needed,
        memory_needed,
        plan_to_make,
        remove_work,
    )
    from calibration.gptq import GPTQSettings
    from calibration.gptq_checkpoint import check_writable, write_gptq_checkpoint
    from calibration.pictures import calibration_pictures
    from calibration.plan import PLAN, model_sha256, read_records, takes_plan, write_plan
    from calibration.weights import Reading
    from engines.memory import available_memory

    if not takes_plan(options.output):
        raise RequestError(f"--output: expected a new folder or an older plan, got {options.output} with other files; choose another")
    asked = GPTQSettings(bits=options.bits, group=options.group or 0, damping=options.damping)  # wrong values are told before the work
    device = _device(options.device)
    opened = open_checkpoint(options.checkpoint)
    pictures = calibration_pictures(options.images, options.samples)
    dtype = DTYPES[options.dtype]
    needed, free = memory_needed(opened.tensors, dtype, device), available_memory()
    if free is not None and free < needed:
        print(
            f"agvas-calibrate: this takes about {needed >> 20} MiB of memory and {free >> 20} MiB are available: it may be killed; "
            "close other programs, or take --dtype bf16 or --device cuda:0",
            file=sys.stderr,
        )
    model = load(options.checkpoint, dtype, LAYERS)  # decoder layers are read in their turn
    group = common_group(model) if options.group is None else options.group
    if options.gptq_checkpoint and not group:
        raise RequestError("--group: expected more than 0 with --gptq-checkpoint, which has one group for all layers, got 0; leave it out")
    if options.gptq_checkpoint:
        check_writable(options.gptq_checkpoint, model, options.bits)
    weights_sha256 = model_sha256(opened.tensors)  # as stored, which export has: --dtype may have rounded them
    settings = CalibrationSettings(replace(asked, group=group), options.answer_share, device)
    work = options.output.with_name(f"{options.output.name}.partial")
    planned = plan_to_make(model, pictures, settings, weights_sha256)
    found = _finished(options.output, planned, work) if (options.output / PLAN).is_file() else None
    plan: QuantPlan
    weights: Mapping[str, QuantizedWeight]
    if found is not None:
        plan, weights = found
    else:
        short = disk_needed(opened.tensors, opened.config, len(pictures)) - _room(work)
        if short > 0:
            _say(f"this takes {short >> 20} MiB more disk than {work.parent} has: it may stop halfway; what is done by then is kept")
        with Progress() as progress:
            plan, weights, ranges = calibrate(model, pictures, settings, progress, work, planned, opened.tensors)
        write_plan(options.output, plan, weights, ranges)
        try:
            weights = Reading(read_records(options.output)[1])  # those before are read from the work folder
            remove_work(work, plan)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{options.output} was written; the same command does what is left") from None
    if options.gptq_checkpoint:
        try:
            write_gptq_checkpoint(model, weights, options.gptq_checkpoint, floats=opened.tensors)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{options.output} was written, not {options.gptq_checkpoint}; the same command writes that") from None
    errors = [record.error for record in plan.linears]
    plain = [record.rounding_error for record in plan.linears]
    seconds = time.monotonic() - started
    mean, mean_plain = sum(errors) / len(errors), sum(plain) / len(plain)
    groups = f"groups of {group}" if group else "one scale an output"
    print(
        f"{options.output}: {len(weights)} linears in {options.bits} bits, {groups}, on {len(plan.images)} "
        f"pictures ({plan.tokens} tokens) in {seconds:.0f} s; mean output error {mean:.4f}, of plain rounding {mean_plain:.4f}"
    )
    if options.json:
        record = {
            "plan": str(options.output),
            "linears": len(weights),
            "pictures": len(plan.images),
            "tokens": plan.tokens,
            "mean_error": mean,
            "mean_rounding_error": mean_plain,
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": round(seconds, 3),
        }
        print(json_line(record))
    return 0


def _say(line: str) -> None:
    print(f"agvas-calibrate: {line}", file=sys.stderr, flush=True)


def _finished(folder: Path, planned: QuantPlan, work: Path) -> tuple[QuantPlan, Mapping[str, QuantizedWeight]] | None:
    """The plan of an earlier run, where this one would only make it once more; says what the folder holds.

    The work folder goes where it is that plan's: the earlier run was stopped before it had removed it.
    """
    from calibration.calibrate import remove_work
    from calibration.plan import PlanError, read_records
    from calibration.weights import Reading

    try:
        plan, weights = read_records(folder)
    except PlanError as error:
        _say(f"{folder} holds a plan that cannot be read, which the new one will replace once it is whole: {error}")
        return None
    remove_work(work, plan)
    found, wanted = plan.inputs(), planned.inputs()
    if differing := [name for name in wanted if found[name] != wanted[name]]:
        _say(f"{folder} holds another plan, which the new one will replace once it is whole ({', '.join(differing)} differ)")
        return None
    _say(f"{folder} holds this plan already")
    return plan, Reading(weights)


def _room(work: Path) -> int:
    """Free bytes, with those that an interrupted run has taken already."""
    import shutil

    place = next(folder for folder in (work, *work.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free + sum(path.stat().st_size for path in work.rglob("*") if path.is_file())


def _device(name: str) -> str:
    """Raises RequestError where there is no such device: nothing else is used in its place."""
    import torch

    from runtime.errors import RequestError

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device: expected cpu or cuda:N of this machine, got {name!r}: {str(error).splitlines()[0]}") from error
    return name


if __name__ == "__main__":
    sys.exit(main())
