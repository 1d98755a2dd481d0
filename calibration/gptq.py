"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): integer weights whose linear layer stays close on the inputs that were seen.

A column is rounded, and what that did to the layer's output is made up for in the columns that are still to come. Columns go from the
most to the least active (act-order); groups and scales are fixed beforehand in their natural order (static groups), since only that form
is read without loss by every engine (calibration/weights.py). It knows nothing of models: a weight and a Hessian come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agvas.weights import LazyTensor
from calibration.weights import LazyQuantizedWeight, QuantizedWeight

# Where in 0..1 of the range that clips nothing the scale search looks, in steps of 1/80. Below 0.45 nothing was ever chosen.
SHRINKS = tuple(step / 80 for step in range(80, 35, -1))
MOST_DAMPING = 10.0
ROUNDED_AT_ONCE = 1 << 24  # weights
LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0  # float16


@dataclass(frozen=True)
class GPTQSettings:
    """How weights become integers.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; 0 for one scale an output.
        block: columns worked through before the rest of the weight is brought up to date: speed, not result.
        damping: added to the Hessian's diagonal, as a share of its mean; raised tenfold until the Hessian can be factored.
        act_order: the most active columns first.
    """

    bits: int = 4
    group: int = 128
    block: int = 128
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, got {self.bits}")
        if self.group < 0:
            raise ValueError(f"group: expected inputs a scale, or 0 for all of them, got {self.group}")
        if self.block < 1:
            raise ValueError(f"block: expected at least 1 column, got {self.block}")
        if not 0 < self.damping <= MOST_DAMPING:
            raise ValueError(f"damping: expected more than 0 and at most {MOST_DAMPING:g}, got {self.damping}")

    def group_of(self, inputs: int, name: str = "weight") -> int:
        """The group of a weight with that many inputs. Raises ValueError naming the weight where the setting does not divide them."""
        group = self.group or inputs
        if inputs % group:
            fitting = [size for size in (128, 64, 32, 16) if size < group and inputs % size == 0]
            remedy = f"choose a group of {fitting[0]}" if fitting else "choose a group that divides it, or 0 for one scale an output"
            raise ValueError(f"{name}: expected inputs that groups of {group} divide, got {inputs}; {remedy} (--group)")
        return group


@dataclass(frozen=True, eq=False)
class Curvature:
    """A Hessian made ready: layers that read the same input share it, and its factor is what costs.

    Attributes:
        importance: [K], the damped diagonal: how much a change of each input's weight is felt. In natural order, as `order` counts.
        order: [K], the columns in the order in which they are rounded.
        factor: [K, K], upper triangular U with UᵀU = H⁻¹, rows and columns in that order.
        damping: what it took, as a share of the diagonal's mean.
    """

    importance: Tensor
    order: Tensor
    factor: Tensor
    damping: float


def curvature(hessian: Tensor, settings: GPTQSettings) -> Curvature:
    """Factor a Hessian.

    An input that was always zero (a dead column) has a zero row, which damping alone makes regular: its weights are then rounded to
    nearest and get nothing of the others' errors. A Hessian of zeros counts as the identity.

    Args:
        hessian: float [K, K], symmetric, XᵀX of the inputs up to a factor; left as it is.

    Raises:
        ValueError: not square, not finite, or not positive semi-definite, so that no damping up to MOST_DAMPING helps.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian: expected [K, K], got {list(hessian.shape)}")
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("hessian: expected finite values, got NaN or infinity; the layer's inputs overflow, collect them in float32")
    mean = float(diagonal.mean())
    if float(diagonal.min()) < 0:
        raise ValueError("hessian: expected XᵀX, got a negative diagonal; collect it again")
    order = torch.arange(len(hessian), device=hessian.device)
    if settings.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    # H = R Rᵀ with an upper triangular R, from the factor of the reversed matrix; then H⁻¹ = UᵀU with U = R⁻¹. One factoring instead
    # of the three of inverting and factoring again, and the one that fails first.
    backwards = order.flip(0)
    damping = settings.damping
    while True:
        matrix = hessian[backwards][:, backwards] if mean else torch.zeros_like(hessian)
        matrix.diagonal().add_(damping * mean if mean else 1.0)
        importance = torch.empty_like(diagonal)
        importance[backwards] = matrix.diagonal()
        lower, failed = torch.linalg.cholesky_ex(matrix)
        del matrix
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            break
        damping *= 10
        if damping > MOST_DAMPING:
            raise ValueError(
                f"hessian: expected positive semi-definite, got one that no damping up to {MOST_DAMPING:g} can factor; collect it again"
            )
    upper = lower.flip(0, 1)
    del lower
    factor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True)
    return Curvature(importance, order, factor, damping)


def gptq(weight: Tensor, hessian: Tensor | Curvature, settings: GPTQSettings) -> QuantizedWeight:
    """Quantise a linear layer's weight.

    Args:
        weight: float [N, K], on the Hessian's device.
        hessian: float [K, K], or what `curvature` made of it.

    Raises:
        ValueError: shapes that do not fit, a group that does not divide K, values that are not finite; see `curvature`.
    """
    prepared = hessian if isinstance(hessian, Curvature) else curvature(hessian, settings)
    outputs, inputs = weight.shape
    if len(prepared.order) != inputs:
        raise ValueError(f"hessian: expected [{inputs}, {inputs}] for a weight {list(weight.shape)}, got [{len(prepared.order)}] squared")
    group = settings.group_of(inputs)
    scales = search_scales(weight, prepared.importance, settings)  # float16 [N, K / group]
    least, most = _range(settings.bits)
    order, factor = prepared.order.tolist(), prepared.factor
    # Inputs first: a column of the weight is then contiguous.
    remaining = weight.to(factor.dtype).T[prepared.order].contiguous()  # [K, N]
    steps = scales.to(factor.dtype).T.contiguous()  # [K / group, N]
    codes = torch.empty(inputs, outputs, dtype=torch.int8, device=weight.device)
    for first in range(0, inputs, settings.block):
        last = min(first + settings.block, inputs)
        block = remaining[first:last]
        errors = torch.empty_like(block)
        for row, column in enumerate(range(first, last)):
            step = steps[order[column] // group]
            code = (block[row] / step).round_().clamp_(least, most)
            errors[row] = (block[row] - code * step) / factor[column, column]
            block[row:].addr_(factor[column, column:last], errors[row], alpha=-1)
            codes[order[column]] = code.to(torch.int8)
        remaining[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return _quantized(codes.T, scales, settings.bits, group)


def round_to_nearest(weight: Tensor, settings: GPTQSettings) -> QuantizedWeight:
    """Plain rounding, nothing clipped: the largest weight of a group becomes its largest code. What GPTQ is measured against.

    Raises:
        ValueError: a group that does not divide K, values that are not finite.
    """
    group = settings.group_of(weight.shape[1])
    scales = _rounded(_clipping_nothing(weight.float(), group, settings.bits))
    return _quantized(_codes(weight.float(), scales, settings.bits, group), scales, settings.bits, group)


def rounded_to_nearest(tensor: LazyTensor, settings: GPTQSettings, name: str = "weight") -> LazyQuantizedWeight:
    """`round_to_nearest` of a weight that is not in memory yet; some rows at a time, which round independently of one another.

    Args:
        tensor: float [N, K].

    Raises:
        ValueError: a group that does not divide K, and when it is read, values that are not finite.
    """
    outputs, inputs = tensor.shape
    group = settings.group_of(inputs, name)
    rows = max(1, ROUNDED_AT_ONCE // inputs)

    def make() -> QuantizedWeight:
        weight = tensor.read()
        parts = [round_to_nearest(weight[first : first + rows], settings) for first in range(0, outputs, rows)]
        codes, scales = np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts])
        return QuantizedWeight(codes, scales, settings.bits, group)

    return LazyQuantizedWeight((outputs, inputs), settings.bits, group, make)


def search_scales(weight: Tensor, importance: Tensor, settings: GPTQSettings) -> Tensor:
    """Scales that make the weighted squared error of plain rounding least, group by group.

    They are rounded to float16 before they are judged: what is stored is what was chosen.

    Args:
        weight: float [N, K].
        importance: [K], not negative.

    Returns:
        float16 [N, K / group].
    """
    group = settings.group_of(weight.shape[1])
    least, most = _range(settings.bits)
    chosen = []
    for first in range(0, weight.shape[1], group):
        part = weight[:, first : first + group].float()  # [N, group]
        felt = importance[first : first + group].float()
        widest = _clipping_nothing(part, group, settings.bits)  # [N, 1]
        best, scale = torch.full_like(widest, torch.inf), _rounded(widest)
        for shrink in SHRINKS:
            candidate = _rounded(widest * shrink)
            step = candidate.float()
            error = (((part / step).round_().clamp_(least, most) * step - part).square_() @ felt)[:, None]
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
        chosen.append(scale)
    return torch.cat(chosen, dim=1)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, outputs: int = 512) -> float:
    """‖X (W - Q)ᵀ‖ / ‖X Wᵀ‖ over the inputs behind the Hessian; 0 where the layer puts out nothing.

    Args:
        outputs: of a weight with more, that many evenly spread ones stand for all: on the widest layers all would cost more than GPTQ.
    """
    rows = torch.linspace(0, len(weight) - 1, min(outputs, len(weight)), device=weight.device).round().long()
    exact = weight[rows].to(hessian.dtype)
    rounded = torch.from_numpy(quantized.dequantized()).to(weight.device)[rows].to(hessian.dtype)

    def energy(matrix: Tensor) -> float:
        return max(float((matrix @ hessian).mul_(matrix).sum()), 0.0)

    whole = energy(exact)
    return (energy(exact - rounded) / whole) ** 0.5 if whole > 0 else 0.0


def _range(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _clipping_nothing(weight: Tensor, group: int, bits: int) -> Tensor:
    """float [N, K / group]."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: expected finite values, got NaN or infinity; the checkpoint is damaged, copy it again")
    return weight.unflatten(1, (-1, group)).abs().amax(dim=2) / _range(bits)[1]


def _rounded(scales: Tensor) -> Tensor:
    if float(scales.max()) > MOST_SCALE:
        raise ValueError(f"weight: expected a scale of at most {MOST_SCALE:g} (float16), got {float(scales.max()):g}; rescale the layer")
    return scales.clamp(LEAST_SCALE).half()


def _codes(weight: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    codes = (weight.unflatten(1, (-1, group)) / scales.float()[:, :, None]).round_().clamp_(*_range(bits))
    return codes.flatten(1).to(torch.int8)


def _quantized(codes: Tensor, scales: Tensor, bits: int, group: int) -> QuantizedWeight:
    return QuantizedWeight(np.ascontiguousarray(codes.cpu().numpy()), np.ascontiguousarray(scales.cpu().numpy()), bits, group)
