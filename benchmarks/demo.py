"""The demo: export the shipped model, verify the bundle here, segment pictures with it. `make demo` runs this.

The pictures are photographs of surfaces, nano's subject, that scikit-image carries in its package (nothing is
downloaded), with procedural defects drawn on them from seeds that training never used, so that the truth is known; two
are left without a defect. Photos of one's own are segmented unchanged. It shows that the chain works on this machine;
how good the model is on real defects, benchmarks.accuracy measures. A second demo takes the first one's bundle as long as model and code
are the same, and what the first one left is replaced when the second one's pictures have been judged.

Exit codes: 0 all went well, 1 export's or verification's gates or a picture failed, 2 it could not be run,
130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from engines import EngineError
from runtime import Segmentation, Segmenter
from runtime.bundle import Bundle
from runtime.cli.common import Progress, json_line
from runtime.cli.records import output_stems
from runtime.cli.verify import verify_bundle
from runtime.errors import AgvasError, BundleError, RequestError
from runtime.images import read_image
from runtime.picture_files import find_images
from runtime.writing import write_whole

SURFACES = ("brick", "gravel", "grass")
SCENES = ("coins", "coffee", "page")
DEFECTS = ("crack", "stain", "hole", "scratch", "contamination", "cut", "corrosion", "spalling")
FIRST_SEED = 9_000_000_000  # training draws from 1,000,000 on, export's parity pictures from 8,000,000,000 on

_ATTEMPTS = 40
_DEFECT_SHARE = (0.004, 0.2)  # of the picture

TIMED_CALLS = 20  # at least; every picture equally often
WARM_UP_CALLS = 3

MADE_OF = "bundle.made_of.json"  # beside the bundle: what it was made of, once it has been verified
MAKERS = ("agvas", "calibration", "export", "engines", "runtime")  # packages whose code a bundle depends on

_CELL = 256  # of the contact sheet, pixels
_LABEL = 28
_GAP = 24  # between two pictures of a row
_FONT = 17
_LETTERS = 28  # of a label that fits its cell


@dataclass(frozen=True)
class DemoPicture:
    """A picture to segment: its file, uint8 RGB [H, W, 3], and the defect drawn on it.

    Attributes:
        truth: bool [H, W], where the defect was drawn; all False where none was; None for a photo of the user's own.
        defect: kind of the defect, "" where there is none or it is not known.
    """

    path: Path
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.bool_] | None
    defect: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("photos", nargs="*", metavar="PHOTO", help="pictures or folders of your own, segmented unchanged")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of everything made (default demo)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="demo pictures to make (default 8)")
    options = parser.parse_args(argv)
    try:
        return run_demo(options.output, options.count, options.photos)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (AgvasError, EngineError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def run_demo(output: Path, count: int, photos: Sequence[str]) -> int:
    """Make everything under `output`, in place of an earlier demo; returns the exit code.

    Raises:
        RequestError: `count` is negative or leaves nothing to segment, or `output` is a folder of something else.
        ImageError: a photo is not there.
        AgvasError, EngineError: the bundle cannot be used.
    """
    if count < 0 or not (count or photos):
        raise RequestError(f"--count: expected at least 1 picture to segment, got {count} and {len(photos)} photos")
    photo_paths = find_images(photos) if photos else []
    _check_output(output)
    if _is_made_of(output, made_of := _made_of()):
        print(f"1. {output / 'bundle'} is an earlier demo's of this model and code: not exported again", file=sys.stderr)
    else:
        print(f"1. export nano to {output / 'bundle'}", file=sys.stderr)
        if code := _export(output / "bundle"):
            print(f"demo: the export failed (exit code {code}); see above", file=sys.stderr)
            return code
    with Progress() as progress:
        print("2. verify: do the masks agree with the PyTorch reference's?", file=sys.stderr)
        verified = verify_bundle(output / "bundle", progress=progress)
        if not verified["passed"]:
            print(f"demo: verification failed: {'; '.join(verified['failures'])}", file=sys.stderr)
            return 1
        noted = {"made_of": made_of, "bundle": Bundle(output / "bundle", check_hashes=False).id}
        write_whole(output / MADE_OF, json.dumps(noted).encode())
        progress.step_aside()
        parity = verified["parity"]
        agreed = f"mask IoU {parity['mask_iou_mean']:.4f}, {parity['flips']} flips on {parity['images']} golden pictures"
        print(f"   passed: {agreed}", file=sys.stderr)
        print("3. pictures", file=sys.stderr)
        pictures = make_pictures(output / "pictures", count)
        unreadable = []
        for path in photo_paths:
            try:
                pictures.append(DemoPicture(path, read_image(path), None, ""))
            except AgvasError as error:
                print(f"demo: {error}", file=sys.stderr)
                unreadable.append({"image": str(path), "error": str(error)})
        if not pictures:
            return 2
        print("4. segment", file=sys.stderr)
        segmenter = Segmenter(output / "bundle", engine="auto")
        results = []
        for done, picture in enumerate(pictures, 1):
            results.append(segmenter(picture.image))
            progress("pictures", done, len(pictures))
        latency = measure_latency(segmenter, [picture.image for picture in pictures], progress)
    _clear(output)  # not before: what stops a second demo leaves the first one's results
    stems = output_stems([picture.path for picture in pictures])
    records = [_write(picture, result, stem, output) for picture, result, stem in zip(pictures, results, stems, strict=True)]
    ious = [record["true_iou"] for record in records if "true_iou" in record]
    summary = {
        "bundle": str(output / "bundle"),
        "verify": verified,
        "engine": segmenter.engine,
        "inference_precision": segmenter.inference_precision,
        "device": segmenter.device,
        "images": [*records, *unreadable],
        "latency_ms": latency,
        "threshold": segmenter.rule.threshold,
        "mean_true_iou": float(np.mean(ious)) if ious else None,
    }
    contact_sheet(pictures, results, records).save(output / "contact_sheet.png")
    (output / "summary.json").write_text(json.dumps(json.loads(json_line(summary)), indent=2) + "\n")
    print("\n".join(_table(summary, output)))
    return 1 if unreadable else 0


def make_pictures(folder: Path, count: int) -> list[DemoPicture]:
    """Surfaces from scikit-image's package, every round turned further, with one drawn defect each; of four or more the last two have none.

    Their files are to be in `folder` (`_write` saves them). The same count gives the same pictures. A defect of a size outside
    _DEFECT_SHARE is drawn again from the next seed: too small or too large to tell on the contact sheet, it would show nothing.

    Raises:
        RequestError: scikit-image is not installed, or its package carries none of the photographs.
    """
    if not count:
        return []
    photographs = photographs_of(SURFACES)
    flawless = 2 if count >= 4 else count // 2
    pictures = []
    for index in range(count):
        turn, which = divmod(index, len(photographs))
        image = np.ascontiguousarray(np.rot90(photographs[which][1], turn))
        truth, defect = np.zeros(image.shape[:2], bool), ""
        if index < count - flawless:
            image, truth, defect = with_defect(image, DEFECTS[index % len(DEFECTS)], FIRST_SEED + _ATTEMPTS * index)
        path = folder / f"{index + 1:02}_{photographs[which][0]}_{defect or 'good'}.png"
        pictures.append(DemoPicture(path, image, truth, defect))
    return pictures


def with_defect(
    photograph: npt.NDArray[np.uint8], kind: str, first_seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], str]:
    """The photograph with a defect of that kind, its truth and the kind: from the first of _ATTEMPTS seeds that draws a fair size."""
    from agvas.training.defects import add_defect  # loads OpenCV

    for seed in range(first_seed, first_seed + _ATTEMPTS):
        image, truth, defect = add_defect(photograph, np.random.default_rng(seed), kind)
        if _DEFECT_SHARE[0] <= truth.mean() <= _DEFECT_SHARE[1]:
            break
    return image, truth, defect


def measure_latency(segmenter: Segmenter, images: Sequence[npt.NDArray[np.uint8]], progress: Progress | None = None) -> dict[str, float]:
    """Milliseconds of one call, from the picture in memory to its mask: median and 90th percentile, after a warm-up."""
    rounds = math.ceil(TIMED_CALLS / len(images))
    for call in range(WARM_UP_CALLS):
        segmenter(images[call % len(images)])
    spent = []
    for call in range(rounds * len(images)):
        started = time.perf_counter()
        segmenter(images[call % len(images)])
        spent.append((time.perf_counter() - started) * 1e3)
        if progress is not None:
            progress("timed calls", call + 1, rounds * len(images))
    p50, p90 = np.percentile(spent, (50, 90))
    return {"p50": float(p50), "p90": float(p90), "calls": len(spent)}


def contact_sheet(pictures: Sequence[DemoPicture], results: Sequence[Segmentation], records: Sequence[dict[str, Any]]) -> Image.Image:
    """Two pictures a row, each with its anomaly map (white where it is 1), what is marked, and where the defect was drawn."""
    beside = min(2, len(pictures))
    sheet = Image.new("RGB", (beside * (4 * _CELL + _GAP) - _GAP, math.ceil(len(pictures) / beside) * (_CELL + _LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for index, (picture, result, record) in enumerate(zip(pictures, results, records, strict=True)):
        row, column = divmod(index, beside)
        top, left = row * (_CELL + _LABEL), column * (4 * _CELL + _GAP)
        iou = f", IoU {record['true_iou']:.2f}" if "true_iou" in record else ""
        labels = (picture.path.name, f"map, highest {result.score:.2f}", f"marked: {_verdict(record)}{iou}", _truth_in_words(picture))
        heat = Image.fromarray((result.anomaly_map * 255).round().astype(np.uint8))
        truth = None if picture.truth is None else Image.fromarray(picture.truth)
        cells = (Image.fromarray(picture.image), heat, result.overlay(), truth)
        for place, (cell, label) in enumerate(zip(cells, labels, strict=True)):
            draw.text((left + place * _CELL + 4, top + 4), label.encode("ascii", "replace").decode()[:_LETTERS], fill="black", font=font)
            if cell is not None:
                small = cell.convert("RGB")
                small.thumbnail((_CELL - _GAP // 4, _CELL - _GAP // 4))
                sheet.paste(small, (left + place * _CELL + (_CELL - small.width) // 2, top + _LABEL))
    return sheet


def _export(bundle: Path) -> int:
    from export.cli import main as export  # loads torch

    return export(["--checkpoint", "nano", "--precision", "fp32", "--lmm", "float", "--output", str(bundle)])


def _made_of() -> str:
    """sha256 of what a demo's bundle depends on: nano's files, the packages that make and read a bundle, and the tools' versions."""
    from export.bundle import TOOLS  # loads torch

    top, digest = Path(__file__).parents[1], hashlib.sha256()
    code = [path for package in MAKERS for path in (top / package).rglob("*.py")]
    for path in sorted([*code, *(path for path in (top / "agvas" / "nano").iterdir() if path.is_file())]):
        digest.update(f"{path.relative_to(top).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for tool in TOOLS:
        digest.update(f"{tool} {version(tool)}\n".encode())
    return digest.hexdigest()


def _is_made_of(output: Path, made_of: str) -> bool:
    """Whether a demo has made and verified the bundle that lies there of these very things; one that is damaged is made anew."""
    try:
        noted = json.loads((output / MADE_OF).read_text())
        return bool(noted == {"made_of": made_of, "bundle": Bundle(output / "bundle").id})
    except (OSError, ValueError, BundleError):
        return False


def _check_output(output: Path) -> None:
    """Raises RequestError where it is a folder of something else."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output {output}: expected a folder, got a file; choose another")
    # Hidden names are what a killed export leaves.
    if not output.exists() or all(path.name.startswith(".") for path in output.iterdir()):
        return
    if not ((output / "summary.json").is_file() or (output / "bundle" / "manifest.json").is_file()):
        raise RequestError(f"--output {output}: expected an earlier demo or an empty folder, got other files; choose another")


def _clear(output: Path) -> None:
    """Remove what an earlier demo wrote but the bundle: nothing old beside the new summary."""
    for path in (
        *output.glob("pictures/*.png"),
        *output.glob("masks/*_mask.png"),
        *output.glob("overlays/*_overlay.png"),
    ):
        path.unlink()
    for name in ("summary.json", "contact_sheet.png"):
        (output / name).unlink(missing_ok=True)


def photographs_of(names: Sequence[str]) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Name and uint8 RGB [H, W, 3] of those photographs that are in the installed package.

    Raises:
        RequestError: scikit-image is not installed, or its package carries none of them.
    """
    # Found without importing it: its data module would offer downloads for what the package leaves out.
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RequestError("the demo's photographs come with scikit-image, which is not installed; pip install scikit-image")
    paths = [Path(spec.origin).parent / "data" / f"{name}.png" for name in names]
    photographs = [(path.stem, read_image(path)) for path in paths if path.is_file()]
    if not photographs:
        raise RequestError(f"{paths[0].parent}: expected {', '.join(names)} (.png), got none; give photos of your own")
    return photographs


def _write(picture: DemoPicture, result: Segmentation, stem: str, output: Path) -> dict[str, Any]:
    """Save mask and overlay, and a picture that the demo drew; the picture's record for summary.json."""
    from benchmarks.metrics import intersection_over_union

    if picture.truth is not None:
        picture.path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.image).save(picture.path)
    record = {"image": str(picture.path), **result.to_json()}
    record["mask"] = str(result.save(output / "masks", stem)["mask"])
    (output / "overlays").mkdir(exist_ok=True)
    record["overlay"] = str(output / "overlays" / f"{stem}_overlay.png")
    result.overlay().save(record["overlay"])
    if picture.truth is not None:
        record["defect"] = picture.defect or None
        if picture.truth.any():
            record["true_iou"] = intersection_over_union(result.mask, picture.truth)
    return record


def _verdict(record: dict[str, Any]) -> str:
    return "??" if not record["anchors_found"] else "NG" if record["is_anomalous"] else "OK"


def _truth_in_words(picture: DemoPicture) -> str:
    if picture.truth is None:
        return "your own photo"
    return f"drawn: {picture.defect}" if picture.truth.any() else "no defect drawn"


def _table(summary: dict[str, Any], output: Path) -> list[str]:
    lines = ["", "verdict  score  IoU with the drawn defect  picture"]
    for record in summary["images"]:
        if "error" in record:
            lines.append(f"failed   {'':24}          {record['image']}")
            continue
        iou = f"{record['true_iou']:.2f}" if "true_iou" in record else "-"
        if record["is_anomalous"] and record.get("true_iou") == 0:
            iou += ", marked elsewhere"
        lines.append(f"{_verdict(record):<7}  {record['score']:.3f}  {iou:>25}  {record['image']}")
    latency, parity = summary["latency_ms"], summary["verify"]["parity"]
    mean = "-" if summary["mean_true_iou"] is None else f"{summary['mean_true_iou']:.2f}"
    lines += [
        f"NG: a score above {summary['threshold']:g}",
        "",
        f"mean IoU with the drawn defects  {mean}",
        f"mask IoU with PyTorch, golden    {parity['mask_iou_mean']:.4f} on {parity['images']} pictures",
        f"one picture, median / 90 %       {latency['p50']:.1f} / {latency['p90']:.1f} ms "
        f"({summary['engine']}, {summary['inference_precision']}, {summary['device']}; {latency['calls']} calls)",
        "",
        f"Look at {output / 'contact_sheet.png'}; masks in {output / 'masks'}, overlays in {output / 'overlays'}, "
        f"all numbers in {output / 'summary.json'}.",
        f"Pictures of yours: agvas-segment PICTURE --bundle {output / 'bundle'} --output results --overlay",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
