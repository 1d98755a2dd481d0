"""Large frames from small pictures: what tiles are worth, on a data set whose pictures are of one size.

    python -m benchmarks.mosaics DATASET --across 4 --output mosaics
    agvas-eval mosaics --bundle bundle                # seen whole, each picture in it a quarter as large
    agvas-eval mosaics --bundle bundle --tile 512     # seen in tiles

A frame is `--across` pictures wide and high, in the manifest's order; pictures of another size than the first one's, and those that fill no
whole frame, are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.datasets import Judged, read_dataset
from runtime.images import read_image


def frame(pictures: Sequence[np.ndarray], across: int) -> np.ndarray:
    """[H, W, ...] × across² → [across · H, across · W, ...], row by row."""
    rows = [np.concatenate(pictures[start : start + across], axis=1) for start in range(0, across * across, across)]
    return np.concatenate(rows, axis=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mosaics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with a manifest.csv")
    parser.add_argument("--across", type=int, default=4, help="pictures along each side of a frame (default 4)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args(argv)
    items = read_dataset("manifest", options.dataset)
    size = read_image(items[0].image).shape
    alike: list[tuple[Judged, np.ndarray]] = [(item, rgb) for item in items if (rgb := read_image(item.image)).shape == size]
    options.output.mkdir(parents=True)
    count = options.across**2
    with open(options.output / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "label"))
        for number in range(len(alike) // count):
            taken = alike[number * count : (number + 1) * count]
            mask = frame([item.read_mask(*size[:2]).astype(np.uint8) * 255 for item, _ in taken], options.across)
            Image.fromarray(frame([rgb for _, rgb in taken], options.across)).save(options.output / f"{number:03d}.png")
            Image.fromarray(mask).save(options.output / f"{number:03d}_mask.png")
            writer.writerow((f"{number:03d}.png", f"{number:03d}_mask.png", int(mask.any())))
    height, width = (options.across * side for side in size[:2])
    print(f"{options.output}: {len(alike) // count} frames of {width} × {height} pixels", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
