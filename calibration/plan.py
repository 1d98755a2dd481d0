"""QuantPlan: what was quantised, how, and on what: a folder with plan.json and weights.safetensors.

Integer weights and activation ranges stand in the tensors file, everything a reader must know to trust them in the JSON beside it, which
takes its name last: a folder with a plan.json is whole. A plan belongs to the weights it was made from and says so by their sha256. Reading
is strict; nothing is computed here but hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from agvas.weights import LazyTensor, LazyTensors
from agvas.writing import disk_errors, write_tensors
from calibration.gptq import GPTQSettings
from calibration.weights import LazyQuantizedWeight, QuantizedWeight
from runtime.bundle import sha256_of

SCHEMA = 1
PLAN, WEIGHTS = "plan.json", "weights.safetensors"
CODES, SCALES, RANGE = ".codes", ".scales", ".input_absmax"
PACKAGES = ("agvas", "torch", "transformers", "numpy", "safetensors")


class PlanError(ValueError):
    """A plan that is missing, damaged, of another version, or made for another checkpoint."""


@dataclass(frozen=True)
class LinearRecord:
    """One linear layer that GPTQ quantised.

    Attributes:
        name: as torch names it inside AGVAS, `language.model.layers.3.mlp.down_proj`.
        bits, group: of its QuantizedWeight.
        damping: share of the Hessian's mean diagonal that it took.
        error: ‖X (W - Q)ᵀ‖ / ‖X Wᵀ‖ on the calibration inputs.
        rounding_error: the same of plain rounding.
    """

    name: str
    bits: int
    group: int
    damping: float
    error: float
    rounding_error: float
    method: str = "gptq"


@dataclass(frozen=True)
class QuantPlan:
    """What was quantised, how, and on what.

    Attributes:
        model: the config's name.
        weights_sha256: `model_sha256` of the model that was calibrated.
        settings: of GPTQ.
        answer_share: how much of the Hessians the answers' tokens made; None where every token counted the same.
        modes: the modes whose prompts were used, in turn.
        images: `image_sha256` of every calibration picture, in the order they came.
        tokens: how many the language model read in all.
        linears: one record for each quantised weight, in the model's order.
        versions: of the packages that took part.
        dtype: what encoders and embeddings computed in (fp32, bf16, fp16); decoder layers always compute in fp32.
        conversations: sha256 of what was asked and answered around the pictures, in tokens; None in plans from before it was recorded.
        config: the parts of the checkpoint's config that were computed with, preprocessing among them; None as above.
    """

    model: str
    weights_sha256: str
    settings: GPTQSettings
    answer_share: float | None
    modes: tuple[str, ...]
    images: tuple[str, ...]
    tokens: int
    linears: tuple[LinearRecord, ...]
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    dtype: str = "fp32"
    conversations: str | None = None
    config: dict[str, Any] | None = None

    def inputs(self) -> dict[str, Any]:
        """Every field but the results, as JSON holds it: what is made of the same is the same."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in fields.items() if name not in ("tokens", "linears")}

    def check(self, model: nn.Module | LazyTensors) -> None:
        """Raises PlanError when the plan was made for other weights than this model's, or this checkpoint's."""
        if (found := model_sha256(model)) != self.weights_sha256:
            raise PlanError(
                f"plan: expected the {self.model} checkpoint it was made for (weights {self.weights_sha256[:12]}…), got one with weights "
                f"{found[:12]}…; run agvas-calibrate on this checkpoint"
            )


def model_sha256(model: nn.Module | LazyTensors) -> str:
    """sha256 of every named tensor's name, shape and float32 bytes: the same for a checkpoint in 16 bit and loaded from it in fp32.

    Args:
        model: in memory, or the tensors of an opened checkpoint, which are then read one after the other.
    """
    digest = hashlib.sha256()
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        values = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
        digest.update(values.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def image_sha256(image: np.ndarray) -> str:
    """sha256 of a picture's height, width and RGB bytes: of what was seen, whatever file it stood in."""
    return hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}\n".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def versions() -> dict[str, str | None]:
    """Of the packages that take part; None for one that runs from its source folder."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: of(package) for package in PACKAGES}


def takes_plan(folder: Path) -> bool:
    """Whether `write_plan` may write there: no folder yet, an empty one, an older plan, or what an interrupted writing left."""
    if not folder.exists() or (folder / PLAN).is_file():
        return True
    found = {path.name for path in folder.iterdir()}
    begun = {f"{WEIGHTS}.partial", f"{PLAN}.partial"}  # one of these is there until the plan is whole
    return not found or (bool(found & begun) and found <= begun | {WEIGHTS})


def write_plan(folder: Path, plan: QuantPlan, weights: Mapping[str, QuantizedWeight], ranges: Mapping[str, np.ndarray]) -> None:
    """Write the folder; an interrupted writing leaves an older plan as it was until all is written, and then none for a moment.

    Args:
        weights: by linear layer, those of the plan's records; asked for one after the other, twice.
        ranges: largest absolute input of each channel by linear layer, float32 [K].

    Raises:
        PlanError: weights that are not those of the records.
        OSError: the disk is full.
    """
    tensors = _check_records(folder, plan, weights)
    for name, channels in ranges.items():
        values = torch.from_numpy(np.ascontiguousarray(channels, np.float32))
        tensors[name + RANGE] = LazyTensor(tuple(values.shape), values.dtype, partial(torch.Tensor.clone, values))
    folder.mkdir(parents=True, exist_ok=True)
    new_weights, new_plan = folder / f"{WEIGHTS}.partial", folder / f"{PLAN}.partial"
    write_tensors(new_weights, tensors)
    content = {"schema": SCHEMA, "tensors_sha256": sha256_of(new_weights)} | dataclasses.asdict(plan)
    with disk_errors(new_plan):
        new_plan.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # An old plan.json must not vouch for new tensors, not even for a moment.
    (folder / PLAN).unlink(missing_ok=True)
    os.replace(new_weights, folder / WEIGHTS)
    os.replace(new_plan, folder / PLAN)


def read_plan(folder: str | Path, model: nn.Module | None = None) -> tuple[QuantPlan, dict[str, QuantizedWeight]]:
    """A plan and its integer weights, by linear layer.

    Args:
        model: the checkpoint it shall be used with; None leaves that unchecked.

    Raises:
        PlanError: missing, damaged, of another schema, tensors that do not fit the records; made for other weights than the model's.
    """
    folder = Path(folder)
    plan, tensors = _read(folder)
    if model is not None:
        plan.check(model)
    weights = {}
    for record in plan.linears:
        try:
            weights[record.name] = QuantizedWeight(tensors[record.name + CODES], tensors[record.name + SCALES], record.bits, record.group)
        except KeyError as error:
            raise PlanError(f"{folder / WEIGHTS}: expected tensor {error.args[0]}, got none; run agvas-calibrate again") from None
        except ValueError as error:
            raise PlanError(f"{folder / WEIGHTS}: {record.name}: {error}; run agvas-calibrate again") from error
    quantized = {name.removesuffix(CODES) for name in tensors if name.endswith(CODES)}
    if extra := sorted(quantized - weights.keys()):
        raise PlanError(f"{folder / PLAN}: expected a record for every quantised linear, got none for {', '.join(extra[:5])}; run it again")
    return plan, weights


def open_plan(folder: str | Path, model: nn.Module | LazyTensors) -> tuple[QuantPlan, dict[str, LazyQuantizedWeight]]:
    """A plan and its integer weights, by linear layer, each to be read when asked for.

    Args:
        model: the checkpoint it shall be used with.

    Raises:
        PlanError: as `read_plan`; of tensors that do not fit their records when they are read.
    """
    plan, weights = read_records(folder)
    plan.check(model)
    return plan, weights


def read_records(folder: str | Path) -> tuple[QuantPlan, dict[str, LazyQuantizedWeight]]:
    """`open_plan` for whatever checkpoint.

    Raises:
        PlanError: as `open_plan`, but for another checkpoint.
    """
    folder = Path(folder)
    plan, names = _opened(folder)
    for record in plan.linears:
        for name in (record.name + CODES, record.name + SCALES):
            if name not in names:
                raise PlanError(f"{folder / WEIGHTS}: expected tensor {name}, got none; run agvas-calibrate again")

    def lazy(record: LinearRecord) -> LazyQuantizedWeight:
        def make() -> QuantizedWeight:
            with safe_open(folder / WEIGHTS, framework="np") as file:
                codes, scales = file.get_tensor(record.name + CODES), file.get_tensor(record.name + SCALES)
            try:
                return QuantizedWeight(codes, scales, record.bits, record.group)
            except ValueError as error:
                raise PlanError(f"{folder / WEIGHTS}: {record.name}: {error}; run agvas-calibrate again") from error

        with safe_open(folder / WEIGHTS, framework="np") as file:
            outputs, inputs = file.get_slice(record.name + CODES).get_shape()
        return LazyQuantizedWeight((outputs, inputs), record.bits, record.group, make)

    return plan, {record.name: lazy(record) for record in plan.linears}


def read_ranges(folder: str | Path) -> dict[str, np.ndarray]:
    """Largest absolute input of each channel by linear layer, float32 [K]; its maximum is the tensor's range.

    Raises:
        PlanError: as `read_plan`.
    """
    _, tensors = _read(Path(folder), RANGE)
    return {name.removesuffix(RANGE): tensor for name, tensor in tensors.items()}


def _read(folder: Path, suffix: str = "") -> tuple[QuantPlan, dict[str, np.ndarray]]:
    """The plan, and the tensors whose names end so."""
    plan, names = _opened(folder)
    with safe_open(folder / WEIGHTS, framework="np") as file:
        return plan, {name: file.get_tensor(name) for name in names if name.endswith(suffix)}


def check_there(folder: Path) -> None:
    """Raises PlanError where the folder holds no plan, or half of one."""
    if not (folder / PLAN).is_file() or not (folder / WEIGHTS).is_file():
        raise PlanError(f"{folder}: expected a plan ({PLAN} and {WEIGHTS}), got none or half of one; make it with agvas-calibrate --output")


def _opened(folder: Path) -> tuple[QuantPlan, list[str]]:
    """The plan, and the names of the tensors in the file beside it, which is seen to be the plan's."""
    check_there(folder)
    path = folder / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path}: expected JSON, got {error}; run agvas-calibrate again") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise PlanError(f"{path}: expected a plan of schema {SCHEMA}, got {found!r}; run this version's agvas-calibrate")
    plan = _plan(path, content)
    if (found := sha256_of(folder / WEIGHTS)) != content.get("tensors_sha256"):
        expected = str(content.get("tensors_sha256"))[:12]
        raise PlanError(f"{folder / WEIGHTS}: expected sha256 {expected}…, got {found[:12]}…; copy the folder again or run agvas-calibrate")
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            return plan, list(file.keys())
    except Exception as error:  # the library raises nothing narrower
        raise PlanError(f"{folder / WEIGHTS} cannot be read: {error}; run agvas-calibrate again") from error


def _plan(path: Path, content: dict[str, Any]) -> QuantPlan:
    fields = {name: value for name, value in content.items() if name not in ("schema", "tensors_sha256")}
    try:
        fields["settings"] = GPTQSettings(**fields["settings"])
        fields["linears"] = tuple(LinearRecord(**record) for record in fields["linears"])
        fields["modes"], fields["images"] = tuple(fields["modes"]), tuple(fields["images"])
        return QuantPlan(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: expected the fields of a plan: {error}; run agvas-calibrate again") from error


def _check_records(folder: Path, plan: QuantPlan, weights: Mapping[str, QuantizedWeight]) -> dict[str, LazyTensor]:
    """Codes and scales, to be read when they are written."""
    recorded = {record.name: (record.bits, record.group) for record in plan.linears}
    given, tensors = {}, {}
    for name, weight in weights.items():
        given[name] = (weight.bits, weight.group)
        tensors[name + CODES] = LazyTensor(weight.shape, torch.int8, partial(_codes, weights, name))
        tensors[name + SCALES] = LazyTensor(tuple(weight.scales.shape), torch.float16, partial(_scales, weights, name))
    if recorded != given:
        differing = sorted(name for name in recorded.keys() | given.keys() if recorded.get(name) != given.get(name))
        raise PlanError(f"{folder}: expected weights as the plan records them, got others for {', '.join(differing[:5])}")
    return tensors


def _codes(weights: Mapping[str, QuantizedWeight], name: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(weights[name].codes))


def _scales(weights: Mapping[str, QuantizedWeight], name: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(weights[name].scales))
