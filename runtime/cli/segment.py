"""agvas-segment: pictures in; verdicts, masks and overlays out.

One line on stdout for each picture and instruction, in words or as JSON; everything else (engine, progress, errors) goes to stderr, so
a program can read stdout line by line while the run goes on. A picture is looked at once, whatever the number of instructions. One that
cannot be segmented has its line, too, and the run goes on; a result that cannot be written stops it, since the next one could not be
written either.

Exit codes: 0 every picture has a verdict, 1 some have none, 2 nothing could be done or a result could not be written,
3 some are NG (where asked for), 130 interrupted (with --watch, whose only end it is, 0).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineError, EngineOptions
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
from runtime.cli.output import alone_in, prepare, refuse_own_folder, refuse_own_results, spare_inputs
from runtime.cli.records import endings_of, made, output_stems, records_of, segment_pictures
from runtime.cli.watch import SETTLED, Watch
from runtime.command_line import Parser, on_stderr, warnings_as_lines
from runtime.errors import AgvasError, ImageError, RequestError, choose
from runtime.images import PIXEL_LIMIT, PictureWarning
from runtime.picture_files import Found, search
from runtime.prompts import DIRECT, MODES, PLUS
from runtime.recipe import OF_REQUEST, OF_SEGMENTER, Recipe, beside_recipe
from runtime.region import read_region
from runtime.segmenter import Segmenter
from runtime.tiling import Tiling


def main(argv: Sequence[str] | None = None) -> int:
    heard = sys.stdout is not None
    open_streams()
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)  # inputs before and behind the options
    if arguments.bundle is None and arguments.recipe is None:
        parser.error("one of the arguments --bundle --recipe is required")
    before, recipe = _end_as_ctrl_c(), None
    try:
        if not heard and arguments.output is None:
            raise RequestError("stdout: expected somewhere for the verdicts to go, got a closed one; redirect it, or give --output DIR")
        recipe = None if arguments.recipe is None else _follow(arguments, argv)
        with warnings_as_lines(on_stderr("agvas-segment")), contextlib.ExitStack() as held:
            return _run(arguments, recipe, held)
    except KeyboardInterrupt:
        how = "stopped" if arguments.watch else "interrupted"
        print(f"agvas-segment: {how}; what was written so far is whole and stays", file=sys.stderr)
        return 0 if arguments.watch else 130  # --watch has no other end
    except BrokenPipeError:
        close_stdout()
        return 2
    except (AgvasError, EngineError, OSError) as error:
        print(f"agvas-segment: {str(error) if recipe is None else _as_asked(str(error), arguments.recipe)}", file=sys.stderr)
        return 2
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end_as_ctrl_c() -> Any:
    """Take SIGTERM, by which a service is stopped, for Ctrl-C; gives what took it before, None in a thread that may not set it."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="agvas-segment",
        description="Segment anomalies in pictures with an exported AG-VAS. One line on stdout for each picture and instruction.",
        epilog="Exit codes: 0 every picture has a verdict, OK or NG; 1 some have none (not read, or no map); 2 nothing could be done, "
        "or a result could not be written; 3 with --fail-on-ng, some are NG; 130 interrupted "
        "(0 with --watch, which is stopped so). A line begins with OK, NG, or ?? where "
        "there is no verdict: the picture was not read, or the model gave no map. Its time leaves out reading and writing files. "
        "Pictures of the same name in different folders get their folders' names in front: crack__000_mask.png, good__000_mask.png. "
        "With several instructions their numbers stand behind: 000__1_mask.png, 000__2_mask.png.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMAGE|DIR|GLOB", help="pictures, folders of pictures, or quoted patterns")
    add_engine_arguments(parser, bundle_required=False)
    add(
        "--recipe",
        metavar="FILE",
        help="take bundle, engine, thresholds, tiles, region and instruction from there; each record then has its sha256",
    )
    add("--save-recipe", metavar="FILE", help="write these settings as a recipe, once model and settings have been found to go together")
    add("--mode", default=DIRECT, help=f"one that the model was trained for of {', '.join(MODES)} (default {DIRECT})")
    add(
        "--instruction",
        action="append",
        metavar="TEXT",
        help="what to look for, in words (default: the mode's own); give it again to ask more about the same pictures",
    )
    add("--normal-state", metavar="TEXT", help=f"for --mode {PLUS}: a sentence on what a normal object looks like")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the bundle's limit, also the most)")
    add("--threshold", type=float, metavar="P", help="a picture is anomalous where its map exceeds it, 0..1 (default: the bundle's)")
    add(
        "--relative-threshold",
        type=float,
        metavar="R",
        help="an anomalous picture's mask is what lies above R times its map's maximum, 0..1; 1: above --threshold (default: the bundle's)",
    )
    add("--tile", type=int, metavar="N", help="see larger pictures in tiles of N × N pixels, an inference each (default: whole)")
    add("--tile-overlap", type=int, metavar="N", help="pixels that neighbouring tiles share at least (default: an eighth of --tile)")
    add("--region", metavar="FILE", help="a picture, white where to look and black where not; pictures must be of its size")
    add("--pixel-limit", type=int, default=PIXEL_LIMIT, metavar="N", help=f"largest picture (default {PIXEL_LIMIT})")
    add("--recursive", action="store_true", help="look into subfolders too")
    add(
        "--watch",
        action="store_true",
        help="go on with the pictures that come into the folders named, each once it is whole, until Ctrl-C or SIGTERM; results have the "
        "whole name (part.png_mask.png), in subfolders as the pictures",
    )
    add("--settle", type=float, metavar="S", help=f"with --watch: a file is whole that has not changed for S seconds (default {SETTLED})")
    add("--output", metavar="DIR", help="write <stem>_mask.png (0 and 255) there, in place of older files")
    add("--overlay", action="store_true", help="write <stem>_overlay.png too")
    add("--map", action="store_true", help="write <stem>_map.png too, the anomaly map in 16 bits: 65535 is a probability of 1")
    add("--polygons", action="store_true", help="with --json: the outline of each mask too")
    add("--json", action="store_true", help="one JSON object for each picture, in place of words")
    add("--fail-on-ng", action="store_true", help="exit code 3 where every picture has a verdict and some are NG (default: 0)")
    add(
        "--strict",
        action="store_true",
        help="exit code 1 too where a picture was warned of (dark, of one tone, a sliver, far too large), or left out of a folder as of a "
        "kind that is not read, such as .webp; each of the latter then has a line",
    )
    add("--quiet", action="store_true", help="no notes and no progress bar on stderr, only errors and warnings")
    return parser


def _follow(arguments: argparse.Namespace, argv: Sequence[str] | None) -> Recipe:
    """Settings as the recipe has them, whose file says that bundle and region are its own.

    Raises:
        RequestError: see Recipe; a setting that is given beside it, which would have to win or to lose in silence.
    """
    recipe = Recipe.read(arguments.recipe)
    left_out = object()  # not a default, which may have been given, too; of what is given several times None
    apart = argparse.Namespace(**dict.fromkeys(vars(arguments), left_out) | {"instruction": None})
    again = vars(_parser().parse_intermixed_args(argv, apart))
    given = [name for name, value in again.items() if value is not left_out and value is not None]
    if twice := next((name for name in ("bundle", *OF_SEGMENTER, *OF_REQUEST, "save_recipe") if name in given), None):
        raise beside_recipe(twice)
    recipe.check()
    for name in ("bundle", *OF_SEGMENTER, *OF_REQUEST):
        setattr(arguments, name, getattr(recipe, name))
    if recipe.instruction is not None:
        arguments.instruction = [recipe.instruction]
    return recipe


def _as_asked(message: str, recipe: str) -> str:
    """Words on an option in words on the recipe's setting, where that is where it stands."""

    def as_set(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return name if name in (*OF_SEGMENTER, *OF_REQUEST) else option[0]

    words = re.sub(r"--([a-z-]+)", as_set, message)
    about = re.match(r"\w+", words)
    return f"{recipe}: {words}" if about is not None and about[0] in (*OF_SEGMENTER, *OF_REQUEST) else message


def _to_save(arguments: argparse.Namespace) -> Recipe | None:
    """What --save-recipe shall write.

    Raises:
        RequestError: it would hold several instructions; its folder is not there.
    """
    if arguments.save_recipe is None:
        return None
    instructions = arguments.instruction or [None]
    if len(instructions) > 1:
        raise RequestError(f"--save-recipe: expected one --instruction, which a recipe holds, got {len(instructions)}; save one for each")
    path = Path(arguments.save_recipe)
    if path.is_dir():
        raise RequestError(f"--save-recipe {path}: expected a file, got a folder; name a file in it, such as {path / 'station.json'}")
    if not path.parent.is_dir():
        raise RequestError(f"--save-recipe {path}: expected a file in a folder that is there, got {path.parent}; make that folder")
    settings = {name: getattr(arguments, name) for name in ("bundle", *OF_SEGMENTER, *OF_REQUEST)}
    return Recipe(**settings | {"instruction": instructions[0]})


def _run(arguments: argparse.Namespace, recipe: Recipe | None, held: contextlib.ExitStack) -> int:
    options = engine_options(arguments)
    _check(arguments)
    to_save = _to_save(arguments)
    note = (lambda line: None) if arguments.quiet else on_stderr("agvas-segment")
    warnings.simplefilter("once", UserWarning)
    if arguments.output is not None:
        for place in _places(arguments):
            refuse_own_results(arguments.inputs, place, arguments.recursive)
    found, failed = (Found([], [], []), []) if arguments.watch else _find(arguments.inputs, arguments.recursive)
    pictures = found.pictures
    if arguments.strict:
        failed += [{"image": str(path), "error": reason, **made()} for path, reason in found.left_out]
    if arguments.output is not None:
        spare_inputs(pictures, output_stems(pictures), endings_of(len(arguments.instruction or [None])), Path(arguments.output))
        refuse_own_folder(arguments.inputs, arguments.output)
    for record in failed:
        _report(record, arguments.json, False)
    if not pictures and not arguments.watch:
        return 2
    region = None if arguments.region is None else _read_region(arguments.region)
    if region is not None and region.all():
        warnings.warn(f"--region {arguments.region}: white throughout, so that nothing is left out", stacklevel=2)
    if arguments.output is not None:
        prepare(arguments.output)  # before the model is opened, which can take minutes
        if arguments.watch:
            for place in dict.fromkeys((arguments.output, *_places(arguments))):
                held.enter_context(alone_in(place))
    segmenter = _open(arguments, options, region, note)
    verdicts, warned = Counter[str](failed=len(failed)), set[str]()
    instructions = arguments.instruction or [None]
    if to_save is not None:
        segmenter.request(**to_save.request)  # or it would be saved and refused
        to_save.write(arguments.save_recipe)
        note(f"saved {arguments.save_recipe}")
    warnings.simplefilter("ignore", PictureWarning)  # _warn tells them, with the first picture's name
    asked = {"mode": arguments.mode, "normal_state": arguments.normal_state, "max_new_tokens": arguments.max_new_tokens}
    if arguments.watch:
        watch = Watch(
            arguments.inputs,
            recursive=arguments.recursive,
            settled=SETTLED if arguments.settle is None else arguments.settle,
            say=lambda line: print(f"agvas-segment: {line}", file=sys.stderr),
        )
        held.callback(_tell_waiting, watch)
        requests = [segmenter.request(text, **asked) for text in instructions]
        kinds = {"mask": True, "overlay": arguments.overlay, "map": arguments.map}
        records = records_of(segmenter, _as_they_come(watch, arguments), requests, kinds, arguments.polygons)
        note(f"watching {', '.join(arguments.inputs)}; Ctrl-C ends it")
    else:
        records = segment_pictures(
            segmenter,
            pictures,
            instructions=instructions,
            output=arguments.output,
            overlay=arguments.overlay,
            anomaly_map=arguments.map,
            polygons=arguments.polygons,
            **asked,
        )
    with Progress(quiet=arguments.quiet or arguments.watch) as progress:
        done, several = 0, len(instructions) > 1
        for record in records:
            progress.step_aside()
            if recipe is not None:
                record["recipe_sha256"] = recipe.sha256
            _warn(record, warned)
            _report(record, arguments.json, several)
            verdicts[_verdict(record)] += 1
            done += 1 if "instruction" in record else len(instructions)  # a picture that cannot be read leaves none to ask
            progress("answers" if several else "pictures", done, len(pictures) * len(instructions))
    where = "" if arguments.output is None else f"; masks in {arguments.output}"
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()) if count)
    note(("answers: " if several else "") + told + where)
    if verdicts["failed"] or verdicts["??"] or (arguments.strict and warned):
        return 1
    return 3 if arguments.fail_on_ng and verdicts["NG"] else 0


def _open(arguments: argparse.Namespace, options: EngineOptions, region: np.ndarray | None, note: Callable[[str], None]) -> Segmenter:
    """The segmenter that was asked for; notes say what `auto` chose, and why."""
    if arguments.engine == AUTO:
        note(opening(arguments.bundle))
    segmenter = Segmenter(
        arguments.bundle,
        arguments.engine,
        options.device,
        inference_precision=arguments.inference_precision,
        threads=options.threads,
        low_memory=options.low_memory,
        remeasure=arguments.remeasure,
        threshold=arguments.threshold,
        relative_threshold=arguments.relative_threshold,
        tile=arguments.tile,
        tile_overlap=arguments.tile_overlap,
        region=region,
        pixel_limit=arguments.pixel_limit,
    )
    if segmenter.choice is not None:
        chosen = replace(options, inference_precision=segmenter.inference_precision)
        when = " when it was measured" if segmenter.choice.remembered else ""
        note(f"{describe(segmenter.engine, chosen)}, chosen by auto: {segmenter.choice.milliseconds:.1f} ms a picture{when}")
        for name, reason in () if segmenter.choice.remembered else segmenter.choice.rejected.items():
            note(f"  not {name}: {reason}")
    return segmenter


def _check(arguments: argparse.Namespace) -> None:
    choose("--mode", arguments.mode, MODES)
    if arguments.settle is not None and not arguments.watch:
        raise RequestError("--settle: expected --watch beside it, got none; leave it out")
    if arguments.watch:
        _check_watch(arguments)
    for option, given, what in (("--overlay", arguments.overlay, "overlays"), ("--map", arguments.map, "maps")):
        if given and arguments.output is None:
            raise RequestError(f"{option}: expected --output DIR beside it, got none; say where to write the {what}")
    if arguments.polygons and not arguments.json:
        raise RequestError("--polygons: expected --json beside it, got none; outlines are given in JSON only")
    for option in ("threshold", "relative_threshold"):
        given = getattr(arguments, option)
        if given is not None and not 0 <= given <= 1:
            raise RequestError(f"--{option.replace('_', '-')}: expected a number in 0..1, got {given}")
    if arguments.pixel_limit < 1:
        raise RequestError(f"--pixel-limit: expected at least 1, got {arguments.pixel_limit}")
    if arguments.tile is None and arguments.tile_overlap is not None:
        raise RequestError("--tile-overlap: expected --tile beside it, got none; say how large the tiles are")
    if arguments.tile is not None:
        try:
            Tiling(arguments.tile, arguments.tile_overlap)
        except RequestError as error:
            raise RequestError(f"--{str(error).replace('tile_overlap', 'tile-overlap')}") from error


def _check_watch(arguments: argparse.Namespace) -> None:
    for name in arguments.inputs:
        if not os.path.isdir(name):
            raise RequestError(f"--watch: expected folders, got {name}, which is none; make it, or name the folder that pictures come into")
    for option, given in (("--strict", arguments.strict), ("--fail-on-ng", arguments.fail_on_ng)):
        if given:
            raise RequestError(f"{option}: expected no --watch beside it, whose exit code comes when it is stopped; read each line instead")
    if arguments.settle is not None and not 0 <= arguments.settle < float("inf"):
        raise RequestError(f"--settle: expected seconds, 0 or more, got {arguments.settle}")
    if len({os.path.realpath(name) for name in arguments.inputs}) < len(arguments.inputs):
        raise RequestError("--watch: expected each folder once, got one twice; name it once")
    names = [_own_name(name).casefold() for name in arguments.inputs]
    if arguments.output is not None and len({*names}) < len(names):
        raise RequestError("--watch: expected folders of different names, whose results have folders of these names; got one twice")


def _as_they_come(watch: Watch, arguments: argparse.Namespace) -> Iterator[tuple[Path, Path | None, str]]:
    """--watch's pictures, with folder and stem of their results, which do not depend on what else has come, or is going to."""
    places = {} if arguments.output is None else dict(zip(arguments.inputs, _places(arguments), strict=True))
    for folder, path in watch:
        yield path, Path(places[folder]) / path.parent.relative_to(folder) if places else None, path.name


def _tell_waiting(watch: Watch) -> None:
    if waiting := watch.left():
        print(f"agvas-segment: pictures that lie there and have not been judged: {waiting} at least", file=sys.stderr)


def _places(arguments: argparse.Namespace) -> list[str]:
    """Where results go: of several folders that are watched, in a folder of each one's name."""
    if not arguments.watch or len(arguments.inputs) == 1:
        return [arguments.output]
    return [os.path.join(arguments.output, _own_name(name)) for name in arguments.inputs]


def _own_name(folder: str) -> str:
    return os.path.basename(os.path.abspath(folder))


def _read_region(path: str) -> np.ndarray:
    try:
        return read_region(path)
    except AgvasError as error:
        raise RequestError(f"--region {error}") from error


def _find(inputs: Sequence[str], recursive: bool) -> tuple[Found, list[dict[str, Any]]]:
    """What those inputs hold that give pictures, and a record of each that gives none."""
    good, failed = [], []
    for name in inputs:
        try:
            search(name, recursive=recursive)
        except ImageError as error:
            failed.append({"image": name, "error": str(error), **made()})
        else:
            good.append(name)
    return (search(good, recursive=recursive) if good else Found([], [], [])), failed


def _warn(record: dict[str, Any], warned: set[str]) -> None:
    """On stderr, each warning of the first picture that it is about: a line's log does not fill."""
    for warning in record.get("warnings", ()):
        if warning not in warned:
            warned.add(warning)
            print(f"agvas-segment: warning: {record['image']}: {warning} (told once)", file=sys.stderr)


def _report(record: dict[str, Any], as_json: bool, several: bool) -> None:
    if "error" in record:
        image, reason = record["image"], record["error"]
        # Messages about files begin with the file's name already.
        named = reason if reason.startswith((image, repr(image))) else f"{image}: {reason}"
        print(f"agvas-segment: {named}", file=sys.stderr)
    say(json_line(record) if as_json else _in_words(record, several))


def _in_words(record: dict[str, Any], several: bool) -> str:
    """With several instructions, which of them it was stands below."""
    image = _printable(record["image"])
    if "error" in record:
        asked = f"\n    {_one_line(record['instruction'])}" if several and "instruction" in record else ""
        return f"??  {'-':>5}  {'-':>9} px  {'-':>8} ms  {image}  (no verdict: stderr says why){asked}"
    milliseconds = record["timings_ms"]["total"]
    line = f"{_verdict(record)}  {record['score']:.3f}  {record['area']:>9} px  {milliseconds:8.1f} ms  {image}"
    if not record["anchors_found"]:
        lacks = "was cut at the length limit before its anchors" if record["truncated"] else "lacks [NOR], [ANO] or [SEG]"
        line += f"  (no verdict: the answer {lacks})"
    if record["warnings"]:
        line += "  (warned of: --json has the words)"
    if record["anchor_groups"] > 1:
        line += f"  (the first of {record['anchor_groups']} masks in the answer)"
    if several:
        line += f"\n    {_one_line(record['instruction'])}"
    if not record["answer_verified"]:  # the model's own words: news in direct mode, the purpose of the others
        line += f"\n    {_one_line(record['text'])}{' … (cut at the length limit)' if record['truncated'] else ''}"
    return line


def _one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """Without the line breaks and control codes that a file's name or a model's answer could send to a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _verdict(record: dict[str, Any]) -> str:
    """In a word or two; a picture for which the model gave no map is not OK, though nothing anomalous was found."""
    if "error" in record:
        return "failed"
    if not record["anchors_found"]:
        return "??"
    return "NG" if record["is_anomalous"] else "OK"


if __name__ == "__main__":
    sys.exit(main())
