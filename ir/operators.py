"""PyTorch's operators by name: ``aten.linear``, ``aten.add.Tensor``, ``intarsia.linear_i8``, ``operator.mul``."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from .errors import ParseError, Unsupported
from .graph import Arg, Ref, Symbol

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "f64": torch.float64,
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "f8e4m3": torch.float8_e4m3fn,
        "f8e5m2": torch.float8_e5m2,
        "i64": torch.int64,
        "i32": torch.int32,
        "i16": torch.int16,
        "i8": torch.int8,
        "u64": torch.uint64,
        "u32": torch.uint32,
        "u16": torch.uint16,
        "u8": torch.uint8,
        "b1": torch.bool,
        "c64": torch.complex64,
        "c128": torch.complex128,
    }
)
"""PyTorch's element types by our names."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
"""Our names of PyTorch's element types."""

_PLAIN_NAMESPACES = {"operator": operator, "math": math, "torch": torch}
"""Where functions on sizes come from: Python's ``operator`` and ``math``, and ``torch.sym_max`` and the like."""


@lru_cache(maxsize=4096)
def resolve(op: str) -> Callable[..., Any]:
    """The callable behind a name; Unsupported if PyTorch has no such operator registered."""
    _register_ours(op)
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    try:
        if namespace in _PLAIN_NAMESPACES:
            return getattr(_PLAIN_NAMESPACES[namespace], name)  # type: ignore[no-any-return]
        packet = getattr(getattr(torch.ops, namespace), name)
        return getattr(packet, overload or "default")  # type: ignore[no-any-return]
    except AttributeError as error:
        message = f"operator {op} is not registered with PyTorch; import the library that defines it"
        raise Unsupported(message) from error


def _register_ours(op: str) -> None:
    """Our own operators register themselves when ``intarsia.kernels`` is imported; by name, so that ir stays below."""
    if op.startswith("intarsia."):
        importlib.import_module("intarsia.kernels").register()


def schema(op: str) -> torch.FunctionSchema | None:
    """The operator's schema; None for a plain function on sizes."""
    found = resolve(op)
    return found._schema if isinstance(found, torch._ops.OpOverload) else None


def name_of(target: object) -> str:
    """The name of a callable met in an exported program; Unsupported if it is no operator."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload == "default" else f"{namespace}.{name}.{overload}"
    module = getattr(target, "__module__", "").removeprefix("_")
    name = getattr(target, "__name__", repr(target))
    if module in _PLAIN_NAMESPACES:
        return f"{module}.{name}"
    if module.startswith("torch.") and hasattr(torch, name):
        return f"torch.{name}"
    raise Unsupported(f"{name} is no operator that a graph can hold")


def returns_sequence(op: str) -> bool:
    """Whether a call returns several values or a list, even a list of one, rather than one value."""
    found = schema(op)
    if found is None:
        return False
    return len(found.returns) != 1 or isinstance(found.returns[0].type, torch.ListType)


def to_arg(value: object, ref: Callable[[torch.fx.Node], str]) -> Arg:
    """A PyTorch argument as the graph holds it; a number that is not one (NaN) becomes ``math.nan`` itself."""
    match value:
        case torch.fx.Node():
            return Ref(ref(value))
        case list() | tuple():
            return tuple(to_arg(item, ref) for item in value)
        case torch.dtype() | torch.layout() | torch.memory_format():
            return Symbol(str(value))
        case float():
            return math.nan if math.isnan(value) else value
        case None | bool() | int() | complex() | str():
            return value
    raise Unsupported(f"an argument of type {type(value).__name__} is nothing that a graph can hold")


def from_arg(arg: Arg, lookup: Callable[[str], Any]) -> Any:
    """The argument as PyTorch takes it, every reference replaced by ``lookup`` of its name."""
    match arg:
        case Ref(name):
            return lookup(name)
        case Symbol(name):
            return _constant(name)
        case tuple():
            return [from_arg(item, lookup) for item in arg]
    return arg


def _constant(name: str) -> object:
    module, _, attribute = name.partition(".")
    value = getattr(torch, attribute, None) if module == "torch" else None
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise ParseError(f"{name} is no constant of PyTorch such as torch.float32")
    return value
