"""Trains a small AG-VAS from nothing on procedural samples: one loop, deterministic by step, resumable at any time.

Plain samples come alone until `plain_until` of the steps. BCE leads until `paper_weights_from` and the paper's 0.5 / 2.0 weights end
it: from scratch, Dice alone stalls before there is anything to overlap. The weights kept are an exponential moving average. State is safetensors and JSON, no pickle.
It trains every parameter; LoRA on a pretrained language model is another job.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from agvas.checkpoint import save
from agvas.config import ANSWER, NAMED
from agvas.model import AGVAS
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions, sample_instruction
from agvas.training.losses import MaskLossWeights, mask_loss, text_loss
from agvas.training.pool import Batch, PoolSettings, SamplePool, draw_batch


@dataclass(frozen=True)
class TrainSettings:
    """One training run; kept as settings.json beside its state."""

    config: str = "nano"
    steps: int = 2400
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    clip_norm: float = 1.0
    average_decay: float = 0.997
    text_weight: float = 0.1
    early_weights: MaskLossWeights = field(default_factory=lambda: MaskLossWeights(bce=4.0, dice=0.25))
    late_weights: MaskLossWeights = field(default_factory=MaskLossWeights)
    paper_weights_from: float = 0.7
    plain_until: float = 0.25
    seed: int = 0
    save_every: int = 100
    pool: PoolSettings = field(default_factory=PoolSettings)


class Diverged(RuntimeError):
    """The loss became NaN or infinite; the last saved state is intact."""


def new_model(config: str, seed: int) -> AGVAS:
    """A randomly initialised model of a named size with the small tokenizer."""
    settings = NAMED[config]()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([*all_instructions(), ANSWER], settings.language.vocabulary)
    model = AGVAS(settings, tokenizer)
    # transformers starts SAM's absolute positions at zero, which a pretrained checkpoint overwrites; from scratch they must differ.
    torch.nn.init.trunc_normal_(model.pixel_encoder.pos_embed, std=0.02)
    torch.nn.init.trunc_normal_(model.semantic_encoder.embeddings.position_embedding.weight, std=0.02)
    return model


def train(settings: TrainSettings, folder: Path, device: str = "cpu", workers: int = 2) -> AGVAS:
    """Train, or go on training what `folder` holds, and save the averaged weights to `folder`/checkpoint.

    Raises:
        ValueError: `folder` holds a run with other settings.
        Diverged: the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(settings, folder / "settings.json")
    pool = SamplePool.make(folder / "pool", settings.pool, workers)
    model = new_model(settings.config, settings.seed).to(device).train()
    run = _Run(model, settings, folder)
    first = run.resume()
    bar = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="training", unit="step")
    started = time.monotonic()
    for step, batch in zip(bar, _batches(pool, model, settings, first), strict=True):
        losses = run.step(step, batch)
        if step % 20 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, "seconds": round(time.monotonic() - started, 1), **losses}) + "\n")
        if (step + 1) % settings.save_every == 0:
            run.save(step + 1)
    averaged = run.averaged_model()
    save(averaged, folder / "checkpoint", dtype=torch.float16)
    return averaged


class _Run:
    """Model, its moving average and the optimiser, saved and resumed together."""

    def __init__(self, model: AGVAS, settings: TrainSettings, folder: Path) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
        )

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        settings, model = self.settings, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup_decay(step, settings.warmup_steps, settings.steps)
        late = step >= settings.paper_weights_from * settings.steps
        device = next(model.parameters()).device
        instruction = sample_instruction(np.random.default_rng([settings.seed, step, 1]))
        prompt = model.prompt_encoder.encode(instruction)
        assert prompt.draft is not None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(batch.pixel_image.to(device), batch.semantic_image.to(device), prompt, prompt.draft)
        text = text_loss(output.logits, prompt.draft)
        mask = mask_loss(
            output.maps,
            batch.target.to(device),
            batch.valid.to(device),
            settings.late_weights if late else settings.early_weights,
        )
        loss = settings.text_weight * text + mask
        if not torch.isfinite(loss):
            raise Diverged(f"loss is {loss.item()} at step {step}; the state of the last save is in {self.folder}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A young average must not remember the random start: its memory grows with the steps taken.
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            self.average[name].lerp_(tensor, 1 - decay)
        return {"text": text.item(), "mask": mask.item(), "norm": norm.item()}

    def averaged_model(self) -> AGVAS:
        model = AGVAS(self.model.config, self.model.tokenizer)
        model.load_state_dict(self.average)
        return model.eval()

    def save(self, step: int) -> None:
        state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, slots in self.optimizer.state.items():
            state |= {f"optimizer.{slot}.{names[id(parameter)]}": tensor for slot, tensor in slots.items()}
        partial = self.folder / "state.partial"
        state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        save_file(state, partial, metadata={"step": str(step)})
        os.replace(partial, self.folder / "state.safetensors")

    def resume(self) -> int:
        """The step to go on with: 0 when nothing was saved."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0
        state = load_file(path)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in state.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        for name, tensor in self.average.items():
            tensor.copy_(parts["average"][name])
        parameters = dict(self.model.named_parameters())
        for name, tensor in parts["optimizer"].items():
            slot, parameter = name.split(".", 1)
            place = torch.device("cpu") if slot == "step" else parameters[parameter].device
            self.optimizer.state[parameters[parameter]][slot] = tensor.to(place)
        return int(parts["optimizer"][f"step.{next(iter(parameters))}"].item())


def warmup_decay(step: int, warmup_steps: int, steps: int) -> float:
    """WarmupDecayLR: linear up over `warmup_steps`, then linear down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def _batches(pool: SamplePool, model: AGVAS, settings: TrainSettings, first: int) -> Iterator[Batch]:
    """Batches from step `first` on, drawn two steps ahead in threads."""
    config = model.config

    def draw(step: int) -> Batch:
        rng = np.random.default_rng([settings.seed, step, 0])
        among = settings.pool.plain if step < settings.plain_until * settings.steps else None
        return draw_batch(pool, config.preprocessing, 4 * config.pixel.grid, settings.batch, rng, among)

    with ThreadPoolExecutor(1) as threads:
        ahead = [threads.submit(draw, step) for step in range(first, min(first + 2, settings.steps))]
        for step in range(first, settings.steps):
            batch = ahead.pop(0).result()
            if step + 2 < settings.steps:
                ahead.append(threads.submit(draw, step + 2))
            yield batch


def _same_settings(settings: TrainSettings, path: Path) -> None:
    text = json.dumps(asdict(settings), indent=2)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path} describes another run; choose another folder, or remove this one to start again")
    path.write_text(text)
