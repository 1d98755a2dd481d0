"""A graph of two branches on a picture, one of plain convolutions and one with a depthwise one among them, which meet."""

from __future__ import annotations

import numpy as np
import openvino
from openvino import opset13

NAMES = ("first", "second", "chain's first", "expand", "depthwise", "project")


def branches(seed: int = 0) -> openvino.Model:
    """Picture [1, 3, 16, 16] → sum [1, 4, 16, 16]; its convolutions have NAMES."""
    rng = np.random.default_rng(seed)

    def convolved(source: openvino.Node, name: str, depthwise: bool = False) -> openvino.Node:
        channels = source.output(0).get_partial_shape()[1].get_length()
        weights = rng.normal(size=(4, 1, 1, 3, 3) if depthwise else (4, channels, 3, 3)).astype(np.float32)
        operator = opset13.group_convolution if depthwise else opset13.convolution
        node = operator(source, opset13.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
        node.set_friendly_name(name)
        return opset13.relu(node)

    image = opset13.parameter([1, 3, 16, 16], openvino.Type.f32)
    plain = convolved(convolved(image, "first"), "second")
    chain = convolved(convolved(convolved(convolved(image, "chain's first"), "expand"), "depthwise", depthwise=True), "project")
    return openvino.Model([opset13.add(plain, chain)], [image], "branches")


def convolutions(model: openvino.Model | None) -> set[str]:
    """Names of those in a part of it."""
    return set() if model is None else {node.get_friendly_name() for node in model.get_ops()} & set(NAMES)
