"""Run a graph eagerly through PyTorch, and check its types through PyTorch's fake kernels."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidGraph, Unsupported
from .graph import Graph, Node
from .operators import DTYPE_NAMES, DTYPES, from_arg, resolve, returns_sequence
from .sizes import Size, evaluate
from .types import ScalarType, TensorType, Type


def call(node: Node, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the node's outputs are when its inputs are ``values``."""
    target = resolve(node.op)
    if isinstance(target, torch._ops.OpOverload):
        result = target(**{key: from_arg(arg, values.__getitem__) for key, arg in node.args.items()})
    else:
        result = target(*(from_arg(arg, values.__getitem__) for arg in node.args.values()))
    return tuple(result) if returns_sequence(node.op) else (result,)


def evaluate_nodes(nodes: Iterable[Node], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` and all that the nodes define, computed in order without gradients."""
    table = dict(values)
    with torch.no_grad():
        for node in nodes:
            table.update(zip((value.name for value in node.outputs), call(node, table), strict=True))
    return table


def to_module(graph: Graph, weights: Mapping[str, Tensor]) -> torch.fx.GraphModule:
    """A module that runs ``graph`` eagerly, weights as buffers, and that ``torch.export`` accepts."""
    fx = torch.fx.Graph()
    root = torch.nn.Module()
    env: dict[str, torch.fx.Node] = {}
    for index, value in enumerate(graph.inputs):
        env[value.name] = fx.placeholder(value.name if _may_be_argument(value.name) else f"input_{index}")
    for index, param in enumerate(graph.params):
        root.register_buffer(f"param_{index}", weights[param.name])
        env[param.name] = fx.get_attr(f"param_{index}")
    for node in graph.nodes:
        _add_call(fx, node, env)
    fx.output(tuple(env[name] for name in graph.outputs))
    module = torch.fx.GraphModule(root, fx, class_name="IntarsiaGraph")
    return module.eval()


def _may_be_argument(name: str) -> bool:
    """Whether generated code may call an argument so: a word that shadows nothing that the code itself says."""
    return name.isidentifier() and not iskeyword(name) and name not in {"self", "torch", "device", "inf", "nan"}


def _add_call(fx: torch.fx.Graph, node: Node, env: dict[str, torch.fx.Node]) -> None:
    target = resolve(node.op)
    args = {key: from_arg(arg, env.__getitem__) for key, arg in node.args.items()}
    if isinstance(target, torch._ops.OpOverload):
        made = fx.call_function(target, (), args)
    else:
        made = fx.call_function(target, tuple(args.values()))
    if not returns_sequence(node.op):
        env[node.name] = made
        return
    for index, value in enumerate(node.outputs):
        env[value.name] = fx.call_function(operator.getitem, (made, index))


def check_types(graph: Graph) -> None:
    """Raise InvalidGraph at the first node whose declared types are not what PyTorch's fake kernel gives.

    A graph with named sizes is asked twice, each time with another extent for each size where its range allows.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    for low in (3, 5) if graph.sizes else (1,):
        sizes = {size.name: _inside(size, low + index) for index, size in enumerate(graph.sizes)}
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            values: dict[str, Any] = {v.name: _stand_in(v.type, sizes) for v in (*graph.inputs, *graph.params)}
            for node in graph.nodes:
                _check_node(node, values, sizes)


def _inside(size: Size, extent: int) -> int:
    raised = max(size.minimum, extent)
    return raised if size.maximum is None else min(raised, size.maximum)


def _check_node(node: Node, values: dict[str, Any], sizes: Mapping[str, int]) -> None:
    try:
        results = call(node, values)
    except Unsupported:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidGraph(f"%{node.name}: {node.op} does not accept its arguments: {reason}") from error
    if len(results) != len(node.outputs):
        raise InvalidGraph(f"%{node.name}: {node.op} gives {len(results)} values, the node names {len(node.outputs)}")
    for value, result in zip(node.outputs, results, strict=True):
        expected = _at(value.type, sizes)
        if (found := type_of(result)) != expected:
            raise InvalidGraph(f"%{value.name}: declared {value.type}, {node.op} gives {found} for sizes {dict(sizes)}")
        values[value.name] = result


def _at(type_: Type, sizes: Mapping[str, int]) -> Type:
    if isinstance(type_, ScalarType):
        return type_
    return TensorType(type_.dtype, tuple(evaluate(dim, sizes) for dim in type_.shape))


def _stand_in(type_: Type, sizes: Mapping[str, int]) -> Tensor | int:
    if isinstance(type_, ScalarType):
        return 1
    return torch.empty([evaluate(dim, sizes) for dim in type_.shape], dtype=DTYPES[type_.dtype])


def type_of(value: object) -> Type:
    """The type of something that ran."""
    if isinstance(value, Tensor):
        return TensorType(DTYPE_NAMES[value.dtype], tuple(value.shape))
    if isinstance(value, bool | torch.SymBool):
        return ScalarType("bool")
    if isinstance(value, int | torch.SymInt):
        return ScalarType("int")
    if isinstance(value, float | torch.SymFloat):
        return ScalarType("float")
    raise Unsupported(f"a value of type {type(value).__name__} is nothing that a graph can hold")
