"""The door to PyTorch: modules and ``torch.export`` programs in, ``torch.export`` programs out."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from .errors import Unsupported, UsageError
from .execute import type_of
from .graph import Arg, Graph, Node, Value
from .operators import DTYPE_NAMES, DTYPES, name_of, to_arg
from .program import Program, example_inputs
from .sizes import Size, names
from .types import ScalarType, TensorType, Type

Dynamic = Mapping[str, Mapping[int, str]]
"""Which axes of which inputs may vary, and what their extents are called: ``{"x": {0: "N", 3: "4*H"}}``."""


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    static: Mapping[str, object] | None = None,
    dynamic: Dynamic | None = None,
    name: str | None = None,
) -> Program:
    """The module as a program.

    Args:
        module: What to trace; weights may be on the meta device.
        inputs: Example tensors by the names of ``forward``'s parameters; they become the graph's inputs.
        static: Arguments of ``forward`` that are fixed, such as ``return_dict=False``.
        dynamic: Axes that may vary; all others are fixed at the example's extents.
        name: What to call the graph; the module's class otherwise.

    Raises:
        Unsupported: Control flow, data-dependent shapes, hidden state: all reasons at once, with module and line.
    """
    kwargs = {**inputs, **(static or {})}
    shapes = _dynamic_shapes(inputs, dynamic or {}) | {key: _fixed(value) for key, value in (static or {}).items()}
    title = name or type(module).__name__
    with torch.no_grad():
        try:
            with _quiet_pytorch():
                program = _export(module, kwargs, shapes)
        except Exception as error:  # torch.export has no common base class for what it refuses
            raise Unsupported(f"{title} cannot be traced:", _draft_reasons(module, kwargs, shapes, error)) from error
    return import_program(program, name=title, dynamic=dynamic)


def import_program(program: ExportedProgram, *, name: str, dynamic: Dynamic | None = None) -> Program:
    """An exported program as ours, functionalized but not decomposed: ``linear`` and attention stay whole."""
    if reasons := list(_refusals(program)):
        raise Unsupported(f"{name} cannot be represented:", reasons)
    with _quiet_pytorch():
        functional = program.run_decompositions({})
    if reasons := list(_changed_in_place(functional)):
        raise Unsupported(f"{name} cannot be represented:", reasons)
    return _Import(functional, dynamic or {}).program(name)


def export_program(program: Program, *, sizes: Mapping[str, int] | None = None) -> ExportedProgram:
    """Our program as an exported one; named sizes stay dynamic, with their ranges."""
    inputs = example_inputs(program.graph, sizes)
    dims: dict[str, Any] = {
        size.name: Dim(size.name, min=size.minimum, max=size.maximum) for size in program.graph.sizes
    }
    shapes = tuple(_torch_dims(value.type, dims) for value in program.graph.inputs)
    with torch.no_grad(), _quiet_pytorch():
        return torch.export.export(program.module(), inputs, dynamic_shapes=shapes, strict=False)


def _torch_dims(type_: Type, dims: Mapping[str, Any]) -> dict[int, Any]:
    assert isinstance(type_, TensorType)
    return {axis: _affine(dim, dims) for axis, dim in enumerate(type_.shape) if isinstance(dim, str)}


def _affine(dim: str, dims: Mapping[str, Any]) -> Any:
    """``"4*H"`` as torch.export spells it; anything richer is left to torch.export's inference."""
    if dim in dims:
        return dims[dim]
    match = re.fullmatch(r"(\d+)\*(\w+)", dim)
    return int(match[1]) * dims[match[2]] if match and match[2] in dims else Dim.AUTO


def _dynamic_shapes(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, Any]:
    for key, axes in dynamic.items():
        if key not in inputs:
            raise UsageError(f"dynamic: {key!r} is no input; inputs are {', '.join(inputs)}")
        for axis in axes:
            if not 0 <= axis < inputs[key].ndim:
                raise UsageError(f"dynamic: {key} has axes 0 to {inputs[key].ndim - 1}, not {axis}")
    texts = [text for axes in dynamic.values() for text in axes.values()]
    dims = {name: Dim(name) for name in sorted({n for text in texts for n in names(text)})}
    return {
        key: {axis: _affine(text, dims) for axis, text in dynamic[key].items()} if key in dynamic else _fixed(value)
        for key, value in inputs.items()
    }


def _fixed(value: object) -> Any:
    """No axis varies; the nesting of tuples, lists and dictionaries is what torch.export wants repeated."""
    return torch.utils._pytree.tree_map(lambda _: None, value)


def _export(module: torch.nn.Module, kwargs: dict[str, Any], shapes: dict[str, Any]) -> ExportedProgram:
    """Export, and narrow the range of a named size as far as the model itself asks for (an embedding's length)."""
    for _ in range(4):
        try:
            return torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError as error:
            if "Suggested fixes" not in str(error):
                raise
            fixes = str(error).split("\n\n")[0]
            shapes = refine_dynamic_shapes_from_suggested_fixes(fixes, shapes)  # type: ignore[assignment]
    return torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)


def _draft_reasons(
    module: torch.nn.Module, kwargs: Mapping[str, object], shapes: Mapping[str, Any], error: Exception
) -> Sequence[str]:
    """All that stands in the way: torch.export stops at the first obstacle, a draft export goes on."""
    first = f"torch.export: {str(error).strip().splitlines()[0]}"
    try:
        with _quiet_pytorch():
            draft = torch.export.draft_export(module, (), dict(kwargs), dynamic_shapes=dict(shapes), strict=False)
    except Exception:  # the draft fails for reasons that the first error already tells
        return [first]
    return list(_refusals(draft)) or [first]


@contextlib.contextmanager
def _quiet_pytorch() -> Iterator[None]:
    """Hold back what PyTorch's export prints, logs and warns of; our own reasons say it in one line each."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _refusals(program: ExportedProgram) -> Iterator[str]:
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            yield f"{spec.target or spec.arg.name}: a script object or token; only tensors go in and out of a graph"
    for fx in program.graph.nodes:
        if fx.op == "call_function" and (reason := _refusal(fx)):
            yield f"{_scope(fx) or 'the model itself'}: {reason}{_at(fx)}"


def _changed_in_place(functional: ExportedProgram) -> Iterator[str]:
    """State that outlives a call; only a functionalized program shows it, as outputs of their own kinds."""
    for out in functional.graph_signature.output_specs:
        if out.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION):
            yield f"{out.target}: is changed in place by forward; make it an input and an output"


def _refusal(fx: torch.fx.Node) -> str | None:
    target = fx.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target.name()} is control flow"
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.dynamic_output_shape in target.tags:
            return f"{name_of(target)} gives a shape that depends on data"
        if torch.Tag.data_dependent_output in target.tags or name_of(target) == "aten.item":
            return f"{name_of(target)} turns data into a Python value that the model then branches or indexes on"
    return None


def _at(fx: torch.fx.Node) -> str:
    source = _source(fx)
    return f" ({source})" if source else ""


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


def _source(fx: torch.fx.Node) -> str:
    """File and line in the user's model; the path starts at the package, so that it means the same everywhere."""
    frames = [f for f in _FRAME.findall(fx.meta.get("stack_trace") or "") if not f[0].startswith("<")]
    lines = [f"{_package_path(Path(path))}:{line}" for path, line in frames]
    users = [line for line in lines if not line.startswith("torch/")]
    return (users or lines or [""])[-1]


def _package_path(path: Path) -> str:
    parts = path.parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return path.name


def _scope(fx: torch.fx.Node) -> str:
    stack = list(fx.meta.get("nn_module_stack", {}).values())
    path: str = stack[-1][0] if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # what PyTorch calls the place of nodes that its own passes add
        return ""
    return ".".join(re.findall(r"\w+", path.removeprefix("L['self']").replace("_modules", "")))


class _Import:
    """One walk over an exported program's nodes, naming as it goes."""

    def __init__(self, program: ExportedProgram, dynamic: Dynamic) -> None:
        self.source = program
        self.names: dict[torch.fx.Node, str] = {}
        self.taken: set[str] = set()
        self.state: Mapping[str, Any] = {**program.state_dict, **program.constants}
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.inputs: list[Value] = []
        self.params: list[Value] = []
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}
        self.symbols = self._name_symbols(dynamic)

    def program(self, name: str) -> Program:
        for fx in self.source.graph.nodes:
            if fx.op == "placeholder":
                self._placeholder(fx)
            elif fx.op == "call_function" and fx.target is not operator.getitem:
                self._call(fx)
        (outputs,) = next(fx for fx in self.source.graph.nodes if fx.op == "output").args
        if bad := [out for out in outputs if not isinstance(out, torch.fx.Node)]:
            raise Unsupported(f"{name} returns {bad[0]!r}, which is no tensor of the graph")
        graph = Graph(
            name,
            tuple(self.inputs),
            tuple(self.params),
            tuple(self.nodes),
            tuple(self.names[out] for out in outputs),
            self._sizes(),
        )
        return Program(graph, self.weights)

    def _placeholder(self, fx: torch.fx.Node) -> None:
        spec = self.specs[fx.name]
        if isinstance(spec.arg, ConstantArgument):
            return
        is_input = spec.kind is InputKind.USER_INPUT
        name = self._fresh(fx.name if is_input else str(spec.target))
        self.names[fx] = name
        value = Value(name, self._type(fx.meta["val"]))
        if is_input:
            self.inputs.append(value)
        else:
            self.params.append(value)
            self.weights[name] = self.state[str(spec.target)].detach()

    def _call(self, fx: torch.fx.Node) -> None:
        result = fx.meta.get("val")
        if result is None or result == ():
            return  # an assertion: it defines nothing
        op = name_of(fx.target)
        if op == _NORM and all(user.args[1] == 0 for user in fx.users):
            self._norm(fx, result[0])
            return
        base = ".".join(filter(None, (_scope(fx), _word(fx, op))))
        if isinstance(result, list | tuple):
            outputs = tuple(Value(self._fresh(f"{base}.{i}"), self._type(item)) for i, item in enumerate(result))
            for user in fx.users:
                self.names[user] = outputs[user.args[1]].name  # type: ignore[index]
        else:
            outputs = (Value(self._fresh(base), self._type(result)),)
            self.names[fx] = outputs[0].name
        self.nodes.append(Node(*self._bound(op, fx), outputs, _source(fx)))

    def _norm(self, fx: torch.fx.Node, result: object) -> None:
        """A batch norm whose statistics nobody uses gives its result alone: their shape depends on the device."""
        value = Value(self._fresh(".".join(filter(None, (_scope(fx), "batch_norm")))), self._type(result))
        self.names |= dict.fromkeys(fx.users, value.name)
        args = {**self._bound(_NORM, fx)[1], "training": False, "cudnn_enabled": True}
        keys = [argument.name for argument in torch.ops.aten.batch_norm.default._schema.arguments]
        self.nodes.append(Node("aten.batch_norm", {key: args[key] for key in keys}, (value,), _source(fx)))

    def _bound(self, op: str, fx: torch.fx.Node) -> tuple[str, dict[str, Arg]]:
        """The operator and its arguments by name; a graph has no device, it runs where its inputs are."""
        if isinstance(fx.target, torch._ops.OpOverload):
            parameters = [argument.name for argument in fx.target._schema.arguments]
        else:
            parameters = [f"arg{i}" for i in range(len(fx.args))]
        given = dict(zip(parameters, fx.args, strict=False)) | dict(fx.kwargs)
        given = {key: value for key, value in given.items() if key not in ("device", "pin_memory")}
        return _deviceless(op), {key: to_arg(value, self.names.__getitem__) for key, value in given.items()}

    def _fresh(self, base: str) -> str:
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def _type(self, value: object) -> Type:
        if not isinstance(value, Tensor):
            return type_of(value) if not isinstance(value, bool) else ScalarType("bool")
        if value.dtype not in DTYPE_NAMES:
            raise Unsupported(f"element type {value.dtype} has no name in a graph; known: {', '.join(DTYPES)}")
        return TensorType(DTYPE_NAMES[value.dtype], tuple(map(self._dim, value.shape)))

    def _dim(self, extent: int | torch.SymInt) -> int | str:
        return extent if isinstance(extent, int) else self._spelled(extent.node.expr)

    def _spelled(self, expression: Any) -> int | str:
        import sympy

        named = expression.xreplace({symbol: sympy.Symbol(name, integer=True) for symbol, name in self.symbols.items()})
        text = re.sub(
            r"\b(PythonMod|Mod|Max|Min)\b", lambda m: {"Max": "max", "Min": "min"}.get(m[1], "mod"), str(named)
        )
        return int(text) if text.lstrip("-").isdigit() else text

    def _name_symbols(self, dynamic: Dynamic) -> dict[Any, str]:
        """PyTorch's symbols by the names the user gave the axes they come from."""
        found: dict[Any, str] = {}
        for fx in self.source.graph.find_nodes(op="placeholder"):
            for axis, text in dynamic.get(fx.name, {}).items():
                extent = fx.meta["val"].shape[axis]
                if isinstance(extent, int) or len(extent.node.expr.free_symbols) != 1 or len(names(text)) != 1:
                    continue
                (symbol,) = extent.node.expr.free_symbols
                found.setdefault(symbol, next(iter(names(text))))
        for symbol in self.source.range_constraints:
            if not symbol.is_Symbol:
                continue
            found.setdefault(symbol, str(symbol))
        return found

    def _sizes(self) -> tuple[Size, ...]:
        sizes = []
        used = {n for v in self._all_values() if isinstance(v.type, TensorType) for d in v.type.shape for n in names(d)}
        for symbol, name in self.symbols.items():
            bounds = self.source.range_constraints.get(symbol)
            if name not in used:
                continue
            if bounds is None:
                sizes.append(Size(name))
                continue
            maximum = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
            sizes.append(Size(name, max(int(bounds.lower), 1), maximum))
        return tuple(sorted(sizes, key=lambda size: size.name))

    def _all_values(self) -> Iterator[Value]:
        yield from self.inputs
        for node in self.nodes:
            yield from node.outputs


_NORM = "aten._native_batch_norm_legit_no_training"

_VIEW = torch.ops.aten._unsafe_view.default


def _word(fx: torch.fx.Node, op: str) -> str:
    """What a call is named after.

    Whether a reshape has to copy depends on the device that a model is traced on; its result is a view by name, and the
    copy is called after it, so that traces with and without weights have the same names.
    """
    if fx.target is _VIEW:
        return "view"
    if op == "aten.clone" and [user.target for user in fx.users] == [_VIEW]:
        return "view.clone"
    return op.split(".")[1].strip("_")


def _deviceless(op: str) -> str:
    """The overload that says the same without a device."""
    return "aten.to.dtype" if op == "aten.to.device" else op
