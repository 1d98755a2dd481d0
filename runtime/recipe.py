"""Recipes: what one station of a line is set to, in a file of its own, so that a line is set up once and every record can be traced to it.

A recipe names a bundle, an engine and everything a picture is judged by. `agvas-segment --save-recipe` writes one after its settings have
been found to work; `agvas-segment --recipe` and `Recipe.read(...)` take it. The sha256 of bundle and region stand in it: a threshold says
nothing about another model's maps, nor a region about another camera's pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle, sha256_of
from runtime.errors import BundleError, ImageError, RequestError, choose
from runtime.images import PIXEL_LIMIT
from runtime.prompts import DIRECT
from runtime.segmenter import Segmenter
from runtime.writing import write_whole

SCHEMA = 1
LARGEST = 1_000_000  # bytes of a recipe's file
_OF_FILE = ("path", "sha256")  # fields of the file, which are not in it
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_PATHS = ("bundle", "region")
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("text", (str,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "None": ("null", (type(None),)),
}
OF_REQUEST = ("instruction", "mode", "normal_state", "max_new_tokens")
OF_SEGMENTER = (
    "engine",
    "device",
    "inference_precision",
    "threads",
    "low_memory",
    "threshold",
    "relative_threshold",
    "tile",
    "tile_overlap",
    "region",
    "pixel_limit",
)


@dataclass(frozen=True)
class Recipe:
    """A station's settings; those of Segmenter and of its calls, by the same names.

    Attributes:
        bundle, region: paths; in the file they are told from the recipe's own folder.
        manifest_sha256: Bundle.id of the bundle that the recipe was made for; None: any.
        region_sha256: of the region's file; None: any.
        path, sha256: of the file that the recipe was read from, "" where it was made in memory.
    """

    bundle: str
    engine: str = "auto"
    device: str = "cpu"
    inference_precision: str | None = None
    threads: int = 0
    low_memory: bool = False
    threshold: float | None = None
    relative_threshold: float | None = None
    tile: int | None = None
    tile_overlap: int | None = None
    region: str | None = None
    pixel_limit: int = PIXEL_LIMIT
    instruction: str | None = None
    mode: str = DIRECT
    normal_state: str | None = None
    max_new_tokens: int | None = None
    manifest_sha256: str | None = None
    region_sha256: str | None = None
    path: str = dataclasses.field(default="", compare=False)
    sha256: str = dataclasses.field(default="", compare=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """Raises RequestError where the file is missing, no recipe, or has a setting that there is not; values are judged by `open`."""
        if not isinstance(path, (str, os.PathLike)):
            raise RequestError(f"recipe: expected the path of one (agvas-segment --save-recipe writes it), got {path!r}")
        path = Path(path)
        try:
            if path.exists() and not path.is_file():
                raise OSError("a folder, device or pipe")
            with open(path, "rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            fields = json.loads(content, object_pairs_hook=_each_once)
        except (OSError, ValueError, RecursionError) as error:
            got = f"what is no JSON: {error}" if isinstance(error, json.JSONDecodeError) else getattr(error, "strerror", None) or error
            raise RequestError(f"{path}: expected a recipe (agvas-segment --save-recipe writes one), got {got}") from error
        schema = fields.pop("recipe", None) if isinstance(fields, dict) else None
        if schema != SCHEMA or schema is True:
            got = "none" if schema is None else f'"recipe": {schema!r}'
            wanted = f'JSON with "recipe": {SCHEMA}'
            raise RequestError(f"{path}: expected a recipe, {wanted}, got {got}; agvas-segment --save-recipe writes one")
        known = {field.name: str(field.type).split(" | ") for field in dataclasses.fields(cls) if field.name not in _OF_FILE}
        for name, value in fields.items():
            choose(str(path), name, known)
            if not any(type(value) in _KINDS[kind][1] for kind in known[name]):
                kinds = " or ".join(_KINDS[kind][0] for kind in known[name])
                raise RequestError(f"{path}: {name}: expected {kinds}, got {value!r}")
        if not fields.get("bundle"):
            raise RequestError(f"{path}: bundle: expected the bundle's folder, told from the recipe's own, got none")
        for name in _PATHS:
            hashed = "manifest_sha256" if name == "bundle" else "region_sha256"
            if hashed not in fields and fields.get(name) is not None:
                raise RequestError(f"{path}: {hashed}: expected the sha256 of its {name}, got none; write null where any {name} will do")
            if fields.get(hashed) is not None and fields.get(name) is None:
                raise RequestError(f"{path}: {name}: expected the one of this {hashed}, got none; name it, or write null for both")
            if fields.get(hashed) is not None and not _SHA256.fullmatch(fields[hashed]):
                raise RequestError(f"{path}: {hashed}: expected a sha256, 64 hexadecimal digits, got {fields[hashed]!r}; save it again")
            if fields.get(name) is not None:
                folder = os.path.dirname(os.path.realpath(path))  # the file's own, where a link was given
                fields[name] = os.path.join(folder, fields[name])  # ".." is for the system to follow, through links too
        return cls(**fields, path=str(path), sha256=hashlib.sha256(content).hexdigest())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Whole or not at all, with the sha256 of bundle and region as they are now.

        Raises:
            OutputError: the file cannot be written.
            BundleError: no bundle there.
            ImageError: no region there.
        """
        path = Path(path)
        told = dataclasses.asdict(self) | {"manifest_sha256": self._bundle_id(), "region_sha256": self._region_id()}
        for name in _OF_FILE:
            del told[name]
        for name in _PATHS:
            if told[name] is not None:
                told[name] = _from(path.parent, told[name])
        write_whole(path, (json.dumps({"recipe": SCHEMA} | told, indent=2) + "\n").encode())

    def open(self) -> Segmenter:
        """The segmenter of these settings.

        Raises:
            RequestError: as check; a setting out of range; a mode or an instruction that the model does not take.
            BundleError, EngineError, ImageError: see Segmenter.
        """
        self.check()
        try:
            segmenter = Segmenter(self.bundle, **{name: getattr(self, name) for name in OF_SEGMENTER})
            segmenter.request(**self.request)  # or it would be found out with the first part
        except RequestError as error:
            raise RequestError(f"{self._name}: {error}") from error
        return segmenter

    def check(self) -> None:
        """Whether bundle and region are those that the recipe was made for.

        Raises:
            RequestError: they are others.
            BundleError: no bundle there.
            ImageError: no region there.
        """
        bundle, region = self._bundle_id(), self._region_id()
        if self.manifest_sha256 is not None and bundle != self.manifest_sha256.lower():
            raise RequestError(
                f"{self._name}: expected the bundle it was made for (manifest {self.manifest_sha256[:12]}…) at {self.bundle}, got another "
                f"({bundle[:12]}…), whose scores its threshold says nothing about; put that one back, or choose the threshold anew and "
                "save the recipe again"
            )
        if self.region_sha256 is not None and region != self.region_sha256.lower():
            raise RequestError(
                f"{self._name}: expected the region it was made for (sha256 {self.region_sha256[:12]}…) at {self.region}, got "
                f"{'none' if region is None else f'another ({region[:12]}…)'}; put that one back, or save the recipe again"
            )

    def _bundle_id(self) -> str:
        try:
            return Bundle(Path(self.bundle), check_hashes=False).id
        except BundleError as error:
            raise type(error)(f"{self._name}: {error}{self._moved(self.bundle)}") from error

    def _moved(self, path: str) -> str:
        """What else to say where there is nothing at a path of the file's."""
        if not self.path or os.path.exists(path):
            return ""
        return "; its paths are told from its own folder: move both together, or save the recipe anew where it is now"

    @property
    def _name(self) -> str:
        return self.path or "recipe"

    def _region_id(self) -> str | None:
        if self.region is None:
            return None
        try:
            return sha256_of(Path(self.region))
        except OSError as error:
            words = f"{self._name}: expected its region at {self.region}, got {error}; put it back{self._moved(self.region)}"
            raise ImageError(words) from error

    @property
    def request(self) -> dict[str, Any]:
        """What a call, an inspection's question or a stream takes: `segmenter(frame, **recipe.request)`."""
        return {name: getattr(self, name) for name in OF_REQUEST}


def beside_recipe(setting: str) -> RequestError:
    """What a command line says of one of a recipe's settings that is given beside it: it would have to win or to lose in silence."""
    option = f"--{setting.replace('_', '-')}"
    return RequestError(f"{option}: expected the recipe's settings alone, got it beside --recipe; leave it out, or save another recipe")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A setting given twice would be the last one's, and the first would look as if it held."""
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} twice; leave one of them")
    return dict(pairs)


def _from(folder: Path, path: str) -> str:
    """A path told from a folder, or whole where no way leads there (another drive). A link at its end stays one: it may be set anew."""
    before, name = os.path.split(path.rstrip("/") or path)
    whole = os.path.realpath(path) if name in ("", ".", "..") else os.path.join(os.path.realpath(before), name)
    try:
        return Path(os.path.relpath(whole, os.path.realpath(folder))).as_posix()
    except ValueError:
        return whole
