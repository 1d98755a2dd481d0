"""A checkpoint that points at its parts: parts.json names a base, a pixel encoder and what was trained; no weight is copied.

Each part is read in the layout it was published in, and a later one replaces what an earlier one has: trained tensors go over the
base's, adapters are added last. Every tensor is accounted for; which of them a configuration needs is judged by who opens the
checkpoint (checkpoint.py), and how a configuration is had from the parts stands in published.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agvas import lora
from agvas.layouts import ADAPTER, LLAVA, SAM, SAM_MODEL, TRAINED, VIT, Rules, Translated, rename, translate
from agvas.misread import misread
from agvas.torch_file import read_structure, torch_file, torch_folder
from agvas.weights import LazyTensor, safetensors_file, safetensors_folder

FILE = "parts.json"
SAFETENSORS, PICKLED, TRAINED_FILE = "model.safetensors", "pytorch_model.bin", "trained.safetensors"
RECORD = "trained.json"  # what agvas-train left beside it
MODEL_STATES = "mp_rank_00_model_states.pt"  # DeepSpeed's, of the first of the processes that share a model (ZeRO stages 0 to 2)
EMBEDDINGS, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"
NEW_STAGES = ("spam.", "mask_decoder.")  # which no published part has
VITS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "dinov3_vit")
LLAVAS = ("llava_onevision", "llava")
_LLAVAS_OWN = re.compile(r"model\.(?:layers|mm_projector|embed_tokens|vision_tower\.vision_tower)\.")
_PUBLISHED_TOO = "give the same base in Hugging Face's, which llava-hf publishes (llava-hf/llava-onevision-qwen2-7b-ov-hf for instance)"
_NUMBERED = re.compile(r"^(.*?\.)(\d+)(\..*)$")


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


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        problems: what of it is damaged, in words.
        recorded: whether all it should have is written down beside it, so that nothing can be missing unseen.
    """

    whole: Translated
    adapters: lora.Adapters = field(default_factory=lora.Adapters)
    problems: tuple[str, ...] = ()
    recorded: bool = False


@dataclass
class Gathered:
    """The parts' tensors by our names.

    Attributes:
        base, pixel_encoder: where these are; None where there are no parts, or the base has the pixel encoder.
        origins: the part each tensor comes from; of a merged one, the weight's.
        names: what that part calls it.
        merged: weights that an adapter is added to, and the adapter's part.
        unused: names that the parts have and an AG-VAS does without, by part.
        problems: what does not fit together, in words.
        notes: what fits, and a user should know all the same.
        published: whether the base is a LLaVA as it was published, whose tower may have layers that are not computed.
    """

    base: Path | None = None
    pixel_encoder: Path | None = None
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    origins: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    merged: dict[str, Path] = field(default_factory=dict)
    unused: dict[Path, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    published: bool = False

    def put(self, part: Path, translated: Translated) -> None:
        self.tensors |= translated.tensors
        self.origins |= dict.fromkeys(translated.tensors, part)
        self.names |= {name: translated.names.get(name, name) for name in translated.tensors}
        self.unused.setdefault(part, []).extend(translated.unused)
        self.problems += [
            f"unexpected {name} in {part} (nothing here is called so: give the part as it was published or trained)"
            for name in translated.unknown
        ]

    def add(self, part: Path, adapters: lora.Adapters) -> None:
        matrices = [name.removesuffix(".weight") for name, tensor in self.tensors.items() if len(tensor.shape) == 2]
        self.problems += adapters.incomplete(part, matrices)
        for layer, adapter in adapters.layers.items():
            name, theirs = f"{layer}.weight", adapters.names[layer]
            shape = (adapter.up.shape[0], adapter.down.shape[-1])
            if name not in self.tensors:
                self.problems.append(f"an adapter for {theirs} in {part}, which no part has: give the base that it was trained on")
            elif (expected := self.tensors[name].shape) != shape:
                makes = f"makes {list(shape)}, expected {list(expected)}"
                self.problems.append(f"an adapter for {theirs} in {part} {makes}: give the base that it was trained on")
            else:
                self.tensors[name] = adapter.added_to(self.tensors[name])
                self.merged[name] = part

    def called(self, name: str) -> str | None:
        """What the tensor's part calls it, or would call it: as it does in another layer. None where nothing tells."""
        if name in self.names:
            return self.names[name]
        if not (wanted := _NUMBERED.match(name)):
            return None
        for ours, theirs in self.names.items():
            if (other := _NUMBERED.match(ours)) and (other[1], other[3]) == (wanted[1], wanted[3]):
                return re.sub(rf"\.{other[2]}\.", f".{wanted[2]}.", theirs, count=1)
        return None


def gather(folder: Path, parts: Parts) -> Gathered:
    """All parts, none of their values read.

    Raises:
        ValueError: a part is missing, damaged, or in no layout known here; says what to give.
    """
    base = _there(folder, parts.base, "base")
    if base.resolve() == folder.resolve():
        raise ValueError(f"{folder / FILE}: base: expected another checkpoint, got this one; write it anew with agvas-import")
    gathered = Gathered(base)
    gathered.put(base, published_base(base))
    gathered.published = model_type(base) is not None
    if parts.pixel_encoder is not None:
        gathered.pixel_encoder = path = _there(folder, parts.pixel_encoder, "pixel_encoder")
        gathered.put(path, pixel_encoder(path))
    found = {path: trained(path) for path in (_there(folder, given, "trained") for given in parts.trained)}
    for path, part in found.items():
        gathered.put(path, part.whole)
        gathered.add(path, part.adapters)
        gathered.problems += part.problems
    if not all(part.recorded for part in found.values()):
        _note_what_is_the_bases(gathered)
    return gathered


def _note_what_is_the_bases(gathered: Gathered) -> None:
    """Whoever trained SPAM and a mask decoder has, as a rule, trained something of the language model, too; but nothing says it here."""
    trained = {part for name, part in gathered.origins.items() if name.startswith(NEW_STAGES)} - {gathered.base}
    if not trained:
        return
    for name in (EMBEDDINGS, HEAD):
        if gathered.origins.get(name) == gathered.base:
            gathered.notes.append(f"{name}: the base's, for no trained part has it; where it was trained, copy that part again")
    layers = [part for name, part in gathered.origins.items() if name.startswith("language.model.layers.")]
    if not gathered.merged and set(layers) == {gathered.base}:
        gathered.notes.append(
            f"the language model's layers are the base's: no trained part has any, or adapters; where it was trained with LoRA, copy "
            f"{lora.CONFIG} and {lora.WEIGHTS}, too"
        )


def model_type(folder: Path) -> str | None:
    """What Hugging Face's config.json says a folder holds; None without one."""
    try:
        fields = json.loads((folder / "config.json").read_text())
        return fields.get("model_type") if isinstance(fields, dict) else None
    except (OSError, ValueError):
        return None


def place(folder: Path, given: str) -> Path:
    """Where a path of parts.json leads, in as few words as it can be said."""
    path = folder / given
    short = Path(os.path.normpath(path))  # which is elsewhere where ".." follows a link
    return short if short.exists() and path.exists() and short.samefile(path) else path


def _there(folder: Path, given: str, name: str) -> Path:
    if not (path := place(folder, given)).exists():
        raise ValueError(f"{folder / FILE}: {name}: {given} is not there; correct the path, or run agvas-import again")
    return path


def published_base(path: Path) -> Translated:
    """A LLaVA in Hugging Face's layout, or a checkpoint of this package. ValueError for anything else."""
    found = model_type(path)
    if found in LLAVAS:
        translated = translate(_folder(path), LLAVA)
        own = [name for name in translated.unknown if _LLAVAS_OWN.match(name)]
        if 2 * len(own) > len(translated.unknown) and len(own) > len(translated.tensors):
            names = f"{path} has the names of LLaVA's own code ({lora.listed(own)})"
            raise ValueError(f"{names}, expected Hugging Face's layout; {_PUBLISHED_TOO}")
        if _is_tied(path) and HEAD in translated.tensors:  # stored all the same; whoever ties it does not look at it
            tensors = {name: tensor for name, tensor in translated.tensors.items() if name != HEAD}
            return Translated(tensors, (*translated.unused, HEAD), translated.unknown, translated.names)
        return translated
    if found is not None:
        raise ValueError(
            f"{path} is a {found}, expected {' or '.join(LLAVAS)} (as Hugging Face has them) or a checkpoint of this package; "
            f"a base in LLaVA's own layout: {_PUBLISHED_TOO}"
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


def trained(path: Path) -> Trained:
    """What a training left: whole tensors, and adapters by the layer's name.

    Raises:
        ValueError: nothing of a training there, or in a form that cannot be read without running code.
    """
    if path.is_file():
        return _state(path, _file(path))
    if states := deepspeed_weights(path):
        return _state(states, torch_file(states, "module"))
    has_adapter = any((path / name).is_file() for name in (lora.CONFIG, lora.WEIGHTS, lora.PICKLED))
    has_rest = (path / TRAINED_FILE).is_file()
    if not has_adapter and not has_rest:
        if not _holds(path, SAFETENSORS) and not _holds(path, PICKLED):
            raise ValueError(
                f"{path} holds nothing that was trained: expected {TRAINED_FILE} or {lora.CONFIG} (agvas-train's trained/, peft), latest "
                f"(DeepSpeed), {SAFETENSORS} or {PICKLED}; of a run give its folder trained/, or state/ where it was stopped"
            )
        return _state(path, _folder(path))
    adapters, saved = lora.read_adapter(path) if has_adapter else (lora.Adapters(), {})
    adapters, parts = _ours(path, adapters, ADAPTER), [translate(saved, ADAPTER)]
    if has_rest:
        parts.append(translate(safetensors_file(path / TRAINED_FILE), TRAINED))
    whole = Translated(
        {name: tensor for part in parts for name, tensor in part.tensors.items()},
        unknown=tuple(name for part in parts for name in part.unknown),
        names={ours: theirs for part in parts for ours, theirs in part.names.items()},
    )
    lacking, recorded = _against_record(path, whole.tensors, has_adapter)
    return Trained(whole, adapters, (*adapters.misranked(), *lacking), recorded)


def _against_record(path: Path, tensors: Mapping[str, LazyTensor], has_adapter: bool) -> tuple[list[str], bool]:
    """What the folder lacks of all that agvas-train says it left there, in words; and whether it says all."""
    if not (file := path / RECORD).is_file():
        return [], False
    try:
        fields = json.loads(file.read_text())
        whole = "tensors" in fields  # earlier ones name the stages alone
        names = list(map(str, fields["tensors"] if whole else fields["parts"]))
        adapted = bool(fields.get("adapter"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as what agvas-train leaves: {misread(error)}; copy the file again") from error
    known = {*tensors, *(name.partition(".")[0] for name in tensors)}
    lacking = [name for name in names if name not in known]
    if adapted and not has_adapter:
        lacking += [lora.CONFIG, lora.WEIGHTS]
    if not lacking:
        return [], whole
    return [f"{path} lacks {lora.listed(lacking)}, which its {RECORD} names: copy the whole folder again"], whole


def _state(path: Path, tensors: dict[str, LazyTensor]) -> Trained:
    """A state dictionary of the module that training wraps the model in, its adapters beside their weights."""
    adapters = lora.Adapters()
    if lora.has_factors(tensors):
        adapters, tensors = lora.split(path, tensors, _settings_of(path))
        adapters = _ours(path, adapters, TRAINED)
    return Trained(translate(tensors, TRAINED), adapters, tuple(adapters.misranked()))


def _ours(path: Path, adapters: lora.Adapters, rules: Rules) -> lora.Adapters:
    """The adapters by our names of their layers."""
    layers, names = {}, {}
    for theirs, adapter in adapters.layers.items():
        _, name = rename(theirs, rules)
        if name is None:
            raise ValueError(f"{path}: an adapter for {theirs}, which is no layer of a language model known here; merge it with peft")
        layers[name], names[name] = adapter, theirs
    return lora.Adapters(layers, names, adapters.settings)


def _settings_of(path: Path) -> lora.LoRASettings:
    """What is said of a training state's adapters: in adapter_config.json beside it, or in the run's settings.json above it."""
    for place in (path, *path.parents[:3]):
        if (place / lora.CONFIG).is_file():
            return lora.read_settings(place / lora.CONFIG)
        if (place / "settings.json").is_file():
            try:
                found: dict[str, Any] = json.loads((place / "settings.json").read_text())["parts"]["lora"]
                rank, targets = found.get("rank"), found.get("targets")
                return lora.LoRASettings(
                    place / "settings.json",
                    float(found["alpha"]),
                    rank=None if rank is None else int(rank),
                    targets=None if targets is None else tuple(map(str, targets)),
                )
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
