"""The training loop: stopped and resumed, accumulated, spread over processes, it is one and the same run."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn

from agvas.config import ANSWER, tiny
from agvas.tokenizer import train_tokenizer
from agvas.training import loop
from agvas.training.batch import Batch, collate
from agvas.training.loop import Diverged, Group, LoopSettings, run, warmup_decay
from agvas.training.sample import TrainingSample
from runtime.prompts import PromptEncoder

SETTINGS = LoopSettings(
    steps=7, global_batch=4, micro_batch=2, learning_rate=0.05, warmup_steps=2, average_decay=0.9, precision="no", save_every=2, log_every=1
)
ENCODER = PromptEncoder(train_tokenizer([ANSWER], 512), tiny().prompts)


class Learner(nn.Module):
    """Learns how bright a picture is; with dropout, so that random numbers matter, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 45 * 45, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
        self.still = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.seen += len(batch.prompts)
        wanted = batch.pixel_image.mean(dim=(1, 2, 3))
        return {"brightness": (self.layers(batch.semantic_image)[:, 0] - wanted).square().mean(), "constant": torch.ones(()) * 0.25}

    def groups(self) -> list[Group]:
        return [Group([p for p in self.parameters() if p.requires_grad])]


class Noise:
    """Pictures of random brightness; what was asked for is kept, and at `stop_at` it raises."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.asked = stop_at, set[tuple[int, int]]()

    def sample(self, seed: int, step: int, index: int) -> TrainingSample:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.asked.add((step, index))
        level = np.random.default_rng([seed, step, index]).integers(256)
        return TrainingSample(np.full((9, 9, 3), level, np.uint8), "Look.", ANSWER, np.zeros((9, 9), bool), True)


def make_batch(samples: Sequence[TrainingSample]) -> Batch:
    return collate(samples, tiny(), ENCODER)


def trained(
    folder: Path, settings: LoopSettings = SETTINGS, source: Any = None, module: nn.Module | None = None, workers: int = 1
) -> dict[str, Tensor]:
    learner = module or Learner()
    run(learner, learner.groups(), source or Noise(), make_batch, settings, folder, workers=workers)
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=name)


def test_a_state_that_cannot_be_written_is_told_in_words_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a full disk, for the state is larger and all else smaller
    try:
        with pytest.raises(OSError, match=r"state\.safetensors\.partial: expected to be written whole, got: .*; free some space"):
            trained(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").glob("state*"))
    assert_same(trained(tmp_path / "run"), trained(tmp_path / "whole"))


def test_no_thread_outlives_a_run_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its error is held, and the run's frames with it: a thread that is left would be waited for by the garbage collector."""

    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("agvas.training.loop.State.save", full)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="no room") as held:
        trained(tmp_path, workers=2)
    left = [thread.name for thread in threading.enumerate() if thread not in before and thread.name.startswith("ThreadPoolExecutor")]
    assert held.tb is not None and not left


def test_a_log_is_not_filled_with_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, replace(SETTINGS, steps=40))
    bars = capsys.readouterr().err.count("step/s")
    assert 1 <= bars <= 4  # stderr is no terminal here: one at the beginning, one in ten seconds, one at the end


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return trained(folder), logged(folder)


@pytest.mark.parametrize("stop_at", [1, 2, 5, 6])
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, uninterrupted: Any, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, source=Noise(stop_at))
    source = Noise()
    weights = trained(tmp_path, source=source)
    assert_same(weights, uninterrupted[0])
    saved = max((stop_at - 1) // 2 * 2, 0)  # samples are drawn ahead: the step before the stop may not have been taken
    assert min(step for step, _ in source.asked) in (saved, stop_at // 2 * 2)
    timing = {"seconds", "images_per_second"}
    assert [{k: v for k, v in line.items() if k not in timing} for line in logged(tmp_path)] == [
        {k: v for k, v in line.items() if k not in timing} for line in uninterrupted[1]
    ]


def test_ctrl_c_waits_for_its_step_and_keeps_it(tmp_path: Path, uninterrupted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Pressed(Learner):
        def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
            if step == 2 and not self.pressed:
                self.pressed = True
                handler = signal.getsignal(signal.SIGINT)  # as if it had come; a real one could end all the tests, see test_interruption
                assert callable(handler)
                handler(signal.SIGINT, None)
            return super().forward(batch, step)

        pressed = False

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, module=Pressed())
    assert "stopping after this step, and saving its state" in capsys.readouterr().err
    source = Noise()
    weights = trained(tmp_path, source=source)
    assert min(step for step, _ in source.asked) == 3, "a run without Ctrl-C saves behind steps 1 and 3 alone"
    assert_same(weights, uninterrupted[0])


def test_a_finished_run_takes_no_more_steps_and_gives_the_same_weights(tmp_path: Path, uninterrupted: Any) -> None:
    trained(tmp_path)
    source = Noise()
    assert_same(trained(tmp_path, source=source), uninterrupted[0])
    assert not source.asked


def test_a_batch_is_the_same_in_one_part_or_four(tmp_path: Path) -> None:
    """Without dropout, whose random numbers fall on other samples when the batch is split otherwise."""

    def run_with(micro_batch: int) -> dict[str, Tensor]:
        module = Learner()
        module.layers[2].p = 0.0
        return trained(tmp_path / str(micro_batch), replace(SETTINGS, micro_batch=micro_batch), module=module)

    whole, parts = run_with(4), run_with(1)
    assert_same(parts, whole, tolerance=2e-6)  # sums in another order, over seven steps of Adam


def test_every_place_of_the_global_batch_is_asked_for_once(tmp_path: Path) -> None:
    source = Noise()
    trained(tmp_path, source=source)
    assert source.asked == {(step, index) for step in range(7) for index in range(4)}


def test_samples_drawn_ahead_or_when_needed_train_the_same_weights(tmp_path: Path) -> None:
    none, two = (trained(tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert_same(none, two)


def test_training_moves_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    start = Learner().state_dict()
    moved = {name for name, tensor in trained(tmp_path).items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if name.startswith("layers.")} | {"seen"}


def test_a_group_with_a_share_of_the_rate_moves_by_that_share(tmp_path: Path) -> None:
    """Adam's first step is the rate, whatever the gradient."""
    module, start = Learner(), Learner().state_dict()
    settings = replace(SETTINGS, steps=1, warmup_steps=1, average_decay=None, clip_norm=1e9)
    run(module, [Group([module.layers[1].weight], 0.1), Group([module.layers[4].weight])], Noise(), make_batch, settings, tmp_path)
    slow = (module.layers[1].weight - start["layers.1.weight"]).abs().max().item()
    fast = (module.layers[4].weight - start["layers.4.weight"]).abs().max().item()
    assert slow == pytest.approx(0.005, rel=1e-3) and fast == pytest.approx(0.05, rel=1e-3)


def test_the_weights_kept_are_the_average_over_the_last_steps(tmp_path: Path) -> None:
    averaged = trained(tmp_path / "averaged")
    last = trained(tmp_path / "last", replace(SETTINGS, average_decay=None))
    on_disk = load_file(tmp_path / "averaged" / "state.safetensors")
    name = "layers.1.weight"
    torch.testing.assert_close(on_disk[f"weights.{name}"], last[name])
    torch.testing.assert_close(on_disk[f"average.{name}"], averaged[name])
    assert not torch.equal(averaged[name], last[name])


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [warmup_decay(step, 4, 10) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert warmup_decay(0, 0, 1) == 1
    assert [warmup_decay(step, 100, 2) for step in range(2)] == [0.01, 0.02]  # a run shorter than its warm-up


@pytest.mark.parametrize("spoil", [lambda level: math.nan, lambda level: math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_save(tmp_path: Path, spoil: Callable[[float], float]) -> None:
    class Spoiled(Learner):
        def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
            losses = super().forward(batch, step)
            return losses | {"brightness": losses["brightness"] * (spoil(1.0) if step == 4 else 1.0)}

    with pytest.raises(Diverged, match="brightness is (nan|inf) at step 4; the state of step 4 is in "):
        trained(tmp_path, module=Spoiled())
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert file.metadata() == {"step": "4"}
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "state.safetensors").values())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("step", "left"), [(3, "the state of step 2 is in "), (1, "no state has been saved")])
def test_weights_that_are_no_numbers_never_become_the_state(tmp_path: Path, step: int, left: str) -> None:
    """A step whose loss and gradient were finite may still end in a weight that is not."""

    class Overflowing(Learner):
        def forward(self, batch: Batch, at: int) -> dict[str, Tensor]:
            losses = super().forward(batch, at)
            if at == step:
                self.layers[4].bias.data.fill_(math.inf)
            return losses

    with pytest.raises(Diverged, match=rf"layers\.4\.bias is no finite number behind step {step}; {left}"):
        trained(tmp_path, replace(SETTINGS, micro_batch=4), module=Overflowing())
    assert (tmp_path / "state.safetensors").exists() == (step == 3)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\0" * len(data), lambda data: b""])
def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    trained(tmp_path, replace(SETTINGS, steps=2))
    state = tmp_path / "state.safetensors"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a whole state, got: .*; remove the file to begin again at step 0"):
        trained(tmp_path, replace(SETTINGS, steps=2))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    wider = Learner()
    wider.layers[4] = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"expected the state of this model, got another one's \(see average\.layers\.4\.bias\)"):
        trained(tmp_path, replace(SETTINGS, average_decay=0.9), module=wider)


def test_damaged_settings_are_named_and_the_run_goes_on_without_them(tmp_path: Path, uninterrupted: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, source=Noise(4), workers=0)
    settings = tmp_path / "settings.json"
    settings.write_text(settings.read_text()[:40])
    with pytest.raises(ValueError, match=r"settings\.json: expected a whole JSON file, got .*; if this command began the run, remove the"):
        trained(tmp_path)
    settings.unlink()
    assert_same(trained(tmp_path), uninterrupted[0])


def test_files_are_on_the_disk_before_they_take_the_place_of_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    sync, move = os.fsync, os.replace

    def synced(opened: int) -> None:
        done.append(("synced", Path(os.readlink(f"/proc/self/fd/{opened}")).name))
        sync(opened)

    def moved(before: Any, after: Any) -> None:
        done.append(("moved", Path(after).name))
        move(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    trained(tmp_path, replace(SETTINGS, steps=1))
    for name in ("settings.json", "state.safetensors"):
        at = done.index(("moved", name))
        assert done[at - 1 : at + 2] == [("synced", f"{name}.partial"), ("moved", name), ("synced", tmp_path.name)]


def test_a_folder_holds_one_run_and_says_what_differs(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"seed was 0, is 1.*choose another folder"):
        trained(tmp_path, replace(SETTINGS, seed=1))
    with pytest.raises(ValueError, match=r"steps was 7, is 6"):
        trained(tmp_path, replace(SETTINGS, steps=6))


def test_a_run_goes_on_with_another_rate_and_more_steps_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, source=Noise(4), workers=0)
    trained(tmp_path, replace(SETTINGS, learning_rate=0.01, warmup_steps=0, steps=9))
    told = "training: goes on at step 4 with other settings: learning_rate was 0.05, is 0.01; steps was 7, is 9; warmup_steps was 2, is 0"
    assert told in capsys.readouterr().err
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert (kept["learning_rate"], kept["steps"], kept["warmup_steps"]) == (0.01, 9, 0)
    assert [line["step"] for line in logged(tmp_path)] == list(range(9))
    assert logged(tmp_path)[4]["rate"] == pytest.approx(0.01 * warmup_decay(4, 0, 9))
    trained(tmp_path, replace(SETTINGS, learning_rate=0.01, warmup_steps=0, steps=9))
    assert "other settings" not in capsys.readouterr().err


def test_a_run_that_had_ended_goes_on_with_more_steps_at_the_rate_of_the_new_end_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run")
    assert "the rate goes on" not in capsys.readouterr().err
    source = Noise()
    trained(tmp_path / "run", replace(SETTINGS, steps=9), source)
    told = "training: with more steps the rate goes on at 29% of learning_rate, from which it falls to zero at step 9"
    assert told in capsys.readouterr().err
    assert {step for step, _ in source.asked} == {7, 8}
    rates = [line["rate"] for line in logged(tmp_path / "run")]
    assert rates[6:] == pytest.approx([0.05 * 1 / 5, 0.05 * 2 / 7, 0.05 * 1 / 7]), "it was near its end, and jumps up"
    trained(tmp_path / "whole", replace(SETTINGS, steps=9))
    assert logged(tmp_path / "whole")[6]["rate"] == pytest.approx(0.05 * 3 / 7), "so a run of nine steps is another"


def test_a_run_of_a_version_that_kept_other_settings_is_refused_in_these_words(tmp_path: Path) -> None:
    trained(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    del kept["clip_norm"]
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="got another version's, without or with clip_norm: whether this is the same run cannot be told"):
        trained(tmp_path)


def test_a_run_shorter_than_its_warm_up_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "short", replace(SETTINGS, steps=3, warmup_steps=6))
    assert "training: 3 steps end within the warm-up of 6: the rate reaches 50% of learning_rate" in capsys.readouterr().err
    trained(tmp_path / "long", replace(SETTINGS, steps=3, warmup_steps=3))
    assert "warm-up" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 5}, "multiple of 2 (processes 1 x micro_batch 2), got 5; change one of them"),
        ({"precision": "fp8"}, "one of auto, no, bf16"),
        *[
            ({name: number}, f"{name}: expected at least 1, got {number}")
            for name in ("steps", "global_batch", "micro_batch", "save_every", "log_every")
            for number in (0, -1)
        ],
        *[
            ({name: value}, f"{name}: expected a finite number above 0, got {value:g}")
            for name in ("learning_rate", "clip_norm")
            for value in (0.0, -5.0, math.inf, math.nan)
        ],
        ({"warmup_steps": -5}, "warmup_steps: expected 0 or more, got -5"),
        *[({"weight_decay": value}, "weight_decay: expected a finite number of 0 or more") for value in (-0.1, math.inf, math.nan)],
        *[({"betas": betas}, "betas: expected two numbers of 0 or more and below 1") for betas in ((0.9, 1.0), (-0.1, 0.9))],
        *[({"average_decay": decay}, f"average_decay: expected a number between 0 and 1, got {decay:g}") for decay in (0.0, 1.0, 1.5)],
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(tmp_path, replace(SETTINGS, **changes))


@pytest.mark.parametrize(("able", "kept"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no"), ({"bf16": True}, "bf16")])
def test_auto_takes_bf16_where_the_device_has_it_and_stays_with_it(
    tmp_path: Path, able: dict[str, bool], kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    trained(tmp_path, replace(SETTINGS, precision="auto"))
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == kept
    assert "emulates" not in capsys.readouterr().err
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": kept == "no"})
    with pytest.raises(ValueError, match=rf"precision was {kept}"):
        trained(tmp_path, replace(SETTINGS, precision="auto"))


def test_emulated_bf16_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    trained(tmp_path, replace(SETTINGS, precision="bf16"))
    assert "precision auto takes fp32" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    module = Learner()
    with pytest.raises(ValueError, match="sees none; use --device cpu"):
        run(module, module.groups(), Noise(), make_batch, SETTINGS, tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "expected cpu, cuda or cuda:N, got 'mps'"),
        ("xpu", "expected cpu, cuda or cuda:N, got 'xpu'"),
        ("meta", "expected cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:2", "got cuda:2, and torch sees cuda:0 to cuda:1"),
    ],
)
def test_a_device_that_nothing_would_run_on_is_refused_and_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    module, source = Learner(), Noise()
    with pytest.raises(ValueError, match=message):
        run(module, module.groups(), source, make_batch, SETTINGS, tmp_path, device=device)
    assert not source.asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ['{"step": 3, "sec', "\0\0\0", "\0\0\n"], ids=["half a line", "a power cut", "with its end"])
def test_what_a_full_disk_or_a_power_cut_left_of_the_logs_last_line_is_dropped(tmp_path: Path, uninterrupted: Any, end: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, source=Noise(4), workers=0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(end)
    assert_same(trained(tmp_path), uninterrupted[0])
    assert [line["step"] for line in logged(tmp_path)] == list(range(7))


def test_a_damaged_line_inside_the_log_is_named_and_the_log_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, source=Noise(4))
    log = tmp_path / "log.jsonl"
    log.write_text(damaged := "{half\n" + log.read_text())
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: expected JSON with a step, got '{half'; remove the line"):
        trained(tmp_path)
    assert log.read_text() == damaged


class Sharded:
    """An accelerator that takes itself for DeepSpeed's, whose states are folders."""

    def __init__(self, inner: Accelerator, module: nn.Module) -> None:
        self.inner, self.module = inner, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    distributed_type = DistributedType.DEEPSPEED

    def save_state(self, place: str) -> None:
        Path(place).mkdir()
        torch.save(self.module.state_dict(), Path(place) / "part.pt")

    def load_state(self, place: str) -> None:
        self.module.load_state_dict(torch.load(Path(place) / "part.pt"))


@pytest.mark.parametrize("dies_before", ["state.old", "state", "nothing"])
def test_a_sharded_state_is_there_at_every_moment_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_before: str
) -> None:
    """os.replace to `dies_before` stands for a power cut; the second save replaces the first."""
    settings = replace(SETTINGS, steps=4, average_decay=None)
    plain, move, saves = loop.accelerator_for, os.replace, 0

    def learn(source: Noise) -> Noise:
        module = Learner()
        monkeypatch.setattr(loop, "accelerator_for", lambda *given: Sharded(plain(*given), module))
        trained(tmp_path, settings, source, module, workers=0)
        return source

    def replaced(before: Any, after: Any) -> None:
        nonlocal saves
        saves += Path(after).name == "state"
        if Path(after).name == dies_before and saves == (2 if dies_before == "state" else 1):
            raise KeyboardInterrupt
        move(before, after)

    monkeypatch.setattr(os, "replace", replaced)
    if dies_before != "nothing":
        with pytest.raises(KeyboardInterrupt):
            learn(Noise())
        monkeypatch.setattr(os, "replace", move)
        expected = {"state.old": 2, "state": 4}[dies_before]
        assert min((step for step, _ in learn(Noise()).asked), default=4) == expected
    else:
        learn(Noise())
    assert json.loads((tmp_path / "state" / "step.json").read_text()) == {"step": 4}
    assert [path.name for path in tmp_path.glob("state*")] == ["state"]


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    trained(tmp_path)
    (path,) = (tmp_path / "tensorboard").glob("events*")
    data, place, scalars = path.read_bytes(), 0, dict[str, list[float]]()
    while place < len(data):  # TFRecord: length, its checksum, the message, its checksum
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        place += 12 + length + 4
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append(value.simple_value)
    lines = logged(tmp_path)
    assert scalars["brightness"] == pytest.approx([line["brightness"] for line in lines], rel=1e-6)
    assert scalars["rate"] == pytest.approx([line["rate"] for line in lines], rel=1e-6)
    assert len(lines) == 7 and all(line["images_per_second"] > 0 for line in lines)

