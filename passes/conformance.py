"""What every pass must satisfy; run it on a pass of your own in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from intarsia.ir.errors import InvalidGraph
from intarsia.ir.execute import check_types
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Choices, Chosen
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.spec import Spec, construct
from intarsia.ir.target import Target
from intarsia.ir.verify import verify
from intarsia.passes.base import Pass, check_chosen


def check_pass(
    pass_: Pass,
    program: Program,
    target: Target,
    *,
    sizes: Mapping[str, int] | None = None,
    error: float = 0.0,
) -> None:
    """Raise AssertionError, in one sentence, unless the pass keeps its promises on ``program``.

    The promises: its notation makes it again; every offered option runs and gives a valid graph with the same
    interface, the same weights or fewer, and text that reads back; defaults change nothing; a second run finds nothing
    to do. Where the weights are there, the graphs run: with the defaults within ``error``, with any choice to finite
    values.

    Args:
        sizes: Named sizes for the run; small ones otherwise.
        error: Largest squared error, relative to the squares of the unchanged graph's outputs, that a run without
            choices may cause; 0 asks for the same bits.
    """
    _check_notation(pass_)
    graph = program.graph
    choices = pass_.choices(graph, target)
    _check_choices(pass_, choices, pass_.refusals(graph, target))
    changed = pass_.run(graph, target, {})
    _check_graph(pass_, graph, changed, {})
    _check_defaults(pass_, graph, changed, target, choices)
    if pass_.run(changed, target, {}) != changed:
        raise AssertionError(f"{pass_}: a second run changes what the first one left")
    for place, options in choices.items():
        for option in options[1:]:
            _check_structure(pass_, graph, pass_.run(graph, target, {place: option}), {place: option})
    for chosen in _mixtures(choices):
        _check_graph(pass_, graph, pass_.run(graph, target, chosen), chosen)
    if not program.is_meta:
        inputs = example_inputs(graph, sizes)
        _check_default_result(pass_, program, changed, inputs, error=error)
        for chosen in _mixtures(choices):
            _check_chosen_result(pass_, program, pass_.run(graph, target, chosen), inputs, chosen=chosen)


def _check_notation(pass_: Pass) -> None:
    again = construct(type(pass_), Spec.parse(str(pass_)))
    if again != pass_ or str(again) != str(pass_):
        raise AssertionError(f"{pass_}: its notation makes {again!r}, not the same pass again")


def _check_choices(pass_: Pass, choices: Choices, refusals: Mapping[str, str]) -> None:
    for place, options in choices.items():
        least = 2 if type(pass_).unlisted is Pass.unlisted else 1  # others may be asked for that no list holds
        if len(options) < least or len(set(options)) < len(options):
            raise AssertionError(f"{pass_}: %{place} offers {options}; a choice has at least two different options")
        if place in refusals:
            raise AssertionError(f"{pass_}: %{place} offers {options} and is refused: {refusals[place]}")
    for place, reason in refusals.items():
        if not reason or "\n" in reason:
            raise AssertionError(f"{pass_}: the reason at %{place} is {reason!r}, not one line")


def _check_defaults(pass_: Pass, graph: Graph, changed: Graph, target: Target, choices: Choices) -> None:
    defaults = {place: options[0] for place, options in choices.items()}
    check_chosen(pass_, graph, target, defaults)
    if pass_.run(graph, target, defaults) != changed:
        raise AssertionError(f"{pass_}: the first options do not give what a run without answers gives")
    if choices and changed != graph:
        raise AssertionError(f"{pass_}: the first options change the graph; the first option leaves things as they are")


def _check_graph(pass_: Pass, graph: Graph, changed: Graph, chosen: Chosen) -> None:
    _check_structure(pass_, graph, changed, chosen)
    where = _where(pass_, chosen)
    try:
        check_types(changed)
    except InvalidGraph as error:
        raise AssertionError(f"{where}: the graph it gives is broken: {error}") from error
    if Graph.parse(str(changed)) != changed:
        raise AssertionError(f"{where}: the graph it gives does not read back from its text")


def _check_structure(pass_: Pass, graph: Graph, changed: Graph, chosen: Chosen) -> None:
    where = _where(pass_, chosen)
    try:
        verify(changed)
    except InvalidGraph as error:
        raise AssertionError(f"{where}: the graph it gives is broken: {error}") from error
    if changed.inputs != graph.inputs:
        raise AssertionError(f"{where}: changes the inputs, which are the model's interface")
    if _output_types(changed) != _output_types(graph):
        raise AssertionError(f"{where}: changes the types of the outputs, which are the model's interface")
    if foreign := [param.name for param in changed.params if param not in graph.params]:
        raise AssertionError(f"{where}: adds or changes the parameter %{foreign[0]}; insert a node that computes it")


def _output_types(graph: Graph) -> list[object]:
    return [graph.values[name].type for name in graph.outputs]


def _where(pass_: Pass, chosen: Chosen) -> str:
    if not chosen:
        return str(pass_)
    first = ", ".join(f"{place}: {option}" for place, option in list(chosen.items())[:3])
    return f"{pass_} with {first}{', ...' if len(chosen) > 3 else ''}"


def _check_default_result(
    pass_: Pass, program: Program, changed: Graph, inputs: tuple[Tensor, ...], *, error: float
) -> None:
    expected = program.module()(*inputs)
    found = Program(changed, program.weights).module()(*inputs)
    for before, after in zip(expected, found, strict=True):
        difference = _relative_error(before, after)
        if not difference <= error:
            raise AssertionError(f"{pass_}: changes the result by {difference:.3g}; at most {error:.3g} was declared")


def _check_chosen_result(
    pass_: Pass, program: Program, changed: Graph, inputs: tuple[Tensor, ...], *, chosen: Chosen
) -> None:
    for output in Program(changed, program.weights).module()(*inputs):
        if not output.isfinite().all():
            raise AssertionError(f"{_where(pass_, chosen)}: the result is not finite")


def _relative_error(before: Tensor, after: Tensor) -> float:
    if torch.equal(before, after):
        return 0.0
    wide = before.double()
    return float((after.double() - wide).square().sum() / wide.square().sum())


def _mixtures(choices: Choices) -> Iterator[Chosen]:
    """Answers that together take every option of every place, each answering all places at once."""
    for turn in range(1, max((len(options) for options in choices.values()), default=1)):
        yield {place: options[min(turn, len(options) - 1)] for place, options in choices.items()}
