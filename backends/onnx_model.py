"""A program as an ONNX model: exported by torch.onnx, weights stored in the bits they have, our names on everything."""

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from intarsia.backends.onnx_fusion import fuse
from intarsia.backends.onnx_lowering import decomposed, lower
from intarsia.backends.onnx_operators import OPSET, RUNTIME
from intarsia.backends.onnx_repairs import widen_integers, widen_selections
from intarsia.backends.onnx_sparse import RuntimeWeights, spellings
from intarsia.backends.onnx_weights import Weights
from intarsia.ir.errors import Unsupported
from intarsia.ir.exported import export_program
from intarsia.ir.graph import Graph
from intarsia.ir.operators import resolve
from intarsia.ir.program import Program, materialize
from intarsia.ir.sizes import names

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class Dialect:
    """What the runtime that reads the file wants written in its own way; the defaults are ONNX Runtime's.

    Attributes:
        fuse: Gives the graph whole operators in place of their pieces.
        translations: How torch.onnx spells operators.
        weights: Replaces the calls of the private domain, and lays their weights out.
    """

    fuse: Callable[[Graph], Graph] = fuse
    translations: Callable[[], Mapping[Callable[..., Any], Callable[..., Any]]] = spellings
    weights: type[Weights] = RuntimeWeights


def onnx_model(program: Program, dialect: Dialect | None = None) -> onnx_ir.Model:
    """The program in ONNX, inputs by their names in the graph, outputs ``output.0``, ``output.1``, ...

    Raises:
        Unsupported: torch.onnx cannot translate a call; the message names it.
    """
    import onnx_ir.passes.common as passes

    dialect = dialect or Dialect()
    fused = materialize(Program(dialect.fuse(lower(program.graph)), program.weights))
    exported = export_program(fused)
    _name_calls(exported, fused.graph)
    model = _translate(decomposed(exported, dialect.translations()), fused.graph, dialect)
    dialect.weights(model.graph, fused.graph).store()
    model.opset_imports.update({node.domain: 1 for node in model.graph if node.domain == RUNTIME})
    widen_selections(model.graph)
    widen_integers(model.graph)
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


def _translate(exported: torch.export.ExportedProgram, graph: Graph, dialect: Dialect) -> onnx_ir.Model:
    with quiet():
        try:
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=dict(dialect.translations()),
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
