"""Print a graph, and read it back: the only serialization a graph has.

    graph tiny {
      size N in [2, 64]
      input %x: f32[N, 8]
      param %fc.weight: f32[4, 8]
      %fc.linear: f32[N, 4] = aten.linear(input=%x, weight=%fc.weight, bias=None)  # model.py:12
      return %fc.linear
    }

Names, operators and keys that are not plain words are written as JSON strings, so anything round-trips
(but for a surrogate pair spelled as two code points, which JSON joins to the one it stands for).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from .errors import ParseError
from .graph import Arg, Graph, Node, Ref, Symbol, Value
from .sizes import Size
from .types import parse_type

T = TypeVar("T")


def print_graph(graph: Graph, *, sources: bool = True) -> str:
    """One line for each size, input, parameter and node; ``sources`` adds the model's file and line."""
    lines = [f"graph {_word(graph.name)} {{"]
    lines += [f"  size {size}" for size in graph.sizes]
    lines += [f"  input {_value(value)}" for value in graph.inputs]
    lines += [f"  param {_value(value)}" for value in graph.params]
    lines += [print_node(node, sources=sources) for node in graph.nodes]
    lines += [f"  return {', '.join(map(_name, graph.outputs))}".rstrip(), "}"]
    return "\n".join(lines) + "\n"


def print_node(node: Node, *, sources: bool = True) -> str:
    """The line of one call."""
    args = ", ".join(f"{_word(key)}={_arg(arg)}" for key, arg in node.args.items())
    comment = f"  # {' '.join(node.source.split())}" if sources and node.source else ""
    return f"  {', '.join(map(_value, node.outputs))} = {_word(node.op)}({args}){comment}"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


def _word(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _name(name: str) -> str:
    return "%" + (name if _PLAIN_NAME.fullmatch(name) else json.dumps(name))


def _value(value: Value) -> str:
    return f"{_name(value.name)}: {value.type}"


def _arg(arg: Arg) -> str:
    match arg:
        case Ref(name):
            return _name(name)
        case Symbol(name):
            return name
        case tuple():
            return "[" + ", ".join(map(_arg, arg)) + "]"
        case str():
            return json.dumps(arg)
        case complex():
            return f"complex[{arg.real!r}, {arg.imag!r}]"
        case _:
            return repr(arg)


def parse_graph(text: str) -> Graph:
    """The graph that ``print_graph`` wrote; ParseError with line and column otherwise."""
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ParseError("line 1: expected 'graph NAME {', found an empty text")
    head = _Line(lines[0], 1)
    head.literal("graph")
    name = head.word()
    head.literal("{")
    head.end()
    body = _Body()
    for number, line in enumerate(lines[1:-1], start=2):
        if line.strip():
            body.read(_Line(line, number))
    last = _Line(lines[-1], len(lines))
    if len(lines) < 2 or lines[-1].strip() != "}":
        last.fail("a closing '}'")
    if body.outputs is None:
        last.fail("a line 'return %...' before the closing '}'")
    return Graph(name, tuple(body.inputs), tuple(body.params), tuple(body.nodes), body.outputs, tuple(body.sizes))


class _Body:
    """What the lines between the braces have said so far."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self.inputs: list[Value] = []
        self.params: list[Value] = []
        self.nodes: list[Node] = []
        self.outputs: tuple[str, ...] | None = None

    def read(self, line: _Line) -> None:
        if self.outputs is not None:
            line.fail("'}' after 'return'")
        if line.peek("%"):
            self.nodes.append(line.node())
        elif line.accept("size "):
            self.sizes.append(line.size())
        elif line.accept("input "):
            self.inputs.append(line.value())
        elif line.accept("param "):
            self.params.append(line.value())
        elif line.accept("return"):
            self.outputs = line.names()
        else:
            line.fail("size, input, param, return or a node such as '%y: f32[2] = aten.relu(self=%x)'")
        line.end()


_SPACE = re.compile(r"[ \t]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_TYPE = re.compile(r"\w+\[[^\]]*\]|int|float|bool")
_NUMBER = re.compile(r"-?(?:inf|nan|\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?)")
_FLOAT = re.compile(r"[.eEi]")
_RANGE = re.compile(r"([A-Za-z_]\w*) in \[([0-9]{1,18}), ([0-9]{1,18}|inf)\]")
_BARE = re.compile(r"[A-Za-z_][\w.]*")
_CONSTANTS: dict[str, Arg] = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}


class _Line:
    """A cursor over one line of text."""

    def __init__(self, text: str, number: int) -> None:
        self.text = text
        self.number = number
        self.at = 0

    def fail(self, expected: str) -> NoReturn:
        found = self.text[self.at : self.at + 40].strip() or "the end of the line"
        raise ParseError(f"line {self.number}, column {self.at + 1}: expected {expected}, found {found!r}")

    def peek(self, text: str) -> bool:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text.startswith(text, self.at)

    def accept(self, text: str) -> bool:
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def literal(self, text: str) -> None:
        if not self.accept(text):
            self.fail(repr(text))

    def token(self, pattern: re.Pattern[str], expected: str) -> str:
        self.peek("")
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(expected)
        self.at = match.end()
        return match[0]

    def end(self) -> None:
        if not self.peek("#") and self.at < len(self.text):
            self.fail("the end of the line")

    def string(self) -> str:
        start = self.at
        try:
            return str(json.loads(self.token(_STRING, "a string in double quotes")))
        except json.JSONDecodeError:
            self.at = start
            self.fail("a string with JSON escapes")

    def word(self) -> str:
        return self.string() if self.peek('"') else self.token(_PLAIN, "a word or a string")

    def name(self) -> str:
        self.literal("%")
        return self.string() if self.text.startswith('"', self.at) else self.token(_PLAIN_NAME, "a value's name")

    def names(self) -> tuple[str, ...]:
        return self.separated(self.name) if self.peek("%") else ()

    def value(self) -> Value:
        name = self.name()
        self.literal(":")
        self.peek("")
        start = self.at
        text = self.token(_TYPE, "a type such as f32[2, N]")
        try:
            return Value(name, parse_type(text))
        except ParseError:
            self.at = start
            self.fail("a type such as f32[2, N]")

    def size(self) -> Size:
        match = _RANGE.fullmatch(self.token(_RANGE, "'NAME in [minimum, maximum]'"))
        assert match is not None
        return Size(match[1], int(match[2]), None if match[3] == "inf" else int(match[3]))

    def node(self) -> Node:
        outputs = self.separated(self.value)
        self.literal("=")
        op = self.word()
        self.literal("(")
        args: dict[str, Arg] = {}
        while not self.accept(")"):
            if args:
                self.literal(",")
            key = self.word()
            if key in args:
                self.fail(f"each argument once; {key} is given twice, before")
            self.literal("=")
            args[key] = self.arg()
        source = self.text[self.at :].strip().removeprefix("#").strip() if self.peek("#") else ""
        return Node(op, args, outputs, source)

    def arg(self) -> Arg:
        if self.peek("%"):
            return Ref(self.name())
        if self.accept("["):
            return self.items()
        if self.accept("complex["):
            return self.complex_number()
        if self.peek('"'):
            return self.string()
        if self.at < len(self.text) and (self.text[self.at].isdigit() or self.text[self.at] == "-"):
            return self.numeral()
        word = self.token(_BARE, "a value, a number, a string, a list or a constant such as torch.float32")
        return _CONSTANTS[word] if word in _CONSTANTS else Symbol(word)

    def numeral(self) -> int | float:
        self.peek("")
        start = self.at
        text = self.token(_NUMBER, "a number")
        try:
            return math.nan if "nan" in text else float(text) if _FLOAT.search(text) else int(text)
        except ValueError:
            self.at = start
            self.fail("a number")

    def complex_number(self) -> complex:
        start = self.at
        items = self.items()
        match items:
            case (int() | float() as real, int() | float() as imag):
                return complex(real, imag)
        self.at = start
        self.fail("a complex number such as complex[1.0, -2.0]")

    def items(self) -> tuple[Arg, ...]:
        if self.accept("]"):
            return ()
        items = self.separated(self.arg)
        self.literal("]")
        return items

    def separated(self, read: Callable[[], T]) -> tuple[T, ...]:
        items = [read()]
        while self.accept(","):
            items.append(read())
        return tuple(items)
