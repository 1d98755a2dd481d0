"""The training loop, on accelerate: the same command on a CPU, a GPU or many, with or without DeepSpeed.

What is trained is a module that takes a batch and returns named losses; what it learns from is asked for by number, so that step, process
and accumulation decide alone which sample is seen where: a resumed run repeats an uninterrupted one, and two processes (but for the
random numbers of dropout) one. It knows nothing of masks, anchors or text. What a run goes on from is state.py's.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from agvas.interruption import Held, held_back
from agvas.training.batch import Batch
from agvas.training.device import check_device
from agvas.training.kept import keep_settings
from agvas.training.log import Log
from agvas.training.processes import check_alike, check_shared, from_main
from agvas.training.sample import TrainingSample
from agvas.training.state import Diverged, State
from runtime.progress import pace

PRECISIONS = ("auto", "no", "bf16")
MAY_CHANGE = ("learning_rate", "clip_norm", "warmup_steps", "save_every", "log_every")
"""Settings that a run may go on with another value of; it may also get more steps, and a run that had ended then goes on from its state.

The rate follows the new settings from there: the line that falls to zero at the new end lies above the old one, so with more steps the rate
jumps up, and most in a run that had ended. Such a run is not the one that would have had so many steps from its beginning.
"""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast; the defaults are the paper's (§4.1, B.2) where it gives any.

    Attributes:
        steps: optimiser steps; the paper gives none (30 hours of four A100).
        global_batch: samples an optimiser step learns from, over all processes and accumulation.
        micro_batch: samples one process computes with at a time.
        warmup_steps: WarmupDecayLR: linear up, then linear down to zero at `steps`.
        betas, weight_decay, clip_norm: of AdamW, as LISA's code has them (the paper gives none); norms and biases do not decay.
        average_decay: the weights kept are a moving average with this memory; None keeps the last ones, as the paper does.
        precision: "bf16" computes matrix products in bf16 (autocast), "no" in the weights' own type; "auto" in bf16 where the device
            multiplies in it, as the paper does. A CPU that does not emulates it, twenty times slower than fp32.
        save_every, log_every: steps between states, and between lines of log.jsonl and TensorBoard.
    """

    steps: int = 10_000
    global_batch: int = 80
    micro_batch: int = 2
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    average_decay: float | None = None
    precision: str = "auto"
    save_every: int = 100
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("steps", "global_batch", "micro_batch", "save_every", "log_every"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}; correct it")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                remedy = "; one of 1e9 clips nothing" if name == "clip_norm" else ""
                raise ValueError(f"{name}: expected a finite number above 0, got {value:g}{remedy}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {self.warmup_steps}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a finite number of 0 or more, got {self.weight_decay:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers of 0 or more and below 1, got {self.betas[0]:g} and {self.betas[1]:g}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ValueError(f"average_decay: expected a number between 0 and 1, got {self.average_decay:g}; null keeps the last weights")


class Source(Protocol):
    """Where samples come from: a pure function of seed, step and place in the global batch."""

    def sample(self, seed: int, step: int, index: int) -> TrainingSample: ...


@dataclass(frozen=True)
class Group:
    """Parameters that share a rate: `share` of the settings' learning rate."""

    parameters: Sequence[nn.Parameter]
    share: float = 1.0


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def accelerator_for(settings: LoopSettings, device: str) -> Accelerator:
    """The accelerator of this process, as `accelerate launch` or `torchrun` set it up; alone without them.

    Raises:
        ValueError: a global batch that processes and micro-batch do not divide; a device that is none or is not there.
    """
    check_device(device)
    kind = torch.device(device).type
    if kind == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(torch.device(device))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    at_once = processes * settings.micro_batch
    if settings.global_batch % at_once:
        raise ValueError(
            f"global_batch: expected a multiple of {at_once} (processes {processes} x micro_batch {settings.micro_batch}), got "
            f"{settings.global_batch}; change one of them (--batch, --micro-batch)"
        )
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # accelerate drops it in silence where it is told cpu
    # The loop casts by itself: DeepSpeed's bf16 would turn the weights, and not the inputs.
    accelerator = Accelerator(
        cpu=kind == "cpu" and not deepspeed,
        mixed_precision="no",
        gradient_accumulation_steps=settings.global_batch // at_once,
        # Without a GPU accelerate finds no backend of its own for DeepSpeed, and takes each process for the only one.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if kind == "cpu" and deepspeed else None,
    )
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed was asked for and accelerate did not take it; see its own messages, or launch without it")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("accelerate: expected DeepSpeed or none, got FSDP, which takes single weights apart; use deepspeed_zero2.json")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ValueError("DeepSpeed: expected ZeRO stage 1 or 2, got 3, which takes single weights apart; use deepspeed_zero2.json")
        # What "auto" stands for where there is no data loader to read it from.
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": settings.micro_batch, "gradient_clipping": settings.clip_norm}
    return accelerator


def run(
    module: nn.Module,
    groups: Sequence[Group],
    source: Source,
    collate: Callable[[Sequence[TrainingSample]], Batch],
    settings: LoopSettings,
    folder: Path,
    device: str = "cpu",
    name: str = "training",
    workers: int = 1,
    facts: dict[str, Any] | None = None,
) -> None:
    """Train `module` in place, or go on with what `folder` holds; it ends holding the weights to keep.

    Args:
        module: called as module(batch, step), returns {name: loss}, each the mean over the batch; their sum is minimised.
        groups: what is trained; all other parameters keep still.
        workers: threads that draw samples ahead; 0 draws them when they are needed.
        facts: what else makes this run this run; kept beside the settings in settings.json, and compared on resume.

    Raises:
        Diverged: see there; says which state there is.
        ValueError: `folder` holds a run with other settings than MAY_CHANGE allows, or one that "auto" began in another precision on
            another machine; processes were given different settings.
    """
    accelerator = accelerator_for(settings, device)
    settings = replace(settings, precision=_precision(settings.precision, accelerator, name))
    folder.mkdir(parents=True, exist_ok=True)
    kept = asdict(settings) | (facts or {})
    check_alike(kept)
    changed = from_main(lambda: keep_settings(folder / "settings.json", kept, MAY_CHANGE, ("steps",)))
    module.to(accelerator.device)
    optimizer = torch.optim.AdamW(_parameter_groups(groups, settings), lr=settings.learning_rate, betas=settings.betas)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    state = State(accelerator, module, wrapped, prepared, settings.average_decay, folder)
    if state.sharded:
        check_shared(folder / "settings.json")
    first = state.resume()
    if accelerator.is_main_process:
        _tell(name, settings, first, changed)
    log: Log | None = None

    def open_log() -> None:
        nonlocal log
        log = Log(folder, first, accelerator.num_processes)

    from_main(open_log)
    learner = _Learner(accelerator, wrapped, prepared, groups, settings)
    bar = tqdm(
        range(first, settings.steps),
        initial=first,
        total=settings.steps,
        desc=name,
        unit="step",
        disable=not accelerator.is_main_process,
        **pace(),
    )
    # Ctrl-C waits for the step and saves it; of several processes none knows at which step the others would end.
    alone = accelerator.num_processes == 1
    try:
        with (
            # Closed here, whatever ends the run: left to the garbage collector, its threads would be waited for wherever that runs, be it
            # in a thread that they wait for.
            closing(_batches(source, collate, settings, accelerator, first, workers)) as batches,
            held_back("this step, and saving its state") if alone else nullcontext(Held()) as held,
        ):
            for step in bar:
                values = learner.step(step, batches)
                state.average(step)
                last = step + 1 == settings.steps
                if log is not None and (step % settings.log_every == 0 or last):
                    bar.set_postfix({key: f"{value:.3f}" for key, value in values.items()}, refresh=False)
                    log.write(step, values | {"rate": float(prepared.param_groups[0]["lr"])}, settings.global_batch)
                if held.asked or (step + 1) % settings.save_every == 0 or last:
                    state.save(step + 1)
                if held.asked:
                    break
    except Diverged as error:
        raise Diverged(f"{error}; {state.where()}") from error
    if log is not None:
        log.close()
    state.keep_average()
    accelerator.wait_for_everyone()
    accelerator.free_memory()


class _Learner:
    """One process's part in each optimiser step."""

    def __init__(
        self, accelerator: Accelerator, wrapped: nn.Module, optimizer: Any, groups: Sequence[Group], settings: LoopSettings
    ) -> None:
        self.accelerator, self.wrapped, self.optimizer, self.settings = accelerator, wrapped, optimizer, settings
        self.parameters = [parameter for group in groups for parameter in group.parameters]

    def step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """Take one step on the next micro-batches; its losses, and the norm of its gradient where it is known. Raises Diverged."""
        settings, accelerator = self.settings, self.accelerator
        # Dropout must not depend on how often a run was interrupted.
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["share"] * warmup_decay(step, settings.warmup_steps, settings.steps)
        sums: dict[str, Tensor] = {}
        values: dict[str, float] = {}
        parts = accelerator.gradient_accumulation_steps
        for _ in range(parts):
            with accelerator.accumulate(self.wrapped):
                losses = self._losses(next(batches), step)
                accelerator.backward(torch.stack(list(losses.values())).sum())
                for key, value in losses.items():
                    sums[key] = sums.get(key, 0) + value.detach() / parts
                if accelerator.sync_gradients:  # the last part
                    values = self._clip(step, sums)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return values

    def _losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        batch = batch.to(self.accelerator.device)
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.wrapped(batch, step)

    def _clip(self, step: int, sums: dict[str, Tensor]) -> dict[str, float]:
        """Clip the gradient, and see that all is finite, which is the same in every process, so that all stop together."""
        means = {key: float(value) for key, value in self.accelerator.reduce(sums, "mean").items()}
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip_norm)  # None of DeepSpeed, which clips later
        values = means | ({} if norm is None else {"norm": float(norm)})
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{'gradient' if name == 'norm' else name} is {value} at step {step}")
        return values


def _precision(asked: str, accelerator: Accelerator, name: str) -> str:
    """What is computed in: "auto" by what the device multiplies in; what it emulates is told."""
    native = multiplies_in_bf16(accelerator.device)
    if asked == "auto":
        return "bf16" if native else "no"
    if asked == "bf16" and not native and accelerator.is_main_process:
        tqdm.write(f"{name}: this {accelerator.device.type} has no bfloat16 and emulates it slowly; precision auto takes fp32", sys.stderr)
    return asked


def _tell(name: str, settings: LoopSettings, first: int, changed: Sequence[str]) -> None:
    """What is worth a line on stderr before the first step."""
    if changed:
        tqdm.write(f"{name}: goes on at step {first} with other settings: {'; '.join(changed)}", sys.stderr)
        if first < settings.steps and any(words.startswith("steps was ") for words in changed):
            share = warmup_decay(first, settings.warmup_steps, settings.steps)
            again = f"at {share:.0%} of learning_rate, from which it falls to zero at step {settings.steps}"
            tqdm.write(f"{name}: with more steps the rate goes on {again}", sys.stderr)
    if settings.steps < settings.warmup_steps:
        reached = warmup_decay(settings.steps - 1, settings.warmup_steps, settings.steps)
        tqdm.write(
            f"{name}: {settings.steps} steps end within the warm-up of {settings.warmup_steps}: the rate reaches {reached:.0%} of "
            "learning_rate; take fewer warmup_steps to train at it",
            sys.stderr,
        )


def warmup_decay(step: int, warmup_steps: int, steps: int) -> float:
    """WarmupDecayLR: linear up over `warmup_steps`, then linear down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def _parameter_groups(groups: Iterable[Group], settings: LoopSettings) -> list[dict[str, Any]]:
    made = []
    for group in groups:
        for is_matrix in (True, False):
            if chosen := [parameter for parameter in group.parameters if (parameter.ndim > 1) == is_matrix]:
                made.append({"params": chosen, "share": group.share, "weight_decay": settings.weight_decay if is_matrix else 0.0})
    return made


def _batches(
    source: Source,
    collate: Callable[[Sequence[TrainingSample]], Batch],
    settings: LoopSettings,
    accelerator: Accelerator,
    first: int,
    workers: int,
) -> Generator[Batch, None, None]:
    """This process's micro-batches from step `first` on, drawn ahead in threads where there are any."""

    def draw(step: int, part: int) -> Batch:
        begin = (part * accelerator.num_processes + accelerator.process_index) * settings.micro_batch
        return collate([source.sample(settings.seed, step, begin + i) for i in range(settings.micro_batch)])

    places = ((step, part) for step in range(first, settings.steps) for part in range(accelerator.gradient_accumulation_steps))
    if workers == 0:
        yield from (draw(*place) for place in places)
        return
    with ThreadPoolExecutor(workers) as threads:
        ahead: list[Future[Batch]] = []
        for place in places:
            ahead.append(threads.submit(draw, *place))
            if len(ahead) > workers + 1:
                yield ahead.pop(0).result()
        while ahead:
            yield ahead.pop(0).result()
