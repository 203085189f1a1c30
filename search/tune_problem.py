"""What is tuned: a kernel at a shape, and the calls of a graph that share the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from intarsia import kernels
from intarsia.ir.errors import Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.target import Target
from intarsia.kernels.launch import Launch, call_graph, launch_of, number, space_of
from intarsia.kernels.records import Key
from intarsia.kernels.tiling import TILINGS, Draw, Footprint, Shape, Space, Tile, require_tiling
from intarsia.kernels.tuned import key_of


@dataclass(frozen=True)
class Problem:
    """A kernel at one shape, of which an example can be made anywhere.

    Attributes:
        op: The operator, ``intarsia.linear_i8``.
        shape: Its extents, by the names of its ``Space``.
        dtype: Element type.
    """

    op: str
    shape: Shape
    dtype: str

    @cached_property
    def graph(self) -> Graph:
        """One call of the operator at the shape."""
        kernels.register()
        return call_graph(self.op, require_tiling(self.op).example(self.shape, Draw(self.dtype)))

    def space(self, architecture: str) -> Space:
        """The tiles that there are; ask ``launch_of`` first whether the kernel takes the call."""
        found = space_of(self.graph.nodes[0], self.graph, architecture)
        assert found is not None
        return found

    def launch(self, architecture: str, tile: Tile) -> Launch:
        """How the call is launched with the tile; Unsupported if the kernel does not take the call."""
        found = launch_of(self.graph.nodes[0], self.graph, architecture, tile)
        assert found is not None
        return found

    def footprint(self, tile: Tile) -> Footprint:
        """What the launch does."""
        return require_tiling(self.op).footprint(tile, self.shape, self.dtype)


@dataclass(frozen=True)
class Site:
    """Calls that share a tile.

    Attributes:
        key: What records about them are kept under.
        problem: The largest of them, which stands for all.
        calls: How many calls of the graphs there are; 0 for a shape that a user gave.
    """

    key: Key
    problem: Problem
    calls: int


def sites_of(graphs: Iterable[Graph], target: Target, sizes: Mapping[str, int]) -> tuple[Site, ...]:
    """What the graphs launch on ``target`` and may be launched otherwise, the most frequent first.

    ``sizes`` has a number for each named size of the graphs.

    Raises:
        Unsupported: A kernel does not take a call.
    """
    found: dict[Key, list[Problem]] = {}
    for graph in graphs:
        for node in graph.nodes:
            launch = launch_of(node, graph, target.architecture) if node.op in TILINGS else None
            if launch is None:
                continue
            space = space_of(node, graph, target.architecture)
            assert space is not None
            shape = {name: number(extent, sizes) for name, extent in space.extents.items()}
            key = key_of(node.op, space, launch, target)
            found.setdefault(key, []).append(Problem(node.op, shape, space.dtype))
    sites = (Site(key, max(these, key=_volume), len(these)) for key, these in found.items())
    return tuple(sorted(sites, key=lambda site: (-site.calls, str(site.key))))


def site_of(kernel: str, shape: Shape, dtype: str, target: Target) -> Site:
    """One kernel at one shape.

    Raises:
        UsageError: No such kernel, or the shape has other names than the kernel's extents.
        Unsupported: The kernel does not take such a call.
    """
    op = kernel if kernel.startswith("intarsia.") else f"intarsia.{kernel}"
    if op not in TILINGS:
        known = ", ".join(name.removeprefix("intarsia.") for name in TILINGS)
        raise UsageError(f"--kernel {kernel}: there is nothing to tune of that name; {known}")
    problem = Problem(op, dict(shape), dtype)
    try:
        graph = problem.graph
    except KeyError as error:
        raise UsageError(f"--shape: {kernel} also needs {error.args[0]}") from error
    except (RuntimeError, ZeroDivisionError) as error:
        raise Unsupported(f"--shape: {kernel} takes no such call: {str(error).strip().splitlines()[0]}") from error
    launch = launch_of(graph.nodes[0], graph, target.architecture)
    assert launch is not None
    space = problem.space(target.architecture)
    if unknown := sorted(shape.keys() - space.extents.keys()):
        raise UsageError(f"--shape: {kernel} has no extent {unknown[0]}; those are {', '.join(space.extents)}")
    return Site(key_of(op, space, launch, target), problem, 0)


def _volume(problem: Problem) -> tuple[int, str]:
    volume = 1
    for extent in problem.shape.values():
        volume *= max(1, extent)
    return volume, str(sorted(problem.shape.items()))
