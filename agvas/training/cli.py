"""agvas-train: tune an AG-VAS on your data as the paper does, or train a small one from nothing; a stopped run goes on where it was."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from agvas.config import ABLATIONS
from agvas.interruption import terminated_as_interrupted
from agvas.training.settings import read_settings
from agvas.training.sources.layouts import LAYOUTS_HELP
from runtime.command_line import Parser

if TYPE_CHECKING:
    from agvas.training.loop import LoopSettings

OUTPUT, TUNING_OUTPUT = Path("training-run"), Path("tuning-run")  # a folder holds one run, so the two do not share one

_EXIT_CODES = """\
exit codes: 0 trained; 1 the loss became no number, the last state is intact; 2 nothing could be done with these arguments, files or data;
130 stopped, the same command goes on
"""


def main(arguments: list[str] | None = None) -> int:
    """The command agvas-train; its exit codes are in the help."""
    options = _parser().parse_args(arguments)
    if options.output is None:
        options.output = OUTPUT if options.checkpoint is None else TUNING_OUTPUT
    with terminated_as_interrupted():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        from agvas.training.device import check_device
        from agvas.training.state import Diverged
    except ModuleNotFoundError as error:
        return _lacking(error)
    try:
        for name in ("steps", "batch", "micro_batch", "samples"):
            if (number := getattr(options, name)) is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
        _check_what_is_trained(options)
        _check_output(options.output)
        check_device(options.device)  # first: samples take minutes and gigabytes
        output = _tune(options) if options.checkpoint is not None else _from_nothing(options)
    except ModuleNotFoundError as error:
        return _lacking(error)
    except (ValueError, OSError) as error:
        print(f"agvas-train: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"agvas-train: {error}. {_after_divergence(options)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"agvas-train: stopped; the same command goes on from what was saved in {options.output}", file=sys.stderr)
        return 130
    if output is not None:
        print(f"saved {output}")
    return 0


def _after_divergence(options: argparse.Namespace) -> str:
    if options.checkpoint is None:
        return "The rates of --config are its recipe's and the same command comes to the same step; try another --seed in another --output"
    return (
        "Look at the samples of this step, or give a lower learning_rate or clip_norm or more warmup_steps under \"loop\" in the file of "
        "--settings; then the same command goes on from that state, or begins again where there is none"
    )


def _lacking(error: ModuleNotFoundError) -> int:
    """What is missing, in the words of the file that asked for it, where it has any."""
    said = str(error)
    if said.startswith(("No module named", "import of ")):  # Python's
        said = f'{error.name} is not installed; pip install "agvas[train]"'
    print(f"agvas-train: {said}", file=sys.stderr)
    return 2


def _check_what_is_trained(options: argparse.Namespace) -> None:
    """ValueError where nothing is named: the training of nano takes hours and gigabytes and is not begun unasked."""
    if options.config is None and options.checkpoint is None:
        raise ValueError(
            "--config, --checkpoint: expected one of the two, got none; give --checkpoint nano|DIR --mixture FILE.json to tune a model, or "
            "--config nano to train nano from nothing (hours, 12 GB of samples)"
        )


def _check_output(folder: Path) -> None:
    """ValueError for a folder of something else: a run is many files, which no one would want among pictures."""
    if not folder.is_dir() or not (found := sorted(path.name for path in folder.iterdir())):
        return
    if not {"recipe.json", "settings.json", "state.safetensors", "state", "pool", "pretraining"} & {*found}:
        raise ValueError(f"--output {folder}: expected a new or empty folder, or that of a run, got one with {found[0]}; choose another")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="agvas-train",
        description=__doc__,
        epilog=f"{LAYOUTS_HELP}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", choices=("nano", "tiny"), help="train this named size from nothing on procedural samples")
    what.add_argument("--checkpoint", metavar="nano|DIR", help="tune this checkpoint: LoRA, SPAM, AGMD, embeddings and head (paper B.2)")
    parser.add_argument(
        "--mixture", type=Path, metavar="FILE.json", help="what to tune on: sources as below, in the form agvas/training/README.md shows"
    )
    parser.add_argument(
        "--settings", type=Path, metavar="FILE.json", help="tuning settings that differ from the paper's; see agvas/training/README.md"
    )
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="keep what the frozen encoders say of each picture")
    where = f"folder of states, logs and checkpoint (default {OUTPUT}, with --checkpoint {TUNING_OUTPUT})"
    parser.add_argument("--output", type=Path, metavar="DIR", help=where)
    parser.add_argument("--steps", type=int, help="optimiser steps (of each of the three phases with --config)")
    parser.add_argument("--batch", type=int, help="samples an optimiser step learns from, over all processes")
    parser.add_argument("--micro-batch", type=int, help="samples a process computes with at a time")
    parser.add_argument("--samples", type=int, help="procedural samples in the pool, with --config")
    parser.add_argument("--ablation", choices=ABLATIONS, help="leave a part out (the paper's table 3)")
    parser.add_argument("--seed", type=int, help="of weights and of the order of samples (default: the recipe's, 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:N; with torchrun or accelerate launch: cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that make samples (default 2; 0: none of their own)")
    return parser


def _from_nothing(options: argparse.Namespace) -> Path | None:
    for name in ("mixture", "settings", "feature_cache"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for tuning; give --checkpoint in place of --config")
    from agvas.training.processes import is_main_process
    from agvas.training.recipe import Recipe, train_from_nothing

    recipe = Recipe(config=options.config, ablation=options.ablation).with_seed(options.seed or 0)
    recipe = recipe.shortened(options.steps, options.steps, options.samples)
    recipe = replace(
        recipe,
        pretraining=replace(recipe.pretraining, loop=_changed_loop(recipe.pretraining.loop, options)),
        language=replace(recipe.language, loop=_changed_loop(recipe.language.loop, options)),
        tuning=replace(recipe.tuning, loop=_changed_loop(recipe.tuning.loop, options)),
    )
    train_from_nothing(recipe, options.output, options.device, options.workers)
    return options.output / "checkpoint" if is_main_process() else None


def _tune(options: argparse.Namespace) -> Path | None:
    if options.samples is not None:
        raise ValueError("--samples is for training from nothing; leave it or --checkpoint out")
    if options.mixture is None:
        raise ValueError("--checkpoint needs what to tune on; give --mixture FILE.json (see agvas/training/README.md)")
    from agvas.checkpoint import load
    from agvas.training.ablation import leave_out
    from agvas.training.mixture import Mixture, MixtureSettings
    from agvas.training.processes import is_main_process
    from agvas.training.text_limits import TextLimits
    from agvas.training.trainer import TuningSettings, tune

    settings = TuningSettings() if options.settings is None else read_settings(options.settings, TuningSettings())
    settings = replace(settings, loop=_changed_loop(settings.loop, options))
    mixture_settings = MixtureSettings.read(options.mixture)
    model = load(options.checkpoint)
    if options.ablation is not None:
        told = leave_out(model, options.ablation)
        if is_main_process():
            print(told, file=sys.stderr)
    prompts = model.config.prompts
    mixture = Mixture(mixture_settings, prompts.anchors, TextLimits(model.tokenizer, prompts))
    if is_main_process():
        print(mixture.describe(), file=sys.stderr)
    facts = {"checkpoint": str(options.checkpoint), "mixture_groups": mixture.facts()}
    tune(model, mixture, settings, options.output, options.device, options.workers, options.feature_cache, facts)
    return options.output / "checkpoint" if is_main_process() else None


def _changed_loop(loop: LoopSettings, options: argparse.Namespace) -> LoopSettings:
    steps = loop.steps if options.steps is None else options.steps
    batch = loop.global_batch if options.batch is None else options.batch
    # No more at a time than a process has of a step's samples.
    share = max(1, batch // int(os.environ.get("WORLD_SIZE", 1)))
    micro = min(share, loop.micro_batch) if options.micro_batch is None else options.micro_batch
    seed = loop.seed if options.seed is None else options.seed
    return replace(loop, steps=steps, global_batch=batch, micro_batch=micro, seed=seed)


if __name__ == "__main__":
    sys.exit(main())
