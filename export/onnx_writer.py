"""From a stage's module to an ONNX model in memory, and from there to a file with its weights beside it.

Opset 20 is the newest that onnxruntime, OpenVINO and TensorRT 10 and 11 all read. Attention is exported as the matmul-softmax-matmul
pattern that each of them fuses; operators of later opsets would shut one of them out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.adapters import ADAPTERS, example_inputs
from runtime.contract import STAGES

OPSET = 20
# Weights above this lie in a .data file beside the graph: a protobuf ends at 2 GB, and only a file of its own can be memory-mapped.
EXTERNAL_FROM_BYTES = 1024
# Sizes of the free axes while exporting: no two alike and none 0 or 1, which the exporter would take for constants.
FREE_AXES = {"B": 2, "N": 11, "K": 5, "R": 3}


def export_stage(module: nn.Module, stage: str, sizes: dict[str, int]) -> ir.Model:
    """The stage's graph in fp32, free axes symbolic, tensors named as in the contract."""
    spec = STAGES[stage]
    inputs = example_inputs(stage, sizes, FREE_AXES)
    dimensions = {axis: torch.export.Dim(_dimension_name(axis)) for axis in FREE_AXES}
    shapes = tuple({i: dimensions[axis] for i, axis in enumerate(tensor.shape) if axis in FREE_AXES} for tensor in spec.inputs)
    with _quiet(), torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=shapes,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    program.model.graph.name = stage
    return program.model


def write(model: ir.Model, folder: Path, stage: str) -> None:
    """Write `folder`/stage.onnx and, where there are weights worth it, `folder`/stage.data."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(
        model,
        folder / f"{stage}.onnx",
        external_data=f"{stage}.data",
        size_threshold_bytes=EXTERNAL_FROM_BYTES,
    )


def stage_module(model: nn.Module, stage: str) -> nn.Module:
    """The adapter of a stage around a model's own modules."""
    return ADAPTERS[stage](model).eval()


def _dimension_name(axis: str) -> str:
    return {"B": "batch", "N": "tokens", "K": "past", "R": "row_count"}[axis]


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporter reports its progress through print and warnings; ours is shown by the caller."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
