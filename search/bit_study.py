"""What is known of a network's layers in few bits: ranges, what bits cost, what they take, and the plan of a choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import fsum

from torch import Tensor

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Phase, Plan, Step
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import Target
from intarsia.passes.base import find_pass
from intarsia.passes.quantize_integer import QuantizeInteger
from intarsia.passes.quantize_integer_layers import KEEP, ties
from intarsia.search.bit_counts import FIRST_AND_LAST, Count, counts
from intarsia.search.bit_data import Data, check
from intarsia.search.bit_errors import Group, errors_on_grids
from intarsia.search.bit_layers import Layer, Problem, bits
from intarsia.search.bit_readers import read_by
from intarsia.search.bit_seconds import Price, layer_seconds
from intarsia.search.bit_sensitivity import OPTIONS, Perturbations, perturbations
from intarsia.search.bit_settings import GRIDS, NO, BitSearch
from intarsia.search.bits import Solution, solve
from intarsia.search.calibration import calibrate, find_method
from intarsia.search.estimate import Estimate
from intarsia.search.journal import Journal
from intarsia.search.progress import Progress, Silent
from intarsia.search.smoothing import smooth
from intarsia.search.work import sizes_of

FOLD, SMOOTH, CALIBRATE, QUANTIZE, LOWER = (
    "fold-batch-norm",
    "smooth-linear",
    "calibrate",
    "quantize-integer",
    "lower-integer",
)

FLOAT = "w32a32"
"""What ``keep`` counts as."""


@dataclass(frozen=True)
class Part:
    """Steps of a loop that are treated alike, or the one call of a network without a loop.

    Attributes:
        data: Calls of the network in float; ranges are measured on all of them.
        sample: Those that sensitivities are measured on some of, where the others are more of some steps; None for all.
        first: The first step.
        last: The last step; None for the loop's last.
        share: Of all steps.
    """

    data: Data
    first: int = 0
    last: int | None = None
    share: float = 1.0
    sample: Data | None = None


@dataclass
class BitStudy:
    """Measures what it is asked for, once; ``study.plan(study.solve({"bops": limit}))`` is a plan.

    A layer is called by its name, or with several parts ``number/name``.

    Attributes:
        program: The network in float, batch norms not folded, weights in memory.
        parts: What is measured on; several parts have ranges and bits of their own.
        journal: What sensitivities were measured before, and where they go.
        guide: What a loop keeps of the rows of a call's output.
        price: Measured seconds of a call, where ``how.costs`` asks for them.
    """

    program: Program
    target: Target
    parts: Sequence[Part]
    how: BitSearch = field(default_factory=BitSearch)
    journal: Journal = field(default_factory=Journal)
    progress: Progress = field(default_factory=Silent)
    guide: Callable[[Tensor], Tensor] | None = None
    price: Price | None = None

    @classmethod
    def of(cls, program: Program, target: Target, data: Data, how: BitSearch, journal: Journal) -> BitStudy:
        """Of a network without a loop; UsageError for data that is none."""
        check(data, program.graph)
        return cls(program, target, (Part(data),), how, journal)

    @cached_property
    def settled(self) -> BitSearch:
        """How it is searched, nothing left open."""
        if self.guide is not None or len(self.parts) > 1:
            return self.how.for_loop()
        graph = self.program.graph
        return self.how.for_call(classes=len(graph.type(graph.outputs[0]).shape) == 2)

    @cached_property
    def before(self) -> tuple[Step, ...]:
        """The steps before ranges are measured that do something; the answers of ``smooth-linear`` are measured."""
        graph, steps = self.program.graph, []
        for text in (FOLD, *([SMOOTH] if self.settled.smooth != NO else [])):
            chosen = self._smoothing(graph) if text == SMOOTH else {}
            changed = find_pass(text).run(graph, self.target, chosen)
            steps += [Step(text, chosen)] if changed is not graph else []
            graph = changed
        return tuple(steps)

    @cached_property
    def ready(self) -> Program:
        """The network after these steps, its weights computed."""
        graph = self.program.graph
        for step in self.before:
            graph = find_pass(step.run).run(graph, self.target, step.chosen)
        return materialize(Program(graph, self.program.weights))

    @cached_property
    def wide(self) -> tuple[Mapping[str, str], ...]:
        """The answers of ``calibrate`` for all values, by part."""
        return self._calibrated(self.settled.ranges)

    @cached_property
    def narrow(self) -> tuple[Mapping[str, str], ...]:
        """The same for values that only inputs of four bits are made of."""
        return self._calibrated(self.settled.narrow)

    def ranges(self, number: int, chosen: Mapping[str, str]) -> Mapping[str, str]:
        """The answers of ``calibrate`` in a part where layers have these options."""
        four = {layer for layer, option in chosen.items() if option != KEEP and bits(option)[1] == 4}
        if not four:
            return self.wide[number]
        only = read_by(four, self.wide[number], self.ready.graph)
        return {place: self.narrow[number][place] if place in only else o for place, o in self.wide[number].items()}

    @cached_property
    def calibrated(self) -> tuple[Graph, ...]:
        """The graph with its ranges, by part."""
        return tuple(find_pass(CALIBRATE).run(self.ready.graph, self.target, found) for found in self.wide)

    @cached_property
    def offered(self) -> tuple[Mapping[str, tuple[str, ...]], ...]:
        """By part, what each layer may have; eight bits where it takes none of the options that are asked for.

        Raises:
            Unsupported: No layer takes any.
        """
        found = tuple(
            {
                layer: tuple(option for option in self.how.offered if option in options) or (FIRST_AND_LAST,)
                for layer, options in QuantizeInteger().choices(graph, self.target).items()
            }
            for graph in self.calibrated
        )
        if not all(found):
            refused = QuantizeInteger().refusals(self.calibrated[0], self.target)
            first = next((f"the first, %{layer}: {why}" for layer, why in refused.items()), "it has none")
            raise Unsupported(f"strategy bits: no layer of {self.program.graph.name} can be in integers; {first}")
        return found

    @cached_property
    def ties(self) -> tuple[tuple[Group, ...], ...]:
        """Layers of which all must have the same bits, by part: they share an input, which is rounded once."""
        return tuple(
            tuple(group for group in ties(graph) if all(layer in offered for layer in group))
            for graph, offered in zip(self.calibrated, self.offered, strict=True)
        )

    @cached_property
    def errors(self) -> Perturbations:
        """What each option of each layer costs in accuracy: the part's mean, times its share of the steps."""
        found: Perturbations = {}
        for number, part in enumerate(self.parts):
            for layer, row in self._errors(number).items():
                weighed = {option: estimate.times(part.share) for option, estimate in row.items()}
                found[self.name(number, layer)] = weighed
        return found

    @property
    def error_is(self) -> str:
        """What ``errors`` are, in words."""
        match self.how.sensitivity:
            case "hessian":
                return "the trace of a layer's Hessian, averaged, times the squared change of its weights"
            case "fisher":
                return "half the Fisher information of a layer's weights times their squared changes"
            case "output":
                return "the squared change of the output with a layer's weights rounded, relative to its squared norm"
        if self._squared:
            return "the squared change of the output with a layer on grids, relative to its squared norm"
        return "the Kullback-Leibler divergence from the float network's answer with a layer on grids"

    @cached_property
    def seconds(self) -> tuple[Mapping[str, Mapping[str, float]], ...]:
        """Seconds of one call, by part, layer and option, ``keep`` among them."""
        return tuple(
            layer_seconds(
                Program(graph, self.ready.weights),
                self.target,
                {layer: tuple(dict.fromkeys((KEEP, *options))) for layer, options in offered.items()},
                self.price,
            )
            for graph, offered in zip(self.calibrated, self.offered, strict=True)
        )

    @cached_property
    def problem(self) -> Problem:
        """The integer program's problem: all layers of all parts that can be in integers."""
        return self._problem(self.errors)

    @cached_property
    def unmeasured(self) -> Problem:
        """The same without perturbations: what limits mean, and whether anything keeps them, is known from it."""
        nothing = {
            self.name(number, layer): dict.fromkeys(options, Estimate((0.0,)))
            for number, offered in enumerate(self.offered)
            for layer, options in offered.items()
        }
        return self._problem(nothing)

    @cached_property
    def counts(self) -> tuple[Count, ...]:
        """Layers with their weights and multiply-adds of one call; of an open number of samples, of one."""
        graph = self.program.graph
        sizes = sizes_of(graph, [tensor[:1] for tensor in self.parts[0].data.batches[0]]) if graph.sizes else {}
        return counts(self.ready.graph, sizes)

    @cached_property
    def within(self) -> Problem:
        """The problem whose extent shares are taken of: integers alone."""
        layers = tuple(
            replace(layer, perturbation={o: cost for o, cost in layer.perturbation.items() if o != FLOAT} or {FLOAT: 0})
            for layer in self.unmeasured.layers
        )
        return Problem(layers, self.unmeasured.ties)

    @property
    def limits(self) -> dict[str, float]:
        """Those of ``how``, in bytes, operations and seconds."""
        return self.how.limits(self.within)

    def limit(self, measure: str, share: float) -> float:
        """What a share of the way from the fewest bits to the most is, in bytes, operations or seconds."""
        fewest, most = self.within.extent(measure)
        return fewest * (1 - share) + most * share

    def solve(self, limits: Mapping[str, float]) -> dict[str, str]:
        """The options of least perturbation within limits in bytes, operations and seconds; ``Infeasible`` if none."""
        return self.chosen(solve(self.problem, limits))

    def chosen(self, found: Solution) -> dict[str, str]:
        """A solution's options by layer, as the plan calls them."""
        names = (layer.name for layer in self.problem.layers)
        return {n: KEEP if o == FLOAT else o for n, o in zip(names, found.chosen, strict=True)}

    def used(self, chosen: Mapping[str, str], measure: str) -> float:
        """What a choice takes of a measure, or its ``perturbation``."""
        options = {name: FLOAT if option == KEEP else option for name, option in chosen.items()}
        return fsum(layer.cost(options[layer.name], measure) for layer in self.problem.layers)

    def plan(self, chosen: Mapping[str, str], *, notes: Mapping[str, object] | None = None) -> Plan:
        """The plan that gives layers these options; one that is left out has eight bits."""
        phases = tuple(
            Phase(self._steps(number, chosen), part.first, part.last) for number, part in enumerate(self.parts)
        )
        return Plan(self.program.graph.fingerprint, self.target.name, phases, notes or {})

    def name(self, number: int, layer: str) -> str:
        """What a layer of a part is called."""
        return layer if len(self.parts) == 1 else f"{number}/{layer}"

    def _steps(self, number: int, chosen: Mapping[str, str]) -> tuple[Step, ...]:
        asked = {layer: chosen.get(self.name(number, layer), FIRST_AND_LAST) for layer in self.offered[number]}
        decided = {layer: option for layer, option in asked.items() if option != KEEP}
        ranges = Step(CALIBRATE, self.ranges(number, decided))
        return *self.before, ranges, Step(QUANTIZE, decided), Step(LOWER)

    def _problem(self, errors: Perturbations) -> Problem:
        layers = tuple(
            self._layer(number, part, count, errors)
            for number, part in enumerate(self.parts)
            for count in self.counts
            if count.name in self.offered[number]
        )
        numbers = {layer.name: place for place, layer in enumerate(layers)}
        tied = (
            [self.name(number, layer) for layer in group] for number, ties in enumerate(self.ties) for group in ties
        )
        return Problem(layers, tuple(tuple(numbers[name] for name in group) for group in tied))

    def _layer(self, number: int, part: Part, count: Count, errors: Perturbations) -> Layer:
        name = self.name(number, count.name)
        offered, seconds = self.offered[number][count.name], self.seconds[number][count.name]
        return Layer(
            name=name,
            parameters=count.parameters,
            macs=count.macs * part.share,
            perturbation={_counted(option): errors[name][option].mean for option in offered},
            seconds={_counted(option): seconds[option] * part.share for option in offered},
        )

    def _errors(self, number: int) -> Perturbations:
        """What each option of each layer of a part costs; a layer that has no choice costs nothing."""
        offered, part = self.offered[number], self.parts[number]
        data = _some(part.sample or part.data, self.settled.samples, squared=self._squared)
        nothing = {layer: {option: Estimate((0.0,)) for option in options} for layer, options in offered.items()}
        open_layers = [layer for layer, options in offered.items() if len(options) > 1]
        if self.how.sensitivity != GRIDS:
            options = sorted({option for layer in open_layers for option in offered[layer] if option != KEEP})
            measured = perturbations(
                self.ready,
                data,
                journal=self.journal,
                method=self.how.sensitivity,
                options=options or OPTIONS,
                layers=open_layers,
                progress=self.progress,
            )
            return {layer: {**nothing[layer], **measured.get(layer, {})} for layer in nothing}
        tied = {layer: group for group in self.ties[number] for layer in group}
        groups = dict.fromkeys(tied.get(layer, (layer,)) for layer in open_layers)
        if any(bits(option)[1] == 4 for layer in open_layers for option in offered[layer] if option != KEEP):
            _ = self.narrow  # all of its calls first, not in the middle of what progress is shown of
        found = errors_on_grids(
            self.ready,
            {group: [o for o in offered[group[0]] if o != KEEP and _share(offered, group, o)] for group in groups},
            partial(self._changed, number),
            data,
            journal=self.journal,
            guide=self.guide,
            progress=self.progress,
            phase="layers on grids" + (f", phase {number + 1} of {len(self.parts)}" if len(self.parts) > 1 else ""),
        )
        return {layer: {**nothing[layer], **found.get(layer, {})} for layer in nothing}

    def _changed(self, number: int, group: Group, option: str) -> Graph:
        """The graph with one group of layers on grids."""
        chosen = dict.fromkeys(group, option)
        graph = find_pass(CALIBRATE).run(self.ready.graph, self.target, self.ranges(number, chosen))
        return QuantizeInteger().run(graph, self.target, chosen)

    def _calibrated(self, method: str) -> tuple[Mapping[str, str], ...]:
        return tuple(
            calibrate(
                self.ready,
                part.data.batches,
                find_method(method),
                progress=self.progress,
                total=len(part.data.batches),
            )
            for part in self.parts
        )

    def _smoothing(self, graph: Graph) -> Mapping[str, str]:
        batches = [batch for part in self.parts for batch in part.data.batches]
        program = Program(graph, self.program.weights)
        method = find_method(self.settled.ranges)
        found = smooth(program, batches, bits=self.settled.smooth, method=method, progress=self.progress)
        return dict(found.chosen)

    @property
    def _squared(self) -> bool:
        """Whether the first output is numbers rather than scores of classes."""
        return self.settled.outputs == "numbers"


def _counted(option: str) -> str:
    return FLOAT if option == KEEP else option


def _share(offered: Mapping[str, Sequence[str]], group: Group, option: str) -> bool:
    return all(option in offered[layer] for layer in group)


def _some(data: Data, samples: int, *, squared: bool) -> Data:
    """Calls of so many samples together, at least one, evenly spread."""
    count = min(len(data.batches), max(1, samples // max(1, len(data.batches[0][0]))))
    picked = [(2 * number + 1) * len(data.batches) // (2 * count) for number in range(count)]
    labels = [data.labels[number] for number in picked] if data.labels is not None and not squared else None
    return Data([data.batches[number] for number in picked], labels, squared=squared)
