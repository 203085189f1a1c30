"""What every operator must satisfy; run it on an operator of your own in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from intarsia import kernels
from intarsia.ir.execute import type_of
from intarsia.ir.graph import Arg, Graph, Node, Ref, Value
from intarsia.ir.operators import resolve, returns_sequence
from intarsia.ir.target import Target

Case = Mapping[str, Any]
"""Arguments of a call by their names in the operator's schema, tensors as tensors."""


def check_operator(op: str, cases: Sequence[Case], target: Target) -> None:
    """Raise AssertionError, in one sentence, unless the operator called ``op`` keeps its promises on every case.

    The promises: it is registered under its name; it changes and aliases no argument; the fake kernel and the meta
    device agree with the eager kernel on every type; equal arguments give equal bits; ``why_not`` takes the case and
    ``work`` says what it costs.
    """
    if op not in kernels.operators():
        raise AssertionError(
            f"{op}: no such operator; name it in OPERATORS or in the entry point group {kernels.GROUP}"
        )
    promised = ("OPS", "REFERENCES", "LAUNCHES", "why_not", "work")
    if missing := [name for name in promised if not hasattr(kernels.operators()[op], name)]:
        raise AssertionError(f"{op}: its module has no {', '.join(missing)}; an operator's module has {promised}")
    if op not in kernels.operators()[op].OPS:
        raise AssertionError(f"{op}: its module registers {', '.join(kernels.operators()[op].OPS)}")
    if not cases:
        raise AssertionError(f"{op}: no cases to check")
    for case in cases:
        _check_case(op, case, target)


def _check_case(op: str, case: Case, target: Target) -> None:
    where = f"{op}({', '.join(f'{key}={_show(value)}' for key, value in case.items())})"
    before = {key: value.clone() for key, value in case.items() if isinstance(value, Tensor)}
    results = _call(op, case)
    for key, tensor in before.items():
        if not torch.equal(tensor, case[key]):
            raise AssertionError(f"{where}: changes its argument {key}")
    if any(_shares(result, case[key]) for result in results for key in before):
        raise AssertionError(f"{where}: gives back memory of an argument")
    if not all(map(torch.equal, results, _call(op, case))):
        raise AssertionError(f"{where}: two calls give different bits")
    _check_types(op, case, results, where)
    _check_reference(op, case, results, where)
    _check_contract(op, case, results, target, where)


def _call(op: str, case: Case) -> tuple[Tensor, ...]:
    result = resolve(op)(**case)
    return tuple(result) if returns_sequence(op) else (result,)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _check_types(op: str, case: Case, results: Sequence[Tensor], where: str) -> None:
    expected = list(map(type_of, results))
    with FakeTensorMode() as mode:
        fake = _call(op, {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in case.items()})
    meta = _call(op, {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in case.items()})
    for kind, found in (("fake kernel", fake), ("meta device", meta)):
        if list(map(type_of, found)) != expected:
            given = ", ".join(str(type_of(value)) for value in found)
            raise AssertionError(f"{where}: the {kind} gives {given}, a run gives {', '.join(map(str, expected))}")
        if list(map(_order, found)) != list(map(_order, results)):
            raise AssertionError(f"{where}: in memory, what the {kind} gives lies otherwise than what a run gives")


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the axes that matter: those of more than one element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(step for extent, step in pairs if extent > 1) if tensor.numel() else ()


def _check_reference(op: str, case: Case, results: Sequence[Tensor], where: str) -> None:
    reference = kernels.operators()[op].REFERENCES.get(op)
    if reference is None:
        raise AssertionError(f"{where}: REFERENCES of its module has no {op}")
    found = reference(**case)
    try:
        torch.testing.assert_close(found if returns_sequence(op) else (found,), tuple(results), equal_nan=True)
    except AssertionError as error:
        raise AssertionError(f"{where}: the reference differs: {str(error).splitlines()[0]}") from error


def _check_contract(op: str, case: Case, results: Sequence[Tensor], target: Target, where: str) -> None:
    """``why_not`` and ``work`` about the case as a node whose tensors are parameters, and its activation an input."""
    tensors = {key: Value(key, type_of(value)) for key, value in case.items() if isinstance(value, Tensor)}
    args: dict[str, Arg] = {key: Ref(key) if key in tensors else value for key, value in case.items()}
    outputs = tuple(Value(f"out{i}", type_of(result)) for i, result in enumerate(results))
    node = Node(op, args, outputs)
    params = tuple(value for key, value in tensors.items() if key != "input")
    inputs = tuple(value for key, value in tensors.items() if key == "input")
    graph = Graph("case", inputs, params, (node,), tuple(value.name for value in outputs))
    reason = kernels.why_not(node, graph, target)
    if reason is not None:
        raise AssertionError(f"{where}: why_not refuses what runs: {reason}")
    work = kernels.work(node, graph, {})
    if work is None or work.flops < 0 or work.bytes < bool(tensors):
        raise AssertionError(f"{where}: work says {work}; a call with tensors moves bytes")


def _show(value: object) -> str:
    return str(type_of(value)) if isinstance(value, Tensor) else repr(value)
