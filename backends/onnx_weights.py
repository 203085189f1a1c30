"""Products with weights in ONNX: each stored in the bits it has, laid out as ONNX Runtime computes it as written.

Weights in eight and four bits are written as

    weight int8 or int4 (R, C) -> DequantizeLinear(axis=1, block_size) -> Transpose -> MatMul -> Add

with one block for a row of int8. ONNX Runtime computes this form as it is written, however it is configured. The forms
that it fuses into MatMulNBits (scales along axis 0, or one-dimensional) it computes with activations rounded to int8,
unless a session option says otherwise: further off than the weights themselves, in more time where there is no VNNI.
Measured: docs/decisions/002-onnx-weights.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intarsia.backends.onnx_operators import DOMAIN, RUNTIME
from intarsia.ir.graph import Graph

if TYPE_CHECKING:
    import onnx_ir


class Weights:
    """Replaces the calls of the private domain; a runtime that wants them otherwise has a subclass."""

    def __init__(self, target: onnx_ir.Graph, graph: Graph) -> None:
        self.graph = target
        self.made: dict[tuple[str, str], onnx_ir.Value] = {}
        for index, param in enumerate(graph.params):
            if (value := target.initializers.get(f"param_{index}")) is not None:
                target.initializers.pop(f"param_{index}")
                value.name = param.name
                target.initializers[param.name] = value

    def store(self) -> None:
        """Rewrite every call of the private domain."""
        spell = self.spellings()
        for node in [node for node in self.graph if node.domain == DOMAIN]:
            tape = Tape(node)
            tape.take_place(spell[node.op_type](node, tape))

    def spellings(self) -> Mapping[str, Callable[[onnx_ir.Node, Tape], onnx_ir.Value]]:
        """What writes each call of the private domain on the tape and gives its answer."""
        return {"linear": self.plain, "linear_i8": self.eight_bits, "linear_i4": self.four_bits}

    def plain(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The weight (R, C) transposed: once, when the file is written, where it is constant."""
        weight = value_of(node, 1)
        if weight.const_value is None:
            return product(node, tape, tape.op("Transpose", weight, perm=[1, 0]))
        tensor = weight.const_value
        shape = tuple(reversed(tensor.shape.numpy()))
        return product(
            node, tape, self.initializer(weight, "transposed", tensor.dtype, shape, lambda: tensor.numpy().T)
        )

    def eight_bits(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The weight int8 (R, C), a row a block."""
        weight, scale = value_of(node, 1), value_of(node, 2)
        rows, columns = constant(weight).shape.numpy()
        tensor = constant(scale)
        column = self.initializer(scale, "column", tensor.dtype, (rows, 1), lambda: tensor.numpy().reshape(rows, 1))
        return product(node, tape, _dequantized(node, tape, weight, column, columns))

    def four_bits(self, node: onnx_ir.Node, tape: Tape) -> onnx_ir.Value:
        """The weight int4 (R, C), a group of columns a block."""
        import onnx_ir as ir

        packed, scale = value_of(node, 1), value_of(node, 2)
        tensor = constant(packed)
        rows, half = tensor.shape.numpy()
        key = (str(packed.name), "i4")
        if key not in self.made:
            # Our packing is ONNX's: two to a byte, the first in the low nibble.
            nibbles = ir.PackedTensor(tensor.numpy(), ir.DataType.INT4, shape=ir.Shape([rows, 2 * half]))
            self.made[key] = self.register(f"{packed.name}.i4", nibbles)
        return product(node, tape, _dequantized(node, tape, self.made[key], scale, node.attributes["group"].as_int()))

    def initializer(
        self, source: onnx_ir.Value, what: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], data: Callable[[], Any]
    ) -> onnx_ir.Value:
        """The weight ``source`` in another layout, made when the file is written, once however many calls use it."""
        import numpy as np
        import onnx_ir as ir

        key = (str(source.name), what)
        if key not in self.made:
            name = f"{source.name}.{what}"
            lazy = ir.LazyTensor(
                lambda: ir.Tensor(np.ascontiguousarray(data()), dtype, name=name), dtype, ir.Shape(shape), name=name
            )
            self.made[key] = self.register(name, lazy)
        return self.made[key]

    def register(self, name: str, tensor: Any) -> onnx_ir.Value:
        """The tensor as an initializer."""
        import onnx_ir as ir

        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


class Tape:
    """New nodes in place of one."""

    def __init__(self, node: onnx_ir.Node) -> None:
        self.replaced = node
        self.nodes: list[onnx_ir.Node] = []

    def op(self, op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        """The output of one more node."""
        import onnx_ir as ir

        return self._added(ir.node(op_type, inputs, attributes or None))

    def runtime_op(self, op_type: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        """The output of one more node, of an operator that ONNX Runtime adds to ONNX's own."""
        import onnx_ir as ir

        return self._added(ir.node(op_type, inputs, domain=RUNTIME))

    def again(self, inputs: Sequence[onnx_ir.Value | None]) -> onnx_ir.Value:
        """The output of the replaced node's operator on other inputs."""
        import onnx_ir as ir

        return self._added(ir.node(self.replaced.op_type, inputs, attributes=self.replaced.attributes))

    def take_place(self, answer: onnx_ir.Value) -> None:
        """Put the nodes where the replaced one was; ``answer`` is used where its output was."""
        import onnx_ir as ir

        old = self.replaced.outputs[0]
        answer.type, answer.shape, answer.name = old.type, old.shape, old.name
        graph = self.replaced.graph
        assert graph is not None
        ir.convenience.replace_nodes_and_values(graph, self.replaced, [self.replaced], self.nodes, [old], [answer])

    def _added(self, node: onnx_ir.Node) -> onnx_ir.Value:
        node.metadata_props.update(self.replaced.metadata_props)
        self.nodes.append(node)
        return node.outputs[0]


def product(node: onnx_ir.Node, tape: Tape, weight: onnx_ir.Value) -> onnx_ir.Value:
    """The first input of ``node`` times ``weight`` (C, R), plus the bias where there is one."""
    answer = tape.op("MatMul", value_of(node, 0), weight)
    bias = bias_of(node)
    return answer if bias is None else tape.op("Add", answer, bias)


def value_of(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """The input that is always given."""
    value = node.inputs[index]
    assert value is not None
    return value


def bias_of(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The last input that the operator's schema names; ONNX leaves it out where it is not given."""
    index = 2 if node.op_type == "linear" else 3
    return node.inputs[index] if len(node.inputs) > index else None


def constant(value: onnx_ir.Value) -> Any:
    """The tensor behind a weight."""
    assert value.const_value is not None, "why_not lets no computed weight through"
    return value.const_value


def _dequantized(
    node: onnx_ir.Node, tape: Tape, weight: onnx_ir.Value, scale: onnx_ir.Value, block: int
) -> onnx_ir.Value:
    """The weight (C, R) in the input's element type."""
    wide = tape.op("DequantizeLinear", weight, scale, axis=1, block_size=block)
    dtype = value_of(node, 0).dtype
    if dtype is not None and dtype != scale.dtype:
        wide = tape.op("Cast", wide, to=int(dtype))
    return tape.op("Transpose", wide, perm=[1, 0])
