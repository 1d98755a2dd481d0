"""Calibration: pictures go through the reference once, and its language model comes out in integers, layer by layer.

The pictures' real embeddings (prefix, image, aligned tokens, question, answer) wait on disk; one decoder layer at a time is copied in
float32 to the computing device. Inside a layer the linears that share an input are quantised together and the next ones see what those
then put out, as does the next layer: each makes up for what was lost before it. Decoder layers may stay in the checkpoint's file until
their turn; then memory is encoders and embeddings, one layer, and its Hessian with what is factored of it (`memory_needed`).
Finished pictures and layers stay in the work folder, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from agvas.config import AGVASConfig
from agvas.model import AGVAS
from agvas.weights import LazyTensors, check_finite
from agvas.writing import alone_in, disk_errors
from calibration.conversations import Conversation, conversation, modes_in_turn
from calibration.gptq import GPTQSettings, curvature, gptq, output_error, round_to_nearest
from calibration.observers import HessianSum, Ranges, input_of
from calibration.plan import CODES, RANGE, SCALES, LinearRecord, PlanError, QuantPlan, image_sha256, model_sha256, versions
from calibration.truth import linear_of, put_weight
from calibration.weights import QuantizedWeight
from runtime import preprocess

LAYERS = "language.model.layers"
HEAD = "language.lm_head"
# Linears of a decoder layer that read the same input, in the order in which they are computed.
SHARING = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
STATE = "state.json"  # of a work folder: which calibration's it is
GROUPS = (128, 64, 32)
COMPUTED = ("pixel", "semantic", "spam", "language", "preprocessing")  # parts of the config; its prompts are in the conversations
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIBRARIES = 1_400_000_000  # bytes of Python with torch and transformers, before any weight
TEXT_TOKENS = 100  # of question and answer, about
PASSES = len(SHARING) + 1  # over the pictures in each layer: one a Hessian, one for the output

Report = Callable[[str, int, int], None]  # (what, steps done, steps in all)


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is calibrated.

    Attributes:
        answer_share: how much of the Hessians the answer makes, the rest being question and image; None lets every token count the same.
            Anchor states stand in the answer, a handful of tokens in hundreds: with about a half (each counting 20) their error on
            nano, group 32, eight pictures, was 0.034 against 0.049 with None. Much more starves the keys and values of the image.
        device: where a layer is computed and quantised, "cpu" or "cuda:N". Not part of the result.
    """

    gptq: GPTQSettings = GPTQSettings()
    answer_share: float | None = 0.5
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.answer_share is not None and not 0 < self.answer_share < 1:
            raise ValueError(f"answer_share: expected between 0 and 1, got {self.answer_share}")


class Calibration(NamedTuple):
    """What calibration makes; calibration.plan.write_plan keeps it."""

    plan: QuantPlan
    weights: Mapping[str, QuantizedWeight]  # of every linear in the language model's decoder layers
    ranges: dict[str, np.ndarray]  # of every linear in encoders and language model, head included: float32 [K]


def calibrate(
    model: AGVAS,
    images: Sequence[np.ndarray],
    settings: CalibrationSettings,
    progress: Report | None = None,
    work: Path | None = None,
    planned: QuantPlan | None = None,
    tensors: LazyTensors | None = None,
) -> Calibration:
    """Quantise the language model on pictures. The model stays as it is.

    Args:
        model: its decoder layers may be on the meta device (agvas.checkpoint.load with `left`) where `tensors` are given.
        images: uint8 RGB [H, W, 3] each; read in order, first for their hashes if not `planned`; let a large folder's be read on demand.
        progress: told (what, steps done, steps in all).
        work: where embeddings and finished layers are kept, to go on with after an interruption; about two times pictures × tokens ×
            width × 4 bytes. Left behind at the end, and the weights are read from it when asked for. None for a temporary folder.
        planned: `plan_to_make` of these, with the checkpoint's hash where the model was rounded when it was loaded, or is not whole; None:
            with the model's.
        tensors: the checkpoint's, which decoder layers are read from when their turn comes.

    Raises:
        ValueError: no pictures; a group that does not divide a layer's inputs; values that are not finite.
        PlanError: the work folder holds another calibration.
        FolderInUse: another process is at work in it.
    """
    if not len(images):
        raise ValueError("images: expected at least one calibration picture, got none")
    for index, layer in enumerate(model.language.model.layers):
        for name in (name for names in SHARING for name in names):
            settings.gptq.group_of(linear_of(layer, name).in_features, f"{LAYERS}.{index}.{name}")
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            made = calibrate(model, images, settings, progress, Path(folder), planned, tensors)
            return made._replace(weights=dict(made.weights))
    with alone_in(work, "calibration"), torch.inference_mode():
        planned = planned or plan_to_make(model, images, settings, model_sha256(model))
        return _Run(model, images, settings, progress or (lambda *_: None), work, planned, tensors).finished()


def plan_to_make(model: AGVAS, images: Sequence[np.ndarray], settings: CalibrationSettings, weights_sha256: str) -> QuantPlan:
    """The plan of a calibration without its results: it says what they depend on. Every picture is read for its hash.

    Args:
        weights_sha256: model_sha256 of the checkpoint.
    """
    conversations = _conversations(model, len(images))
    config = json.loads(model.config.to_json())
    return QuantPlan(
        model=model.config.name,
        weights_sha256=weights_sha256,
        settings=settings.gptq,
        answer_share=settings.answer_share,
        modes=tuple(dict.fromkeys(each.mode for each in conversations)),
        images=tuple(image_sha256(image) for image in images),
        tokens=0,
        linears=(),
        versions=versions(),
        dtype=next(name for name, dtype in DTYPES.items() if dtype == next(model.pixel_encoder.parameters()).dtype),
        conversations=hashlib.sha256(repr(conversations).encode()).hexdigest(),
        config={part: config[part] for part in COMPUTED},
    )


def remove_work(work: Path, plan: QuantPlan) -> None:
    """Remove the work folder of a plan that is written; another calibration's stays.

    state.json goes last, so that the folder is still known where this is interrupted.
    """
    if _state(work) != plan.inputs():
        return
    for path in work.iterdir():
        if path.name != STATE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work)


def memory_needed(tensors: LazyTensors, dtype: torch.dtype, device: str = "cpu") -> int:
    """Bytes that a calibration takes at most with decoder layers read in their turn, roughly: of shapes alone.

    One full-width layer of Qwen2-7B took 7.7 GB on the CPU (benchmarks/results/gptq_layer.json), of which the Hessian of down_proj's
    18,944 inputs and what is factored of it are four of 1.4. A whole AG-VAS-7B in bf16 peaked at 9.6 GB on a busy machine
    (benchmarks/results/full_size_plan.json), at 13.8 over its first two layers on another (a throw-away measurement), the pages of its
    file that a layer is read from among them, which the system takes back where it needs them.
    """
    layers: dict[str, int] = {}
    stored: dict[str, int] = {}
    held = widest = 0
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        if not name.startswith(f"{LAYERS}."):
            held += count * dtype.itemsize
            continue
        index = name.removeprefix(f"{LAYERS}.").split(".")[0]
        layers[index] = layers.get(index, 0) + 4 * count
        stored[index] = stored.get(index, 0) + tensor.dtype.itemsize * count
        widest = max(widest, *tensor.shape[1:], 0)
    layer = max(layers.values(), default=0)
    return LIBRARIES + held + layer + max(stored.values(), default=0) + (layer + 4 * 4 * widest**2 if device == "cpu" else 0)


def disk_needed(tensors: LazyTensors, config: AGVASConfig, pictures: int) -> int:
    """Bytes that a calibration writes at most, roughly: codes of a byte a weight, in the work folder and in the plan, and what two layers
    read of every picture."""
    codes = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith(f"{LAYERS}.") and len(tensor.shape) == 2)
    tokens = (1 if config.spam is None else 2) * config.semantic.tokens + TEXT_TOKENS
    return int(2 * codes * (1 + 2 / GROUPS[0])) + 2 * pictures * tokens * config.language.width * 4


def common_group(model: AGVAS) -> int:
    """The largest of GROUPS that divides the inputs of every linear layer to quantise; the largest of all where none does.

    128 in every published model; a GPTQ checkpoint has one group for all layers, so a small one takes what its narrowest layer allows.
    """
    layers: Sequence[nn.Module] = model.language.model.layers
    inputs = {linear_of(layer, name).in_features for layer in layers for names in SHARING for name in names}
    return next((group for group in GROUPS if not any(width % group for width in inputs)), GROUPS[0])


def _conversations(model: AGVAS, pictures: int) -> list[Conversation]:
    encoder = model.prompt_encoder
    return [conversation(encoder, mode, number) for number, mode in enumerate(modes_in_turn(encoder, pictures))]


class _Run:
    """One calibration and its work folder: state.json says which, hidden/ holds embeddings by layer, layers/ what is finished."""

    def __init__(
        self,
        model: AGVAS,
        images: Sequence[np.ndarray],
        settings: CalibrationSettings,
        progress: Report,
        work: Path,
        planned: QuantPlan,
        tensors: LazyTensors | None,
    ) -> None:
        self.model, self.images, self.settings, self.work, self.planned, self.tensors = model, images, settings, work, planned, tensors
        self.device = torch.device(settings.device)
        self.layers: Sequence[nn.Module] = model.language.model.layers
        self.conversations = _conversations(model, len(images))
        self._progress = progress
        self._claim()

    def step(self, done: int) -> None:
        """Told as two works, each with a time of its own: seeing a picture takes many times what one of its passes through a layer does."""
        pictures = len(self.images)
        if done < pictures:
            self._progress("see the pictures", done + 1, pictures)
        else:
            self._progress("calibrate layer by layer", done - pictures, pictures * PASSES * len(self.layers))

    def finished(self) -> Calibration:
        ranges = self._look()
        places: dict[str, tuple[Path, LinearRecord]] = {}
        rotary = copy.deepcopy(self.model.language.model.rotary_emb).to(self.device, torch.float32)
        for index in range(len(self.layers)):
            path = self.work / "layers" / f"{index:03}.safetensors"
            if not path.exists():
                self._quantize(index, rotary, path)
            self.step(len(self.images) * (1 + PASSES * (index + 1)))
            linears, seen = _read_layer(path)
            places |= {record.name: (path, record) for record in linears}
            ranges |= seen
        plan = dataclasses.replace(
            self.planned,
            tokens=sum(len(self._hidden(len(self.layers), number, mmap=True)) for number in range(len(self.images))),
            linears=tuple(record for _, record in places.values()),
        )
        return Calibration(plan, _LayerFiles(places), ranges)

    def _claim(self) -> None:
        """Take an empty work folder, or one that the same calibration left."""
        state, path = self.planned.inputs(), self.work / STATE
        if path.exists():
            found = _state(self.work)
            if differing := [name for name in state if found.get(name) != state[name]]:
                raise PlanError(
                    f"{self.work}: expected the beginnings of this calibration, got another's ({', '.join(differing)} differ); "
                    "remove the folder, or give the same checkpoint, pictures, settings and versions to go on"
                )
        elif {file.name for file in self.work.iterdir()} - {f"{STATE}.partial"}:
            raise PlanError(f"{self.work}: expected an empty work folder, got one with other files; choose another or remove it")
        else:
            _write(path, lambda file: file.write_text(json.dumps(state)))
        for name in ("hidden", "layers"):
            (self.work / name).mkdir(exist_ok=True)

    def _look(self) -> dict[str, np.ndarray]:
        """Encode the pictures and lay down what the first decoder layer reads; the encoders' ranges."""
        path = self.work / "encoders.safetensors"
        seen, done = Ranges(), 0
        if path.exists():
            tensors, about = _read(path)
            seen, done = Ranges(tensors), int(about["pictures"])
        if done == len(self.images):
            return seen.channels
        model = self.model
        parts = [model.pixel_encoder, model.semantic_encoder, model.spam, model.language.get_input_embeddings()]
        (self.work / "hidden" / "000").mkdir(exist_ok=True)
        with (
            _at(self.device, [part for part in parts if part is not None]),
            seen.watching(model.pixel_encoder, "pixel_encoder"),
            seen.watching(model.semantic_encoder, "semantic_encoder"),
        ):
            dtype = next(model.pixel_encoder.parameters()).dtype
            for number in range(done, len(self.images)):
                self.step(number)
                inputs = preprocess.encoder_images(self.images[number], model.config.preprocessing)[:2]
                pixel, semantic = (torch.from_numpy(image).to(self.device, dtype)[None] for image in inputs)
                _, prompt, answer = self.conversations[number]
                self._keep(0, number, model.input_embeddings(model.see(pixel, semantic), [prompt], [answer])[0])
                about = {"pictures": str(number + 1)}
                _write(path, lambda file, about=about: save_file(seen.channels, file, about))  # type: ignore[misc]
        return seen.channels

    def _quantize(self, index: int, rotary: nn.Module, path: Path) -> None:
        """One decoder layer: quantised, its file written, its outputs laid down for the next."""
        layer = self._layer(index)
        done = len(self.images) * (1 + PASSES * index)

        def step() -> None:
            nonlocal done
            done += 1
            self.step(done)

        runs = [partial(self._through, layer, index, number, rotary) for number in range(len(self.images))]
        seen = Ranges()
        weights, records = quantize_layer(f"{LAYERS}.{index}", layer, runs, self._weight, self.settings.gptq, seen, step)
        following = self.work / "hidden" / f"{index + 1:03}"
        following.mkdir(exist_ok=True)
        last = index + 1 == len(self.layers)
        norm = copy.deepcopy(self.model.language.model.norm).to(self.device, torch.float32) if last else None
        for number in range(len(self.images)):
            hidden = runs[number]()[0]
            if norm is not None:
                hidden = norm(hidden)
                seen.add(HEAD, hidden)
            self._keep(index + 1, number, hidden)
            step()
        tensors = {name + CODES: weight.codes for name, weight in weights.items()}
        tensors |= {name + SCALES: weight.scales for name, weight in weights.items()}
        tensors |= {name + RANGE: channels for name, channels in seen.channels.items()}
        about = {"linears": json.dumps([dataclasses.asdict(record) for record in records])}
        _write(path, lambda file: save_file(tensors, file, about))
        shutil.rmtree(self.work / "hidden" / f"{index:03}")

    def _layer(self, index: int) -> nn.Module:
        """A copy of a decoder layer in float32 on the device."""
        layer, name = copy.deepcopy(self.layers[index]), f"{LAYERS}.{index}"
        if next(layer.parameters()).is_meta:
            if self.tensors is None:
                raise ValueError(f"{name} is on the meta device: expected the checkpoint's tensors, got none")
            state = {local: self.tensors[f"{name}.{local}"].read() for local in layer.state_dict()}
            for local, tensor in state.items():
                check_finite(tensor, f"{name}.{local}")
            layer.load_state_dict(state, assign=True)
        return layer.to(self.device, torch.float32)

    def _through(self, layer: nn.Module, index: int, number: int, rotary: nn.Module) -> Tensor:
        """A picture's tokens through a decoder layer: [1, N, D]."""
        hidden = torch.from_numpy(self._hidden(index, number)).to(self.device)[None]
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        output = layer(hidden, position_ids=positions, position_embeddings=rotary(hidden, positions))
        return output if isinstance(output, Tensor) else output[0]

    def _weight(self, number: int, tokens: int) -> Tensor:
        weight = torch.ones(tokens, device=self.device)
        if (share := self.settings.answer_share) is not None:
            answer = len(self.conversations[number].answer)
            weight[-answer:] = share / (1 - share) * (tokens - answer) / answer
        return weight

    def _keep(self, index: int, number: int, hidden: Tensor) -> None:
        array = hidden.float().cpu().numpy()
        if not np.isfinite(array).all():
            where = "the encoders put out" if index == 0 else f"{LAYERS}.{index - 1} puts out"
            raise ValueError(f"picture {number + 1}: {where} NaN or infinity; check the checkpoint's weights and dtype")
        np.save(self.work / "hidden" / f"{index:03}" / f"{number:06}.npy", array)

    def _hidden(self, index: int, number: int, mmap: bool = False) -> np.ndarray:
        """What layer `index` reads of a picture: float32 [N, D]."""
        return np.load(self.work / "hidden" / f"{index:03}" / f"{number:06}.npy", mmap_mode="r" if mmap else None)


def quantize_layer(
    prefix: str,
    layer: nn.Module,
    runs: Sequence[Callable[[], Tensor]],
    token_weight: Callable[[int, int], Tensor],
    settings: GPTQSettings,
    seen: Ranges,
    step: Callable[[], None],
) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
    """Quantise a decoder layer; it holds the dequantised weights afterwards.

    Args:
        prefix: the layer's name, which its linears' names continue.
        runs: one for each picture, through the layer.
        token_weight: (picture, its tokens N) → [N], what each token counts in the Hessians.
        seen: takes the ranges of what the linears read.
        step: called after each picture of each pass.
    """
    weights: dict[str, QuantizedWeight] = {}
    records: list[LinearRecord] = []
    for names in SHARING:
        first = linear_of(layer, names[0])
        total = HessianSum(first.in_features, first.weight.device)
        for number, run in enumerate(runs):
            tokens = input_of(first, run)[0]  # [N, K]
            total.add(tokens, token_weight(number, len(tokens)))
            for name in names:
                seen.add(f"{prefix}.{name}", tokens)
            step()
        hessian = total.mean()
        prepared = None
        for name in names:
            whole, weight = f"{prefix}.{name}", linear_of(layer, name).weight
            try:
                prepared = prepared or curvature(hessian, settings)
                quantized = gptq(weight, prepared, settings)
                error = output_error(weight, quantized, hessian)
                rounding_error = output_error(weight, round_to_nearest(weight, settings), hessian)
            except ValueError as fault:
                raise ValueError(f"{whole}: {fault}") from fault
            weights[whole] = quantized
            records.append(LinearRecord(whole, quantized.bits, quantized.group, prepared.damping, error, rounding_error))
            put_weight(layer, name, quantized)
    return weights, records


def _state(work: Path) -> dict[str, Any]:
    """Which calibration's a work folder is, as its state.json says; nothing where there is none or it is damaged."""
    try:
        found = json.loads((work / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _at(device: torch.device, modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules on a device for a while, then back where each was."""
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A whole file or none."""
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(partial):
        write(partial)
    os.replace(partial, path)


class _LayerFiles(Mapping[str, QuantizedWeight]):
    """Integer weights in the files of finished layers, each read when asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, LinearRecord]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> QuantizedWeight:
        path, record = self._places[name]
        tensors, _ = _read(path, lambda tensor: tensor in (name + CODES, name + SCALES))
        return QuantizedWeight(tensors[name + CODES], tensors[name + SCALES], record.bits, record.group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}, file.metadata()
    except Exception as error:  # the library raises nothing narrower
        raise PlanError(f"{path} cannot be read: {error}; remove the work folder and start again") from error


def _read_layer(path: Path) -> tuple[list[LinearRecord], dict[str, np.ndarray]]:
    """Records and ranges of a finished layer."""
    tensors, about = _read(path, lambda name: name.endswith(RANGE))
    records = [LinearRecord(**record) for record in json.loads(about["linears"])]
    return records, {name.removesuffix(RANGE): tensor for name, tensor in tensors.items()}
