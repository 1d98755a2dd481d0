"""From a stage's module to an ONNX model in memory, and from there to a file with its weights beside it.

Opset 20 is the newest that onnxruntime, OpenVINO and TensorRT 10 and 11 all read. Attention is exported as the matmul-softmax-matmul
pattern that each of them fuses; operators of later opsets would shut one of them out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agvas.interruption import held_back
from agvas.weights import LazyTensor, LazyTensors
from export.adapters import ADAPTERS, PixelEncoderStage, example_inputs
from export.passes import turn_weights
from export.streamed_tensor import StreamedTensor
from runtime.contract import AXIS_NAMES, STAGES

OPSET = 20
# Weights above this lie in a .data file beside the graph: a protobuf ends at 2 GB, and only a file of its own can be memory-mapped.
EXTERNAL_FROM_BYTES = 1024
# Sizes of the free axes while exporting: no two alike and none 0 or 1, which the exporter would take for constants.
FREE_AXES = {"B": 2, "N": 11, "K": 5, "R": 3}


def export_stage(module: nn.Module, stage: str, sizes: dict[str, int], weights: LazyTensors | None = None) -> ir.Model:
    """The stage's graph in fp32, free axes symbolic, tensors named as in the contract.

    Args:
        module: the stage's adapter, in memory or on the meta device.
        weights: of a module on the meta device, by its names: what its graph's initializers are to hold. None of them is read before the
            graph is written but small ones that constants are made of.

    Raises:
        ValueError: a tensor of a module on the meta device that there is no weight for.
    """
    spec = STAGES[stage]
    if isinstance(module, PixelEncoderStage):
        module = module.for_graph()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in example_inputs(stage, sizes, FREE_AXES))
    dimensions = {axis: torch.export.Dim(AXIS_NAMES[axis]) for axis in FREE_AXES}
    shapes = tuple({i: dimensions[axis] for i, axis in enumerate(tensor.shape) if axis in FREE_AXES} for tensor in spec.inputs)
    # Under the device's context: what a module makes while computing (arange) has to lie where its inputs do.
    # Ctrl-C waits for the graph: inside, it can be lost in a callback, or meet C++ that ends the process.
    with held_back(f"the graph of {stage}"), _quiet(), torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), device:
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        _stream(program.model, stage, dict(module.state_dict(keep_vars=True)) | dict(module.named_buffers()), weights or {})
        InlinePass()(program.model)
        turn_weights(program.model)
        program.optimize()
    program.model.graph.name = stage
    return program.model


def _stream(model: ir.Model, stage: str, held: Mapping[str, torch.Tensor], weights: LazyTensors) -> None:
    """Put streamed tensors in the place of the module's own: those of `weights`, or, of a module in memory, these."""
    for name, value in model.graph.initializers.items():
        tensor = held.get(name)
        if tensor is None:
            continue
        if tensor.is_meta and name not in weights:
            raise ValueError(f"{stage}: expected a weight for {name} {list(tensor.shape)}, got none; give the module's weights")
        if not tensor.is_meta and name not in weights:
            source = LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        else:
            source = weights[name]
        value.const_value = StreamedTensor(source, name)


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
