"""Load and save AG-VAS checkpoints: a folder with config.json, model.safetensors and tokenizer.json.

No pickle anywhere. Loading is strict: a missing, unexpected or wrong-shaped tensor is named. Weights are stored in the dtype the
model has; nano's are 16 bit to keep the package small and are computed with in fp32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from agvas.config import AGVASConfig
from agvas.model import AGVAS
from agvas.weights import LazyTensors, safetensors_file

NANO = Path(__file__).parent / "nano"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or not an AG-VAS."""


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint given as "nano" or as a path, once all its files are seen to be there.

    Raises:
        CheckpointError: names what is missing and where.
    """
    folder = NANO if str(checkpoint) == "nano" else Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {checkpoint} is not a folder; give nano or a folder with {', '.join(FILES)}")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise CheckpointError(f"checkpoint {folder} lacks {', '.join(missing)}; it needs {', '.join(FILES)}")
    return folder


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose config and tokenizer are read and whose tensors all fit, none of them in memory yet.

    Attributes:
        tensors: by the names of AGVAS.state_dict(), every one of them and no other, in the shapes of `config`.
    """

    folder: Path
    config: AGVASConfig
    tokenizer: Tokenizer
    tensors: LazyTensors

    def skeleton(self) -> AGVAS:
        """The model on the meta device: its shapes and names, no memory."""
        with torch.device("meta"):
            return AGVAS(self.config, self.tokenizer).eval()


def open_checkpoint(checkpoint: str | Path = "nano") -> OpenedCheckpoint:
    """Read everything of a checkpoint but its tensors' values.

    Raises:
        CheckpointError: missing files, a config or tokenizer that is none, tensors missing, unexpected or of another shape.
    """
    folder = checkpoint_folder(checkpoint)
    try:
        config = AGVASConfig.from_json((folder / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}; copy the file again") from error
    try:
        tensors = safetensors_file(folder / "model.safetensors")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    opened = OpenedCheckpoint(folder, config, tokenizer, tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in opened.skeleton().state_dict().items()}
    _compare(folder, expected, {name: tensor.shape for name, tensor in tensors.items()})
    return opened


def load(checkpoint: str | Path = "nano", dtype: torch.dtype = torch.float32) -> AGVAS:
    """The model, on the CPU, in evaluation mode, in `dtype`.

    Raises:
        CheckpointError: see open_checkpoint.
    """
    opened = open_checkpoint(checkpoint)
    model = opened.skeleton()
    model.load_state_dict({name: tensor.read().to(dtype) for name, tensor in opened.tensors.items()}, assign=True)
    fill_buffers(model)
    return model


def save(model: AGVAS, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json, model.safetensors and tokenizer.json, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(dtype or tensor.dtype).contiguous() for name, tensor in model.state_dict().items()}
    partial = {name: folder / f"{name}.partial" for name in FILES}
    partial["config.json"].write_text(model.config.to_json())
    save_file(state, partial["model.safetensors"], metadata={"format": "pt"})
    model.tokenizer.save(str(partial["tokenizer.json"]))
    for name, path in partial.items():
        os.replace(path, folder / name)


def _compare(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name} {list(expected[name])}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name} {list(found[name])}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"{folder / 'model.safetensors'} does not fit its config.json: {listed}")


def fill_buffers(model: AGVAS) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, position ids) were made on the meta device: make them again."""
    rotary = model.language.model.rotary_emb
    frequencies, rotary.attention_scaling = rotary.compute_default_rope_parameters(rotary.config)
    rotary.inv_freq = frequencies
    rotary.original_inv_freq = frequencies.clone()
    positions = model.semantic_encoder.embeddings
    positions.position_ids = torch.arange(positions.num_positions).unsqueeze(0)
