"""Built engines on disk: which one belongs to a graph, a library version and a GPU, and the check of it before it is loaded.

An engine fits one version and one GPU generation; loaded elsewhere it dies with a message that helps nobody. So its file is named by
graph, engine, version and compute capability, and a sidecar JSON beside it says what it is (nothing is glued into the engine, which
other tools read too). What does not fit is told as expected, found, and the command that rebuilds it. Whether a build is right
is not known here: that is agvas-verify's, whose verdict the sidecar keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.cache import cache_folder, graph_hash, locked, write_whole
from engines.digests import remembered_sha256
from engines.errors import EngineFailed, EngineUnavailable
from engines.tensorrt_builder import RECIPE, BuildRequest, Profile, build

SIDECAR_VERSION = 1
FAILED = ".failed"
DIGESTS = "sha256.json"  # name of the file that remembers those of graphs and their data, see engines.digests
KERNELS = ".kernels"  # ends the name of what TensorRT for RTX compiled of an engine on the device, see engines.tensorrt


@dataclass(frozen=True)
class EngineKey:
    """What an engine belongs to.

    Attributes:
        stage: the graph's name.
        graph: `graph_hash` of the graph and its data.
        engine: "tensorrt" or "tensorrt-rtx".
        version: of that library.
        capability: compute capability of the GPU, "8.9".
    """

    stage: str
    graph: str
    engine: str
    version: str
    capability: str

    @property
    def path(self) -> Path:
        """Where the engine lies; its sidecar is the same with .json."""
        name = f"{self.stage}-{self.graph[:16]}-{self.engine}-{self.version}-sm{self.capability.replace('.', '')}.engine"
        return engines_folder() / name


@dataclass(frozen=True)
class EngineRecord:
    """The sidecar of one engine.

    Attributes:
        stage, graph, engine, version, capability: its key.
        bytes, sha256: of the engine file.
        profile: least, usual and largest shape by input.
        workspace_mb: limit it was built with.
        seconds, cpu_seconds, peak_rss_bytes, layers, attention, attention_fused, unfused, int4_layers: see BuildReport.
        recipe: how it was built, see engines.tensorrt_builder.RECIPE; sidecars of recipe 1 do not tell.
        verified: None when it was never run against the reference; else {"passed", "failures", "mask_iou_mean", "mask_iou_min", "flips"}.
    """

    stage: str
    graph: str
    engine: str
    version: str
    capability: str
    bytes: int
    sha256: str
    profile: dict[str, list[list[int]]]
    workspace_mb: int | None
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int | None
    layers: int | None
    attention: int
    attention_fused: int | None
    unfused: tuple[str, ...]
    int4_layers: int | None
    recipe: int = 1
    verified: dict[str, Any] | None = None
    sidecar_version: int = SIDECAR_VERSION


def engines_folder() -> Path:
    """Where engines lie, of all bundles."""
    return cache_folder() / "engines"


def hash_of(graph: Path) -> str:
    """`graph_hash` of the files themselves: the .onnx and what lies beside it under the same stem. Reads whole what changed.

    Raises:
        EngineFailed: one cannot be read.
    """
    files = {}
    for path in sorted(graph.parent.glob(f"{graph.stem}.*")):
        try:
            files[path.name] = _sha256(path)
        except OSError as error:
            raise EngineFailed(f"{path}: cannot be read ({error}); check its permissions, or copy the bundle again") from error
    return graph_hash(files)


def record_of(path: Path) -> EngineRecord:
    """The sidecar of an engine file.

    Raises:
        EngineUnavailable: there is none, or it is not readable as one.
    """
    sidecar = path.with_suffix(".json")
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        if fields["sidecar_version"] != SIDECAR_VERSION:
            raise ValueError(f"sidecar version {fields['sidecar_version']}, this agvas reads {SIDECAR_VERSION}")
        return EngineRecord(**{**fields, "unfused": tuple(fields["unfused"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineUnavailable(f"{sidecar}: expected the engine's sidecar, found {type(error).__name__}: {error}") from error


def load(key: EngineKey, rebuild: str) -> tuple[bytes, EngineRecord]:
    """The engine of a key, checked against its sidecar.

    Args:
        rebuild: the command that makes it, for the message.

    Raises:
        EngineUnavailable: none was built, it was built for another GPU, version or graph, or its file is not what was built or
            cannot be read.
    """
    try:
        return _load(key, rebuild)
    except OSError as error:
        raise EngineUnavailable(f"{key.path}: cannot be read ({error}); check its permissions, or run {rebuild} --rebuild") from error


def _load(key: EngineKey, rebuild: str) -> tuple[bytes, EngineRecord]:
    path = key.path
    if not path.is_file():
        raise EngineUnavailable(f"stage {key.stage}: expected {_what(key)}, found {_found_instead(key)}; run {rebuild}")
    try:
        record = record_of(path)
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{error}; run {rebuild} --rebuild") from error
    for field in ("stage", "graph", "engine", "version", "capability"):
        expected, found = getattr(key, field), getattr(record, field)
        if expected != found:
            words = {"capability": "compute capability", "graph": "graph hash"}.get(field, field)
            raise EngineUnavailable(f"{path}: expected an engine for {words} {expected}, found one for {found}; run {rebuild} --rebuild")
    if record.recipe != RECIPE:
        raise EngineUnavailable(
            f"{path}: expected an engine of build recipe {RECIPE}, found one of {record.recipe}, which this agvas builds otherwise; "
            f"run {rebuild} --rebuild"
        )
    size = path.stat().st_size
    if size != record.bytes:
        raise EngineUnavailable(f"{path}: expected {record.bytes} bytes, found {size} (cut off?); run {rebuild} --rebuild")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != record.sha256:
        raise EngineUnavailable(f"{path}: expected sha256 {record.sha256[:16]}…, found {found[:16]}… (altered); run {rebuild} --rebuild")
    return content, record


def build_into_cache(
    key: EngineKey,
    graph: Path,
    profile: Profile,
    workspace_mb: int | None = None,
    *,
    device: int = 0,
    rebuild: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[EngineRecord, bool]:
    """Build the engine of a key unless it is there whole, for these shapes. Processes that ask for the same one build it once.

    One that takes more than `profile` asks for, and is tuned for the same usual shapes, is one for these shapes: else those who ask for
    more pictures in a call and those who ask for fewer would build over each other's. There is one a key, since who loads it knows no more.

    Args:
        device: number of the GPU that tensorrt builds on, which has the key's compute capability.
        force: build where memory or disk will not do by the estimate, too.

    Returns:
        Its record, and whether it was there already.

    Raises:
        EngineFailed: it cannot be built, or the disk has no room.
    """
    path, shapes = key.path, {name: [list(shape) for shape in given] for name, given in profile.items()}
    waiting = (lambda: progress("waiting for another process that builds it", 0, 1)) if progress else None
    try:
        with locked(path.with_suffix(".lock"), waiting):
            if not rebuild:
                try:
                    _, record = load(key, "")
                except EngineUnavailable:
                    pass
                else:
                    if _covers(record.profile, shapes) and record.workspace_mb == workspace_mb:
                        return record, True
            if not force:
                _check_disk(graph)
            return _build(key, graph, profile, shapes, workspace_mb, device, force, progress), False
    except OSError as error:
        raise EngineFailed(f"{path}: cannot be written ({error}); free some space or set AGVAS_CACHE to another folder") from error


def _covers(profile: dict[str, list[list[int]]], wanted: dict[str, list[list[int]]]) -> bool:
    """Whether an engine of `profile` takes every shape of `wanted` and is tuned for the same ones."""
    if profile.keys() != wanted.keys():
        return False
    pairs = ((profile[name], wanted[name]) for name in wanted)
    return all(
        usual == asked and all(a <= b for a, b in zip(least, smallest)) and all(a >= b for a, b in zip(most, largest))
        for (least, usual, most), (smallest, asked, largest) in pairs
    )


def hashes() -> dict[Path, str]:
    """sha256 of every engine in the cache, as their sidecars tell: which ones are there before a verification opens its own."""
    found = {}
    for path in engines_folder().glob("*.engine"):
        with contextlib.suppress(EngineUnavailable):  # not ours
            found[path] = record_of(path).sha256
    return found


def set_verified(path: Path, sha256: str, verdict: dict[str, Any]) -> bool:
    """Note in the sidecar how the engine did against the reference. Waits for a build of it that is under way.

    Args:
        sha256: of the engine that was verified.

    Returns:
        False where another engine stands in its place by now, whose sidecar is left as it is.

    Raises:
        EngineUnavailable: its sidecar is gone by now.
    """
    with locked(path.with_suffix(".lock")):
        record = record_of(path)
        if record.sha256 != sha256:
            return False
        write_whole(path.with_suffix(".json"), _json(dataclasses.replace(record, verified=verdict)))
        return True


def set_aside(path: Path, sha256: str) -> Path | None:
    """Rename an engine that gave wrong results, with its sidecar and kernels, so that it is kept for a look and not used.

    Args:
        sha256: of the engine that gave them.

    Returns:
        Its new name; None where another engine stands in its place by now, which is left there.

    Raises:
        EngineUnavailable: its sidecar is gone by now; without one it is loaded no more.
    """
    aside = path.with_name(path.name + FAILED)
    with locked(path.with_suffix(".lock")):
        if record_of(path).sha256 != sha256:
            return None
        for suffix in (KERNELS, ".json"):
            if (beside := path.with_suffix(suffix)).is_file():
                os.replace(beside, aside.with_name(f"{aside.name}{suffix}"))
        os.replace(path, aside)
    return aside


def _build(
    key: EngineKey,
    graph: Path,
    profile: Profile,
    shapes: dict[str, list[list[int]]],
    workspace_mb: int | None,
    device: int,
    force: bool,
    progress: Callable[[str, int, int], None] | None,
) -> EngineRecord:
    path = key.path
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    request = BuildRequest(
        engine=key.engine,
        graph=str(graph.absolute()),
        output=str(partial.absolute()),
        capability=key.capability,
        profile=profile,
        workspace_mb=workspace_mb,
        timing_cache=str(_timings(key).absolute()),
        device=device,
        force=force,
    )
    try:
        report = build(request, path.with_suffix(".log"), progress)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        record = EngineRecord(**asdict(key), sha256=digest, profile=shapes, workspace_mb=workspace_mb, recipe=RECIPE, **asdict(report))
        # What is the old one's goes first: at no moment does a new engine stand beside a sidecar that would vouch for it, or beside kernels
        # compiled of another.
        for suffix in (".json", KERNELS):
            path.with_suffix(suffix).unlink(missing_ok=True)
        os.replace(partial, path)
        write_whole(path.with_suffix(".json"), _json(record))
    finally:
        partial.unlink(missing_ok=True)
    return record


def _timings(key: EngineKey) -> Path:
    """The file of kernel times, one a stage. Who builds the stage of another bundle meanwhile writes it, too: the last one's stays."""
    return engines_folder() / f"timings-{key.stage}-{key.engine}-{key.version}-sm{key.capability.replace('.', '')}"


def _sha256(path: Path) -> str:
    return remembered_sha256(path, engines_folder() / DIGESTS)


def _json(record: EngineRecord) -> bytes:
    return (json.dumps(asdict(record), indent=2) + "\n").encode()


def _check_disk(graph: Path) -> None:
    """Room for one engine: about as large as its graph, and what the library adds."""
    needed = int(1.5 * sum(path.stat().st_size for path in graph.parent.glob(f"{graph.stem}.*"))) + (16 << 20)
    free = shutil.disk_usage(engines_folder()).free
    if free < needed:
        raise EngineFailed(
            f"{engines_folder()}: an engine of {graph.name} takes up to {needed >> 20} MiB and {free >> 20} MiB are free; "
            "free some space, set AGVAS_CACHE to another folder, or go on all the same with --force"
        )


def _what(key: EngineKey) -> str:
    return f"an engine of {key.engine} {key.version} for compute capability {key.capability}"


def _found_instead(key: EngineKey) -> str:
    """What there is of this stage, nearest first, in words."""
    records = []
    for engine in sorted(engines_folder().glob(f"{key.stage}-*.engine")):  # what was set aside ends otherwise
        try:
            records.append(record_of(engine))
        except EngineUnavailable:
            continue  # not ours
    ours = [record for record in records if record.graph == key.graph]
    same = [record for record in ours if (record.engine, record.version) == (key.engine, key.version)]
    if list(engines_folder().glob(f"{key.path.name}{FAILED}")):
        return "only one that failed its verification and was set aside"
    if same:
        return f"one for compute capability {', '.join(sorted(record.capability for record in same))}"
    if ours:
        return ", ".join(sorted({f"one of {record.engine} {record.version} for {record.capability}" for record in ours}))
    if records:
        return "only engines of other graphs (another bundle, or the same exported again)"
    return "none"
