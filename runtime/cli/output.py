"""Where agvas-segment may write: a folder of its own, in which no picture is overwritten and no mask taken for a picture."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from engines.cache import locked
from runtime.errors import OutputError, RequestError
from runtime.picture_files import KINDS
from runtime.writing import make_folder


def prepare(output: str) -> None:
    """Make the folder.

    Raises:
        OutputError: it cannot be made or written to.
    """
    make_folder(output, f"--output {output}")
    if not os.access(output, os.W_OK | os.X_OK):
        raise OutputError(f"--output {output}: expected a writable folder, got one that is not; choose another or change permissions")


@contextlib.contextmanager
def alone_in(output: str) -> Iterator[None]:
    """While this runs, no other --watch writes there: pictures of one name would overwrite each other's results. Where the file system has
    no locks, or the lock is another user's, a warning says so.

    Raises:
        RequestError: one does already.
    """

    def refuse() -> None:
        raise RequestError(f"--output {output}: expected no other --watch that writes there, got one; give each a folder of its own")

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(Path(output, ".agvas-watch.lock"), refuse))
        except OSError as error:
            warnings.warn(f"--output {output}: another --watch that writes there would not be noticed: {error}", stacklevel=2)
        yield


def refuse_own_results(inputs: Sequence[str], output: str, recursive: bool) -> None:
    """Refuse an output folder among those looked through, by name or pattern: the next run would take this one's masks for pictures.

    Raises:
        RequestError: it is one of them.
    """
    place = Path(os.path.realpath(output))
    for name in inputs:
        if os.path.isdir(name):
            folder = Path(os.path.realpath(name))
            looked_through = place == folder or (recursive and folder in place.parents)
        else:
            looked_through = not os.path.lexists(name) and _matches_in(name, place)
        if looked_through:
            raise RequestError(
                f"--output {output}: expected a folder outside the pictures' own, got one in {name}, where the next run would take masks "
                "for pictures; choose another"
            )


def _matches_in(pattern: str, folder: Path) -> bool:
    """Whether a glob pattern may match files that lie right in a folder, which need not exist."""
    parts = Path(pattern).parts
    folders = parts if parts[-1:] == ("**",) else parts[:-1]
    plain = next((index for index, part in enumerate(folders) if glob.has_magic(part)), len(folders))
    base = Path(os.path.realpath(Path(*folders[:plain])))
    return base in (folder, *folder.parents) and _parts_match(folders[plain:], folder.relative_to(base).parts)


def _parts_match(pattern: Sequence[str], folders: Sequence[str]) -> bool:
    """Names of folders, one below the other, against those of a pattern; `**` stands for any number of them."""
    if not pattern:
        return not folders
    if pattern[0] == "**" and _parts_match(pattern[1:], folders):
        return True
    rest = pattern if pattern[0] == "**" else pattern[1:]
    return bool(folders) and fnmatch.fnmatch(folders[0], pattern[0]) and _parts_match(rest, folders[1:])


def refuse_own_folder(inputs: Sequence[str], output: str) -> None:
    """The same of files named in the output folder itself, as a shell expands a pattern; a single one is no pattern's."""
    place = os.path.realpath(output)
    inside = [name for name in inputs if os.path.isfile(name) and os.path.realpath(os.path.dirname(name)) == place]
    if len(inside) > 1:
        raise RequestError(
            f"--output {output}: expected a folder outside the pictures' own, got the one of {inside[0]} and {len(inside) - 1} more that "
            "were named, where the next run of such a pattern would take masks for pictures; choose another"
        )


def spare_inputs(pictures: Sequence[Path], stems: Sequence[str], endings: Sequence[str], output: Path) -> None:
    """Refuse to overwrite or remove a picture as a result: x.png and x_mask.png side by side, segmented into their own folder."""
    given = {Path(os.path.realpath(path.parent)) / path.name: path for path in pictures}
    folder = Path(os.path.realpath(output))
    for stem in stems:
        for name in (f"{stem}{ending}_{kind}.png" for ending in endings for kind in KINDS):
            if (path := given.get(folder / name)) is not None:
                raise RequestError(
                    f"--output {output}: expected a folder of its own, got one where the picture {path} would be "
                    "overwritten; choose another"
                )
