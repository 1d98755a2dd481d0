"""Integer weights of linear layers: what quantisation makes and every writer (checkpoint, graph, torch truth) reads.

One form only, the one that GPTQ checkpoints, ONNX DequantizeLinear, onnxruntime's MatMulNBits, OpenVINO and TensorRT all take without
loss: symmetric, groups along the input axis in their natural order. Act-order changes which codes are chosen, never their order here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """weight[n, k] ≈ codes[n, k] · scales[n, k // group].

    Attributes:
        codes: int8 [N, K] (N outputs, K inputs, as in torch's Linear), from -2^(bits-1) to 2^(bits-1) - 1.
        scales: float16 [N, K / group], positive.
        bits: 4 or 8.
        group: inputs that share a scale; divides K. K itself for one scale an output.

    Raises:
        ValueError: arrays that do not fit one another.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, got {self.bits}")
        if self.codes.ndim != 2 or self.codes.dtype != np.int8:
            raise ValueError(f"codes: expected int8 [N, K], got {self.codes.dtype} {list(self.codes.shape)}")
        outputs, inputs = self.codes.shape
        if self.group < 1 or inputs % self.group:
            raise ValueError(f"group: expected a divisor of {inputs} inputs, got {self.group}")
        expected = (outputs, inputs // self.group)
        if self.scales.shape != expected or self.scales.dtype != np.float16:
            raise ValueError(f"scales: expected float16 {list(expected)}, got {self.scales.dtype} {list(self.scales.shape)}")
        least, most = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        if self.codes.min() < least or self.codes.max() > most:
            raise ValueError(f"codes: expected {least}..{most}, got {self.codes.min()}..{self.codes.max()}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def read(self) -> QuantizedWeight:
        """Itself: it is in memory already."""
        return self

    def dequantized(self) -> np.ndarray:
        """float32 [N, K]."""
        return self.codes.astype(np.float32) * np.repeat(self.scales.astype(np.float32), self.group, axis=1)


class IntegerWeight(Protocol):
    """Integer weights that are in memory (QuantizedWeight) or will be (LazyQuantizedWeight): shape [N, K], bits and group are known."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int: ...

    def read(self) -> QuantizedWeight: ...


@dataclass(frozen=True, eq=False)
class LazyQuantizedWeight:
    """Integer weights that are made or read when asked for, so that a model's need not all be in memory.

    Attributes:
        make: gives them, in this shape (N, K), bits and group; called at every reading.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    make: Callable[[], QuantizedWeight]

    def read(self) -> QuantizedWeight:
        return self.make()


class Reading(Mapping[str, QuantizedWeight]):
    """Integer weights by name, each read when it is asked for, and not kept."""

    def __init__(self, weights: Mapping[str, LazyQuantizedWeight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> QuantizedWeight:
        return self._weights[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
