"""The training loop, on accelerate: the same command on a CPU, a GPU or many, with or without DeepSpeed.

What is trained is a module that takes a batch and returns named losses; what it learns from is asked for by number, so that step, process
and accumulation decide alone which sample is seen where: a resumed run repeats an uninterrupted one, and two processes (but for the
random numbers of dropout) one. State is safetensors and JSON, replaced whole; DeepSpeed writes its own. It knows nothing of masks,
anchors or text.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from tqdm import tqdm

from agvas.interruption import Held, held_back
from agvas.training.batch import Batch
from agvas.training.device import check_device
from agvas.training.sample import TrainingSample
from agvas.writing import disk_errors
from runtime.progress import pace

PRECISIONS = ("auto", "no", "bf16")


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
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ValueError(f"average_decay: expected a number between 0 and 1, got {self.average_decay:g}; null keeps the last weights")


class Source(Protocol):
    """Where samples come from: a pure function of seed, step and place in the global batch."""

    def sample(self, seed: int, step: int, index: int) -> TrainingSample: ...


class Diverged(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the last saved state is intact."""


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
        Diverged: see there.
        ValueError: `folder` holds a run with other settings, or one that "auto" began in another precision on another machine.
    """
    accelerator = accelerator_for(settings, device)
    native = multiplies_in_bf16(accelerator.device)
    if settings.precision == "auto":
        settings = replace(settings, precision="bf16" if native else "no")
    elif settings.precision == "bf16" and not native and accelerator.is_main_process:
        tqdm.write(f"{name}: this {accelerator.device.type} has no bfloat16 and emulates it slowly; precision auto takes fp32", sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        keep_settings(folder / "settings.json", asdict(settings) | (facts or {}))
    module.to(accelerator.device)
    optimizer = torch.optim.AdamW(_parameter_groups(groups, settings), lr=settings.learning_rate, betas=settings.betas)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    state = _State(accelerator, module, wrapped, prepared, settings, folder)
    first = state.resume()
    log = _Log(folder, first, accelerator.num_processes) if accelerator.is_main_process else None
    accumulation = accelerator.gradient_accumulation_steps
    bar = tqdm(
        range(first, settings.steps),
        initial=first,
        total=settings.steps,
        desc=name,
        unit="step",
        disable=not accelerator.is_main_process,
        **pace(),
    )
    batches = _batches(source, collate, settings, accelerator, first, workers)
    # Ctrl-C waits for the step and saves it; of several processes none knows at which step the others would end.
    alone = accelerator.num_processes == 1
    with held_back("this step, and saving its state") if alone else nullcontext(Held()) as held:
        for step in bar:
            # Dropout must not depend on how often a run was interrupted.
            torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
            for group in prepared.param_groups:
                group["lr"] = settings.learning_rate * group["share"] * warmup_decay(step, settings.warmup_steps, settings.steps)
            sums: dict[str, Tensor] = {}
            for _ in range(accumulation):
                with accelerator.accumulate(wrapped):
                    batch = next(batches).to(accelerator.device)
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                        losses = wrapped(batch, step)
                    loss = torch.stack(list(losses.values())).sum()
                    accelerator.backward(loss)
                    for key, value in losses.items():
                        sums[key] = sums.get(key, 0) + value.detach() / accumulation
                    if accelerator.sync_gradients:
                        means = accelerator.reduce(sums, "mean")
                        norm = accelerator.clip_grad_norm_([p for group in groups for p in group.parameters], settings.clip_norm)
                        _check_finite(step, {**means, "gradient": norm}, folder)
                    prepared.step()
                    prepared.zero_grad(set_to_none=True)
            state.average(step)
            values = {key: float(value) for key, value in means.items()} | ({} if norm is None else {"norm": float(norm)})
            if log is not None and (step % settings.log_every == 0 or step + 1 == settings.steps):
                bar.set_postfix({key: f"{value:.3f}" for key, value in values.items()}, refresh=False)
                log.write(step, values | {"rate": float(prepared.param_groups[0]["lr"])}, settings.global_batch)
            if held.asked or (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                state.save(step + 1)
            if held.asked:
                break
    if log is not None:
        log.close()
    state.keep_average()
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def is_main_process() -> bool:
    """Whether this process writes what all share; known before any accelerator is made."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def main_process_first(device: str) -> Iterator[None]:
    """What one process should write before the others read it."""
    with PartialState(cpu=torch.device(device).type == "cpu").main_process_first():
        yield


def warmup_decay(step: int, warmup_steps: int, steps: int) -> float:
    """WarmupDecayLR: linear up over `warmup_steps`, then linear down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings beside it, or see that they are the ones it was begun with.

    Raises:
        ValueError: the folder holds another run; says which settings differ.
    """
    text = json.dumps(settings, indent=2, default=str)
    if path.exists():
        found = json.loads(path.read_text())
        wanted = json.loads(text)
        if different := sorted(_differences(found, wanted)):
            listed = "; ".join(
                f"{name} differs" if "\n" in before + now else f"{name} was {before}, is {now}" for name, before, now in different
            )
            raise ValueError(f"{path} describes another run ({listed}); choose another folder, or remove this one to start again")
        return
    path.write_text(text)


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Each setting that differs, "pool.samples", with what it was and is."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, str(found), str(wanted)


def _check_finite(step: int, values: dict[str, Tensor | None], folder: Path) -> None:
    """The values are the same in every process, so all stop together."""
    for name, value in values.items():
        if value is not None and not torch.isfinite(torch.as_tensor(value)):
            raise Diverged(
                f"{name} is {float(value)} at step {step}; the state of the last save is in {folder}. Lower the learning rate, or look at "
                "the samples of this step, and run the command again to go on from there"
            )


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
) -> Iterator[Batch]:
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


class _State:
    """What is trained, its moving average and the optimiser, saved and resumed together."""

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, wrapped: nn.Module, optimizer: Any, settings: LoopSettings, folder: Path
    ) -> None:
        self.accelerator, self.module, self.wrapped, self.optimizer = accelerator, module, wrapped, optimizer
        self.settings, self.folder = settings, folder
        self.sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.kept: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        persistent = module.state_dict().keys()
        self.kept |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        self.averages: dict[str, Tensor] = {}
        if settings.average_decay is not None:
            if self.sharded:
                raise ValueError("average_decay: a moving average of sharded weights is not supported; set it to null")
            self.averages = {name: tensor.clone() for name, tensor in self.kept.items()}

    @torch.no_grad()
    def average(self, step: int) -> None:
        """A young average must not remember the random start: its memory grows with the steps taken."""
        if self.settings.average_decay is None:
            return
        decay = min(self.settings.average_decay, (1 + step) / (10 + step))
        for name, tensor in self.averages.items():
            if tensor.is_floating_point():
                tensor.lerp_(self.kept[name], 1 - decay)
            else:  # how many batches a norm has seen
                tensor.copy_(self.kept[name])

    @torch.no_grad()
    def keep_average(self) -> None:
        for name, tensor in self.averages.items():
            self.kept[name].copy_(tensor)

    def save(self, step: int) -> None:
        if self.sharded:  # every process writes its part, in the library's own layout
            partial = self.folder / "state.partial"
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # what a stopped save has left; never the only whole state, see _mend
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (partial / "step.json").write_text(json.dumps({"step": step}))
                _put_in_place(self.folder)
        elif self.accelerator.is_main_process:
            state = {f"weights.{name}": tensor for name, tensor in self.kept.items()}
            state |= {f"average.{name}": tensor for name, tensor in self.averages.items()}
            names = {id(parameter): name for name, parameter in self.parameters.items()}
            for parameter, slots in self._optimizer().state.items():
                state |= {f"optimizer.{slot}.{names[id(parameter)]}": tensor for slot, tensor in slots.items()}
            partial = self.folder / "state.partial"
            copied = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
            with disk_errors(partial):
                save_file(copied, partial, metadata={"step": str(step)})
            os.replace(partial, self.folder / "state.safetensors")
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """The step to go on with: 0 when nothing was saved."""
        if self.sharded:
            if self.accelerator.is_main_process:
                _mend(self.folder)
            self.accelerator.wait_for_everyone()
            step = _step_of(place := self.folder / "state")
            if step is None:
                return 0
            self.accelerator.load_state(str(place))
            return step
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0
        optimizer = self._optimizer()
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                group, rest = name.split(".", 1)
                if group == "optimizer":
                    slot, parameter_name = rest.split(".", 1)
                    parameter = self.parameters[parameter_name]
                    place_of = torch.device("cpu") if slot == "step" else parameter.device
                    optimizer.state[parameter][slot] = tensor.to(place_of)
                else:
                    {"weights": self.kept, "average": self.averages}[group][rest].copy_(tensor)
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _step_of(state: Path) -> int | None:
    """The step of a sharded state's folder; None unless it is whole, for step.json is written last."""
    try:
        return int(json.loads((state / "step.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return None


def _put_in_place(folder: Path) -> None:
    """state.partial becomes state; until it has, what was state before is still there as state.old."""
    partial, place, old = (folder / name for name in ("state.partial", "state", "state.old"))
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(partial, place)
    shutil.rmtree(old, ignore_errors=True)


def _mend(folder: Path) -> None:
    """End what an interrupted save began: where there is no whole state, the new one becomes it, else the old one."""
    place = folder / "state"
    if _step_of(place) is None:
        for name in ("state.partial", "state.old"):
            if _step_of(folder / name) is not None:
                shutil.rmtree(place, ignore_errors=True)
                os.replace(folder / name, place)
                break
    shutil.rmtree(folder / "state.old", ignore_errors=True)


class _Log:
    """log.jsonl and TensorBoard's events: the same numbers, each step once, also after a resume."""

    def __init__(self, folder: Path, first: int, processes: int) -> None:
        self.path, self.processes = folder / "log.jsonl", processes
        if self.path.exists():  # what was logged after the last save comes again
            kept = [line for step, line in _logged(self.path) if step < first]
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, self.path)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.started, self.since, self.last = time.monotonic(), time.monotonic(), first - 1

    def write(self, step: int, values: dict[str, float], images: int) -> None:
        now = time.monotonic()
        rate = (step - self.last) * images / max(now - self.since, 1e-9)
        self.since, self.last = now, step
        speed = {"seconds": round(now - self.started, 1), "images_per_second": round(rate, 2), "processes": self.processes}
        line = {"step": step, **speed, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in (values | {"images_per_second": rate}).items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        self.events.close()


def _logged(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of a log; half a last line, of a full disk or a power cut, is left out. Raises ValueError for any other that is none."""
    lines = path.read_text(errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: expected JSON with a step, got {line[:60]!r}; remove the line") from error
        yield step, line
