"""Trains a small AG-VAS from nothing on procedural samples: one loop, deterministic by step, resumable at any time.

Two phases, since the paper starts from a pretrained SAM and a mask decoder on embeddings that say nothing stays at the constant answer.
First the pixel encoder (its stem, where there is one) and the decoder's upscaling alone, read by one learned kernel. Then everything
together, the decoder's hypernetworks starting from that kernel, so that nothing learned is lost at the change. Plain samples come alone
until step `plain_until`. BCE leads until `paper_weights_from` of the second phase and the paper's 0.5 / 2.0 weights end it: from scratch,
Dice alone stalls before there is anything to overlap. The weights kept are an exponential moving average. State is safetensors and
JSON, no pickle. It trains every parameter; LoRA on a pretrained language model is another job.
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.sam.modeling_sam import SamVisionEncoder

from agvas.checkpoint import save
from agvas.config import ANSWER, NAMED
from agvas.model import AGVAS
from agvas.stem import StemmedVisionEncoder
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions, sample_instruction
from agvas.training.losses import MaskLossWeights, anchor_loss, mask_loss, text_loss
from agvas.training.pool import Batch, PoolSettings, SamplePool, draw_batch


@dataclass(frozen=True)
class TrainSettings:
    """One training run; kept as settings.json beside its state.

    Attributes:
        encoder_steps, encoder_learning_rate: first phase, pixel encoder or its stem and upscaling under one learned kernel.
        steps, learning_rate: second phase, the whole model.
        learned_share: in the second phase, what the first one trained learns at this share of the rate.
        plain_until, plain_share: plain samples come alone until this step, then they are this share of a batch.
    """

    config: str = "nano"
    encoder_steps: int = 1200
    encoder_learning_rate: float = 1e-3
    steps: int = 900
    batch: int = 8
    learning_rate: float = 5e-4
    learned_share: float = 0.1
    weight_decay: float = 0.02
    warmup_steps: int = 60
    clip_norm: float = 1.0
    average_decay: float = 0.997
    text_weight: float = 0.1
    early_weights: MaskLossWeights = field(default_factory=lambda: MaskLossWeights(bce=4.0, dice=0.25))
    late_weights: MaskLossWeights = field(default_factory=MaskLossWeights)
    paper_weights_from: float = 0.6
    plain_until: int = 600
    plain_share: float = 0.6
    seed: int = 0
    save_every: int = 100
    pool: PoolSettings = field(default_factory=PoolSettings)


PRIOR_LOGIT = -2.6  # about 7 % of all cells are anomalous
ENCODER_WEIGHTS = MaskLossWeights(bce=1.0, dice=0.1)


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
    torch.nn.init.ones_(model.mask_decoder.upscaling[3].bias)  # see _Run: features begin in GELU's straight part
    # The decoder's blocks begin by leaving the pixels as they are: the second phase starts where the first one ended.
    for block in model.mask_decoder.transformer.layers:
        torch.nn.init.zeros_(block.cross_attn_image_to_token.out_proj.weight)
        torch.nn.init.zeros_(block.cross_attn_image_to_token.out_proj.bias)
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
    _cut_log(folder / "log.jsonl", first)
    total = settings.encoder_steps + settings.steps
    bar = tqdm(range(first, total), initial=first, total=total, desc="training", unit="step")
    started = time.monotonic()
    for step, batch in zip(bar, _batches(pool, model, settings, first), strict=True):
        losses = run.step(step, batch)
        if step % 20 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, "seconds": round(time.monotonic() - started, 1), **losses}) + "\n")
        if (step + 1) % settings.save_every == 0 or step + 1 == total:
            run.save(step + 1)
    averaged = run.averaged_model()
    save(averaged, folder / "checkpoint", dtype=torch.float16)
    return averaged


class _Run:
    """Model, its moving average and the optimiser, saved and resumed together."""

    def __init__(self, model: AGVAS, settings: TrainSettings, folder: Path) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        width = model.mask_decoder.upscaling[3].out_channels
        noise = torch.randn(width, generator=torch.Generator().manual_seed(settings.seed)) * 0.3
        # Features begin near GELU(1), so this sum puts every pixel at PRIOR_LOGIT. Without it the rush to that constant drives
        # half of the features below GELU's bend, where nothing is learned any more.
        self.kernel = nn.Parameter(noise - noise.mean() + PRIOR_LOGIT / (width * 0.841))
        self.parts = nn.ModuleDict({"model": model, "first_phase": nn.ParameterDict({"kernel": self.kernel})})
        self.parts.to(next(model.parameters()).device)
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        early = {id(parameter) for parameter in _early_parameters(model)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.parts.parameters():
            groups.setdefault((id(parameter) in early, parameter.ndim > 1), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "early": is_early, "weight_decay": settings.weight_decay if is_matrix else 0.0}
                for (is_early, is_matrix), parameters in groups.items()
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
        )

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        settings = self.settings
        share = settings.learned_share if step >= settings.encoder_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * (share if group["early"] else 1.0)
        if step == settings.encoder_steps:
            self._hand_over()
        losses = self._encoder_losses(batch) if step < settings.encoder_steps else self._losses(step, batch)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise Diverged(f"loss is {loss.item()} at step {step}; the state of the last save is in {self.folder}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parts.parameters(), settings.clip_norm)
        if not torch.isfinite(norm):
            raise Diverged(f"the gradient is {norm.item()} at step {step}; the state of the last save is in {self.folder}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A young average must not remember the random start: its memory grows with the steps taken.
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:  # how many batches a norm has seen
                self.average[name].copy_(tensor)
        return {name: value.item() for name, value in losses.items()} | {"norm": norm.item()}

    def _encoder_losses(self, batch: Batch) -> dict[str, Tensor]:
        model, device = self.model, self.kernel.device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            embeddings = _early_embeddings(model.pixel_encoder, batch.pixel_image.to(device))
            pixels = embeddings.movedim(1, -1)  # [B, G, G, P]
            for block in model.mask_decoder.transformer.layers:  # all that the blocks do to the pixels before they have learned to do more
                pixels = block.layer_norm4(pixels)
            features = model.mask_decoder.upscaling(pixels.movedim(-1, 1))  # [B, P / 8, M, M]
            logit = torch.einsum("bchw,c->bhw", features, self.kernel)
        return {"mask": anchor_loss(logit, batch.target.to(device), batch.valid.to(device), ENCODER_WEIGHTS)}

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Let the hypernetworks begin with the first phase's kernel: whole for [SEG], half of it against minus half for [ANO] and [NOR]."""
        for hypernetwork, share in zip(self.model.mask_decoder.hypernetworks, (-0.5, 0.5, 1.0), strict=True):
            hypernetwork.proj_out.weight.mul_(0.1)
            hypernetwork.proj_out.bias.copy_(share * self.kernel)
        for name, tensor in self.model.mask_decoder.hypernetworks.state_dict().items():
            self.average[f"mask_decoder.hypernetworks.{name}"].copy_(tensor)

    def _losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        settings, model = self.settings, self.model
        late = step - settings.encoder_steps >= settings.paper_weights_from * settings.steps
        device = next(model.parameters()).device
        instruction = sample_instruction(np.random.default_rng([settings.seed, step, 1]))
        prompt = model.prompt_encoder.encode(instruction)
        assert prompt.draft is not None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(batch.pixel_image.to(device), batch.semantic_image.to(device), prompt, prompt.draft)
        target, valid = batch.target.to(device), batch.valid.to(device)
        weights = settings.late_weights if late else settings.early_weights
        return {
            "text": settings.text_weight * text_loss(output.logits, prompt.draft),
            "mask": mask_loss(output.maps, target, valid, weights),
        }

    def averaged_model(self) -> AGVAS:
        model = AGVAS(self.model.config, self.model.tokenizer)
        model.load_state_dict(self.average)
        return model.eval()

    def save(self, step: int) -> None:
        state: dict[str, Tensor] = {f"parts.{name}": tensor for name, tensor in self.parts.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        names = {id(parameter): name for name, parameter in self.parts.named_parameters()}
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
        groups: dict[str, dict[str, Tensor]] = {"parts": {}, "average": {}, "optimizer": {}}
        for name, tensor in load_file(path).items():
            group, rest = name.split(".", 1)
            groups[group][rest] = tensor
        self.parts.load_state_dict(groups["parts"])
        for name, tensor in self.average.items():
            tensor.copy_(groups["average"][name])
        parameters = dict(self.parts.named_parameters())
        for name, tensor in groups["optimizer"].items():
            slot, parameter = name.split(".", 1)
            place = torch.device("cpu") if slot == "step" else parameters[parameter].device
            self.optimizer.state[parameters[parameter]][slot] = tensor.to(place)
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])


def _early_embeddings(encoder: SamVisionEncoder, pixel_image: Tensor) -> Tensor:
    """What the first phase learns on: the stem alone where there is one, since the ViT behind it adds nothing yet and costs more."""
    if isinstance(encoder, StemmedVisionEncoder):
        return encoder.patch_embed(pixel_image)[1]
    return encoder(pixel_image).last_hidden_state


def _early_parameters(model: AGVAS) -> Iterator[nn.Parameter]:
    """What the first phase trains besides its kernel."""
    encoder, decoder = model.pixel_encoder, model.mask_decoder
    for part in (encoder.patch_embed if isinstance(encoder, StemmedVisionEncoder) else encoder, decoder.upscaling):
        yield from part.parameters()


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Each phase warms up and decays on its own."""
    if step < settings.encoder_steps:
        return settings.encoder_learning_rate * warmup_decay(step, settings.warmup_steps, settings.encoder_steps)
    return settings.learning_rate * warmup_decay(step - settings.encoder_steps, settings.warmup_steps, settings.steps)


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
        plain_share = 1.0 if step < settings.plain_until else settings.plain_share
        return draw_batch(pool, config.preprocessing, 4 * config.pixel.grid, settings.batch, rng, plain_share)

    with ThreadPoolExecutor(1) as threads:
        total = settings.encoder_steps + settings.steps
        ahead = [threads.submit(draw, step) for step in range(first, min(first + 2, total))]
        for step in range(first, total):
            batch = ahead.pop(0).result()
            if step + 2 < total:
                ahead.append(threads.submit(draw, step + 2))
            yield batch


def _cut_log(path: Path, first: int) -> None:
    """Drop what an interrupted run logged after its last save: those steps come again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < first))


def _same_settings(settings: TrainSettings, path: Path) -> None:
    text = json.dumps(asdict(settings), indent=2)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path} describes another run; choose another folder, or remove this one to start again")
    path.write_text(text)
