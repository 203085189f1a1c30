"""Skip the blocks of a step and add what they added last: the two rules of when that users know, as passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph, Node, Ref, Value
from intarsia.ir.plan import Chosen
from intarsia.ir.rewrite import fresh
from intarsia.ir.segments import split
from intarsia.ir.target import Target
from intarsia.passes.base import Pass
from intarsia.passes.block_cuts import BlockCuts


@dataclass(frozen=True)
class StepCaching(Pass):
    """Leave the graph as it is, and cut it in three: what every step runs, what some steps skip, and the head.

    The first segment gives the signal, then the stream, then what else later ones use. The second gives the stream
    behind the last block, and nothing else. A step that skips it gives the third what the stream is now, and what the
    second segment added to it when it last ran.

    Attributes:
        threshold: Of the relative change of the signal; a step whose change is below skips the second segment.
        warm_up: First steps that run all three, 1 or more.
        tail: Last steps that do.
    """

    threshold: float = 0.1
    warm_up: int = 1
    tail: int = 1

    follows: ClassVar[bool] = False
    """Whether a signal is held against that of the step before, and not against that of the last computed step."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is {self.threshold}; it is a relative change, 0 or more")
        if self.warm_up < 1 or self.tail < 0:
            raise ValueError("warm_up is 1 or more, for the first step has nothing to reuse; tail is 0 or more")

    def refusals(self, graph: Graph, target: Target) -> dict[str, str]:
        """How many calls are skipped, about which there is no choice; of a graph that cannot be cut so, the reason."""
        try:
            _, blocks, _ = self.split(graph)
        except Unsupported as error:
            return {graph.name: str(error)}
        return {
            graph.name: f"no choice: {len(blocks.nodes)} of {len(graph.nodes)} calls are skipped by steps that reuse"
        }

    def run(self, graph: Graph, target: Target, chosen: Chosen) -> Graph:
        """The graph itself."""
        return graph

    @abstractmethod
    def reach(self, before: float, change: float) -> float:
        """What is held against the threshold, after a step's relative change; ``before`` is that of the step before."""

    @abstractmethod
    def split(self, graph: Graph) -> tuple[Graph, ...]:
        """The three segments.

        Raises:
            Unsupported: The graph has no residual stream, or more than the stream goes from its blocks to its head.
        """


@dataclass(frozen=True)
class TeaCache(StepCaching):
    """Skip all blocks while the input of the first one, modulated by the time step, has hardly changed.

        %x: f32[2, 512, 128] = ...                        step.0: the signal %modulated, the stream %x
        %modulated: f32[2, 512, 128] = ...
        %y: f32[2, 512, 128] = aten.add.Tensor(...)       step.1: the stream %y behind the last block
        %velocity: f32[2, 512, 48] = aten.linear(...)     step.2

    The relative L1 changes from step to step are put through a polynomial and summed up; where the sum reaches the
    threshold, the step is computed and the sum starts from 0.

    Attributes:
        coefficients: Of the polynomial, the highest power first, as they are published for each network; the change
            itself where none are given.

    Source: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, 2024, arXiv 2411.19108,
    section 3; ``warm_up`` and ``tail`` are ret_steps and what cutoff_steps leaves in the authors' code. For some
    networks that code takes the embedding of the time step alone as the signal; here it is the modulated input, as in
    the paper. Finding the cut in a traced graph is ours.
    """

    coefficients: tuple[float, ...] = ()

    name: ClassVar[str] = "teacache"
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(one, int | float) for one in self.coefficients):
            raise ValueError(f"coefficients are {self.coefficients}; they are numbers, that of the highest power first")

    def reach(self, before: float, change: float) -> float:
        """The sum of all changes since the last computed step, each through the polynomial."""
        if not self.coefficients:
            return before + change
        return before + reduce(lambda value, coefficient: value * change + coefficient, self.coefficients, 0.0)

    def split(self, graph: Graph) -> tuple[Graph, ...]:
        """Before the blocks, all blocks, behind them; errors as of ``StepCaching.split``."""
        cuts = BlockCuts.of(graph)
        if cuts.signal == cuts.first:
            raise Unsupported(
                f"{graph.name}: its first attention reads %{cuts.first} as it is, with nothing that a time step "
                "changes; first-block-cache needs no such signal"
            )
        return _segments(graph, cuts, signal=cuts.signal, stream=cuts.first)


@dataclass(frozen=True)
class FirstBlockCache(StepCaching):
    """Skip all blocks but the first while what the first adds has hardly changed since a step that ran all.

        %x: f32[2, 512, 128] = ...                        step.0: the signal %one - %x, the stream %one
        %one: f32[2, 512, 128] = aten.add.Tensor(...)
        %y: f32[2, 512, 128] = aten.add.Tensor(...)       step.1: the stream %y behind the last block
        %velocity: f32[2, 512, 48] = aten.linear(...)     step.2

    Source: first block cache of ParaAttention (chengzeyi), as in diffusers, ``hooks/first_block_cache.py``: the mean
    absolute change of the first block's residual over its mean absolute value, against the last step that was
    computed. The published rule has no ``tail``, its ``warm_up`` is 1, and a change that equals the threshold skips;
    here it does not, so that a threshold of 0 computes every step. Finding the cut in a traced graph is ours.
    """

    name: ClassVar[str] = "first-block-cache"

    def reach(self, before: float, change: float) -> float:
        """The change itself."""
        return change

    def split(self, graph: Graph) -> tuple[Graph, ...]:
        """Through the first block, the other blocks, behind them; errors as of ``StepCaching.split``."""
        cuts = BlockCuts.of(graph)
        if len(cuts.behind) == 1:
            raise Unsupported(f"{graph.name} has one block, and behind the first there is nothing to skip")
        stream = cuts.behind[0]
        name = fresh("first_block", graph.values)
        signal = Node(
            "aten.sub.Tensor", {"self": Ref(stream), "other": Ref(cuts.first)}, (Value(name, graph.type(stream)),)
        )
        at = 1 + next(n for n, node in enumerate(graph.nodes) if stream in (value.name for value in node.outputs))
        graph = replace(graph, nodes=(*graph.nodes[:at], signal, *graph.nodes[at:]))
        return _segments(graph, cuts, signal=name, stream=stream)


def _segments(graph: Graph, cuts: BlockCuts, *, signal: str, stream: str) -> tuple[Graph, ...]:
    """The graph in three: what leads to the signal and the stream, what else goes through blocks, what is behind."""
    head = _ancestors(graph, (signal, stream))
    carried = {cuts.first}
    stages: dict[str, int] = {}
    for node in graph.nodes:
        if carried.intersection(node.inputs):
            carried.update(value.name for value in node.outputs)
            stages |= {} if node.name in head else {node.name: 1}
    stages |= {node.name: 2 for node in graph.users.get(cuts.last, ())}
    given = replace(graph, outputs=(*graph.outputs, signal, stream, cuts.last))
    before, blocks, *behind = split(given, stages, late=True)
    if not behind:
        raise Unsupported(f"{graph.name}: behind its last block, %{cuts.last}, there is nothing")
    if others := [name for name in blocks.outputs if name != cuts.last]:
        raise Unsupported(
            f"{graph.name}: %{others[0]} goes past %{cuts.last}, the stream behind the last block; a step that skips "
            "the blocks would lack it"
        )
    rest = [name for name in before.outputs if name not in (signal, stream)]
    return (replace(before, outputs=(signal, stream, *rest)), blocks, *behind)


def _ancestors(graph: Graph, names: Iterable[str]) -> set[str]:
    """Nodes, by name, that values are computed by."""
    found: set[str] = set()
    open_ = [graph.producers[name] for name in names if name in graph.producers]
    while open_:
        node = open_.pop()
        if node.name not in found:
            found.add(node.name)
            open_ += [graph.producers[name] for name in node.inputs if name in graph.producers]
    return found
