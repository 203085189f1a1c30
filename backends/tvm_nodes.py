"""What a node of an exported program says: its arguments by name, its shape, its element type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

HEADS = (0, 2, 1, 3)
"""The transposition between heads first and heads beside channels."""


def name(node: torch.fx.Node) -> str:
    """The operator's name with its overload, ``linear.default``."""
    return str(node.target.__name__)  # type: ignore[union-attr]


def arguments(node: torch.fx.Node) -> Mapping[str, Any]:
    """Arguments by the names in the operator's schema, with its defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    given |= dict(zip((argument.name for argument in arguments), node.args, strict=False))
    return given | node.kwargs


def shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Extents of the node's tensor."""
    return tuple(node.meta["val"].shape)


def dtype(node: torch.fx.Node) -> torch.dtype:
    """Element type of the node's tensor, or of its first one."""
    value = node.meta["val"]
    found: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
    return found


def repeated(value: Any, count: int) -> Sequence[int]:
    """A number for each axis, where one may stand for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers


def swaps_heads(node: torch.fx.Node) -> bool:
    """Whether the call is that transposition, or its inverse, which is itself."""
    if node.op != "call_function":
        return False
    if node.target is torch.ops.aten.permute.default:
        return tuple(axis % 4 for axis in node.args[1]) == HEADS  # type: ignore[union-attr, operator]
    if node.target is torch.ops.aten.transpose.int and len(shape(node)) == 4:
        return sorted(axis % 4 for axis in node.args[1:3]) == [1, 2]  # type: ignore[operator, misc]
    return False
