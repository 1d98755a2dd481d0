"""A second form of a stage's graph for onnxruntime on CUDA: attention, norms and activations as the one kernel each that it has for them.

A bundle's graphs say attention as product, softmax, product, which TensorRT and OpenVINO fuse by themselves and onnxruntime does not:
its CUDA provider would write every score to memory several times over, in fp32 around the softmax. Here the same values are named by
onnxruntime's own operators (domain com.microsoft), which no other engine reads; so this form lies beside the plain one, takes its weights
from the same file, and is opened on CUDA alone. What is computed is the same but for rounding: tests compare it with the plain graph on
the CPU provider, `agvas-verify` with the reference's traces on the device.

Nothing here is needed for a right result. A pattern that is not recognised stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# The types that a CUDA kernel exists for. (GroupQueryAttention has none for fp32, MultiHeadAttention none for bf16.)
HEADS_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
GROUPED_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
SILU_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# Widths of a head that the flash kernel takes.
WIDEST, WIDTH_STEP = 256, 8


def fuse(model: ir.Model, every_type: bool = False) -> dict[str, int]:
    """Put onnxruntime's fused operators in the place of what says the same.

    Rules: (1) softmax(Q·Kᵀ·s + bias)·V becomes MultiHeadAttention, in 16 bit with SAM's relative positions as further columns of Q and K
    (`_positions`), since the flash kernel takes no bias; (2) the same under a causal mask, with one query a token and keys that
    a past is put before, becomes GroupQueryAttention, which puts the past before them itself; (3) a norm by the root mean square becomes
    SimplifiedLayerNormalization; (4) a LayerNormalization in fp32 between casts from and to 16 bit loses them: the kernel adds up in fp32
    whatever its input; (5) x·sigmoid(x) becomes QuickGelu with its factor at 1. (6) A Pad with zeros behind becomes a Concat with
    zeros: of SAM's windows it is a copy of 10 MB, for which onnxruntime 1.31's Pad took 0.8 ms on an H100, 22 of a picture's 54.

    Args:
        model: changed in place; its weights are not read, but for the scales and offsets of norms where rule 4 converts them.
        every_type: fuse where the CUDA provider has no kernel, too: for tests on the CPU provider, which has others.

    Returns:
        How many of each operator were put in.
    """
    work = _Fusion(model, every_type)
    work.attention()
    work.norms()
    work.activations()
    work.padding()
    work.clean()
    if work.counts:
        model.opset_imports[CONTRIB] = 1
    return work.counts


class _Fusion:
    def __init__(self, model: ir.Model, every_type: bool) -> None:
        self.model, self.graph = model, model.graph
        self.every_type = every_type
        self.counts: dict[str, int] = {}
        self.constants: dict[tuple[str, bytes], ir.Value] = {}
        self.repeated: dict[tuple[object, ...], ir.Value] = {}
        self.lengths: tuple[ir.Value, ir.Value] | None = None
        self.made = 0  # nodes, for their names

    # --- attention -------------------------------------------------------------------------------------------------------------------

    def attention(self) -> None:
        for softmax in [node for node in self.graph if node.op_type == "Softmax"]:
            self._one_attention(softmax)

    def _one_attention(self, softmax: ir.Node) -> None:
        product = _only_reader(softmax.outputs[0])
        if product is not None and product.op_type == "Cast":
            product = _only_reader(product.outputs[0])
        if product is None or product.op_type != "MatMul":
            return
        value, result = product.inputs[1], product.outputs[0]
        scores, scale, masked, bias = _without_cast(softmax.inputs[0]), 1.0, False, None
        if (node := _made_by(scores, "Where")) is not None:
            masked, scores = True, _without_cast(node.inputs[2])
        if (node := _made_by(scores, "Add")) is not None:
            first, second = node.inputs
            scores, bias = (first, second) if _is_product(first) else (second, first)
        scores, factor = _unscaled(scores)
        scale *= factor
        if (node := _made_by(scores, "MatMul")) is None:
            return
        query, factor = _unscaled(node.inputs[0])
        scale *= factor
        turned, factor = _unscaled(node.inputs[1])
        scale *= factor
        key = _unturned(turned)
        if key is None or value is None or query is None or query.dtype not in (ir.DataType.FLOAT, *LOW):
            return
        if any(tensor.dtype != query.dtype or tensor.shape is None or len(tensor.shape) != 4 for tensor in (query, key, value)):
            return
        assert query.shape is not None
        heads, width = query.shape[1], query.shape[3]
        if not isinstance(heads, int) or not isinstance(width, int):
            return
        if masked and bias is not None:
            return  # GroupQueryAttention takes no bias on CUDA
        if masked:
            self._grouped(query, key, value, result, scale, heads, width)
        elif self.every_type or query.dtype in HEADS_TYPES:
            if bias is not None and (bias.dtype != query.dtype or bias.shape is None or len(bias.shape) != 4):
                return
            if bias is not None and (self.every_type or query.dtype in LOW):
                if (parts := _positions(bias)) is not None and self._with_columns(query, key, value, result, scale, parts, heads, width):
                    return
            inputs = [self._flat(tensor) for tensor in (query, key, value)]
            if bias is not None:
                inputs += [None, None, bias]
            self._replace(result, "MultiHeadAttention", inputs, {"num_heads": heads, "scale": scale}, heads, width)

    def _with_columns(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        result: ir.Value,
        scale: float,
        parts: tuple[ir.Value, ir.Value],
        heads: int,
        width: int,
    ) -> bool:
        """Rule 1 with relative positions: whether the kernel is wide enough for them.

        bias[i, (y, x)] = down[i, y] + across[i, x] is a product, too: of (down, across) with the key's place, a one in the column
        of its y and one in that of its x. So s·(q·k) + bias = s·((q, down / s, across / s) · (k, place)), and nothing of the size of the
        scores is ever in memory. Values get columns of zeros, since the kernel wants them as wide as the keys.
        """
        down, across = parts
        assert key.shape is not None and query.shape is not None and down.shape is not None and across.shape is not None
        tokens, rows, columns, dtype, batch = key.shape[2], down.shape[3], across.shape[3], query.dtype, query.shape[0]
        if not (isinstance(tokens, int) and isinstance(rows, int) and isinstance(columns, int)) or dtype is None:
            return False
        added = -(-(width + rows + columns) // WIDTH_STEP) * WIDTH_STEP - width
        if tokens != rows * columns or query.shape[2] != tokens or width + added > WIDEST:
            return False
        factor = self._constant(f"factor_{dtype.name}", np.array([1 / scale]).astype(dtype.numpy()))
        first = [self._tokens_first(tensor) for tensor in (query, key, value)]  # [B, N, H, C]
        self._unpacked(query, first[0])
        further = []
        for part, size in ((down, rows), (across, columns)):
            shape = self._constant("part", np.array([-1, heads, tokens, size], np.int64))
            apart = self._add("Reshape", [part, shape], {}, dtype, [batch, heads, tokens, size])
            scaled = self._add("Mul", [apart, factor], {}, dtype, [batch, heads, tokens, size])
            further.append(self._add("Transpose", [scaled], {"perm": [0, 2, 1, 3]}, dtype, [batch, tokens, heads, size]))
        if unused := added - rows - columns:
            further.append(self._everywhere(np.zeros((1, tokens, 1, unused)), "unused", first[1], dtype))
        place = np.zeros((1, tokens, 1, added))
        place[0, np.arange(tokens), 0, np.arange(tokens) // columns] = 1
        place[0, np.arange(tokens), 0, rows + np.arange(tokens) % columns] = 1
        places = self._everywhere(place, "place", first[1], dtype)
        nothing = self._everywhere(np.zeros_like(place), "nothing", first[1], dtype)
        inputs: list[ir.Value | None] = []
        for side in ([first[0], *further], [first[1], places], [first[2], nothing]):
            wide = self._add("Concat", side, {"axis": -1}, dtype, [batch, tokens, heads, width + added])
            inputs.append(self._joined(wide, [batch, tokens, heads * (width + added)]))
        self._replace(result, "MultiHeadAttention", inputs, {"num_heads": heads, "scale": scale}, heads, width, padding=added)
        return True

    def _unpacked(self, query: ir.Value, first: ir.Value) -> None:
        """Let what else reads a packed product's query [B·H, N, C] read it from `first` [B, N, H, C]: the rest is not turned then."""
        flat = _made_by(query, "Reshape")
        source = flat.inputs[0] if flat else None
        if source is None or _packed(query) is None or source.shape is None:
            return
        assert query.shape is not None
        turned = self._add("Transpose", [first], {"perm": [0, 2, 1, 3]}, query.dtype, query.shape)
        shape = self._constant("merged", np.array([-1, *(int(size) for size in query.shape[2:])], np.int64))  # type: ignore[call-overload]
        source.replace_all_uses_with(self._add("Reshape", [turned, shape], {}, query.dtype, source.shape))

    def _everywhere(self, array: np.ndarray, name: str, like: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A constant [1, N, 1, E] for every picture and head of `like` [B, N, H, C], once for all that have as many."""
        assert like.shape is not None
        batch, tokens, heads, _ = like.shape
        key = (name, array.shape, dtype.name, str(batch), heads)
        if key not in self.repeated:
            constant = self._constant(f"{name}_{tokens}_{array.shape[3]}_{dtype.name}", array.astype(dtype.numpy()))
            sides = self._add("Shape", [like], {"start": 0, "end": 3}, ir.DataType.INT64, [3])
            last = self._constant("last", np.array(array.shape[3:], np.int64))
            shape = self._add("Concat", [sides, last], {"axis": 0}, ir.DataType.INT64, [4])
            self.repeated[key] = self._add("Expand", [constant, shape], {}, dtype, [batch, tokens, heads, array.shape[3]])
        return self.repeated[key]

    def _grouped(self, query: ir.Value, key: ir.Value, value: ir.Value, result: ir.Value, scale: float, heads: int, width: int) -> None:
        """Rule 2; the mask is taken for causal since the language stage has no other, and since a query for every new key needs one."""
        keys, values = _uncentred(_unrepeated(key)), _unrepeated(value)
        joined = [_made_by(tensor, "Concat") for tensor in (keys, values)]
        if not (self.every_type or query.dtype in GROUPED_TYPES) or width % 8 or any(node is None for node in joined):
            return
        (past_key, new_key), (past_value, new_value) = (node.inputs for node in joined if node is not None)
        if not (past_key and new_key and past_value and new_value) or query.shape is None or new_key.shape is None:
            return
        groups = new_key.shape[1]
        if query.shape[2] != new_key.shape[2] or not isinstance(groups, int):
            return  # fewer queries than keys: the rows of the last layer
        inputs = [self._flat(tensor) for tensor in (query, new_key, new_value)]
        inputs += [past_key, past_value, *self._lengths(past_key, new_key)]
        attributes = {"num_heads": heads, "kv_num_heads": groups, "scale": scale}
        node = self._replace(result, "GroupQueryAttention", inputs, attributes, heads, width, outputs=3)
        for before, after in zip((keys, values), node.outputs[1:], strict=True):
            after.dtype, after.shape = before.dtype, before.shape
            before.replace_all_uses_with(after)

    def _lengths(self, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """int32 [B] of all tokens but one, and int32 [1] of all tokens, once a graph."""
        if self.lengths is None:
            counts = [self._add("Shape", [tensor], {"start": 2, "end": 3}, ir.DataType.INT64, [1]) for tensor in (past, new)]
            total = self._add("Add", counts, {}, ir.DataType.INT64, [1])
            total = self._add("Cast", [total], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32, [1])
            one = self._constant("one", np.array([1], np.int32))
            before = self._add("Sub", [total, one], {}, ir.DataType.INT32, [1])
            batch = self._add("Shape", [new], {"start": 0, "end": 1}, ir.DataType.INT64, [1])
            self.lengths = self._add("Expand", [before, batch], {}, ir.DataType.INT32, [None]), total
        return self.lengths

    def _flat(self, tensor: ir.Value) -> ir.Value:
        """[B, H, N, C] as [B, N, H·C]."""
        assert tensor.shape is not None
        batch, heads, tokens, width = tensor.shape
        assert isinstance(heads, int) and isinstance(width, int)
        return self._joined(self._tokens_first(tensor), [batch, tokens, heads * width])

    def _joined(self, tensor: ir.Value, shape: list[object]) -> ir.Value:
        """[B, N, H, C] as [B, N, H·C]."""
        return self._add("Reshape", [tensor, self._constant("flat", np.array([0, 0, -1], np.int64))], {}, tensor.dtype, shape)

    def _tokens_first(self, tensor: ir.Value) -> ir.Value:
        """[B, H, N, C] as [B, N, H, C]: what it was turned from, where it was, and turned back otherwise."""
        assert tensor.shape is not None
        if (node := _made_by(tensor, "Transpose")) is not None and _perm(node) == (0, 2, 1, 3):
            assert node.inputs[0] is not None
            return node.inputs[0]
        batch, heads, tokens, width = tensor.shape
        if (packed := _packed(tensor)) is not None:
            whole, number = packed
            bounds = [self._constant("bound", np.array([bound], np.int64)) for bound in (number, number + 1, 2)]
            one = self._add("Slice", [whole, *bounds], {}, tensor.dtype, [batch, tokens, 1, heads, width])
            return self._add("Squeeze", [one, bounds[2]], {}, tensor.dtype, [batch, tokens, heads, width])
        return self._add("Transpose", [tensor], {"perm": [0, 2, 1, 3]}, tensor.dtype, [batch, tokens, heads, width])

    def _replace(
        self,
        result: ir.Value,
        operator: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int | float],
        heads: int,
        width: int,
        outputs: int = 1,
        padding: int = 0,
    ) -> ir.Node:
        """Compute `result` [B, H, N, C] by an operator of onnxruntime's, whose first output is [B, N, H·(C + padding)]."""
        node = ir.node(operator, inputs, attributes=attributes, domain=CONTRIB, num_outputs=outputs, name=f"{result.name}_fused")
        assert result.shape is not None
        batch, _, tokens, _ = result.shape
        for number, output in enumerate(node.outputs):
            output.name = f"{result.name}_fused_{number}"
        node.outputs[0].dtype, node.outputs[0].shape = result.dtype, ir.Shape([batch, tokens, heads * (width + padding)])
        self.graph.append(node)  # sorted into place at the end
        shape = self._constant("heads", np.array([0, 0, heads, width + padding], np.int64))
        apart = self._add("Reshape", [node.outputs[0], shape], {}, result.dtype, [batch, tokens, heads, width + padding])
        if padding:
            bounds = [self._constant("bound", np.array([number], np.int64)) for number in (0, width, 3)]
            apart = self._add("Slice", [apart, *bounds], {}, result.dtype, [batch, tokens, heads, width])
        for use in list(result.uses()):
            # What only turns it back to [B, N, H·C], as [B, Y, X, H·C] perhaps, has it already.
            if (last := _turned_back(use.node)) is not None:
                last.replace_input_with(0, apart)
        turned = self._add("Transpose", [apart], {"perm": [0, 2, 1, 3]}, result.dtype, result.shape)
        result.replace_all_uses_with(turned)
        self._count(operator)
        return node

    # --- norms and activations -------------------------------------------------------------------------------------------------------

    def norms(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Reciprocal":
                self._root_mean_square(node)
            elif node.op_type == "LayerNormalization":
                self._layer_norm(node)

    def _root_mean_square(self, reciprocal: ir.Node) -> None:
        """Rule 3: weight · cast(x / √(mean(x²) + ε))."""
        root = _made_by(reciprocal.inputs[0], "Sqrt")
        total = _made_by(root.inputs[0], "Add") if root else None
        mean = _made_by(total.inputs[0], "ReduceMean") if total else None
        square = _made_by(mean.inputs[0], "Pow") if mean else None
        scaled = _only_reader(reciprocal.outputs[0])
        if total is None or square is None or scaled is None or scaled.op_type != "Mul":
            return
        source, epsilon, exponent = square.inputs[0], _number(total.inputs[1]), _number(square.inputs[1])
        if source is None or epsilon is None or exponent != 2 or source not in scaled.inputs:
            return
        after = _only_reader(scaled.outputs[0])
        if after is not None and after.op_type == "Cast":
            after = _only_reader(after.outputs[0])
        if after is None or after.op_type != "Mul":
            return
        weight = next((value for value in after.inputs if value is not None and value.is_initializer()), None)
        result, plain = after.outputs[0], _without_cast(source)
        if weight is None or plain is None or weight.dtype != result.dtype or result.is_graph_output():
            return
        taken = plain if plain.dtype == result.dtype else source
        if taken.dtype != result.dtype:
            return  # types that differ: the kernel would have to convert
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        fused = self._add("SimplifiedLayerNormalization", [taken, weight], attributes, result.dtype, result.shape)
        result.replace_all_uses_with(fused)
        self._count("SimplifiedLayerNormalization")

    def _layer_norm(self, node: ir.Node) -> None:
        """Rule 4."""
        source, result = node.inputs[0], node.outputs[0]
        plain = _without_cast(source)
        readers = [use.node for use in result.uses()]
        if plain is None or plain is source or plain.dtype not in LOW or len(node.outputs) != 1 or not readers or result.is_graph_output():
            return
        if any(reader.op_type != "Cast" or reader.outputs[0].dtype != plain.dtype for reader in readers):
            return
        scales = [self._lowered(value, plain.dtype) for value in node.inputs[1:] if value is not None]
        if any(value is None for value in scales):
            return
        attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"stash_type": 1}
        fused = self._add("LayerNormalization", [plain, *scales], attributes, plain.dtype, result.shape)
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(fused)
        self._count("LayerNormalization in 16 bit")

    def _lowered(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        if not value.is_initializer() or value.const_value is None:
            return None
        name = f"{value.name}_{dtype.name.lower()}_fused"
        if name not in self.graph.initializers:
            tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
            self.graph.register_initializer(ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor))
        return self.graph.initializers[name]

    def activations(self) -> None:
        """Rule 5."""
        for node in [node for node in self.graph if node.op_type == "Sigmoid"]:
            source, product = node.inputs[0], _only_reader(node.outputs[0])
            if product is None or product.op_type != "Mul" or source not in product.inputs:
                continue
            result, plain = product.outputs[0], _without_cast(source)
            after = _only_reader(result)
            if after is not None and after.op_type == "Cast" and plain is not None and after.outputs[0].dtype == plain.dtype:
                result = after.outputs[0]
            taken = plain if plain is not None and plain.dtype == result.dtype else source
            if taken is None or result.is_graph_output() or taken.dtype != result.dtype:
                continue
            if not self.every_type and taken.dtype not in SILU_TYPES:
                continue
            fused = self._add("QuickGelu", [taken], {"alpha": 1.0}, result.dtype, result.shape, CONTRIB)
            result.replace_all_uses_with(fused)
            self._count("QuickGelu")

    def padding(self) -> None:
        """Rule 6."""
        for node in [node for node in self.graph if node.op_type == "Pad"]:
            value, result = node.inputs[0], node.outputs[0]
            pads = node.inputs[1].const_value if node.inputs[1] is not None else None
            mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
            filled = node.inputs[2] if len(node.inputs) > 2 else None
            if mode != "constant" or pads is None or (filled is not None and _number(filled) != 0) or len(node.inputs) > 3:
                continue
            if value is None or value.shape is None or value.dtype is None or result.is_graph_output():
                continue
            amounts, sizes = pads.numpy().tolist(), list(value.shape)
            rank = len(sizes)
            if any(amounts[:rank]) or not all(isinstance(size, int) for size in sizes[1:]) or amounts[rank] or min(amounts) < 0:
                continue
            for axis in range(1, rank):
                if not (amount := amounts[rank + axis]):
                    continue
                added = [*sizes[:axis], amount, *sizes[axis + 1 :]]
                zero = self._constant(f"zero_{value.dtype.name}", np.zeros(1).astype(value.dtype.numpy()))
                batch = self._add("Shape", [value], {"start": 0, "end": 1}, ir.DataType.INT64, [1])
                rest = self._constant("rest", np.array(added[1:], np.int64))
                shape = self._add("Concat", [batch, rest], {"axis": 0}, ir.DataType.INT64, [rank])
                zeros = self._add("Expand", [zero, shape], {}, value.dtype, added)
                sizes[axis] += amount  # type: ignore[operator]
                value = self._add("Concat", [value, zeros], {"axis": axis}, value.dtype, sizes)
                self._count("Concat for Pad")
            result.replace_all_uses_with(value)

    # --- the graph -------------------------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Drop what nothing reads any more, and put nodes in order."""
        dropped = True
        while dropped:
            dead = [node for node in self.graph if not any(output.uses() or output.is_graph_output() for output in node.outputs)]
            self.graph.remove(dead, safe=True)
            dropped = bool(dead)
        for name in [name for name, value in self.graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
            del self.graph.initializers[name]
        self.graph.sort()

    def _add(
        self,
        operator: str,
        inputs: Iterable[ir.Value | None],
        attributes: Mapping[str, object],
        dtype: ir.DataType | None,
        shape: object,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(operator, list(inputs), attributes=attributes, domain=domain)  # type: ignore[arg-type]
        output = node.outputs[0]
        self.made += 1
        output.name = f"fused_{operator.lower()}_{self.made}"
        node.name = f"node_{output.name}"
        output.dtype = dtype
        output.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)  # type: ignore[arg-type]
        self.graph.append(node)  # sorted into place at the end
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        key = (name, array.tobytes())
        if key not in self.constants:
            tensor = ir.tensor(array, name=f"fused_{name}_{len(self.constants)}")
            value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self.constants[key] = value
        return self.constants[key]

    def _count(self, operator: str) -> None:
        self.counts[operator] = self.counts.get(operator, 0) + 1


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads it; None where there are more, or it leaves the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _without_cast(value: ir.Value | None) -> ir.Value | None:
    node = _made_by(value, "Cast")
    return node.inputs[0] if node is not None else value


def _is_product(value: ir.Value | None) -> bool:
    plain, _ = _unscaled(value)
    return _made_by(plain, "MatMul") is not None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What is multiplied with a constant number, and that number; itself and 1 where nothing is."""
    node = _made_by(value, "Mul")
    if node is not None:
        for index in (0, 1):
            if (factor := _number(node.inputs[index])) is not None:
                return node.inputs[1 - index], factor
    return value, 1.0


def _packed(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Of a query, key or value [B, H, N, C] that SAM takes from one product: that product [B, N, 3, H, C], and which of the three it is."""
    flat = _made_by(value, "Reshape")
    one = _made_by(flat.inputs[0], "Squeeze") if flat else None
    cut = _made_by(one.inputs[0], "Slice") if one else None
    merged = _made_by(cut.inputs[0], "Reshape") if cut else None
    turned = _made_by(merged.inputs[0], "Transpose") if merged else None
    if turned is None or cut is None or _perm(turned) != (2, 0, 3, 1, 4):
        return None
    whole, start = turned.inputs[0], _number(cut.inputs[1])
    if whole is None or start is None or _number(cut.inputs[3]) != 0:
        return None
    return whole, int(start)


def _turned_back(node: ir.Node) -> ir.Node | None:
    """The Reshape to [., H·C] behind a node that begins to put the tokens of a result [B, H, N, C] before its heads; None for others."""
    turn: ir.Node | None = node
    if node.op_type == "Reshape":
        shape = node.outputs[0].shape
        turn = _only_reader(node.outputs[0])
        if shape is None or len(shape) not in (4, 5):
            return None
    if turn is None or turn.op_type != "Transpose" or _perm(turn) not in ((0, 2, 1, 3), (0, 2, 3, 1, 4)):
        return None
    last = _only_reader(turn.outputs[0])
    return last if last is not None and last.op_type == "Reshape" and last.inputs[0] is turn.outputs[0] else None


def _positions(bias: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """SAM's two parts of a bias [B, H, N, N]: down [., Y, X, Y] and across [., Y, X, X]; None for any other bias."""
    flat = _made_by(bias, "Reshape")
    total = _made_by(flat.inputs[0], "Add") if flat else None
    spread = [_made_by(value, "Unsqueeze") for value in total.inputs] if total else []
    if len(spread) != 2 or any(node is None for node in spread):
        return None
    found: dict[int, ir.Value] = {}
    for node in spread:
        assert node is not None
        shape, part = node.outputs[0].shape, node.inputs[0]
        if shape is None or len(shape) != 5 or part is None or part.shape is None or len(part.shape) != 4:
            return None
        if not all(isinstance(size, int) for size in part.shape[1:]):
            return None
        found[3 if shape[4] == 1 else 4] = part  # which axis of the keys' grid it tells apart
    if set(found) != {3, 4} or found[3].shape[1:3] != found[4].shape[1:3]:  # type: ignore[index]
        return None
    return found[3], found[4]


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None or math.prod(value.const_value.shape.numpy()) != 1:
        return None
    return float(value.const_value.numpy().astype(np.float64).reshape(()))


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _unturned(value: ir.Value | None) -> ir.Value | None:
    """K [B, H, N, C] of Kᵀ [B, H, C, N], turned at once or, as torch writes it, as [B·H, N, C] between two Reshapes."""
    if (node := _made_by(value, "Transpose")) is not None and _perm(node) == (0, 1, 3, 2):
        return node.inputs[0]
    outer = _made_by(value, "Reshape")
    turn = _made_by(outer.inputs[0], "Transpose") if outer else None
    inner = _made_by(turn.inputs[0], "Reshape") if turn is not None and _perm(turn) == (0, 2, 1) else None
    return inner.inputs[0] if inner else None


def _uncentred(value: ir.Value) -> ir.Value:
    """Keys [B, H, N, C] before the mean over N was taken from them: softmax does not see it, nor need it a kernel in fp32 inside."""
    centred = _made_by(_without_cast(value), "Sub")
    mean = _made_by(centred.inputs[1], "ReduceMean") if centred else None
    if centred is None or mean is None or mean.inputs[0] is not centred.inputs[0] or _number(mean.inputs[1]) not in (2, -2):
        return value
    keys = _without_cast(centred.inputs[0])
    return value if keys is None else keys


def _unrepeated(value: ir.Value) -> ir.Value:
    """Keys or values before each was repeated for the heads of its group; themselves where none was."""
    flat = _made_by(value, "Reshape")
    wide = _made_by(flat.inputs[0], "Expand") if flat else None
    apart = _made_by(wide.inputs[0], "Unsqueeze") if wide else None
    source = apart.inputs[0] if apart else None
    return value if source is None else source
