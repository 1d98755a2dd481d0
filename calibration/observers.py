"""What flows into linear layers, summed up: Hessians for GPTQ, activation ranges for 8 bit.

Both see one input after another and keep nothing of them but the sum or the maximum, so memory does not grow with the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


class HessianSum:
    """XᵀX of a linear layer's inputs, float32 [K, K], as a mean over tokens of weight 1."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, inputs, device=device)
        self._weight = 0.0

    def add(self, tokens: Tensor, weight: Tensor) -> None:
        """tokens [N, K], weight [N], not negative: what each counts."""
        scaled = tokens.float() * weight.float().sqrt()[:, None]
        self._sum.addmm_(scaled.T, scaled)
        self._weight += float(weight.sum())

    def mean(self) -> Tensor:
        """[K, K]; the sum itself is used up, since a second one may not fit. Raises ValueError when no token came."""
        if not self._weight:
            raise ValueError("hessian: expected at least one token, got none; give calibration pictures")
        return self._sum.div_(self._weight)


class Ranges:
    """Largest absolute input of each channel by linear layer, float32 [K]; a tensor's range is the largest of them."""

    def __init__(self, known: Mapping[str, np.ndarray] | None = None) -> None:
        self.channels = {name: np.array(values) for name, values in (known or {}).items()}

    def add(self, name: str, tokens: Tensor) -> None:
        """tokens [..., K]."""
        largest = tokens.detach().flatten(0, -2).abs().amax(dim=0).float().cpu().numpy()
        seen = self.channels.get(name)
        self.channels[name] = largest if seen is None else np.maximum(seen, largest)

    @contextmanager
    def watching(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """While it lasts, every call of a linear layer of the module counts."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: self.add(name, inputs[0])

        linears = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        handles = [layer.register_forward_pre_hook(hook(f"{prefix}.{name}")) for name, layer in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """Carries an input out of the middle of a module."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def input_of(linear: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `run` would feed the linear layer; nothing behind it is computed.

    Raises:
        ValueError: `run` never reached it.
    """

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = linear.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.tokens
    finally:
        handle.remove()
    raise ValueError("linear: expected a layer that the module runs through, got one that it never called")
