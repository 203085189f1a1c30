"""What the axes of every value in a graph are made of, followed from the inputs.

Data flow alone decides: no name of a module or of a model does. An axis of tokens is known once the frames, rows and
columns of one input meet in it, or once a grid of coordinates is multiplied onto tokens that came as one axis.
"""

from __future__ import annotations

from intarsia.ir.graph import Graph, Node
from intarsia.ir.sizes import Size, evaluate
from intarsia.ir.types import TensorType
from intarsia.passes.token_axes import Axes, Factor, is_known, length, unknown
from intarsia.passes.token_rules import moved


class TokenAxes:
    """What each axis of each value is made of.

    Named sizes get one example value each, so that a named batch does not stand in the way.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._sizes = {size.name: _example(size) for size in graph.sizes}
        self._known: dict[str, Axes] = {}
        for value in graph.inputs:
            if isinstance(value.type, TensorType):
                self._keep(value.name, self._source(value.name, made=False))
        for node in graph.nodes:
            for place, value in enumerate(node.outputs):
                if isinstance(value.type, TensorType):
                    self._keep(value.name, self._moved(node, place))

    def of(self, name: str) -> Axes:
        """The axes of a value; where nothing is known, their extents alone."""
        return self._known.get(name) or tuple(map(unknown, self.shape(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        """The extents of a value, named sizes replaced by the example."""
        return tuple(evaluate(dim, self._sizes) for dim in self._graph.type(name).shape)

    def is_tensor(self, name: str) -> bool:
        """Whether the value is a tensor and no number."""
        return isinstance(self._graph.values[name].type, TensorType)

    def _source(self, name: str, *, made: bool) -> Axes:
        """The axes of a value from which others stem."""
        return tuple(((Factor(extent, name, axis, made=made),),) for axis, extent in enumerate(self.shape(name)))

    def _keep(self, name: str, axes: Axes) -> None:
        """Note what is known; an axis that does not have the value's extent is none that we understand."""
        fitting = tuple(
            axis if length(axis) == extent else unknown(extent)
            for axis, extent in zip(axes, self.shape(name), strict=False)
        )
        if len(fitting) == len(self.shape(name)) and any(is_known(segment) for axis in fitting for segment in axis):
            self._known[name] = fitting

    def _moved(self, node: Node, place: int) -> Axes:
        """The axes of the call's output at ``place``; a grid of coordinates is a source of its own."""
        if node.op == "aten.meshgrid.indexing" and node.args.get("indexing") == "ij":
            return self._source(node.name, made=True)
        return moved(node, place, self)


def _example(size: Size) -> int:
    """As near as the size may come to a prime far from usual extents, so that it is mistaken for no other."""
    return min(max(1009, size.minimum), size.maximum or 1009)
