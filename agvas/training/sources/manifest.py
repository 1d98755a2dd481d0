"""The manifest data set: a folder with manifest.csv, a line per image, and masks 0 / 255 of its size.

Everything that can be checked without decoding pixels is checked when the manifest is read, so that a run of hours does
not end at line 900; masks are decoded one at a time. It downloads nothing, converts nothing and never guesses: a mask
of 0 / 1 is an error.

Columns: image, mask (may be empty for label 0), label (1 anomalous, 0 normal), and optionally class, kind, split and text.
As anomaly data, in evaluation and in the mixture's group "anomaly", class, kind and split name the picture and `text` is
not used: an anomaly with a description belongs into instruct.jsonl, whose five fields one sentence does not fill. In
the mixture's group "general", `text` is the referring phrase ("the man in red"), the mask is what it refers to, and
every line needs both, with label 1 (see read_phrases).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.pictures import decoded, picture_shapes
from agvas.training.sources.texts import checked

__all__ = ["Item", "Phrase", "read_manifest", "read_phrases", "read_split"]

MANIFEST = "manifest.csv"
REQUIRED_COLUMNS = ("image", "mask", "label")


@dataclass(frozen=True)
class Item:
    """One line of a manifest. An absent or empty cell is None; for `category` it is the folder's name."""

    image: Path
    mask: Path | None
    is_anomalous: bool
    category: str  # the column `class`
    kind: str | None
    split: str | None
    text: str | None
    manifest: Path
    line: int

    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """The truth, bool [H, W], True where anomalous; all False for a normal image without a mask file.

        height and width are those of the image as it was decoded. Raises DatasetError where the mask has another size,
        more than one channel, values other than 0 and 255, or contradicts the label.
        """
        if self.mask is None:
            return np.zeros((height, width), bool)
        try:
            opened = decoded(self.mask)
        except DatasetError as error:
            raise self._error("a readable mask", f"{self.mask} ({error.found})", "write it again as PNG") from error
        if opened.mode not in ("L", "1"):
            raise self._error("a mask of one 8-bit channel", f"mode {opened.mode} in {self.mask}", "save it as 8-bit grey (mode L)")
        values = np.asarray(opened.convert("L"))
        if values.shape != (height, width):
            raise self._error(
                f"a mask of {height} x {width} (height x width, as the image)",
                f"{values.shape[0]} x {values.shape[1]} in {self.mask}",
                "resize the mask with nearest neighbour",
            )
        strange = np.setdiff1d(values, (0, 255))
        if strange.size:
            raise self._error(
                "a mask of 0 and 255",
                f"{', '.join(map(str, strange[:5]))}{', ...' if strange.size > 5 else ''} in {self.mask}",
                "write anomalous pixels as 255, all others as 0, in a lossless format",
            )
        truth = values == 255
        if self.is_anomalous and not truth.any():
            raise self._error("anomalous pixels (label 1)", f"only 0 in {self.mask}", "set the label to 0 or draw the anomaly")
        if not self.is_anomalous and truth.any():
            raise self._error("no anomalous pixel (label 0)", f"{int(truth.sum())} in {self.mask}", "set the label to 1")
        return truth

    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) as the image's header says, and turned, too, where its EXIF tag swaps the sides."""
        return _shapes(self.manifest, self.line, self.image)

    def _error(self, expected: str, found: str, remedy: str) -> DatasetError:
        return DatasetError(self.manifest, self.line, expected, found, remedy)


def read_manifest(folder: str | os.PathLike[str]) -> list[Item]:
    """The items of folder/manifest.csv in the file's order; paths in it are relative to the folder and stay inside it.

    Checks columns, labels, that the files exist and, from their headers, that masks have their image's size; raises
    DatasetError. Links inside the folder are followed: whoever placed the folder placed them.
    """
    root = Path(folder)
    manifest = root / MANIFEST
    if not manifest.is_file():
        found = "no such file" if root.is_dir() else f"no folder {root}"
        raise DatasetError(manifest, None, "a manifest", found, "give a folder that holds manifest.csv with image, mask and label")
    items = [_item(root, manifest, line, row) for line, row in _rows(manifest)]
    if not items:
        raise DatasetError(manifest, None, "at least one image", "only the header", "add a line per image")
    return items


@dataclass(frozen=True)
class Phrase:
    """One line of a manifest as general segmentation: its text refers to what its mask shows."""

    item: Item
    text: str

    @property
    def image(self) -> Path:
        return self.item.image

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[str, npt.NDArray[np.bool_]] | None:
        """(text, mask bool [H, W]); nothing is drawn."""
        return self.text, self.item.read_mask(height, width)


def read_split(folder: str | os.PathLike[str], split: str | None = None) -> list[Item]:
    """`read_manifest`, and of it the lines whose column split says so; DatasetError where there are none."""
    items = read_manifest(folder)
    chosen = [item for item in items if split in (None, item.split)]
    if not chosen:
        found = ", ".join(sorted({item.split or "(empty)" for item in items}))
        raise DatasetError(Path(folder) / MANIFEST, None, f"images of split {split}", found, "give another split")
    return chosen


def read_phrases(folder: str | os.PathLike[str], split: str | None = None) -> list[Phrase]:
    """`read_split`, each line with label 1 and a text without control tokens; raises DatasetError."""
    return [_phrase(item) for item in read_split(folder, split)]


def _phrase(item: Item) -> Phrase:
    if item.text is None or not item.is_anomalous:
        found = "no text" if item.text is None else "label 0"
        remedy = "fill in the column text and the mask, or list the folder under anomaly"
        raise DatasetError(item.manifest, item.line, "a text that refers to a mask with label 1", found, remedy)
    return Phrase(item, checked(item.text, item.manifest, "text", item.line))


def _rows(manifest: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a byte-order mark
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            missing = [name for name in REQUIRED_COLUMNS if name not in header]
            if missing:
                raise DatasetError(
                    manifest,
                    1,
                    f"the columns {', '.join(REQUIRED_COLUMNS)}",
                    f"{', '.join(header) or 'no header'} (without {', '.join(missing)})",
                    "add them to the header; the separator is a comma",
                )
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(header):
                    remedy = "quote cells that contain commas" if len(cells) > len(header) else "write a comma for each empty cell"
                    raise DatasetError(manifest, lines.line_num, f"{len(header)} cells", str(len(cells)), remedy)
                yield lines.line_num, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except UnicodeDecodeError as error:
        raise DatasetError(manifest, None, "UTF-8 text", str(error), "save the manifest as UTF-8") from error
    except csv.Error as error:
        raise DatasetError(manifest, None, "comma-separated values", str(error), "check quotes and line ends") from error


def _item(root: Path, manifest: Path, line: int, row: dict[str, str]) -> Item:
    label = row["label"]
    if label not in ("0", "1"):
        raise DatasetError(manifest, line, "label 0 (normal) or 1 (anomalous)", repr(label), "write one of the two")
    image = _inside(root, manifest, line, "image", row["image"])
    mask = _inside(root, manifest, line, "mask", row["mask"]) if row["mask"] else None
    if label == "1" and mask is None:
        raise DatasetError(manifest, line, "a mask for label 1", "an empty cell", "name the mask file, or set the label to 0")
    if mask is not None:
        _check_same_size(manifest, line, image, mask)
    return Item(
        image=image,
        mask=mask,
        is_anomalous=label == "1",
        category=row.get("class") or root.resolve().name,
        kind=row.get("kind") or None,
        split=row.get("split") or None,
        text=row.get("text") or None,
        manifest=manifest,
        line=line,
    )


def _inside(root: Path, manifest: Path, line: int, column: str, cell: str) -> Path:
    """root / cell, an existing file below root."""
    if not cell:
        raise DatasetError(manifest, line, f"a file in column {column}", "an empty cell", "name the file or remove the line")
    normal = os.path.normpath(cell)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise DatasetError(manifest, line, f"a path inside the folder in column {column}", cell, f"move the file below {root}")
    path = root / normal
    if not path.is_file():
        raise DatasetError(manifest, line, f"a file in column {column}", f"no file {path}", "correct the path or restore the file")
    return path


def _check_same_size(manifest: Path, line: int, image: Path, mask: Path) -> None:
    """Compares the headers; pixels are not decoded."""
    expected, (*_, found) = _shapes(manifest, line, image), _shapes(manifest, line, mask)
    if found not in expected:
        raise DatasetError(
            manifest,
            line,
            f"a mask of {expected[0][0]} x {expected[0][1]} (height x width, as {image.name})",
            f"{found[0]} x {found[1]} in {mask}",
            "resize the mask with nearest neighbour",
        )


def _shapes(manifest: Path, line: int, path: Path) -> list[tuple[int, int]]:
    """See Item.shapes; whether the tag is heeded is up to who decodes the image."""
    try:
        return picture_shapes(path)
    except DatasetError as error:
        raise DatasetError(manifest, line, error.expected, f"{path} ({error.found})", error.remedy) from error
