"""A picture's results as agvas-segment tells and writes them: its record, and files whose names no other picture's results have."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engines import EngineError
from runtime import __version__
from runtime.cli.output import spare_inputs
from runtime.errors import OutputError
from runtime.picture_files import KINDS
from runtime.prompts import DIRECT, Prompt
from runtime.segmenter import Segmenter

# What leaves the next picture a chance; ImageError is a ValueError.
_OF_ONE_PICTURE = (EngineError, ValueError, MemoryError)


def segment_pictures(
    segmenter: Segmenter,
    pictures: Sequence[Path],
    *,
    mode: str = DIRECT,
    instructions: Sequence[str | None] = (None,),
    normal_state: str | None = None,
    max_new_tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overlay: bool = False,
    anomaly_map: bool = False,
    polygons: bool = False,
) -> Iterator[dict[str, Any]]:
    """Segment one picture after the other; each instruction gives the record that agvas-segment prints as JSON.

    Args:
        instructions: all are asked about every picture; None is the mode's default.
        normal_state, max_new_tokens: see Segmenter.__call__; the same for every instruction.
        output: folder for `<stem>_mask.png` and, with `overlay` and `anomaly_map`, `<stem>_overlay.png` and `<stem>_map.png`; stems are
            told apart, see output_stems. A picture without a verdict has none, and what an earlier run left under its names is removed,
            as is an overlay or map where none is asked for. With several instructions the first one's stem is `<stem>__1`, and so on.
        polygons: also give the outline of each mask.

    Yields:
        "image" and "error" for a picture that could not be read or looked at, or whose results have names too long for the file system,
        and with "instruction" for one about which this instruction failed; else "image", what Segmentation.to_json gives ("mask" is the
        file's path, None without `output`; "timings_ms" of a picture's first answer also has "read", which "total" leaves out), "overlay"
        if asked for, and the segmenter's "engine", "inference_precision" and "device". Every one says what it was made by:
        "manifest_sha256" (Bundle.id), "model", "version" and "time" (ISO 8601, UTC).

    Raises:
        RequestError: the mode or an instruction is refused, or a result would overwrite one of the pictures.
        OutputError: a result cannot be written; those before it are.
    """
    asked_for = {"mask": True, "overlay": overlay, "map": anomaly_map}
    requests = [segmenter.request(text, mode, normal_state=normal_state, max_new_tokens=max_new_tokens) for text in instructions]
    endings, stems = endings_of(len(requests)), output_stems(pictures)
    if output is not None:
        spare_inputs(pictures, stems, endings, Path(output))
    place = None if output is None else Path(output)
    placed = ((path, place, stem) for path, stem in zip(pictures, stems, strict=True))
    yield from records_of(segmenter, placed, requests, asked_for, polygons)


def records_of(
    segmenter: Segmenter,
    pictures: Iterable[tuple[Path, Path | None, str]],
    requests: Sequence[Prompt],
    asked_for: dict[str, bool],
    polygons: bool,
) -> Iterator[dict[str, Any]]:
    """`segment_pictures` of pictures as they come, each with folder (None: write nothing) and stem of its results; `asked_for` says which
    of KINDS is written."""
    endings = endings_of(len(requests))
    model = {"manifest_sha256": segmenter.bundle.id, "model": segmenter.bundle.manifest.model}
    for path, output, stem in pictures:
        try:
            inspection = segmenter.inspect(path)
        except _OF_ONE_PICTURE as error:
            for ending in endings:
                _forget(output, stem + ending)
            yield {"image": str(path), "error": str(error) or type(error).__name__, **model, **made()}
            continue
        reading = {"read": inspection.read_milliseconds}
        for request, ending in zip(requests, endings, strict=True):
            failed = {"image": str(path), "instruction": request.instruction}
            try:
                result = inspection.answer(request)
                told = result.to_json(polygons=polygons)
            except _OF_ONE_PICTURE as error:
                _forget(output, stem + ending)
                yield {**failed, "error": str(error) or type(error).__name__, **model, **made()}
                continue
            record = {"image": str(path), **told, **model, **made()}
            record["timings_ms"], reading = {**reading, **record["timings_ms"]}, {}
            if not result.anchors_found:  # an empty mask would say OK
                _forget(output, stem + ending)
            elif output is not None:
                _forget(output, stem + ending, [kind for kind in asked_for if kind != "mask"])  # or they would outlive their mask
                try:
                    saved = result.save(output, stem + ending, overlay=asked_for["overlay"], anomaly_map=asked_for["map"])
                except _OF_ONE_PICTURE as error:  # a name too long, say; the next one's need not be
                    _forget(output, stem + ending)
                    yield {**failed, "error": str(error) or type(error).__name__, **model, **made()}
                    continue
                except OutputError:
                    _forget(output, stem + ending)  # of a verdict that is not told
                    raise
                record.update({name: str(file) for name, file in saved.items()})
            record["engine"] = segmenter.engine
            record["inference_precision"] = segmenter.inference_precision
            record["device"] = segmenter.device
            yield record


def made() -> dict[str, str]:
    """Version and time of a record."""
    return {"version": __version__, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}


def endings_of(instructions: int) -> list[str]:
    """What stands behind a picture's stem for each of its instructions."""
    return [""] if instructions == 1 else [f"__{number}" for number in range(1, instructions + 1)]


def _forget(output: str | os.PathLike[str] | None, stem: str, kinds: Sequence[str] = KINDS) -> None:
    """Remove an earlier run's results, which would pass for this one's.

    Raises:
        OutputError: one cannot be removed.
    """
    if output is None:
        return
    for kind in kinds:
        path = Path(output) / f"{stem}_{kind}.png"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR):  # where no file can have that name, there is none
                raise OutputError(
                    f"{path}: expected to remove an earlier run's result, got {error}; remove it, or choose another folder"
                ) from error


def output_stems(pictures: Sequence[Path]) -> list[str]:
    """A stem for each picture's results, no two alike (not even by case alone: some file systems ignore it).

    A stem that only one picture has is kept. Pictures of the same stem in different folders get as many of their
    folders' names in front as it takes, joined by "__" (crack/000.png, good/000.png → crack__000, good__000); those in
    one folder keep their suffix (a.png, a.jpg → a.png, a.jpg). Should that still give a name twice, the later picture
    gets "-2", "-3", …
    """
    by_stem: dict[str, list[int]] = {}
    for index, path in enumerate(pictures):
        by_stem.setdefault(path.stem.casefold(), []).append(index)
    names = [path.stem for path in pictures]
    for indices in by_stem.values():
        if len(indices) > 1:
            told_apart = _with_folders([pictures[index] for index in indices])
            for index, name in zip(indices, told_apart, strict=True):
                names[index] = name
    # Numbers go to those that had to be renamed first, never to a picture whose stem was its own from the start.
    taken = {names[indices[0]].casefold() for indices in by_stem.values() if len(indices) == 1}
    for indices in by_stem.values():
        for index in indices if len(indices) > 1 else ():
            name, number = names[index], 1
            while names[index].casefold() in taken:
                number += 1
                names[index] = f"{name}-{number}"
            taken.add(names[index].casefold())
    return names


def _with_folders(paths: Sequence[Path]) -> list[str]:
    """Names of pictures of one stem, told apart by their folders, or by suffix within one."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    one_folder_twice = len({path.parent for path in absolute}) < len(absolute)
    last = [path.name if one_folder_twice else path.stem for path in absolute]
    folders = [path.parts[1:-1] for path in absolute]  # parts[0] is the root or drive

    def at_depth(depth: int) -> list[str]:
        return ["__".join((*parts[max(len(parts) - depth, 0) :], name)) for parts, name in zip(folders, last, strict=True)]

    # a.png and A.PNG in one folder stay alike at any depth, which is no reason to name all the folders above.
    alternatives = [at_depth(depth) for depth in range(max(map(len, folders)) + 1)]
    return max(alternatives, key=lambda names: (len({name.casefold() for name in names}), len({*names})))  # of equals the shallowest
