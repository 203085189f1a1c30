"""Along which axis of each value the tokens of the video lie, if along any: what step allocation rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.sizes import Dim
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.attention_sites import SPARSE, Site, survey, why_none
from intarsia.passes.token_axes import Axis, Factor, Segment, count
from intarsia.passes.token_flow import TokenAxes
from intarsia.passes.token_layout import layout_of


@dataclass(frozen=True)
class Place:
    """Where the video's tokens lie in a value: along axis ``dim``, behind ``before`` others, in front of ``after``."""

    dim: int
    before: int = 0
    after: int = 0

    @property
    def others(self) -> int:
        """Tokens of the axis that are none of the video's."""
        return self.before + self.after


class TokenPlaces:
    """Where the tokens of the video lie in every value of a traced video transformer.

    The video's tokens are those that the first self-attention over video tokens asks for; text beside them is
    counted, not followed. Data flow alone decides: no name of a module does.

    Args:
        graph: Any traced model.

    Attributes:
        attention: Every call of attention, and why it is no dense self-attention over video tokens if it is none.
        layout: How the tokens lie in the video; text beside them is that of the first attention.
        video: The axes that are the video's tokens.

    Raises:
        Unsupported: The graph has no self-attention over the tokens of a video, or two that differ in them.
    """

    def __init__(self, graph: Graph) -> None:
        self._axes = TokenAxes(graph)
        self.attention: Mapping[str, Site | str] = survey(graph)
        asked = {site.name: site.query for site in self.attention.values() if isinstance(site, Site)}
        asked |= {node.name: node.ref("query") for node in graph.find(SPARSE)}
        videos = {name: found for name, query in asked.items() if (found := self._video(query))}
        if not videos:
            raise Unsupported(f"step allocation: {why_none(graph)}")
        (first, (self.layout, self.video)), *others = videos.items()
        for name, (layout, video) in others:
            if video != self.video:
                raise Unsupported(
                    f"step allocation: %{name} is among {layout}, %{first} among {self.layout}; one set of tokens is "
                    "followed"
                )

    @property
    def count(self) -> int:
        """N, the tokens of the video."""
        return count(self.video)

    def of(self, name: str) -> Place | None:
        """Where they lie in a value; None if along no axis of it."""
        if not self._axes.is_tensor(name):
            return None
        found = [place for dim, axis in enumerate(self._axes.of(name)) if (place := self._place(dim, axis))]
        return found[0] if len(found) == 1 else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The extents of a value, named sizes replaced by an example."""
        return self._axes.shape(name)

    def _place(self, dim: int, axis: Axis) -> Place | None:
        for number, segment in enumerate(axis):
            if segment in self._spellings:
                return Place(dim, sum(map(count, axis[:number])), sum(map(count, axis[number + 1 :])))
        return None

    def _video(self, query: str) -> tuple[TokenLayout, Segment] | None:
        """How the tokens of queries (B, H, S, D) lie, and the segment of S that is the video; None if they are none."""
        axis = self._axes.of(query)[2]
        layout = layout_of(axis)
        if isinstance(layout, str):
            return None
        (segment,) = (segment for segment in axis if len(segment) == 3)
        return layout, segment

    @cached_property
    def _spellings(self) -> frozenset[Segment]:
        """The video's tokens as three axes, and as the one axis of an input that has them flat already."""
        found = {self.video}
        inner = self.video[-1]
        if len({(factor.source, factor.axis) for factor in self.video}) == 1:
            found.add((Factor(self.count, inner.source, inner.axis, inner.stride, inner.made),))
        return frozenset(found)


def restricted(extents: tuple[Dim, ...], place: Place, active: str) -> tuple[Dim, ...]:
    """Extents of which the axis at ``place`` holds the active tokens of the video and all others."""
    dim: Dim = f"{active} + {place.others}" if place.others else active
    return (*extents[: place.dim], dim, *extents[place.dim + 1 :])
