"""agvas-eval: the paper's metrics of a bundle, a checkpoint or a trivial baseline on published data sets and manifests.

The command reads and checks every data set before a model is loaded, then prints a table, and on request a JSON, a CSV line for each
picture and a contact sheet for each data set. How numbers are made stands in evaluation.CONVENTIONS and with every result. Nothing is
trained or tuned here.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contact_sheet import ContactSheet
from benchmarks.datasets import LAYOUTS, READERS_HELP, Judged, read_dataset
from benchmarks.environment import versions
from benchmarks.evaluation import CONVENTIONS, METRICS, Observation, Predict, Prediction, Progress, evaluate, mean_metrics
from benchmarks.operating_points import OperatingPoints, in_words
from benchmarks.per_image import PerImageTable
from benchmarks.predictors import BASELINES, Question, Source, open_predictor, read_normal_text
from runtime.command_line import Parser, warnings_as_lines
from runtime.prompts import DIRECT, MODES
from runtime.recipe import OF_REQUEST, OF_SEGMENTER, Recipe, beside_recipe
from runtime.writing import write_result

__all__ = ["Dataset", "evaluate_datasets", "main", "read_datasets", "table"]

_HEADS = {
    "ap": "AP",
    "f1_max": "F1-max",
    "aupro": "AUPRO",
    "iou_anomalous": "IoU anomalous",
    "found_anomalous": "found anomalous",
    "empty_normal": "empty normal",
    "image_auroc": "image AUROC",
}
_EXTRAS = {"cv2": "eval"}  # by package; what else may be missing is the checkpoint's PyTorch. Engines name their own extras
_NEEDS = """\
what is needed: a bundle needs an engine alone, as agvas-segment does (pip install "agvas[openvino]" or "agvas[cpu]");
--baseline also "agvas[eval]", --checkpoint "agvas[train]"
"""


@dataclass(frozen=True)
class Dataset:
    """A data set whose files were checked: its name in tables, its folder and its pictures."""

    name: str
    root: Path
    items: Sequence[Judged]


def read_datasets(named: Sequence[tuple[str, Path]], limit: int | None = None, split: str | None = None) -> list[Dataset]:
    """The data sets (layout, folder), in order. A published one is named by its layout, others by their folder; a name taken gets a number.

    With `limit`, that many pictures of each, evenly spaced over it (so that sorted kinds and labels all take part). Raises as read_dataset.
    """
    datasets: list[Dataset] = []
    for layout, root in named:
        if layout == "manifest" and root.is_dir() and not (root / "manifest.csv").exists():
            raise ValueError(
                f"{root}: expected a manifest.csv in it, found none; of a folder of pictures give --dataset folder --root {root} (masks in "
                f"{root.name}/masks), or --dataset good --root {root} where all show good parts"
            )
        items = read_dataset(layout, root, split)
        if limit is not None and limit < len(items):
            items = [items[position * len(items) // limit] for position in range(limit)]
        base = root.resolve().name if layout in ("folder", "good", "manifest") else layout
        taken = {dataset.name for dataset in datasets}
        numbered = (f"{base} {number}" for number in range(2, len(named) + 2))
        datasets.append(Dataset(base if base not in taken else next(name for name in numbered if name not in taken), root, items))
    return datasets


def evaluate_datasets(
    datasets: Sequence[Dataset],
    predict: Predict,
    progress: Callable[[str], Progress] = lambda name: iter,
    per_image: PerImageTable | None = None,
    overlays: Path | None = None,
    region: npt.NDArray[np.bool_] | None = None,
) -> list[dict[str, Any]]:
    """`evaluate` of each data set, with its name as "dataset", its "operating_points" and CONVENTIONS as "conventions".

    `progress` gives, for a data set's name, what wraps its items. With `per_image`, a line for each picture goes there; with `overlays`, an
    existing folder, each data set's contact sheet is written there as NAME.png. `region` is evaluate's.
    """
    results = []
    for dataset in datasets:
        sheet = ContactSheet(dataset.name, dataset.root) if overlays is not None else None
        points = OperatingPoints()
        observers: list[Callable[[Observation], None]] = [points]
        if per_image is not None:
            observers.append(functools.partial(per_image.write, dataset.name, dataset.root))
        if sheet is not None:
            observers.append(sheet.add)
        metrics = evaluate(dataset.items, predict, progress(dataset.name), observers, region)
        results.append({"dataset": dataset.name, **metrics, "operating_points": points.to_json(), "conventions": CONVENTIONS})
        if sheet is not None and overlays is not None:
            sheet.save(overlays / f"{dataset.name}.png")
    return results


def table(results: Sequence[dict[str, Any]], paper: bool = False) -> str:
    """A Markdown table: a row for each category, and the mean of each data set and, where there are several, of all.

    With `paper`, the metrics in the form of the paper's table 1, per cent: (AP, F1-max, IoU anomalous), and beside it empty normal.
    """
    shown = ("(AP, F1-max, IoU anomalous) %", "empty normal %") if paper else tuple(_HEADS[name] for name in METRICS)
    heads: tuple[str, ...] = ("data set", "category", "images", *shown)
    rows = [heads]
    for result in results:
        rows += [_row(result["dataset"], name, metrics, paper) for name, metrics in result["categories"].items()]
        if len(result["categories"]) > 1:
            rows.append(_row(result["dataset"], "mean", result["mean"], paper))
    if len(results) > 1:
        rows.append(_row("mean", "", mean_metrics([result["mean"] for result in results]), paper))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _row(dataset: str, category: str, metrics: dict[str, Any], paper: bool) -> tuple[str, ...]:
    if paper:
        percent = {name: "-" if metrics[name] is None else f"{100 * metrics[name]:.1f}" for name in METRICS}
        numbers = [f"({percent['ap']}, {percent['f1_max']}, {percent['iou_anomalous']})", percent["empty_normal"]]
    else:
        numbers = ["-" if metrics[name] is None else f"{metrics[name]:.4f}" for name in METRICS]
    return (dataset.replace("|", "\\|"), category.replace("|", "\\|"), str(metrics["images"]), *numbers)


def _parser() -> argparse.ArgumentParser:
    conventions = "\n".join(f"  {name.replace('_', ' ')}: {text}" for name, text in CONVENTIONS.items())
    parser = Parser(
        prog="agvas-eval",
        description="Pixel AP, F1-max, AUPRO, IoU on anomalous images, empty masks on normal images, and image AUROC.",
        epilog=f"{READERS_HELP}\n{_NEEDS}\nconventions, also in the JSON:\n{conventions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group(
        "data", "at least one; --dataset and --root belong together and may be repeated, the first to the first"
    )
    data.add_argument("datasets", nargs="*", type=Path, metavar="DATASET", help="folder with a manifest.csv")
    layouts = f"the layout of the next --root: {', '.join(LAYOUTS)}, see below"
    data.add_argument("--dataset", action="append", default=[], metavar="LAYOUT", help=layouts)
    data.add_argument("--root", action="append", default=[], type=Path, metavar="DIR", help="the data set's folder")
    data.add_argument("--limit", type=_positive, metavar="N", help="N images of each data set, evenly spaced over it")
    data.add_argument("--split", help="manifest: only the lines whose column split says so; ksdd2, isic: instead of test")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, metavar="DIR", help="an exported bundle")
    source.add_argument("--recipe", metavar="FILE", help="a station's bundle with all of its settings (agvas-segment --save-recipe)")
    source.add_argument("--checkpoint", metavar="nano|DIR", help="the PyTorch reference")
    source.add_argument("--baseline", metavar="NAME", help=f"a trivial map, for comparison: {', '.join(BASELINES)}")
    source.add_argument("--detector", type=Path, metavar="FILE.xml", help="another package's, as anomalib 2 exports it to OpenVINO")
    parser.add_argument("--engine", help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; with --bundle")
    parser.add_argument("--device", help="cpu or cuda:N; with --bundle or --checkpoint")
    parser.add_argument("--inference-precision", help="graph, bf16, int8 or bf16+int8, as agvas-segment has it; with --bundle")
    threads = "CPU threads of one inference (default 0: the engine's choice); with --bundle"
    parser.add_argument("--threads", type=int, metavar="N", help=threads)
    parser.add_argument("--threshold", type=float, metavar="P", help="instead of the model's own; with --bundle or --checkpoint")
    parser.add_argument("--relative-threshold", type=float, metavar="R", help="likewise; 1: masks are what exceeds --threshold")
    parser.add_argument("--tile", type=int, metavar="N", help="see larger pictures in tiles of N × N pixels; with --bundle")
    parser.add_argument("--tile-overlap", type=int, metavar="N", help="pixels that neighbouring tiles share at least")
    parser.add_argument(
        "--region", metavar="FILE", help="judge this part of every picture alone, as agvas-segment does: white where to look; with --bundle"
    )
    parser.add_argument(
        "--fusion-weight", type=float, metavar="A", help="of the absolute map (eq. 8), instead of the model's own; with --checkpoint"
    )
    asked = parser.add_argument_group("question")
    asked.add_argument("--mode", help=f"one that the model was trained for of {', '.join(MODES)} (default {DIRECT})")
    asked.add_argument("--instruction", metavar="TEXT", help="instead of the mode's default")
    asked.add_argument(
        "--normal-text",
        metavar="TEXT|FILE.json",
        help="describe-then-segment-plus: what a normal object looks like, put before the instruction; in a file by category",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--paper", action="store_true", help="print the table in the paper's form: (AP, F1-max, IoU) in per cent")
    output.add_argument("--json", action="store_true", help="print JSON as the last lines")
    output.add_argument("--output", type=Path, metavar="FILE.json", help="also write the JSON to this file, in place of an older one")
    output.add_argument("--csv", type=Path, metavar="FILE.csv", help="a line for each image, written as it is judged; a new file")
    sheets = "a contact sheet of each data set, in place of older ones: best, worst and random images"
    output.add_argument("--overlays", type=Path, metavar="DIR", help=sheets)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _tqdm(name: str) -> Progress:
    from tqdm import tqdm

    return functools.partial(tqdm, desc=name, unit="image", file=sys.stderr, disable=None)  # None: only on a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """The command agvas-eval; 0, 2 with one line on stderr for bad arguments, data, bundle or engine, 130 where it was interrupted."""
    arguments = _parser().parse_args(argv)
    from engines.errors import EngineError
    from runtime.cli.common import say
    from runtime.errors import AgvasError

    tables: list[PerImageTable] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings_as_lines(_say))
            summary, results = _run(arguments, stack, tables)
        say(table(results, arguments.paper))
        for result in results:
            for point in in_words(result["dataset"], result["operating_points"]):
                say(point)
        if not any(result["mean"]["normal_images"] or result["mean"]["ap"] is not None for result in results):
            say("nothing is known of these pictures: give masks, or --dataset good for good parts alone; --csv has every picture's score")
        if arguments.json:
            for line in results if len(results) == 1 else [*results, summary]:
                say(json.dumps(line, allow_nan=False))
        if arguments.output is not None:  # last, so that a full disk does not cost the numbers
            write_result(arguments.output, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        print(f'agvas-eval: {package} is not installed; pip install "agvas[{_EXTRAS.get(package, "train")}]"', file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, EngineError, AgvasError) as error:
        print(f"agvas-eval: {' '.join(str(error).split())}{_kept(tables)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"agvas-eval: interrupted{_kept(tables)}", file=sys.stderr)
        return 130
    return 0


def _say(line: str) -> None:
    """On stderr, above the bar."""
    from tqdm import tqdm

    tqdm.write(f"agvas-eval: {line}", file=sys.stderr)


def _telling(predict: Predict) -> Predict:
    """`predict`, its warnings on stderr with the first picture that each is about, as agvas-segment tells them."""
    told: set[str] = set()

    def telling(item: Judged) -> Prediction:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            prediction = predict(item)
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            if text not in told:
                told.add(text)
                _say(f"warning: {item.image}: {text} (told once)")
        return prediction

    return telling


def _kept(tables: Sequence[PerImageTable]) -> str:
    """Where the lines of a run are that did not end."""
    return "".join(f"; the images judged so far are in {table.partial}" for table in tables if table.partial.exists())


def _asked(arguments: argparse.Namespace) -> tuple[Source, Question]:
    """Who is judged and what it is asked, by the arguments or by a recipe, beside which none of them is taken."""
    if arguments.recipe is not None:
        settings = (*OF_SEGMENTER, *OF_REQUEST, "normal_text", "fusion_weight")
        if given := [name for name in settings if getattr(arguments, name, None) is not None]:
            raise beside_recipe(given[0])
        recipe = Recipe.read(arguments.recipe)
        recipe.check()
        return Source.of_recipe(recipe), Question()
    source = Source(
        arguments.bundle,
        arguments.checkpoint,
        arguments.baseline,
        arguments.engine,
        arguments.device,
        arguments.inference_precision,
        arguments.threshold,
        arguments.relative_threshold,
        arguments.fusion_weight,
        arguments.detector,
        arguments.tile,
        arguments.tile_overlap,
        arguments.region,
        arguments.threads,
    )
    normal_text = None if arguments.normal_text is None else read_normal_text(arguments.normal_text)
    return source, Question(arguments.mode or DIRECT, arguments.instruction, normal_text)


def _run(arguments: argparse.Namespace, stack: ExitStack, tables: list[PerImageTable]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what --output writes, each data set's result); files are opened on `stack`, the table of images goes to `tables`, too.

    With every result stands who was `judged`, with what was used, the `settings` as they were asked for (None is the model's own, or where
    there is no such thing) and `versions`; no paths, so that results made elsewhere compare.
    """
    if len(arguments.dataset) != len(arguments.root):
        given = f"{len(arguments.dataset)} and {len(arguments.root)}"
        raise ValueError(f"--dataset, --root: expected as many of one as of the other, got {given}; give a --root for each --dataset")
    named = [("manifest", folder) for folder in arguments.datasets] + list(zip(arguments.dataset, arguments.root))
    if not named:
        raise ValueError(
            "DATASET: expected at least one data set, got none; name a folder with a manifest.csv, or give --dataset and --root"
        )
    for option, path in (("--output", arguments.output), ("--csv", arguments.csv)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{option}: expected a file in an existing folder, got {path}; make the folder first")
        if path is not None and path.is_dir():
            raise ValueError(f"{option}: expected a file, got the folder {path}; name a file in it")
        if path is not None and not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise ValueError(f"{option}: expected a place that can be written to, got {path}; choose another")
    if arguments.overlays is not None and arguments.overlays.exists() and not arguments.overlays.is_dir():
        raise ValueError(f"--overlays: expected a folder, got the file {arguments.overlays}; name another")
    source, question = _asked(arguments)
    datasets = read_datasets(named, arguments.limit, arguments.split)
    question.check(item.category for dataset in datasets for item in dataset.items)
    predict = open_predictor(source, question, _say)
    if arguments.overlays is not None:
        arguments.overlays.mkdir(parents=True, exist_ok=True)
    if arguments.csv is not None:
        tables.append(stack.enter_context(PerImageTable(arguments.csv)))
    per_image = tables[0] if tables else None
    results = evaluate_datasets(datasets, _telling(predict), _tqdm, per_image, arguments.overlays, predict.region)
    settings: dict[str, Any] = {"mode": None if source.bundle is None and source.checkpoint is None else question.mode}
    settings |= {"instruction": question.instruction, "normal_text": question.normal_text}
    if source.recipe is not None:
        settings |= {"mode": source.recipe.mode, "instruction": source.recipe.instruction, "normal_text": source.recipe.normal_state}
    settings |= {"threshold": source.threshold, "relative_threshold": source.relative_threshold, "fusion_weight": source.fusion_weight}
    settings |= {"tile": source.tile, "tile_overlap": source.tile_overlap}
    settings |= {"region_share": None if predict.region is None else float(predict.region.mean())}
    settings |= {"limit": arguments.limit, "split": arguments.split}
    facts = {"judged": dict(predict.judged), "settings": settings, "versions": versions()}
    results = [result | facts for result in results]
    if len(results) == 1:
        return results[0], results
    return {"datasets": results, "mean": mean_metrics([result["mean"] for result in results]), **facts}, results


if __name__ == "__main__":
    raise SystemExit(main())
