"""What a graph's inputs and outputs look like: names, dtypes and symbolic shapes, and the check of real arrays against them.

Kept apart from the back-ends so that every one of them refuses the same wrong array with the same words. It knows nothing
of AG-VAS: which stages exist is written in runtime/contract.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from engines.errors import TensorMismatch


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: `shape` holds an int for a fixed axis and a letter for a symbolic one (equal letters, equal sizes).

    `stays`: of an output that other calls are fed, and that the host mostly does not look at. An engine on a GPU may give a `Resident`
    for it, and takes one as an input.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    stays: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def grows(self) -> bool:
        """An axis is a sum ("K+N"), so that what is fed back grows with every call."""
        return any(isinstance(axis, str) and "+" in axis for axis in self.shape)


class Resident(Protocol):
    """An output that stayed in the memory of its engine's device. Its values are fetched when they are asked for, and never change."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def size(self) -> int: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


class Joined:
    """Parts [1, n, D] one behind the other as one tensor [1, sum of n, D], for engines that can put them together on their device."""

    def __init__(self, parts: Sequence[np.ndarray | Resident]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        if any(part.ndim != 3 or part.shape[0] != 1 or part.shape[2] != first.shape[2] or part.dtype != first.dtype for part in self.parts):
            raise ValueError(f"expected parts [1, n, D] of one width and type, got {[(str(p.dtype), list(p.shape)) for p in self.parts]}")
        self.dtype = first.dtype
        self.shape = (1, sum(part.shape[1] for part in self.parts), first.shape[2])
        self.ndim = 3
        self.size = self.shape[1] * self.shape[2]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in self.parts], axis=1, dtype=dtype or self.dtype)


@dataclass(frozen=True)
class StageSpec:
    """One graph: its name and its tensors in order.

    `sizes`: what the graph's own names of free axes are fixed at, where they are.
    `usual`: sizes that most calls have on axes which stay free, for an engine that gains by preparing for them.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    usual: tuple[tuple[str, int], ...] = ()

    @property
    def feeds_itself(self) -> bool:
        """Its outputs come back as its inputs, grown: keys and values."""
        return any(output.grows for output in self.outputs)

    def fixed(self, sizes: Mapping[str, int], names: Mapping[str, str] | None = None) -> StageSpec:
        """The same stage with these symbolic axes at these sizes: an engine may then plan for them, and refuses others.

        Args:
            names: what the graph calls these axes.
        """

        def fix(spec: TensorSpec) -> TensorSpec:
            return replace(spec, shape=tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape))

        named = tuple((names[axis], size) for axis, size in sizes.items() if names and axis in names)
        return StageSpec(self.name, tuple(map(fix, self.inputs)), tuple(map(fix, self.outputs)), named, self.usual)

    def expecting(self, sizes: Mapping[str, int]) -> StageSpec:
        """The same stage, most of whose calls have these sizes; it takes others all the same."""
        return replace(self, usual=tuple(sizes.items()))

    def check_inputs(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Refuse feeds that are missing, unknown, of another dtype, rank or axis size.

        Raises:
            TensorMismatch: names the tensor, what was expected, what was given, and what to do.
        """
        expected = {spec.name for spec in self.inputs}
        if missing := expected - feeds.keys():
            raise TensorMismatch(f"stage {self.name}: input {', '.join(sorted(missing))} is missing; feed {sorted(expected)}")
        if unknown := feeds.keys() - expected:
            raise TensorMismatch(f"stage {self.name}: unknown input {', '.join(sorted(unknown))}; it takes {sorted(expected)}")
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            given = f"{array.dtype} {list(array.shape)}"
            if str(array.dtype) != spec.dtype or array.ndim != len(spec.shape):
                raise TensorMismatch(f"stage {self.name}: expected {spec}, got {given}; convert it before the call")
            for axis, size in zip(spec.shape, array.shape):
                if isinstance(axis, int):
                    if axis != size:
                        raise TensorMismatch(f"stage {self.name}: expected {spec}, got {given}: an axis must be {axis}")
                    continue
                known, where = sizes.setdefault(axis, (size, spec.name))
                if known != size:
                    raise TensorMismatch(
                        f"stage {self.name}: expected {spec}, got {given}: axis {axis} is {size} here but {known} in {where}"
                    )
