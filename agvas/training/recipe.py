"""How nano is made from nothing: procedural samples, pixel and language pretraining, then the whole model under the paper's objective.

It stands for what the 7B gets from SAM, SigLIP and LLaVA-OneVision before AG-VAS is trained, at a size that two CPU cores train in well
under an hour. Every number is a field; the folder is resumable at any time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from agvas.config import ANSWER, NAMED, AGVASConfig, ablated
from agvas.model import AGVAS
from agvas.tokenizer import train_tokenizer
from agvas.training.adaptation import TrainedParts
from agvas.training.batch import collate
from agvas.training.descriptions import all_sentences
from agvas.training.device import check_device
from agvas.training.instructions import all_instructions
from agvas.training.kept import keep_settings
from agvas.training.language_pretraining import LanguagePretraining, LanguagePretrainingSettings
from agvas.training.loop import LoopSettings, run
from agvas.training.losses import MaskLossWeights
from agvas.training.objective import ObjectiveSettings
from agvas.training.pool import PoolSettings, ProceduralSource, SamplePool
from agvas.training.pretraining import PixelPretraining, PretrainingSettings, hand_over
from agvas.training.processes import from_main, join, once_a_machine
from agvas.training.trainer import TuningSettings, tune
from agvas.trunk import published_weights

MODES = {"direct": 0.55, "describe-then-segment": 0.15, "describe-then-segment-plus": 0.15, "segment-then-explain": 0.15}

SLOW = ("pixel_encoder.patch_embed", "mask_decoder.upscaling")  # what pixel pretraining taught
FROZEN = ("pixel_encoder.patch_embed.trunk",)  # what photographs taught


@dataclass(frozen=True)
class Recipe:
    """One training from nothing.

    Attributes:
        plain_share: share of a batch drawn from the plain samples, once the others are there.
        modes: share of each instruction mode.
        ablation: one of agvas.config.ABLATIONS, None for AG-VAS.
    """

    config: str = "nano"
    seed: int = 0
    pool: PoolSettings = PoolSettings()
    plain_share: float = 0.6
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
    language: LanguagePretrainingSettings = field(default_factory=LanguagePretrainingSettings)
    tuning: TuningSettings = field(
        default_factory=lambda: TuningSettings(
            LoopSettings(
                steps=600,
                global_batch=8,
                micro_batch=8,
                learning_rate=5e-4,
                warmup_steps=60,
                betas=(0.9, 0.98),
                weight_decay=0.02,
                average_decay=0.997,
            ),
            TrainedParts(lora=None, encoders=True, slow=SLOW, slow_share=0.1, frozen=FROZEN),
            ObjectiveSettings(
                text=0.1,
                mask=MaskLossWeights(bce=1.0, dice=1.0),
                image=0.3,
                early_mask=MaskLossWeights(bce=4.0, dice=0.25),
                early_until=400,
            ),
        )
    )
    modes: dict[str, float] = field(default_factory=lambda: dict(MODES))
    ablation: str | None = None

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe with other random weights and another order of samples; the pool stays."""
        return replace(
            self,
            seed=seed,
            pretraining=replace(self.pretraining, loop=replace(self.pretraining.loop, seed=seed)),
            language=replace(self.language, loop=replace(self.language.loop, seed=seed)),
            tuning=replace(self.tuning, loop=replace(self.tuning.loop, seed=seed)),
        )

    def shortened(self, pretraining_steps: int | None, tuning_steps: int | None, samples: int | None) -> Recipe:
        """With other numbers of steps and samples (None: as they are); what falls at a share of a run keeps its share, and so does the
        language pretraining of both."""
        pretraining, language, tuning, pool = self.pretraining, self.language, self.tuning, self.pool
        if pretraining_steps is not None:
            words = max(1, round(language.loop.steps * pretraining_steps / pretraining.loop.steps))
            language = replace(language, loop=replace(language.loop, steps=words))
            until = round(pretraining.plain_until * pretraining_steps / pretraining.loop.steps)
            pretraining = replace(pretraining, plain_until=until, loop=replace(pretraining.loop, steps=pretraining_steps))
        if tuning_steps is not None:
            until = round(tuning.objective.early_until * tuning_steps / tuning.loop.steps)
            tuning = replace(
                tuning, objective=replace(tuning.objective, early_until=until), loop=replace(tuning.loop, steps=tuning_steps)
            )
        if samples is not None:
            pool = replace(pool, samples=samples, plain=samples * pool.plain // pool.samples)
        return replace(self, pretraining=pretraining, language=language, tuning=tuning, pool=pool)


def train_from_nothing(recipe: Recipe, folder: Path, device: str = "cpu", workers: int = 2) -> AGVAS:
    """The recipe's model, also in folder/checkpoint in 16 bit; goes on where an interrupted run stopped.

    Raises:
        ValueError: the folder holds another run; a pretrained trunk's package is not installed.
        Diverged: see state.py.
    """
    check_device(device)
    model = new_model(recipe.config, recipe.seed, recipe.ablation)  # first: what it lacks is told before the samples are made
    folder.mkdir(parents=True, exist_ok=True)
    join(device)
    from_main(lambda: keep_settings(folder / "recipe.json", asdict(recipe)))
    pool = once_a_machine(lambda: SamplePool.make(folder / "pool", recipe.pool, workers))
    first = PixelPretraining(model.train(), recipe.pretraining.weights, recipe.seed)
    anchors = model.config.prompts.anchors
    config = pieces_config(model.config, recipe.pretraining.side)
    source = ProceduralSource(
        pool,
        config.preprocessing.pixel_size,
        recipe.plain_share,
        recipe.pretraining.plain_until,
        anchors=anchors,
        pieces=config is not model.config,
    )
    run(
        first,
        first.groups(),
        source,
        lambda samples: collate(samples, config, model.prompt_encoder),
        recipe.pretraining.loop,
        folder / "pretraining",
        device,
        "pixel pretraining",
    )
    hand_over(first.kernel, model)
    words = recipe.language
    config = semantic_config(model.config)
    run(
        second := LanguagePretraining(model),
        second.groups(),
        ProceduralSource(pool, model.config.preprocessing.pixel_size, recipe.plain_share, modes=words.modes, anchors=anchors),
        lambda samples: collate(samples, config, model.prompt_encoder),
        words.loop,
        folder / "language-pretraining",
        device,
        "language pretraining",
    )
    source = ProceduralSource(pool, model.config.preprocessing.pixel_size, recipe.plain_share, modes=recipe.modes, anchors=anchors)
    return tune(model, source, recipe.tuning, folder, device, dtype=torch.float16)


def new_model(config: str, seed: int, ablation: str | None = None) -> AGVAS:
    """A randomly initialised model of a named size with the small tokenizer; a pretrained stem's trunk as published.

    Raises:
        ValueError: the trunk's package is not installed.
    """
    settings = ablated(NAMED[config](), ablation)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([*all_instructions(), *all_sentences(), ANSWER], settings.language.vocabulary)
    model = AGVAS(settings, tokenizer)
    # transformers starts SAM's absolute positions at zero, which a pretrained checkpoint overwrites; from scratch they must differ.
    torch.nn.init.trunc_normal_(model.pixel_encoder.pos_embed, std=0.02)
    torch.nn.init.trunc_normal_(model.semantic_encoder.embeddings.position_embedding.weight, std=0.02)
    if settings.pixel.stem == "pretrained":
        trunk, statistics = model.pixel_encoder.patch_embed.trunk, settings.preprocessing
        trunk.load_published(published_weights(), statistics.pixel_mean, statistics.pixel_std)
    torch.nn.init.ones_(model.mask_decoder.upscaling[3].bias)  # see PixelPretraining: features begin in GELU's straight part
    # The decoder's blocks begin by leaving the pixels as they are: tuning starts where pretraining ended.
    for block in model.mask_decoder.transformer.layers:
        torch.nn.init.zeros_(block.cross_attn_image_to_token.out_proj.weight)
        torch.nn.init.zeros_(block.cross_attn_image_to_token.out_proj.bias)
    return model


def pieces_config(config: AGVASConfig, side: int | None) -> AGVASConfig:
    """The config whose batches show a convolutional stem pieces of `side` pixels; the config itself for any other encoder.

    Raises:
        ValueError: a side that the stem's grids do not divide.
    """
    if side is None or config.pixel.stem == "linear":
        return config
    if side % config.pixel.patch_size or side > config.pixel.image_size:
        raise ValueError(f"side: expected a multiple of {config.pixel.patch_size} up to {config.pixel.image_size} pixels, got {side}")
    return _with_pixels(config, side)


def semantic_config(config: AGVASConfig) -> AGVASConfig:
    """The config whose batches hold the smallest pixel images that a stem takes, for a phase that does not look at them."""
    return _with_pixels(config, 4 * config.pixel.patch_size)


def _with_pixels(config: AGVASConfig, side: int) -> AGVASConfig:
    return replace(
        config, pixel=replace(config.pixel, image_size=side), preprocessing=replace(config.preprocessing, pixel_size=side)
    )
