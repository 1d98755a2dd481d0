"""A checkpoint that points at its parts: parts.json names a base, a pixel encoder and what was trained; no weight is copied.

Each part is read in the layout it was published in, and a later one replaces what an earlier one has: trained tensors go over the
base's, adapters are added last. Every tensor is accounted for; which of them a configuration needs is judged by who opens the
checkpoint (checkpoint.py), and how a configuration is had from the parts stands in published.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agvas import lora
from agvas.layouts import ADAPTER, LLAVA, SAM, SAM_MODEL, TRAINED, VIT, Rules, Translated, rename, translate
from agvas.torch_file import read_structure, torch_file, torch_folder
from agvas.weights import LazyTensor, safetensors_file, safetensors_folder

FILE = "parts.json"
SAFETENSORS, PICKLED, TRAINED_FILE = "model.safetensors", "pytorch_model.bin", "trained.safetensors"
MODEL_STATES = "mp_rank_00_model_states.pt"  # DeepSpeed's, of the first of the processes that share a model (ZeRO stages 0 to 2)
HEAD = "language.lm_head.weight"
VITS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "dinov3_vit")
LLAVAS = ("llava_onevision", "llava")


@dataclass(frozen=True)
class Parts:
    """parts.json: paths, absolute or from the folder it lies in.

    Attributes:
        base: a LLaVA in Hugging Face's layout, or a checkpoint of this package, which has a pixel encoder already.
        pixel_encoder: SAM as published (.pth), a folder or file of transformers' SamModel, or a folder of its CLIP, SigLIP, DINOv2 or
            DINOv3, whose neck was trained; None where the base has it.
        trained: what was trained, each a folder of agvas-train (trained/), a peft adapter, a DeepSpeed state, or a file of tensors.
    """

    base: str
    pixel_encoder: str | None = None
    trained: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Parts:
        """Raises ValueError where the file does not name parts."""
        try:
            fields = json.loads(path.read_text())
            parts = cls(**(fields | {"trained": tuple(fields.get("trained", ()))}))
            if not all(isinstance(text, str) for text in (parts.base, parts.pixel_encoder or "", *parts.trained)):
                raise TypeError("paths are texts")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not name a checkpoint's parts ({error}); write it anew with agvas-import") from error
        return parts


@dataclass
class Gathered:
    """The parts' tensors by our names.

    Attributes:
        origins: the part each tensor comes from; of a merged one, the weight's.
        merged: weights that an adapter is added to, and the adapter's part.
        unused: names that the parts have and an AG-VAS does without, by part.
        problems: what does not fit together, in words.
        published: whether the base is a LLaVA as it was published, whose tower may have layers that are not computed.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, Path] = field(default_factory=dict)
    merged: dict[str, Path] = field(default_factory=dict)
    unused: dict[Path, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    published: bool = False

    def put(self, part: Path, translated: Translated) -> None:
        self.tensors |= translated.tensors
        self.origins |= dict.fromkeys(translated.tensors, part)
        self.unused.setdefault(part, []).extend(translated.unused)
        self.problems += [f"unexpected {name} in {part}" for name in translated.unknown]

    def add(self, part: Path, adapters: Mapping[str, lora.LoRA]) -> None:
        for layer, adapter in adapters.items():
            name = f"{layer}.weight"
            shape = (adapter.up.shape[0], adapter.down.shape[-1])
            if name not in self.tensors:
                self.problems.append(f"an adapter for {layer} in {part}, which no part has")
            elif self.tensors[name].shape != shape:
                self.problems.append(f"an adapter for {layer} in {part} makes {list(shape)}, expected {list(self.tensors[name].shape)}")
            else:
                self.tensors[name] = adapter.added_to(self.tensors[name])
                self.merged[name] = part


def gather(folder: Path, parts: Parts) -> Gathered:
    """All parts, none of their values read.

    Raises:
        ValueError: a part is missing, damaged, or in no layout known here; says what to give.
    """
    gathered = Gathered()
    base = _there(folder, parts.base, "base")
    if base.resolve() == folder.resolve():
        raise ValueError(f"{folder / FILE}: base: expected another checkpoint, got this one; write it anew with agvas-import")
    gathered.put(base, published_base(base))
    gathered.published = model_type(base) is not None
    if parts.pixel_encoder is not None:
        path = _there(folder, parts.pixel_encoder, "pixel_encoder")
        gathered.put(path, pixel_encoder(path))
    for given in parts.trained:
        path = _there(folder, given, "trained")
        translated, adapters = trained(path)
        gathered.put(path, translated)
        gathered.add(path, adapters)
    return gathered


def model_type(folder: Path) -> str | None:
    """What Hugging Face's config.json says a folder holds; None without one."""
    try:
        fields = json.loads((folder / "config.json").read_text())
        return fields.get("model_type") if isinstance(fields, dict) else None
    except (OSError, ValueError):
        return None


def _there(folder: Path, given: str, name: str) -> Path:
    path = folder / given
    if not path.exists():
        raise ValueError(f"{folder / FILE}: {name}: {given} is not there; correct the path, or run agvas-import again")
    return path


def published_base(path: Path) -> Translated:
    """A LLaVA in Hugging Face's layout, or a checkpoint of this package. ValueError for anything else."""
    found = model_type(path)
    if found in LLAVAS:
        translated = translate(_folder(path), LLAVA)
        if _is_tied(path) and HEAD in translated.tensors:  # stored all the same; whoever ties it does not look at it
            tensors = {name: tensor for name, tensor in translated.tensors.items() if name != HEAD}
            return Translated(tensors, (*translated.unused, HEAD), translated.unknown)
        return translated
    if found is not None:
        raise ValueError(
            f"{path} is a {found}, expected {' or '.join(LLAVAS)} (as Hugging Face has them) or a checkpoint of this package; "
            "a base in LLaVA's own layout is published in Hugging Face's, too"
        )
    from agvas.checkpoint import open_checkpoint  # which reads parts, this base's own maybe

    opened = open_checkpoint(path)
    # A tied head is the table under another name: what was trained on this base has a table of its own, and no head.
    return Translated({name: tensor for name, tensor in opened.tensors.items() if name != HEAD or not opened.config.language.tied_head})


def _is_tied(folder: Path) -> bool:
    fields = json.loads((folder / "config.json").read_text())
    return bool(fields.get("tie_word_embeddings") or fields.get("text_config", {}).get("tie_word_embeddings"))


def pixel_encoder(path: Path) -> Translated:
    """SAM's image encoder from its own file or from transformers' layout, or one of transformers' ViTs. ValueError for anything else."""
    tensors = _folder(path) if path.is_dir() else _file(path)
    if path.is_dir() and model_type(path) in VITS:
        return translate(_halved(tensors), VIT)
    rules: Rules = SAM if any(name.startswith("image_encoder.") for name in tensors) else SAM_MODEL
    translated = translate(tensors, rules)
    if not translated.tensors:
        raise ValueError(
            f"{path} has no image encoder of SAM: expected names with image_encoder. (sam_vit_h_4b8939.pth) or vision_encoder. "
            f"(transformers' SamModel), got {', '.join(sorted(tensors)[:3])}"
        )
    return translated


def _halved(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A gated DINOv2 is published with gate and input projection in one matrix, the gate's rows first."""
    halved = {}
    for name, tensor in tensors.items():
        stem, fused, kind = name.partition(".mlp.weights_in.")
        if not fused:
            halved[name] = tensor
            continue
        rows = tensor.shape[0] // 2
        halved[f"{stem}.mlp.gate_proj.{kind}"] = tensor.rows(0, rows)
        halved[f"{stem}.mlp.up_proj.{kind}"] = tensor.rows(rows, 2 * rows)
    return halved


def trained(path: Path) -> tuple[Translated, dict[str, lora.LoRA]]:
    """What a training left: whole tensors, and adapters by the layer's name.

    Raises:
        ValueError: nothing of a training there, or in a form that cannot be read without running code.
    """
    if path.is_file():
        return _state(path, _file(path))
    if states := deepspeed_weights(path):
        return _state(states, torch_file(states, "module"))
    found: list[tuple[Translated, dict[str, lora.LoRA]]] = []
    if (path / lora.CONFIG).is_file():
        adapters, whole = lora.read_adapter(path)
        found.append((translate(whole, ADAPTER), _layers(path, adapters, ADAPTER)))
    if (path / TRAINED_FILE).is_file():
        found.append((translate(safetensors_file(path / TRAINED_FILE), TRAINED), {}))
    if not found:
        if not _holds(path, SAFETENSORS) and not _holds(path, PICKLED):
            raise ValueError(
                f"{path} holds nothing that was trained: expected {TRAINED_FILE} or {lora.CONFIG} (agvas-train's trained/, peft), latest "
                f"(DeepSpeed), {SAFETENSORS} or {PICKLED}; of a run give its folder trained/, or state/ where it was stopped"
            )
        return _state(path, _folder(path))
    joined = Translated(
        {name: tensor for part, _ in found for name, tensor in part.tensors.items()},
        unknown=tuple(name for part, _ in found for name in part.unknown),
    )
    return joined, {layer: adapter for _, adapters in found for layer, adapter in adapters.items()}


def _state(path: Path, tensors: dict[str, LazyTensor]) -> tuple[Translated, dict[str, lora.LoRA]]:
    """A state dictionary of the module that training wraps the model in, its adapters beside their weights."""
    adapters: dict[str, lora.LoRA] = {}
    if lora.has_factors(tensors):
        adapters, tensors = lora.split(path, tensors, _settings_of(path))
        adapters = _layers(path, adapters, TRAINED)
    return translate(tensors, TRAINED), adapters


def _layers(path: Path, adapters: dict[str, lora.LoRA], rules: Rules) -> dict[str, lora.LoRA]:
    ours = {}
    for layer, adapter in adapters.items():
        _, name = rename(layer, rules)
        if name is None:
            raise ValueError(f"{path}: an adapter for {layer}, which is no layer of a language model known here; merge it with peft")
        ours[name] = adapter
    return ours


def _settings_of(path: Path) -> lora.LoRASettings:
    """The scale of a training state's adapters: in adapter_config.json beside it, or in the run's settings.json above it."""
    for place in (path, *path.parents[:3]):
        if (place / lora.CONFIG).is_file():
            return lora.read_settings(place / lora.CONFIG)
        if (place / "settings.json").is_file():
            try:
                found: dict[str, Any] = json.loads((place / "settings.json").read_text())["parts"]["lora"]
                return lora.LoRASettings(float(found["alpha"]))
            except (ValueError, KeyError, TypeError) as error:
                file = place / "settings.json"
                raise ValueError(f"{file} does not say parts.lora.alpha ({error!r}); put {lora.CONFIG} beside the weights") from error
    raise ValueError(f"{path} holds adapters and nothing says their scale; put peft's {lora.CONFIG} (r, lora_alpha) beside it")


def deepspeed_weights(folder: Path) -> Path | None:
    """The file with all weights of a DeepSpeed state, given as the folder with `latest` or the step's own; None where it is none.

    Raises:
        ValueError: a state that has no such file (stage 3 takes the weights apart), or that cannot be read safely.
    """
    if (folder / "latest").is_file():
        step = folder / (folder / "latest").read_text().strip()
        if not step.is_dir():
            raise ValueError(f"{folder / 'latest'} names {step.name}, which is not there; copy the whole state")
    else:
        step = folder
    merge = f"run `python zero_to_fp32.py . merged --safe_serialization` in {folder} where deepspeed is installed, and give merged"
    if (step / MODEL_STATES).is_file():
        try:
            content = read_structure(step / MODEL_STATES)
        except ValueError as error:
            raise ValueError(f"{error}; or {merge}") from error
        if not isinstance(content, dict) or not content.get("module"):
            raise ValueError(f"{step / MODEL_STATES} holds no weights under 'module'; {merge}")
        return step / MODEL_STATES
    if any(step.glob("zero_pp_rank_*_model_states.pt")):
        raise ValueError(f"{step} is of ZeRO stage 3, whose weights are in pieces; {merge}")
    if (folder / "latest").is_file():
        raise ValueError(f"{step} lacks {MODEL_STATES}; copy the whole state")
    return None


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.index.json").is_file()


def _folder(folder: Path) -> dict[str, LazyTensor]:
    if not _holds(folder, SAFETENSORS) and _holds(folder, PICKLED):
        return torch_folder(folder, PICKLED)
    return safetensors_folder(folder, SAFETENSORS)


def _file(path: Path) -> dict[str, LazyTensor]:
    return safetensors_file(path) if path.suffix == ".safetensors" else torch_file(path)
