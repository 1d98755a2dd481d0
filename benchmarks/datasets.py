"""The paper's six test sets in the folders they are published in, plain folders of pictures, and manifests: what agvas-eval can be given.

Every reader pairs each picture with its mask and compares their sizes before a model is opened; a picture without its mask, a mask
without its picture and an unknown folder are errors, since a set that silently lost files gives a number nobody can compare; pictures of
a kind that is not read (.webp) are left out with a warning, as in agvas-segment, and so are two stray copies in KSDD2's archive. Nothing is
downloaded, converted or resized. The layouts are in READERS_HELP, word for word what --help prints.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.manifest import MANIFEST, read_split
from agvas.training.sources.pictures import decoded, picture_shapes
from runtime.errors import choose
from runtime.picture_files import SUFFIXES, UNREAD_SUFFIXES

__all__ = ["LAYOUTS", "READERS_HELP", "Judged", "Picture", "read_dataset"]

LAYOUTS = ("mvtec", "ksdd2", "rsdd", "isic", "colondb", "clinicdb", "folder", "good", "manifest")

READERS_HELP = """\
layouts of --dataset, as published (DIR is what --root names):
  mvtec     DIR/CATEGORY/test/KIND/*.png and DIR/CATEGORY/ground_truth/KIND/*_mask.png, KIND `good` without masks; DIR may be one category
  ksdd2     DIR/test/ID.png and DIR/test/ID_GT.png (and train with --split train); an all-black mask is a normal picture
  rsdd      DIR/Type-I RSDDs dataset and DIR/Type-II RSDDs dataset, each with `Rail surface images` and GroundTruth; DIR may be one of them
  isic      the challenge of 2016, 2017 or 2018, task 1, e.g. DIR/ISIC2018_Task1-2_Test_Input and DIR/ISIC2018_Task1_Test_GroundTruth
            (training and validation with --split)
  colondb   DIR/images and DIR/masks as in the polyp benchmark, or DIR/Original and DIR/Ground Truth; equal names but for the suffix
  clinicdb  as colondb
  folder    DIR/*.png (or DIR/images) and, if there are any, DIR/masks with equal names but for the suffix; with masks, a picture that has
            none, or an all-black one, is normal; without, nothing is known and only --csv and --overlays say anything. Masks
            STEM_mask.png are taken, too, in DIR/masks or beside their pictures
  good      DIR/*.png (or DIR/images), every picture a good part: how many are called NG, and which threshold would call fewer
  manifest  DIR/manifest.csv with image, mask, label and optionally class, kind, split; the same as naming DIR without --dataset
masks must hold 0 and 255 only, except for rsdd (JPEG), colondb and clinicdb (smoothed edges): there a pixel above 127 is anomalous
"""

_HALF = 127  # of a mask whose levels were smoothed or compressed
_GREY_SLACK = 32  # levels by which JPEG may tint a grey mask
_OF_YOURS = ("folder", "good")  # layouts that no release has
_KSDD2_STRAYS = ("10301 (copy).png", "10301_GT (copy).png")  # the archive's train holds these beside the files that they are copies of
_ISIC_SPLITS = {"train": "Training", "validation": "Validation", "test": "Test"}


class Judged(Protocol):
    """What an evaluation asks of a picture; agvas.training's Item answers, and so does Picture."""

    @property
    def image(self) -> Path: ...
    @property
    def is_anomalous(self) -> bool | None: ...
    @property
    def category(self) -> str: ...
    @property
    def kind(self) -> str | None: ...
    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]: ...
    def shapes(self) -> list[tuple[int, int]]: ...


@dataclass(frozen=True)
class Picture:
    """One picture of a published layout.

    Attributes:
        mask: the file, None where the layout has none for this picture.
        is_anomalous: None where nothing is known.
        category: the pool whose pixels are ranked together.
        kind: of defect, or what else the layout tells apart inside a category.
        smoothed: the mask's levels are no clean 0 and 255, and those above 127 count; otherwise they are an error.
    """

    image: Path
    mask: Path | None
    is_anomalous: bool | None
    category: str
    kind: str | None = None
    smoothed: bool = False

    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """The truth, bool [H, W], True where anomalous; all False without a mask file.

        height and width are those of the image as it was decoded. Raises DatasetError where the mask cannot be read, has another size,
        is coloured, has levels that the layout does not, or contradicts is_anomalous.
        """
        if self.mask is None:
            return np.zeros((height, width), bool)
        truth = _read_mask(self.mask, self.smoothed)
        if truth.shape != (height, width):
            raise _wrong_size(self.image, [(height, width)], self.mask, (truth.shape[0], truth.shape[1]))
        if self.is_anomalous and not truth.any():
            raise DatasetError(
                self.mask, None, "anomalous pixels", "none", "restore the mask: this layout has one for anomalous pictures only"
            )
        if self.is_anomalous is False and truth.any():
            raise DatasetError(
                self.mask, None, "no anomalous pixel", str(int(truth.sum())), "the file changed since it was listed: run again"
            )
        return truth

    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) as the image's header says, and turned, too, where its EXIF tag swaps the sides."""
        return _shapes(self.image)


def read_dataset(layout: str, root: Path, split: str | None = None) -> list[Judged]:
    """The pictures of a data set in one of LAYOUTS, sorted, each with its mask, sizes compared.

    split is for manifest (the column's value; None for every line), ksdd2 and isic (None means test); ValueError for the others and for an
    unknown layout. Raises DatasetError, naming the file or folder, where the layout is not what was published.
    """
    choose("--dataset", layout, LAYOUTS)
    if split is not None and layout not in ("manifest", "ksdd2", "isic"):
        raise ValueError(f"--split: {layout} is published without splits that could be judged, got {split}; leave it out")
    if not root.is_dir():
        remedy = "name a folder of pictures" if layout in _OF_YOURS else "unpack the data set and name its folder"
        raise DatasetError(root, None, "a folder", "a file" if root.exists() else "nothing", remedy)
    if layout == "manifest":
        return list(read_split(root, split))
    pictures = _read(layout, root, split or "test")
    for picture in pictures:
        if picture.mask is not None:
            expected, found = picture.shapes(), _shapes(picture.mask)[-1]
            if found not in expected:
                raise _wrong_size(picture.image, expected, picture.mask, found)
    return list(pictures)


def _read(layout: str, root: Path, split: str) -> list[Picture]:
    match layout:
        case "mvtec":
            return _mvtec(root)
        case "ksdd2":
            return _ksdd2(root, split)
        case "rsdd":
            return _rsdd(root)
        case "isic":
            return _isic(root, split)
        case "colondb" | "clinicdb":
            images, masks = _one_of(root, (("images", "masks"), ("Original", "Ground Truth")))
            return [Picture(image, mask, True, "colon", smoothed=True) for image, mask in _paired(_files(images), _files(masks), "")]
    return _good(root) if layout == "good" else _folder(root)


def _mvtec(root: Path) -> list[Picture]:
    """A category is pooled for itself; the paper's figure is the mean over the 15.

    Training's reader of this layout (agvas/training/sources/mvtec.py) is for three other sets and takes more: its page says what, and why.
    """
    categories = [root] if (root / "test").is_dir() else _folders(root)
    if not any((category / "test").is_dir() for category in categories):
        wanted = "the layout mvtec, a folder for each category with test and ground_truth in it"
        raise _another_layout(root, wanted, "name the unpacked data set")
    pictures = []
    for category in categories:
        kinds = _folders(_folder_of(category, "test"))
        truths = category / "ground_truth"
        unknown = {folder.name for folder in (_folders(truths) if truths.is_dir() else [])} - {folder.name for folder in kinds}
        if unknown:
            raise DatasetError(truths, None, "the kinds of test", f"{', '.join(sorted(unknown))} more", "restore the folder test")
        if not kinds:
            raise DatasetError(category / "test", None, "a folder for each kind of defect, and good", "none", "unpack the data set again")
        for kind in kinds:
            if kind.name == "good":
                pictures += [Picture(image, None, False, category.resolve().name, kind.name) for image in _files(kind)]
                continue
            masks = _files(_folder_of(truths, kind.name))
            pairs = _paired(_files(kind), masks, "_mask")
            pictures += [Picture(image, mask, True, category.resolve().name, kind.name) for image, mask in pairs]
    return pictures


def _ksdd2(root: Path, split: str) -> list[Picture]:
    """Normal pictures come with masks, too, so every mask is decoded here to know which those are."""
    if split not in ("train", "test"):
        raise ValueError(f"--split: ksdd2 has train and test, got {split}; give one of the two")
    if not (root / split).is_dir():
        raise _another_layout(root, f"the layout ksdd2, a folder {split} with pictures and masks", "name the unpacked data set")
    files = _files(root / split)
    if strays := [file.name for file in files if file.name in _KSDD2_STRAYS]:
        warnings.warn(f"{root / split}: left out {' and '.join(strays)}, copies that the archive holds", stacklevel=2)
        files = [file for file in files if file.name not in _KSDD2_STRAYS]
    masks = [file for file in files if file.stem.endswith("_GT")]
    pairs = _paired([file for file in files if not file.stem.endswith("_GT")], masks, "_GT")
    return [Picture(image, mask, bool(_read_mask(mask, smoothed=False).any()), "ksdd2") for image, mask in pairs]


def _rsdd(root: Path) -> list[Picture]:
    """Both types are pooled as one category, rail; the type is the kind. The paper does not say how it averages them."""
    types = [root] if (root / "GroundTruth").is_dir() else _folders(root)
    if not any((folder / "GroundTruth").is_dir() for folder in types):
        raise _another_layout(root, "the layout rsdd, Type-I RSDDs dataset and Type-II RSDDs dataset", "name the unpacked data set")
    pictures = []
    for folder in types:
        images, masks = _one_of(folder, (("Rail surface images", "GroundTruth"),))
        kind = folder.resolve().name.removesuffix(" RSDDs dataset")
        pictures += [Picture(image, mask, True, "rail", kind, smoothed=True) for image, mask in _paired(_files(images), _files(masks), "")]
    return pictures


def _isic(root: Path, split: str) -> list[Picture]:
    if split not in _ISIC_SPLITS:
        raise ValueError(f"--split: isic has {', '.join(_ISIC_SPLITS)}, got {split}; give one of these")
    part = _ISIC_SPLITS[split]
    part_2017 = "Test_v2" if split == "test" else part
    images, masks = _one_of(
        root,
        (
            (f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth"),
            (f"ISIC-2017_{part_2017}_Data", f"ISIC-2017_{part_2017}_Part1_GroundTruth"),
            (f"ISBI2016_ISIC_Part1_{part}_Data", f"ISBI2016_ISIC_Part1_{part}_GroundTruth"),
        ),
    )
    photos = [file for file in _files(images) if file.suffix.lower() == ".jpg"]  # 2017 keeps superpixels as PNG beside them
    return [Picture(image, mask, True, "skin") for image, mask in _paired(photos, _files(masks), "_segmentation")]


def _folder(root: Path) -> list[Picture]:
    images = _pictures_of_yours(root)
    files = _files(root / "masks", "put the masks there, or remove the folder") if (root / "masks").is_dir() else _beside(images)
    if not files:
        return [Picture(image, None, None, root.resolve().name) for image in images]
    images = [image for image in images if image not in files]
    written = [file for file in files if file.stem.lower().endswith("_mask")]
    masks = _by_stem(files, "_mask" if written and len(written) == len(files) else "")
    stems = _by_stem(images, "")
    orphans = sorted(masks.keys() - stems.keys())
    if orphans:
        raise _orphan(masks[orphans[0]], images[0].parent)
    found = [(image, masks.get(stem)) for stem, image in stems.items()]
    return [Picture(image, mask, mask is not None and bool(_read_mask(mask, False).any()), root.resolve().name) for image, mask in found]


def _good(root: Path) -> list[Picture]:
    images = _pictures_of_yours(root)
    if masks := _beside(images):
        raise DatasetError(masks[0], None, "good parts, which have no masks", "a mask beside its picture", "give --dataset folder")
    return [Picture(image, None, False, root.resolve().name) for image in images]


def _pictures_of_yours(root: Path) -> list[Path]:
    """Those in root/images, or in root itself."""
    return _files(root / "images" if (root / "images").is_dir() else root, f"put pictures there ({', '.join(SUFFIXES)}), or name another")


def _beside(images: Sequence[Path]) -> list[Path]:
    """Which of them are masks that lie beside their pictures: x_mask.png beside x.png."""
    stems = {image.stem.lower() for image in images}
    return [image for image in images if image.stem.lower().endswith("_mask") and image.stem.lower().removesuffix("_mask") in stems]


def _one_of(root: Path, pairs: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    """The first pair of folder names of which root has one; DatasetError where it has none, half a pair, or two pairs."""
    present = [(root / images, root / masks) for images, masks in pairs if (root / images).is_dir() or (root / masks).is_dir()]
    wanted = " or ".join(f"{images} and {masks}" for images, masks in pairs)
    if not present:
        raise _another_layout(root, f"the folders {wanted}", "name the folder that holds them")
    if len(present) > 1:
        found = " and ".join(images.name for images, _ in present)
        raise DatasetError(root, None, f"one of {wanted}", found, "name a folder that holds one of them")
    return _folder_of(root, present[0][0].name), _folder_of(root, present[0][1].name)


def _another_layout(root: Path, expected: str, remedy: str) -> DatasetError:
    """A folder without anything of its layout; one with a manifest has most likely been named by the wrong layout."""
    names = [folder.name for folder in _folders(root)]
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "no folder"
    if (root / MANIFEST).is_file():
        return DatasetError(root, None, expected, f"{found} and {MANIFEST}", "give --dataset manifest")
    return DatasetError(root, None, expected, found, remedy)


def _folder_of(parent: Path, name: str) -> Path:
    if not (parent / name).is_dir():
        raise DatasetError(parent / name, None, "a folder", "none", "unpack the data set again, or name the folder above")
    return parent / name


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, remedy: str = "unpack the data set again") -> list[Path]:
    """The pictures in a folder, by suffix; others are licences and tables, hidden ones a file manager's. Warns of what is not read."""
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if unread := Counter(path.suffix.lower() for path in shown if path.suffix.lower() in UNREAD_SUFFIXES):
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        warnings.warn(f"{folder}: left out {counts}: PNG, JPEG, BMP, TIFF or PNM is read; save them as PNG", stacklevel=2)
    found = [path for path in shown if path.suffix.lower() in SUFFIXES]
    if not found:
        raise DatasetError(folder, None, "pictures", "none", remedy)
    return found


def _paired(images: list[Path], masks: list[Path], ending: str) -> list[tuple[Path, Path]]:
    """Each image with the mask of its stem and ending; DatasetError where one of either is alone."""
    of_image, of_mask = _by_stem(images, ""), _by_stem(masks, ending)
    for stem, image in of_image.items():
        if stem not in of_mask:
            folder = masks[0].parent if masks else image.parent
            raise DatasetError(
                image, None, f"its mask {stem}{ending}.* in {folder}", "no such file", "restore the mask, or remove the picture"
            )
    for stem, mask in of_mask.items():
        if stem not in of_image:
            raise _orphan(mask, images[0].parent if images else mask.parent)
    return [(image, of_mask[stem]) for stem, image in of_image.items()]


def _by_stem(files: list[Path], ending: str) -> dict[str, Path]:
    """Files by their stem without the ending, compared in lower case: 2016's ISIC writes _Segmentation."""
    stems: dict[str, Path] = {}
    for file in files:
        if not file.stem.lower().endswith(ending.lower()):
            raise DatasetError(file, None, f"a mask whose name ends in {ending}", file.name, "rename it or move it away")
        stem = file.stem[: len(file.stem) - len(ending)]
        if stem in stems:
            raise DatasetError(file, None, "one file of each name", f"{stems[stem].name} too", "move one of the two away")
        stems[stem] = file
    return stems


def _orphan(mask: Path, images: Path) -> DatasetError:
    return DatasetError(mask, None, f"its picture in {images}", "no such file", "restore the picture, or remove the mask")


def _wrong_size(image: Path, expected: list[tuple[int, int]], mask: Path, found: tuple[int, int]) -> DatasetError:
    height, width = expected[0]
    wanted = f"a mask of {height} x {width} (height x width, as {image.name})"
    return DatasetError(mask, None, wanted, f"{found[0]} x {found[1]}", "resize the mask with nearest neighbour, or restore it")


def _read_mask(path: Path, smoothed: bool) -> npt.NDArray[np.bool_]:
    """A mask file as bool [H, W]: 255, or where smoothed above 127; grey may be stored as colours, palette or one bit."""
    try:
        opened = decoded(path)
    except DatasetError as error:
        raise DatasetError(path, None, "a readable mask", error.found, error.remedy) from error
    mode = opened.mode
    if mode not in ("1", "L", "P", "LA", "RGB", "RGBA"):
        raise DatasetError(path, None, "a mask of 8-bit grey", f"mode {mode}", "save it as 8-bit grey (mode L)")
    values = np.asarray(opened.convert("RGB"))  # [H, W, 3]
    if mode not in ("1", "L", "LA"):
        spread = int((values.max(axis=2).astype(int) - values.min(axis=2)).max())
        if spread > (_GREY_SLACK if smoothed else 0):
            raise DatasetError(
                path, None, "a grey mask", f"colours, {spread} levels apart", "draw anomalous pixels white, all others black"
            )
    grey = values[..., 1]
    if smoothed:
        return np.asarray(grey > _HALF)
    strange = np.setdiff1d(grey, (0, 255))
    if strange.size:
        shown = ", ".join(map(str, strange[:5])) + (", ..." if strange.size > 5 else "")
        raise DatasetError(path, None, "a mask of 0 and 255", shown, "write anomalous pixels as 255, all others as 0, in a lossless format")
    return np.asarray(grey == 255)


def _shapes(path: Path) -> list[tuple[int, int]]:
    """See Picture.shapes; the pixels are not decoded."""
    try:
        return picture_shapes(path)
    except DatasetError as error:
        raise DatasetError(path, None, "an image", error.found, error.remedy) from error
