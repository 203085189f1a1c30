"""Inputs that ONNX Runtime keeps from call to call: written in place where the model proves that this is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intarsia.backends.base import Stateful
from intarsia.ir.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime

KEY = "in_place"
"""Of a model's metadata: JSON, the name of an input by that of the output that may be written over it."""

NAMES = {"float32": "float", "float64": "double"}
"""What ONNX calls element types that numpy calls otherwise."""

COMPUTING = {"Add", "Attention", "Div", "Gather", "MatMul", "Mul", "Sub"}
"""Calls whose result has memory of its own, where no operand is a weight; of others it may be that of an operand."""


def declare(model: onnx_ir.Model) -> None:
    """Say in the model's metadata which outputs may be written over inputs; nothing where none may."""
    if found := in_place(model.graph):
        model.metadata_props[KEY] = json.dumps(found, separators=(",", ":"))


def in_place(graph: onnx_ir.Graph) -> dict[str, str]:
    """Outputs that may be written over an input of theirs, with its name.

    Such an output is the input with rows scattered into it, and all that reads the input has been computed by then, in
    whatever order the model is run: each reader is one that the scattering itself depends on.
    """
    if any(attribute.type.name in {"GRAPH", "GRAPHS"} for node in graph for attribute in node.attributes.values()):
        return {}
    inputs, found = set(graph.inputs), dict[str, str]()
    for output in graph.outputs:
        node = output.producer()
        if node is None or node.op_type != "ScatterND":
            continue
        input = node.inputs[0]
        if input in inputs and input is not None and _read_before(input, node, graph):
            found[str(output.name)] = str(input.name)
    return found if len(set(found.values())) == len(found) else {}


def _read_before(input: onnx_ir.Value, writer: onnx_ir.Node, graph: onnx_ir.Graph) -> bool:
    """Whether the writer depends on all that reads the input, or what may be its memory under another name."""
    before, outputs = _needed(writer), set(graph.outputs)
    same, seen = [input], {input}
    while same:
        value = same.pop()
        if value in outputs:
            return False
        for node, index in value.uses():
            if node is writer:
                if index or value is not input:
                    return False
            elif node not in before:
                return False
            elif not _computes(node, graph):
                fresh = [result for result in node.outputs if result not in seen]
                same += fresh
                seen.update(fresh)
    return True


def _needed(node: onnx_ir.Node) -> set[onnx_ir.Node]:
    """All calls that a call depends on."""
    found: set[onnx_ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _computes(node: onnx_ir.Node, graph: onnx_ir.Graph) -> bool:
    """Whether the result is in memory of its own, whatever ONNX Runtime leaves out of the model."""
    if node.op_type == "Cast" and node.inputs[0] is not None:
        return bool(node.inputs[0].dtype != node.outputs[0].dtype)
    weights = set(graph.initializers.values())
    return node.op_type in COMPUTING and not any(value in weights for value in node.inputs)


class OnnxStates(Stateful):
    """A session with buffers of its own for inputs that are outputs of the call before.

    One buffer for both where the model says that it may be, so that a call writes what it changes and copies nothing;
    else two, which change places.

    Args:
        session: Of ONNX Runtime.
        device: What it runs on, for people.
        values: Zeros, which become the buffers.
        inputs: Which inputs they are.
        outputs: Which output each of them becomes.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        values: Sequence[Tensor],
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        self._session, self._device, self._binding = session, device, session.io_binding()
        given, made = session.get_inputs(), [value.name for value in session.get_outputs()]
        self._inputs, self._outputs = [given[place].name for place in inputs], [made[place] for place in outputs]
        self._given = [value for place, value in enumerate(given) if place not in inputs]
        self._made = [name for place, name in enumerate(made) if place not in outputs]
        shared = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, "{}"))
        pairs = zip(self._inputs, self._outputs, values, strict=True)
        self._now = list(values)
        self._after = [value if shared.get(made) == name else torch.zeros_like(value) for name, made, value in pairs]
        self._bind()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs that are not kept; UsageError for inputs of another number, type or shape."""
        if len(inputs) != len(self._given):
            names = ", ".join(value.name for value in self._given)
            raise UsageError(f"the engine takes {names}; {len(inputs)} tensors are given")
        arrays = [tensor.detach().contiguous().numpy() for tensor in inputs]
        for value, array in zip(self._given, arrays, strict=True):
            _require(value, array)
            self._binding.bind_cpu_input(value.name, array)
        for name in self._made:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        answers = self._binding.get_outputs()[len(self._outputs) :]
        found = tuple(torch.from_numpy(answer.numpy()) for answer in answers)
        self._now, self._after = self._after, self._now
        self._bind()
        return found

    def clear(self) -> None:
        """Keep zeros."""
        for value in self._now:
            value.zero_()

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What is kept, until the next call."""
        return tuple(self._now)

    @property
    def device(self) -> str:
        """What the session runs on."""
        return self._device

    def _bind(self) -> None:
        """Have the session read what there is now, and write what will be; outputs that are kept come first."""
        for name, value in zip(self._inputs, self._now, strict=True):
            array = value.numpy()
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, value.data_ptr())
        for name, value in zip(self._outputs, self._after, strict=True):
            array = value.numpy()
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, value.data_ptr())


def _require(value: onnxruntime.NodeArg, array: np.ndarray[Any, Any]) -> None:
    """Raise UsageError for an array that the session does not take; with bindings it says so without a class."""
    alike = len(array.shape) == len(value.shape) and all(
        isinstance(extent, str) or extent == found for extent, found in zip(value.shape, array.shape, strict=True)
    )
    kind = NAMES.get(array.dtype.name, array.dtype.name)
    if not alike or value.type != f"tensor({kind})":
        takes = f"%{value.name} as {value.type} {value.shape}"
        raise UsageError(f"the engine takes {takes}; found tensor({kind}) {list(array.shape)}")
