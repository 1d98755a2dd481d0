"""Builds a bundle's TensorRT engines: shapes from the contract and the manifest, one engine a stage and GPU, and a verdict on the masks.

A build that succeeds proves nothing about what the engine computes, so engines are verified where they can run, and those that give
other masks are set aside. Where no such GPU is at hand they are built all the same, and said to be unverified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import EngineError, EngineFailed, EngineOptions, EngineUnavailable
from engines.cuda import GPU, capability_here, device_index, gpus_here
from engines.tensorrt_builder import Profile
from engines.tensorrt_cache import EngineKey, EngineRecord, build_into_cache, engines_folder, hashes, set_aside, set_verified
from engines.tensorrt_library import TENSORRT, TENSORRT_ENGINES, ahead_of_time, version
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.errors import RequestError, choose
from runtime.prompts import PromptEncoder
from runtime.verify import Verification, open_pipeline, verify

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildSettings:
    """One call of agvas-build.

    Attributes:
        engine: "tensorrt" or "tensorrt-rtx".
        capabilities: compute capabilities ("8.9") to build for; empty for that of the GPU here.
        device: which GPU that is, "cuda:N".
        workspace_mb: most scratch memory of a layer; None leaves it to the builder.
        max_batch: most pictures in one call of an engine that open_engine opened; a Segmenter's calls have one.
        rebuild: build what is there already, too.
        force: build where memory or disk will not do by the estimate, too.
        stages: which stages; empty for all.
    """

    engine: str
    capabilities: tuple[str, ...] = ()
    device: str = "cuda:0"
    workspace_mb: int | None = None
    max_batch: int = 1
    rebuild: bool = False
    force: bool = False
    stages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choose("--engine", self.engine, TENSORRT_ENGINES)
        for stage in self.stages:
            choose("--stages", stage, STAGES)
        if self.max_batch < 1:
            raise RequestError(f"--max-batch: expected 1 or more, got {self.max_batch}")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise RequestError(f"--workspace: expected a number of MB of 1 or more, got {self.workspace_mb}")
        if not GPU.fullmatch(self.device):
            raise RequestError(f"--device: expected cuda:N (cuda:0 is the first GPU), got {self.device!r}")


def build_engines(bundle: Bundle, settings: BuildSettings, progress: Told | None = None) -> dict[str, Any]:
    """Build every engine asked for, and verify those that can run here.

    Returns:
        The JSON line of agvas-build: "bundle", "precision" (by stage), "engine", "version", "engines" (one record each, with "path" and
        "cached"), "verified" (True or False of the GPU here, None where none could run), "note" (why not, or what failed), "seconds".

    Raises:
        EngineUnavailable: the library or the device is missing, or a compute capability cannot be built for here.
        EngineFailed: a build failed; engines built before it stay.
    """
    started = time.monotonic()
    installed = version(settings.engine)
    here, trouble = _here(settings.device)
    capabilities = _capabilities(settings, here, trouble)
    shapes = profiles(bundle, settings.max_batch)
    stages = settings.stages or tuple(STAGES)
    built: list[dict[str, Any]] = []
    keys = []
    for capability in capabilities:
        for stage in stages:
            key = EngineKey(stage, bundle.graph_hash(stage), settings.engine, installed, capability)
            label = f"{stage}, compute capability {capability}"
            told = None if progress is None else _labelled(progress, label)
            record, cached = build_into_cache(
                key,
                bundle.graph(stage),
                shapes[stage],
                settings.workspace_mb,
                device=device_index(settings.device),
                rebuild=settings.rebuild,
                force=settings.force,
                progress=told,
            )
            keys.append(key)
            built.append(_told(key, record, cached))
    report: dict[str, Any] = {
        "bundle": str(bundle.folder),
        "precision": bundle.manifest.precision,
        "engine": settings.engine,
        "version": installed,
        "engines": built,
        "verified": None,
        "note": "",
    }
    if here not in capabilities:
        why = trouble or f"the GPU here has compute capability {here}"
        report["note"] = f"built, not verified: {why}; run agvas-verify on the device"
    elif missing := [stage for stage in STAGES if stage not in stages]:
        report["note"] = f"built, not verified: without {', '.join(missing)} there is no chain; build all stages, or run agvas-verify"
    else:
        report["verified"], report["note"] = _verify(bundle, settings, progress)
        for entry, key in zip(built, keys):
            entry["verified"] = report["verified"] if key.capability == here else entry["verified"]
    report["seconds"] = round(time.monotonic() - started, 3)
    return report


def profiles(bundle: Bundle, max_batch: int = 1) -> dict[str, Profile]:
    """Least, usual and largest shape of every stage's inputs: the contract's axes with this bundle's sizes.

    The free axes: B from 1, which a Segmenter's calls have, to `max_batch`; N, the tokens of a call, from one (a decoding step) over direct
    mode's to the longest instruction's; K, the past, from 0 to the longest prompt and answer; R, the rows, from one to the draft's.
    """
    prompts, sizes = bundle.prompt_encoder(), bundle.manifest.sizes
    usual, longest, draft = _tokens(prompts, sizes["T"])
    answer = prompts.prompts.max_new_tokens
    least = {"B": 1, "N": 1, "K": 0, "R": 1}
    common = {"B": 1, "N": usual, "K": 0, "R": draft}
    most = {"B": max_batch, "N": longest, "K": longest + answer, "R": max(draft, 8)}

    return {stage: profile_of(stage, sizes, least, common, most) for stage in STAGES}


def profile_of(stage: str, sizes: Mapping[str, int], *free: Mapping[str, int]) -> Profile:
    """Shapes of a stage's inputs where the free axes are as in each of `free`: the least, the usual and the largest."""

    def shape(axes: tuple[str | int, ...], known: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else known[axis] for axis in axes)

    least, usual, most = ({**sizes, **axes} for axes in free)
    return {
        tensor.name: (shape(tensor.shape, least), shape(tensor.shape, usual), shape(tensor.shape, most)) for tensor in STAGES[stage].inputs
    }


def judge(
    bundle: Bundle, engine: str, device: str, verification: Verification, before: Mapping[Path, str]
) -> tuple[list[Path], list[str]]:
    """Note a verification in the sidecars of the engines that ran; set them aside when it failed.

    Every trace was computed then: where an engine cannot run, `verify` raises, and nothing is known about it.
    Which stage is to blame is not known here (agvas-verify --bisect finds it), so all go together.

    Args:
        before: engines.tensorrt_cache.hashes() before the engines were opened; what another process has built in an engine's place since
            then is left alone.

    Returns:
        New names of the engines set aside, and in words what of this could not be done (in a cache that cannot be written): that
        changes nothing of the verdict.
    """
    parity = verification.parity.to_json()
    kept = ("mask_iou_mean", "mask_iou_min", "flips")
    verdict = {"passed": verification.passed, "failures": verification.failures, **{name: parity[name] for name in kept}}
    aside: list[Path] = []
    replaced: list[str] = []
    unnoted: Exception | None = None
    unmoved: Exception | None = None
    installed, capability = version(engine), capability_here(device)
    for stage in STAGES:
        path = EngineKey(stage, bundle.graph_hash(stage), engine, installed, capability).path
        ran = before.get(path, "")
        try:
            if not set_verified(path, ran, verdict):
                replaced.append(stage)
                continue
        except (OSError, EngineUnavailable) as error:  # EngineUnavailable: a sidecar that is gone by now
            unnoted = error
        if not verification.passed:
            try:
                if (moved := set_aside(path, ran)) is not None:
                    aside.append(moved)
            except (OSError, EngineUnavailable) as error:
                unmoved = error
    troubles = []
    if replaced:
        troubles.append(f"another process has built {', '.join(replaced)} again meanwhile, which is not judged; run agvas-verify again")
    if unnoted is not None:
        troubles.append(f"the verdict could not be noted beside the engines ({unnoted}); let this user write to {engines_folder()}")
    if unmoved is not None:
        troubles.append(f"the engines could not be set aside and go on being used ({unmoved}); remove them from {engines_folder()}")
    return aside, troubles


def _verify(bundle: Bundle, settings: BuildSettings, progress: Told | None) -> tuple[bool, str]:
    options = EngineOptions(device=settings.device, to_judge=True)
    told = None if progress is None else lambda done, total: progress("golden traces", done, total)
    before = hashes()
    try:
        verification = verify(bundle, open_pipeline(bundle, settings.engine, options), options, told)
    except EngineError as error:
        raise EngineFailed(f"the engines were built but do not run here: {error}") from error
    aside, troubles = judge(bundle, settings.engine, settings.device, verification, before)
    if verification.passed:
        return True, "; ".join(["built and verified", *troubles])
    moved = [f"set aside as {aside[0].name} and the like"] if aside else []
    command = f"run agvas-verify --bundle {bundle.folder} --engine {settings.engine} --device {settings.device} --bisect"
    return False, f"built, but the masks are not the reference's: {'; '.join([*verification.failures, *moved, *troubles, command])}"


def _tokens(prompts: PromptEncoder, image_tokens: int) -> tuple[int, int, int]:
    """Tokens of direct mode's pass, of the longest one, and of the draft."""
    prompt = prompts.encode(None, next(iter(prompts.prompts.instructions)))
    draft = len(prompts.encode_answer(prompts.prompts.answer))
    seen = len(prompt.prefix) + 2 * image_tokens
    template = len(prompt.suffix)  # with an instruction in it: a little more than the template alone
    return seen + template + draft - 1, seen + template + prompts.prompts.max_instruction_tokens + draft, draft


def _here(device: str) -> tuple[str | None, str]:
    """Compute capability of the GPU here; None, and why, where there is none or no way to ask.

    Raises:
        EngineUnavailable: there are GPUs, but not this one.
    """
    try:
        gpus_here(device)
    except EngineUnavailable as error:
        return None, str(error)
    return capability_here(device), ""


def _capabilities(settings: BuildSettings, here: str | None, trouble: str) -> tuple[str, ...]:
    asked = settings.capabilities
    if settings.engine == TENSORRT:
        if here is None:
            raise EngineUnavailable(trouble)
        if asked and asked != (here,):
            raise EngineUnavailable(
                f"--compute-capability: engine tensorrt builds on the GPU that runs it; expected {here} (the one here), "
                f"got {', '.join(asked)}; build on that device, or use engine tensorrt-rtx"
            )
        return (here,)
    offered = ahead_of_time(settings.engine)
    if not asked and here is None:
        raise EngineUnavailable(
            f"--compute-capability: expected one or more of {', '.join(offered)}, since no GPU here can be asked; got none ({trouble})"
        )
    for capability in asked or (here or "",):
        if capability not in offered:
            raise EngineUnavailable(
                f"--compute-capability: {settings.engine} builds for {', '.join(offered)}; got {capability}; on a Jetson (8.7) and on "
                "data centre GPUs use engine tensorrt on the device"
            )
    return asked or (here or "",)


def _told(key: EngineKey, record: EngineRecord, cached: bool) -> dict[str, Any]:
    counts = ("layers", "attention", "attention_fused", "unfused", "int4_layers")
    told = {name: getattr(record, name) for name in ("stage", "capability", "bytes", "seconds", "cpu_seconds", "peak_rss_bytes", *counts)}
    verified = record.verified
    return told | {"verified": None if verified is None else verified["passed"], "path": str(key.path), "cached": cached}


def _labelled(progress: Told, label: str) -> Told:
    return lambda phase, done, total: progress(f"{label}: {phase.lower()}", done, total)
