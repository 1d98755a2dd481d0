"""The processes of one run, on one machine or several, which need not share a disk: who writes, and how all learn of it.

What one process alone does, reading a state above all, may fail there alone; the others would then wait for it for half an hour and
longer. So its outcome is told to all, errors too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from agvas.training.kept import differences

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process writes what all share; known before any accelerator is made."""
    return int(os.environ.get("RANK", 0)) == 0


def join(device: str) -> None:
    """Become one of the processes that `accelerate launch` or `torchrun` started; the functions below need it, or an accelerator."""
    PartialState(cpu=torch.device(device).type == "cpu")


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, in every process; only there it is called.

    Raises:
        ValueError, OSError: `work` raised it; in every process.
    """
    outcome: list[Any] = [None, None]
    failed: ValueError | OSError | None = None
    if PartialState().is_main_process:
        try:
            outcome = [work(), None]
        except (ValueError, OSError) as error:
            failed = error  # some do not come out of a pickle as they went in
            outcome = [None, (OSError if isinstance(error, OSError) else ValueError, str(error))]
    result, error_told = broadcast_object_list(outcome)
    if failed is not None:
        raise failed
    if error_told is not None:
        kind, text = error_told
        raise kind(text)
    return result


def check_alike(settings: dict[str, Any]) -> None:
    """ValueError, in every process, unless all were given the same settings and facts."""
    given = [json.loads(text) for text in gather_object([json.dumps(settings, default=str)])]
    for rank, other in enumerate(given):
        if listed := "; ".join(f"{name} {ours}, there {theirs}" for name, ours, theirs in differences(given[0], other)):
            raise ValueError(
                f"expected the same settings and data in all processes, got in process 0, and there in process {rank}: {listed}; give the "
                "same to all"
            )


def check_shared(file: Path) -> None:
    """ValueError, in every process, unless all see a file that the main process has written."""
    seen = gather_object([file.exists()])
    if not all(seen):
        raise ValueError(
            f"--output {file.parent}: expected a folder that all processes share, as DeepSpeed's state is written by all of them, got one "
            f"where process {seen.index(False)} does not see {file.name}; give a folder on a disk that all machines share, or launch "
            "without DeepSpeed"
        )


def once_a_machine(work: Callable[[], T]) -> T:
    """What `work` returns, in every process: what it leaves on the disk is written by the first process of each disk alone.

    The main process works first, then one of every machine, which may find on a shared disk that all is there, then the others.
    """
    state = PartialState()
    done: list[T] = []
    with state.main_process_first():
        if state.is_main_process:
            done.append(work())
    with state.local_main_process_first():
        return done[0] if done else work()
