"""OpenVINO on the CPU: the fastest engine measured there, and the one that multiplies in bfloat16 natively.

The accuracy hint is set, not inherited: left alone OpenVINO picks bfloat16 for itself on CPUs that have it and quantises
activations dynamically. Its GPU plug-in is not offered, for want of a machine to verify it on.

Computing in bfloat16, OpenVINO rounds the picture itself and whatever its first convolutions make of it to 8 bits, which costs masks their
edges and faint defects their contrast. Here rounding begins behind the first convolution, and behind whole chains of depthwise ones: a
graph that has some is cut in two, the first part compiled in fp32.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engines import EngineOptions
from engines.errors import EngineFailed, EngineUnavailable, let_interrupt_pass
from engines.spec import StageSpec

_handled = sys.exc_info()[1]
try:
    import openvino
    from openvino import opset13
except (ImportError, OSError) as error:  # it may be there, and a library that it needs may not
    let_interrupt_pass(error, _handled)
    raise EngineUnavailable(f'engine openvino is not installed ({error}); pip install "agvas[openvino]"') from error


# Inputs that share a scale where they are rounded to 8 bit while running, at most.
INT8_BLOCK = 128
LEAST_BLOCK = 16
# The attribute of a DequantizeLinear whose weights have a scale for each so many inputs, in an ONNX file: its name, then an integer.
BLOCK_SIZE = re.compile(rb"\x0a\x0ablock_size\x18((?:[\x80-\xff])*[\x00-\x7f])")
TWICE_BYTES = 256 << 20  # of weights, at most, that a process may hold twice: those of a large language model may not
FEW_CHANNELS = 4  # of a picture; OpenVINO's own means are faster from 16 on
DENSE = ("Convolution", "ConvolutionBackpropData")
DEPTHWISE = ("GroupConvolution", "GroupConvolutionBackpropData")
CONVOLUTIONS = (*DENSE, *DEPTHWISE)


class OpenVinoEngine:
    """A graph compiled, and once more for the sizes that most calls have, where its stage tells them and its weights are few."""

    def __init__(self, graph: Path, spec: StageSpec, options: EngineOptions) -> None:
        self.spec = spec
        if options.device != "cpu":
            raise EngineUnavailable(f"engine openvino runs on device cpu here, not {options.device}")
        asked = f"inference precision {options.inference_precision} was asked for, but"
        if options.in_bf16 and not natively_bf16():
            raise EngineUnavailable(
                f"{asked} this CPU does not multiply in bfloat16; use precision {'int8' if options.rounds_inputs else 'graph'}"
            )
        if options.rounds_inputs and bytes_saturate():
            raise EngineUnavailable(
                f"{asked} this CPU has no VNNI, without which OpenVINO rounds nothing; use precision "
                f"{'bf16' if options.in_bf16 else 'graph'}, or int8 with engine onnxruntime"
            )
        block = int8_block(graph) if options.rounds_inputs else 0
        try:
            self._compiled = _Compiled(graph, spec, options, block)
            twice = spec.usual and not options.low_memory and _weights_bytes(graph) <= TWICE_BYTES
            self._usual = _Compiled(graph, spec.fixed(dict(spec.usual)), options, block) if twice else None
        except Exception as error:  # OpenVINO raises RuntimeError and its own subclasses of Exception
            raise EngineFailed(f"openvino cannot load {graph.name}: {str(error).strip()[-400:]}") from error

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.spec.check_inputs(feeds)
        compiled = self._usual if self._usual is not None and self._usual.takes(feeds) else self._compiled
        try:
            return compiled.run(feeds, [output.name for output in self.spec.outputs])
        except Exception as error:
            raise EngineFailed(f"openvino failed in stage {self.spec.name}: {str(error).strip()[-400:]}") from error


class _Compiled:
    """One compiled graph, or two in a row; every calling thread has inference requests of its own, since a request holds its tensors."""

    def __init__(self, graph: Path, spec: StageSpec, options: EngineOptions, block: int) -> None:
        core = openvino.Core()
        settings: dict[str, object] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": block, "PERFORMANCE_HINT": "LATENCY"}
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        model = core.read_model(str(graph))
        # A shape that is known when compiling needs no inference while running and no kernels for every size: up to a third off the
        # time of small stages (benchmarks/results/levers.md).
        model.reshape(known(model, spec))
        self._shapes = {source.get_any_name(): source.get_partial_shape() for source in model.inputs}
        if any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) and bytes_saturate():
            settings["LP_TRANSFORMS_MODE"] = False  # inputs are rounded to 8 bits as the graph says, and multiplied in fp32
        parts = {"f32": model}
        if options.in_bf16:
            before, behind = cut_before_rounding(model)
            parts = {"bf16": behind} if before is None else {"f32": before, "bf16": behind}
        for part in parts.values():
            pools_as_convolutions(part)
        self._parts = [
            core.compile_model(part, "CPU", settings | {"INFERENCE_PRECISION_HINT": precision}) for precision, part in parts.items()
        ]
        self._requests = threading.local()

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether it was compiled for sizes such as these."""
        return all(shape.compatible(openvino.PartialShape(list(feeds[name].shape))) for name, shape in self._shapes.items())

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        requests = getattr(self._requests, "requests", None)
        if requests is None:
            requests = self._requests.requests = [part.create_infer_request() for part in self._parts]
        *first, last = requests
        passed: Mapping[str | int, np.ndarray] = dict(feeds.items())
        for request in first:
            request.infer(passed, share_inputs=True)
            # By position, and shared: the next part reads them before this thread's next call overwrites them.
            passed = {index: request.get_output_tensor(index).data for index in range(len(request.model_outputs))}
        last.infer(passed, share_inputs=True)
        # Copied: the request's own tensors are overwritten by this thread's next call.
        return {name: last.get_tensor(name).data.copy() for name in outputs}


def _weights_bytes(graph: Path) -> int:
    """On disk, of the graph's own file and of the one beside it that holds its weights."""
    return sum(file.stat().st_size for file in (graph, graph.with_suffix(".data")) if file.exists())


def int8_block(graph: Path) -> int:
    """How many inputs share a scale where they are rounded while running: as many as divide every block of weights that shares one.

    With others OpenVINO rounds nothing, without a word; with fewer than LEAST_BLOCK, neither.

    Raises:
        EngineUnavailable: blocks of weights that it rounds nothing for.
    """
    found = {
        sum((byte & 0x7F) << 7 * place for place, byte in enumerate(number)) for number in BLOCK_SIZE.findall(graph.read_bytes())
    }
    block = math.gcd(INT8_BLOCK, *found)
    if block < LEAST_BLOCK:
        raise EngineUnavailable(
            f"rounding to 8 bits was asked for, but the weights of {graph.name} have a scale for each {min(found)} inputs, where "
            "OpenVINO rounds nothing; use precision graph, or engine onnxruntime"
        )
    return block


def known(model: openvino.Model, spec: StageSpec) -> dict[str, openvino.PartialShape]:
    """Shapes by name of the inputs with a size that the stage fixes and the graph leaves open; the other axes are the graph's own."""
    given = {source.get_any_name(): source.get_partial_shape() for source in model.inputs}
    axes = {tensor.name: list(zip(tensor.shape, given[tensor.name])) for tensor in spec.inputs}
    return {
        name: openvino.PartialShape([axis if isinstance(axis, int) else found for axis, found in pairs])
        for name, pairs in axes.items()
        if any(isinstance(axis, int) and found.is_dynamic for axis, found in pairs)
    }


def pools_as_convolutions(model: openvino.Model) -> None:
    """Means over blocks of a picture's few channels become convolutions with equal weights: the same sums.

    OpenVINO pools in blocks of 16 channels: for a picture's three it fills up 13 with zeros first, which took a tenth of nano's part in
    fp32. Only where blocks neither overlap nor reach beyond the picture.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "AvgPool":
            continue
        source, settings = node.input_value(0), node.get_attributes()
        channels, kernel = source.get_partial_shape()[1], list(settings["kernel"])
        if channels.is_dynamic or channels.get_length() > FEW_CHANNELS or source.get_element_type() != openvino.Type.f32:
            continue
        if list(settings["strides"]) != kernel or any([*settings["pads_begin"], *settings["pads_end"]]):
            continue
        same = np.eye(channels.get_length(), dtype=np.float32) / np.float32(np.prod(kernel))
        weights = np.broadcast_to(same[:, :, None, None], (*same.shape, *kernel))
        mean = opset13.convolution(source, opset13.constant(np.ascontiguousarray(weights)), kernel, [0, 0], [0, 0], [1, 1])
        node.output(0).replace(mean.output(0))
    model.validate_nodes_and_infer_types()


def cut_before_rounding(model: openvino.Model) -> tuple[openvino.Model | None, openvino.Model]:
    """Two models in a row where there are convolutions before bfloat16 begins; else (None, model).

    bfloat16 begins at matrix products and at convolutions that read what another one made, with all that reads them. Before it stays what
    a depthwise convolution reads, unless a product came before: dozens of those in a row, each rounding, moved nano's masks beyond the
    gates (benchmarks/results/levers.md).

    The given model is taken apart. The first one's outputs are the second one's inputs, in their order; the second has all of the model's
    outputs, those that the first one computes, too.
    """
    ordered = model.get_ordered_ops()
    before_depthwise = _leading_to(ordered, DEPTHWISE)
    constant: set[str] = set()
    convolved: set[str] = set()
    behind: set[str] = set()
    before = []
    for node in ordered:
        sources = {node.input_value(index).get_node().get_name() for index in range(node.get_input_size())}
        name, kind = node.get_name(), node.get_type_name()
        begins = kind in ("MatMul", "Result") or (kind in DENSE and bool(sources & convolved) and name not in before_depthwise)
        if kind == "Constant" or (sources and sources <= constant):
            constant.add(name)
        elif begins or sources & behind:
            behind.add(name)
        else:
            before.append(node)
            if kind in CONVOLUTIONS or sources & convolved:
                convolved.add(name)
    if not any(node.get_type_name() in CONVOLUTIONS for node in before):
        return None, model
    results: list[openvino.Node] = []
    parameters: list[openvino.Node] = []
    for output in (output for node in before for output in node.outputs()):
        readers = [reader for reader in output.get_target_inputs() if reader.get_node().get_name() in behind]
        if readers:
            parameter = opset13.parameter(output.get_partial_shape(), output.get_element_type())
            parameter.output(0).set_names(output.get_names())  # an output of the model is found by its name
            for reader in readers:
                reader.replace_source_output(parameter.output(0))
            results.append(opset13.result(output))
            parameters.append(parameter)
    return openvino.Model(results, model.get_parameters(), "before"), openvino.Model(model.get_results(), parameters, "behind")


def _leading_to(ordered: Sequence[openvino.Node], kinds: Sequence[str]) -> set[str]:
    """Names of the nodes of these kinds and of all whose outputs reach one."""
    leading: set[str] = set()
    for node in reversed(ordered):
        readers = {reader.get_node().get_name() for output in node.outputs() for reader in output.get_target_inputs()}
        if node.get_type_name() in kinds or readers & leading:
            leading.add(node.get_name())
    return leading


def natively_bf16(core: openvino.Core | None = None) -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return "BF16" in (core or openvino.Core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def bytes_saturate() -> bool:
    """Whether OpenVINO's products of bytes saturate on this CPU, found by one: x86 without VNNI adds them in pairs in 16 bits.

    On such a CPU it also ignores DYNAMIC_QUANTIZATION_GROUP_SIZE without a word.
    """
    inputs = 64
    source = opset13.parameter([1, inputs], openvino.Type.f32)
    low, high = (opset13.constant(np.float32(value)) for value in (0, 255))
    codes = opset13.convert(opset13.constant(np.full((8, inputs), 127, np.int8)), "f32")
    rounded, weight = opset13.fake_quantize(source, low, high, low, high, 256), opset13.multiply(codes, np.float32(1))
    product = opset13.matmul(rounded, weight, transpose_a=False, transpose_b=True)
    model = openvino.Core().compile_model(openvino.Model([product], [source], "bytes"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (sums,) = model({0: np.full((1, inputs), 255, np.float32)}).values()
    return not bool(np.allclose(sums, inputs * 127 * 255, rtol=1e-3))


def version() -> str:
    """The installed version."""
    return str(openvino.__version__)
