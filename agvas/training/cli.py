"""agvas-train: train a small AG-VAS from nothing, or go on where an interrupted run stopped."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agvas-train", description=__doc__)
    parser.add_argument("--config", default="nano", choices=("nano", "tiny"), help="named size to train (default nano)")
    parser.add_argument("--output", type=Path, default=Path("training-run"), help="folder of pool, state and checkpoint")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps of each of the two phases (default: the recipe's)")
    parser.add_argument("--batch", type=int, default=None, help="images per step (default: the recipe's)")
    parser.add_argument("--samples", type=int, default=None, help="procedural samples in the pool (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--workers", type=int, default=2, help="processes that make samples")
    options = parser.parse_args(arguments)

    try:
        from agvas.training.trainer import Diverged, TrainSettings, train
    except ModuleNotFoundError as error:
        print(f'agvas-train: {error.name} is not installed; pip install "agvas[train]"', file=sys.stderr)
        return 2

    settings = TrainSettings(config=options.config, seed=options.seed)
    if options.steps is not None:
        settings = replace(settings, steps=options.steps, encoder_steps=options.steps, plain_until=options.steps // 3)
    if options.batch is not None:
        settings = replace(settings, batch=options.batch)
    if options.samples is not None:
        settings = replace(settings, pool=replace(settings.pool, samples=options.samples, plain=options.samples * 2 // 5))
    try:
        train(settings, options.output, options.device, options.workers)
    except (ValueError, Diverged, OSError) as error:
        print(f"agvas-train: {error}", file=sys.stderr)
        return 1
    print(f"saved {options.output / 'checkpoint'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
