"""``name(key=value, ...)``: the one notation for passes, options, kernels, strategies and targets."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from .errors import SpecError

Literal = int | float | bool | str | None | tuple["Literal", ...]


@dataclass(frozen=True)
class Spec:
    """A name with literal arguments, e.g. ``i4(group=32)``."""

    name: str
    args: Mapping[str, Literal] = field(default_factory=dict[str, Literal])

    def __str__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}({args})" if args else self.name

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read the notation back; SpecError if the text is not of that form."""
        name, paren, rest = text.strip().partition("(")
        if not name or not name.replace("-", "_").replace(".", "_").isidentifier():
            raise SpecError(f"expected 'name(key=value, ...)', found {text!r}")
        if not paren:
            return cls(name)
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise ValueError("not one call with keyword arguments")
            args = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
            if len(args) < len(call.keywords):
                raise ValueError("a key is given twice, or as **")
            return cls(name, args)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise SpecError(f"expected 'name(key=value, ...)' with literal values, found {text!r}") from error


T = TypeVar("T")


def spec_of(name: str, instance: object) -> Spec:
    """The notation of a frozen dataclass: ``name`` with the fields that differ from their defaults."""
    changed: dict[str, Literal] = {}
    for f in _arguments(instance):
        value = getattr(instance, f.name)
        if f.default is MISSING or value != f.default:
            changed[f.name] = value
    return Spec(name, changed)


def construct(cls: type[T], spec: Spec) -> T:
    """``cls`` with the arguments of ``spec``; SpecError names an unknown, missing or mistyped key."""
    known = {f.name: f for f in _arguments(cls)}
    for key, value in spec.args.items():
        if key not in known:
            raise SpecError(f"{spec.name}: unknown key {key!r}; it takes {', '.join(known) or 'no arguments'}")
        default = known[key].default
        if default is not MISSING and default is not None and not _fits(value, default):
            raise SpecError(f"{spec.name}: {key} takes a {type(default).__name__}, found {value!r}")
    missing = [key for key, f in known.items() if key not in spec.args and f.default is MISSING]
    if missing:
        raise SpecError(f"{spec.name}: {', '.join(missing)} must be given")
    try:
        return cls(**spec.args)
    except (ValueError, TypeError) as error:
        raise SpecError(f"{spec}: {error}") from error


def _arguments(described: object) -> list[Field[Any]]:
    """The fields of a dataclass or an instance of one, those that can only be named behind the others."""
    return sorted(fields(described), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]


def _fits(value: Literal, default: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
