"""The graph: an immutable flat list of operator calls in execution order.

A value is a name. Nodes refer to their inputs by name, so a node is plain data:
it can be compared, hashed, printed, and swapped for another node that defines
the same names, without touching the nodes that use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType

from .sizes import Size
from .types import TensorType, Type


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of the value called ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A PyTorch constant that is no number, by its name: ``torch.float32``, ``torch.contiguous_format``."""

    name: str


Arg = Ref | Symbol | int | float | complex | bool | str | None | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class Value:
    """Something with a name and a type that a node, an input or a parameter defines."""

    name: str
    type: Type


class Arguments(dict[str, Arg]):
    """Arguments of a call by the operator's parameter names; hashable, and not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError("a node's arguments are immutable; use replace(node, args={**node.args, ...})")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]
    __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return (Arguments, (dict(self),))


@dataclass(frozen=True)
class Node:
    """One call of the operator ``op``.

    Attributes:
        op: Operator by its PyTorch name, ``aten.linear``, ``aten.add.Tensor``, ``intarsia.linear_i8``.
        args: Arguments by the names in the operator's schema.
        outputs: What the call defines, at least one value.
        source: File and line of the user's model, for messages; not part of the graph's identity.
    """

    op: str
    args: Mapping[str, Arg]
    outputs: tuple[Value, ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if type(self.args) is not Arguments:
            object.__setattr__(self, "args", Arguments(self.args))

    @property
    def name(self) -> str:
        """The name of the first output, by which plans, reports and errors call the node."""
        return self.outputs[0].name

    @property
    def type(self) -> TensorType:
        """The type of the first output; TypeError if that is a number and no tensor."""
        if not isinstance(self.outputs[0].type, TensorType):
            raise TypeError(f"%{self.name} is a number of type {self.outputs[0].type}, not a tensor")
        return self.outputs[0].type

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of all values the call uses, in order, repetitions kept."""
        return tuple(_names(tuple(self.args.values())))

    def ref(self, arg: str) -> str:
        """The name of the value passed as ``arg``; KeyError or TypeError if there is none."""
        value = self.args[arg]
        if not isinstance(value, Ref):
            raise TypeError(f"%{self.name}: {arg} of {self.op} is {value!r}, not a value of the graph")
        return value.name


def _names(arg: Arg) -> Iterator[str]:
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from _names(item)


@dataclass(frozen=True)
class Graph:
    """A model: what goes in, the weights by name and type, the calls, what comes out.

    Attributes:
        sizes: The named sizes that the types mention, each with its range.
    """

    name: str
    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    sizes: tuple[Size, ...] = ()

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value by name."""
        table = {value.name: value for value in (*self.inputs, *self.params)}
        for node in self.nodes:
            for value in node.outputs:
                table[value.name] = value
        return MappingProxyType(table)

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that defines a value, by the value's name; inputs and parameters have none."""
        return MappingProxyType({value.name: node for node in self.nodes for value in node.outputs})

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that use a value, in order, by the value's name; a value nobody uses is absent."""
        table: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                table.setdefault(name, []).append(node)
        return MappingProxyType({name: tuple(nodes) for name, nodes in table.items()})

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with anything but the sources."""
        from .text import print_graph

        return sha256(print_graph(self, sources=False).encode()).hexdigest()[:12]

    def type(self, name: str) -> TensorType:
        """The type of a tensor value; KeyError if there is no such value, TypeError if it is a number."""
        found = self.values[name].type
        if not isinstance(found, TensorType):
            raise TypeError(f"%{name} is a number of type {found}, not a tensor")
        return found

    def find(self, *ops: str) -> Iterator[Node]:
        """The calls of any of these operators, in execution order."""
        return (node for node in self.nodes if node.op in ops)

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)

    @classmethod
    def parse(cls, text: str) -> Graph:
        """Read printed text back; ParseError with line and column if it is not a graph."""
        from .text import parse_graph

        return parse_graph(text)
