"""What a run goes on from: what is trained, its moving average and the optimiser, saved and resumed together.

One safetensors file that the main process writes and reads; what it holds is then sent to the others, which may have other disks. Under
DeepSpeed a folder in that library's own layout, of which every process writes and reads its part. Both are replaced whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agvas.training.processes import from_main
from agvas.writing import on_disk, replacing


class Diverged(ArithmeticError):
    """A loss, its gradient or a weight became NaN or infinite; the last saved state is intact."""


class State:
    """The state of one run in this process.

    Args:
        average_decay: memory of a moving average of the weights; None has none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        wrapped: nn.Module,
        optimizer: Any,
        average_decay: float | None,
        folder: Path,
    ) -> None:
        self.accelerator, self.module, self.wrapped, self.optimizer = accelerator, module, wrapped, optimizer
        self.average_decay, self.folder = average_decay, folder
        self.sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.saved: int | None = None
        self.parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.kept: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        persistent = module.state_dict().keys()
        self.kept |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        self.averages: dict[str, Tensor] = {}
        if average_decay is not None:
            if self.sharded:
                raise ValueError("average_decay: a moving average of sharded weights is not supported; set it to null")
            self.averages = {name: tensor.clone() for name, tensor in self.kept.items()}

    @torch.no_grad()
    def average(self, step: int) -> None:
        """A young average must not remember the random start: its memory grows with the steps taken."""
        if self.average_decay is None:
            return
        decay = min(self.average_decay, (1 + step) / (10 + step))
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
        """Raises Diverged, and leaves the state before, where a weight is no number; OSError where it cannot be written."""
        self._check_finite(step)
        if self.sharded:
            self._save_shards(step)
        else:
            from_main(lambda: self._save_file(step))
        self.saved = step

    def resume(self) -> int:
        """The step to go on with, in all processes the same: 0 when nothing was saved.

        Raises:
            ValueError: the state is damaged, or another model's.
        """
        step = self._load_shards() if self.sharded else self._load_file()
        self.saved = step or None
        return step

    def where(self) -> str:
        """Which state there is, in words."""
        return "no state has been saved" if self.saved is None else f"the state of step {self.saved} is in {self.folder}"

    def _check_finite(self, step: int) -> None:
        """The weights are the same in every process, so all stop together."""
        for name, tensor in {**self.kept, **self.averages}.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise Diverged(f"{name} is no finite number behind step {step - 1}")

    @property
    def _file(self) -> Path:
        return self.folder / "state.safetensors"

    def _save_file(self, step: int) -> None:
        state = {f"weights.{name}": tensor for name, tensor in self.kept.items()}
        state |= {f"average.{name}": tensor for name, tensor in self.averages.items()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter, slots in self._optimizer().state.items():
            state |= {f"optimizer.{slot}.{names[id(parameter)]}": tensor for slot, tensor in slots.items()}
        copied = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        with replacing(self._file) as partial:
            save_file(copied, partial, metadata={"step": str(step)})

    @torch.no_grad()
    def _load_file(self) -> int:
        read: dict[str, Tensor] = {}

        def read_state() -> tuple[int, dict[str, tuple[torch.Size, torch.dtype]]]:
            step, tensors = _read(self._file)
            if step:
                self._check_names(tensors)
            read.update(tensors)
            return step, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

        step, kinds = from_main(read_state)
        for name, (shape, dtype) in kinds.items():
            tensor = read.pop(name) if name in read else torch.empty(shape, dtype=dtype)
            self._put(name, broadcast(tensor.to(self.accelerator.device)))
        return step

    def _put(self, name: str, tensor: Tensor) -> None:
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            slot, parameter_name = rest.split(".", 1)
            parameter = self.parameters[parameter_name]
            self._optimizer().state[parameter][slot] = tensor.to("cpu" if slot == "step" else parameter.device)
        else:
            {"weights": self.kept, "average": self.averages}[kind][rest].copy_(tensor)

    def _check_names(self, tensors: dict[str, Tensor]) -> None:
        expected = {f"weights.{name}": tensor.shape for name, tensor in self.kept.items()}
        expected |= {f"average.{name}": tensor.shape for name, tensor in self.averages.items()}
        found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer.")}
        learned = {name.split(".", 2)[2] for name in tensors if name.startswith("optimizer.")}
        if found != expected or not learned <= self.parameters.keys():
            name = min({name for name, _ in found.items() ^ expected.items()} | (learned - self.parameters.keys()))
            raise ValueError(f"{self._file}: expected the state of this model, got another one's (see {name}); choose another folder")

    def _save_shards(self, step: int) -> None:
        """Every process writes its part, in the library's own layout."""
        partial, is_main = self.folder / "state.partial", self.accelerator.is_main_process
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)  # what a stopped save has left; never the only whole state, see _mend
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if is_main:
            for path in partial.rglob("*"):
                on_disk(path)
            (partial / "step.json").write_text(json.dumps({"step": step}))
            on_disk(partial / "step.json")
            _put_in_place(self.folder)
        self.accelerator.wait_for_everyone()

    def _load_shards(self) -> int:
        place = self.folder / "state"

        def mended() -> int:
            _mend(self.folder)
            return _step_of(place) or 0

        if step := from_main(mended):
            self.accelerator.load_state(str(place))
        return step

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _read(path: Path) -> tuple[int, dict[str, Tensor]]:
    """(step, tensors) of a state; (0, {}) where there is none."""
    if not path.exists():
        return 0, {}
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        remedy = "remove the file to begin again at step 0, or put a copy of it there"
        raise ValueError(f"{path}: expected a whole state, got: {error}; {remedy}") from error


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
