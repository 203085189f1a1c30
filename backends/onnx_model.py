"""A program as an ONNX model: exported by torch.onnx, weights stored in the bits they have, our names on everything.

Weights in eight and four bits are written as

    weight int8 or int4 (R, C) -> DequantizeLinear(axis=1, block_size) -> Transpose -> MatMul -> Add

with one block for a row of int8. ONNX Runtime computes this form as it is written, however it is configured. The forms
that it fuses into MatMulNBits (scales along axis 0, or one-dimensional) it computes with activations rounded to int8,
unless a session option says otherwise: further off than the weights themselves, in more time where there is no VNNI.
Measured: docs/decisions/002-onnx-weights.md.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from intarsia.backends.onnx_fusion import fuse
from intarsia.backends.onnx_operators import DOMAIN, OPSET, translations
from intarsia.ir.errors import Unsupported
from intarsia.ir.exported import export_program
from intarsia.ir.graph import Graph
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program, materialize
from intarsia.ir.sizes import names

if TYPE_CHECKING:
    import onnx_ir


def onnx_model(program: Program) -> onnx_ir.Model:
    """The program in ONNX, inputs by their names in the graph, outputs ``output.0``, ``output.1``, ...

    Raises:
        Unsupported: torch.onnx cannot translate a call; the message names it.
    """
    import onnx_ir.passes.common as passes

    fused = materialize(Program(fuse(program.graph), program.weights))
    exported = export_program(fused)
    _name_calls(exported, fused.graph)
    model = _translate(exported, fused.graph)
    _Weights(model.graph, fused.graph).store()
    _name_values(model, fused.graph)
    _name_sizes(model, fused.graph, _symbols(exported, fused.graph))
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    _strip(model)
    return model


def _name_calls(exported: torch.export.ExportedProgram, graph: Graph) -> None:
    """Put our nodes' names where torch.onnx keeps the module path; calls come in the graph's order."""
    calls = iter(fx for fx in exported.graph.nodes if fx.op == "call_function" and fx.target is not operator.getitem)
    call = next(calls, None)
    for node in graph.nodes:
        if call is None:
            return
        if call.target is resolve(node.op):
            call.meta["nn_module_stack"] = {node.name: (node.name, node.op)}
            call = next(calls, None)


def _translate(exported: torch.export.ExportedProgram, graph: Graph) -> onnx_ir.Model:
    with quiet():
        try:
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=dict(translations()),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            causes = list(_causes(error))
            raise Unsupported(f"backend onnx cannot take {graph.name}:", [causes[-1]]) from error
    assert made is not None
    return made.model


def _causes(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error).strip().splitlines()[0]
        error = error.__cause__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch.onnx prints about packages that are not there and about its progress."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Weights:
    """Replaces the products of the private domain, and lays their weights out as ONNX Runtime wants them."""

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
        spell: Mapping[str, Callable[[onnx_ir.Node, _Tape], onnx_ir.Value]] = {
            "linear": self._plain,
            "linear_i8": self._eight_bits,
            "linear_i4": self._four_bits,
        }
        for node in [node for node in self.graph if node.domain == DOMAIN]:
            tape = _Tape(node)
            weight = spell[node.op_type](node, tape)
            product = tape.op("MatMul", node.inputs[0], weight)
            bias = _bias(node)
            answer = product if bias is None else tape.op("Add", product, bias)
            tape.take_place(answer)

    def _plain(self, node: onnx_ir.Node, tape: _Tape) -> onnx_ir.Value:
        weight = _value(node, 1)
        if weight.const_value is None:
            return tape.op("Transpose", weight, perm=[1, 0])
        tensor = weight.const_value
        return self._initializer(
            weight, "transposed", tensor.dtype, tuple(reversed(tensor.shape.numpy())), lambda: tensor.numpy().T
        )

    def _eight_bits(self, node: onnx_ir.Node, tape: _Tape) -> onnx_ir.Value:
        weight, scale = _value(node, 1), _value(node, 2)
        rows, columns = _constant(weight).shape.numpy()
        tensor = _constant(scale)
        column = self._initializer(scale, "column", tensor.dtype, (rows, 1), lambda: tensor.numpy().reshape(rows, 1))
        return self._dequantized(node, tape, weight, column, columns)

    def _four_bits(self, node: onnx_ir.Node, tape: _Tape) -> onnx_ir.Value:
        import onnx_ir as ir

        packed, scale = _value(node, 1), _value(node, 2)
        tensor = _constant(packed)
        rows, half = tensor.shape.numpy()
        key = (str(packed.name), "i4")
        if key not in self.made:
            # Our packing is ONNX's: two to a byte, the first in the low nibble.
            nibbles = ir.PackedTensor(tensor.numpy(), ir.DataType.INT4, shape=ir.Shape([rows, 2 * half]))
            self.made[key] = self._register(f"{packed.name}.i4", nibbles)
        return self._dequantized(node, tape, self.made[key], scale, node.attributes["group"].as_int())

    def _dequantized(
        self, node: onnx_ir.Node, tape: _Tape, weight: onnx_ir.Value, scale: onnx_ir.Value, block: int
    ) -> onnx_ir.Value:
        """The weight (C, R) in the input's element type."""
        wide = tape.op("DequantizeLinear", weight, scale, axis=1, block_size=block)
        dtype = _value(node, 0).dtype
        if dtype is not None and dtype != scale.dtype:
            wide = tape.op("Cast", wide, to=int(dtype))
        return tape.op("Transpose", wide, perm=[1, 0])

    def _initializer(
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
            self.made[key] = self._register(name, lazy)
        return self.made[key]

    def _register(self, name: str, tensor: Any) -> onnx_ir.Value:
        import onnx_ir as ir

        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


class _Tape:
    """New nodes in place of one."""

    def __init__(self, node: onnx_ir.Node) -> None:
        self.replaced = node
        self.nodes: list[onnx_ir.Node] = []

    def op(self, op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        """The output of one more node."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes or None)
        node.metadata_props.update(self.replaced.metadata_props)
        self.nodes.append(node)
        return node.outputs[0]

    def take_place(self, answer: onnx_ir.Value) -> None:
        """Put the nodes where the replaced one was; ``answer`` is used where its output was."""
        import onnx_ir as ir

        old = self.replaced.outputs[0]
        answer.type, answer.shape, answer.name = old.type, old.shape, old.name
        graph = self.replaced.graph
        assert graph is not None
        ir.convenience.replace_nodes_and_values(graph, self.replaced, [self.replaced], self.nodes, [old], [answer])


def _value(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _bias(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The last input that the operator's schema names; ONNX leaves it out where it is not given."""
    index = 2 if node.op_type == "linear" else 3
    return node.inputs[index] if len(node.inputs) > index else None


def _constant(value: onnx_ir.Value) -> Any:
    assert value.const_value is not None, "why_not lets no computed weight through"
    return value.const_value


def _name_values(model: onnx_ir.Model, graph: Graph) -> None:
    """Name nodes and what they give after our nodes: ``blocks.0.ffn.linear/MatMul``; inputs and outputs plainly."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        ours = scopes[0] if scopes and scopes[0] in graph.producers else graph.name
        name = f"{ours}/{node.op_type}"
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for index, value in enumerate(node.outputs):
            value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"
    for value, ours in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = ours.name
    for index, value in enumerate(model.graph.outputs):
        value.name = f"output.{index}"


def _symbols(exported: torch.export.ExportedProgram, graph: Graph) -> dict[str, str]:
    """Our names of the sizes that torch.export calls ``s77``, as far as the inputs tell."""
    found: dict[str, str] = {}
    user_inputs = set(exported.graph_signature.user_inputs)
    placeholders = [fx for fx in exported.graph.find_nodes(op="placeholder") if fx.name in user_inputs]
    for fx, value in zip(placeholders, graph.inputs, strict=True):
        for theirs, ours in zip(fx.meta["val"].shape, graph.type(value.name).shape, strict=True):
            symbols, sizes = names(str(theirs)), names(ours) if isinstance(ours, str) else frozenset()
            if len(symbols) == len(sizes) == 1:
                found.setdefault(*symbols, *sizes)
    return found


def _name_sizes(model: onnx_ir.Model, graph: Graph, symbols: Mapping[str, str]) -> None:
    """Write our names of sizes into all shapes; those of outputs are the graph's own."""
    import onnx_ir as ir

    def named(dim: int | onnx_ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), dim.value)

    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([named(dim) for dim in value.shape])
    for value, ours in zip(model.graph.outputs, graph.outputs, strict=True):
        value.shape = ir.Shape(graph.type(ours).shape)


def _strip(model: onnx_ir.Model) -> None:
    """Leave nothing in the file that depends on this machine, and say who made it."""
    from importlib.metadata import version

    model.producer_name, model.producer_version = "intarsia", version("intarsia")
    model.graph.name = "graph"
    model.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
