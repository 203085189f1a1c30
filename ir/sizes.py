"""Dimensions: integers, or expressions over named sizes such as ``"2*N"``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .errors import InvalidGraph

Dim = int | str
"""A concrete extent, or an expression over named sizes such as ``"N"``, ``"2*N"`` or ``"(H//2)*(W//2)"``."""


@dataclass(frozen=True, slots=True)
class Size:
    """A named size and the range it may take; ``maximum=None`` leaves it open."""

    name: str
    minimum: int = 1
    maximum: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in [{self.minimum}, {'inf' if self.maximum is None else self.maximum}]"


_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: Mapping[str, Callable[..., int]] = {"max": max, "min": min}
_FUNCTIONS = {*_CALLS, "mod"}


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The extent that ``dim`` has for these sizes; InvalidGraph if a name has no size."""
    if isinstance(dim, int):
        return dim
    try:
        return _evaluate(_tree(dim), dim, sizes)
    except ZeroDivisionError as error:
        raise InvalidGraph(f"dimension {dim!r}: divides by zero for sizes {dict(sizes)}") from error


def solve(extents: Mapping[Dim, int]) -> dict[str, int]:
    """The sizes for which dimensions have these extents: ``{"4*H": 32, "N": 2}`` gives ``{"H": 8, "N": 2}``.

    A size is told by a dimension in which it stands alone and linearly, as the inputs of traced models have it.

    Raises:
        InvalidGraph: No size gives an extent, two dimensions tell a size apart, or none tells it.
    """
    found: dict[str, int] = {}
    for dim, extent in extents.items():
        if len(names(dim)) != 1:
            continue
        (name,) = names(dim)
        offset = evaluate(dim, {name: 0})
        factor = evaluate(dim, {name: 1}) - offset
        if factor and evaluate(dim, {name: 2}) == offset + 2 * factor:
            found.setdefault(name, (extent - offset) // factor)
    for dim, extent in extents.items():
        if evaluate(dim, found) != extent:
            raise InvalidGraph(f"dimension {dim!r} is {extent}, which no size gives beside {found}")
    return found


def names(dim: Dim) -> frozenset[str]:
    """The named sizes in ``dim``."""
    if isinstance(dim, int):
        return frozenset()
    return frozenset(n.id for n in ast.walk(_tree(dim)) if isinstance(n, ast.Name)) - _FUNCTIONS


@lru_cache(maxsize=4096)
def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InvalidGraph(f"dimension {text!r} is not an expression over named sizes such as 2*N") from error


def _evaluate(node: ast.expr, text: str, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.Name(id=name):
            raise InvalidGraph(f"dimension {text!r}: size {name} has no value; give one, such as --size {name}=8")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, text, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, text, sizes), _evaluate(right, text, sizes))
        case ast.Call(func=ast.Name("max" | "min" as name), args=[_, _, *_] as args, keywords=[]):
            return _CALLS[name](*(_evaluate(arg, text, sizes) for arg in args))
        case ast.Call(func=ast.Name("mod"), args=[left, right], keywords=[]):
            return _evaluate(left, text, sizes) % _evaluate(right, text, sizes)
    raise InvalidGraph(f"dimension {text!r}: only + - * // % ** max min mod over named sizes are dimensions")
