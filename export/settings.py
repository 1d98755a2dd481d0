"""What one export is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.gate import GateBudget
from export.quantisation import ENCODERS

PICTURES, STREAMED_PICTURES = 64, 2  # that parity is judged on where nothing else is asked for; layer by layer each takes minutes


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Attributes:
        checkpoint: "nano" or a checkpoint folder.
        precision: fp32, fp16, bf16, or int8: both encoders' linear layers in 8 bit, all else fp32.
        output: the bundle's folder.
        strict: fail when a gate fails; otherwise write the bundle with the failure in its manifest.
        compare: compare with the reference; otherwise the bundle says that nobody did, and has no traces for agvas-verify.
        images: folder of pictures to judge parity on; None takes procedural ones.
        pictures: how many at most; None for PICTURES, or STREAMED_PICTURES where the reference is computed layer by layer.
        lmm: the language model's weights: float, int8 or gptq4.
        calibration: folder of the plan, or of a GPTQ checkpoint, that they come from; quantisation.RTN for plain rounding; None
            calibrates on procedural pictures.
        gates: what to change of the precision's gates, by field of runtime.parity.Gates.
        budget: how far layers may go back to float when a gate fails.
        head: the language model's head: float or int8.
        streamed: compute the reference layer by layer; None does so where the model does not fit the memory.
        resume: keep finished stages of an interrupted export, and go on with those of an earlier one; None does so where the reference is
            computed layer by layer.
        force: go on where the estimate says that memory or disk will not do.
        threshold, relative_threshold: the bundle's, in place of the checkpoint's (runtime.masking); None keeps those. Parity is judged by
            them, too.
    """

    checkpoint: str
    precision: str
    output: Path
    strict: bool = True
    images: Path | None = None
    pictures: int | None = None
    lmm: str = "float"
    calibration: Path | None = None
    gates: Mapping[str, Any] = field(default_factory=dict)
    budget: GateBudget = GateBudget()
    head: str = "float"
    compare: bool = True
    streamed: bool | None = None
    resume: bool | None = None
    force: bool = False
    threshold: float | None = None
    relative_threshold: float | None = None

    @property
    def calibrates(self) -> bool:
        """Whether export has to calibrate by itself, for which the model has to be in memory."""
        return self.calibration is None and (self.lmm != "float" or self.precision == "int8")

    def stage_precision(self, stage: str) -> str:
        """What a stage computes in, as the manifest tells it.

        In bf16 the mask decoder stays fp32: its 8 bits alone moved nano's maps by 6e-3, all the other stages' by 1.5e-5.
        """
        if self.precision == "bf16" and stage == "mask_decoder":
            return "fp32"
        return self.precision if self.precision != "int8" or stage in ENCODERS else "fp32"
