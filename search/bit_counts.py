"""What a network's layers hold and compute, by layer from its graph, and what bits make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, prod

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Graph, Node, Ref
from intarsia.ir.program import Program, split_constant
from intarsia.ir.sizes import evaluate
from intarsia.search.bit_layers import Layer, Problem, bits
from intarsia.search.work import CONVOLUTIONS, node_work

FIRST_AND_LAST = "w8a8"
"""The bits of the first and the last layer, whatever the others have. Source: HAWQ-V3, section 4."""

MEBIBYTE = 2.0**20

PRODUCTS = ("intarsia.linear_i8i8", "intarsia.conv2d_i8i8")
"""What layers in integers are lowered to."""


@dataclass(frozen=True)
class Count:
    """A convolution or a linear layer.

    Attributes:
        name: The node's name.
        input: The value that it reads.
        weight: The value that holds its weights.
        parameters: Number of weights, without bias; 0 if an earlier layer has the same weights.
        macs: Multiply-adds of one call of the graph.
    """

    name: str
    input: str
    weight: str
    parameters: int
    macs: int


def counts(graph: Graph, sizes: Mapping[str, int] | None = None) -> tuple[Count, ...]:
    """Every convolution and linear layer whose weights depend on no input, in execution order, for these sizes.

    Biases and batch norms are not counted, so folding a batch norm changes nothing. InvalidGraph if a named size is
    missing.
    """
    sizes = sizes or {}
    constant, dynamic = split_constant(graph)
    known = {value.name for node in constant for value in node.outputs} | {value.name for value in graph.params}
    found: list[Count] = []
    for node in dynamic:
        if (factors := _factors(node)) is not None and factors[1] in known:
            found.append(_count(node, graph, sizes, *factors, seen={count.weight for count in found}))
    return tuple(found)


def ties(found: Sequence[Count]) -> tuple[tuple[str, ...], ...]:
    """Layers, by name, that must have the same bits: those that read the same value, or have the same weights.

    The value is quantized once. In a residual network these are the first convolution of a unit and the one on its
    shortcut. Source: HAWQ-V3's notebook (github.com/Zhen-Dong/HAWQ), ILP.ipynb.
    """
    readers: dict[tuple[str, str], list[str]] = {}
    for count in found:
        readers.setdefault(("input", count.input), []).append(count.name)
        readers.setdefault(("weight", count.weight), []).append(count.name)
    return tuple(tuple(group) for group in readers.values() if len(group) > 1)


def uniform(found: Sequence[Count], option: str) -> dict[str, str]:
    """Every layer with ``option``, such as ``w4a4``, but the first and the last one with eight bits."""
    ends = (found[0].name, found[-1].name) if found else ()
    return {count.name: FIRST_AND_LAST if count.name in ends else option for count in found}


def size_bytes(found: Iterable[Count], chosen: Mapping[str, str]) -> float:
    """Bytes of the weights in the bits of ``chosen``, option by layer."""
    return fsum(count.parameters * bits(chosen[count.name])[0] / 8 for count in found)


def size_mib(found: Iterable[Count], chosen: Mapping[str, str]) -> float:
    """``size_bytes`` in MiB, which the tables of HAWQ-V3 call MB."""
    return size_bytes(found, chosen) / MEBIBYTE


def bops(found: Iterable[Count], chosen: Mapping[str, str]) -> float:
    """Operations on bits of one call: weight bits x activation bits x multiply-adds, summed over the layers."""
    return fsum(prod(bits(chosen[count.name])) * count.macs for count in found)


def packing_saves(programs: Iterable[Program]) -> int:
    """Bytes that weights of integer products lose where those whose codes fit in four bits are two a byte.

    Programs are lowered and materialized; a weight that several of them have under one name counts once.
    """
    codes = {
        name: program.weights[name]
        for program in programs
        for name in (node.ref("weight") for node in program.graph.find(*PRODUCTS))
        if name in program.weights and not program.weights[name].is_meta
    }
    return sum(one.numel() // 2 for one in codes.values() if bool(((one >= -8) & (one <= 7)).all()))


def problem(
    found: Sequence[Count],
    perturbation: Mapping[str, Mapping[str, float]],
    *,
    tied: Sequence[Sequence[str]] | None = None,
    seconds: Mapping[str, Mapping[str, float]] | None = None,
) -> Problem:
    """The integer program's problem of these layers.

    Args:
        found: The network's layers.
        perturbation: By layer and option; a layer that is absent keeps the bits of ``FIRST_AND_LAST``.
        tied: Layers that must agree, such as ``quantize-integer``'s ties; ``ties(found)`` unless given.
        seconds: Of one call, by layer and option, where they are known.

    Raises:
        UsageError: A perturbation or a tie of a layer that is not in ``found``.
    """
    groups = ties(found) if tied is None else tied
    numbers = {count.name: number for number, count in enumerate(found)}
    if unknown := {*perturbation, *(name for group in groups for name in group)} - numbers.keys():
        raise UsageError(f"bits: {', '.join(sorted(unknown))} is no convolution or linear layer of the graph")
    layers = tuple(
        Layer(
            name=count.name,
            parameters=count.parameters,
            macs=count.macs,
            perturbation=perturbation.get(count.name, {FIRST_AND_LAST: 0.0}),
            seconds=(seconds or {}).get(count.name, {}),
        )
        for count in found
    )
    return Problem(layers, tuple(tuple(numbers[name] for name in group) for group in groups))


def _factors(node: Node) -> tuple[str, str] | None:
    """The names of input and weight of a convolution or linear layer; None for anything else."""
    ours = node.op.startswith(("intarsia.linear_", "intarsia.conv2d_"))
    if not ours and node.op not in CONVOLUTIONS and node.op != "aten.linear":
        return None
    value, weight = node.args.get("input"), node.args.get("weight")
    return (value.name, weight.name) if isinstance(value, Ref) and isinstance(weight, Ref) else None


def _count(node: Node, graph: Graph, sizes: Mapping[str, int], value: str, weight: str, *, seen: set[str]) -> Count:
    work = node_work(node, graph, sizes)
    assert work is not None
    elements = prod(evaluate(dim, sizes) for dim in graph.type(weight).shape)
    return Count(node.name, value, weight, 0 if weight in seen else elements, round(work.flops / 2))
