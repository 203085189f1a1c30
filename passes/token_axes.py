"""What an axis of a tensor is made of: extents of the model's inputs, split, multiplied and laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True, slots=True)
class Factor:
    """``extent`` steps along an axis of a value, each ``stride`` elements long.

    Attributes:
        source: The input or the grid of coordinates whose axis this is; empty if nothing is known.
        axis: Which of its axes.
        made: Whether the graph makes the source, as it makes a grid of coordinates.
    """

    extent: int
    source: str = ""
    axis: int = 0
    stride: int = 1
    made: bool = False


Segment = tuple[Factor, ...]
"""A product of factors, the outermost first."""

Axis = tuple[Segment, ...]
"""Segments that lie end to end, as concatenation leaves them."""

Axes = tuple[Axis, ...]


def unknown(extent: int) -> Axis:
    """An axis of which only the extent is known."""
    return ((Factor(extent),),)


def count(segment: Segment) -> int:
    """Places along a segment."""
    return prod(factor.extent for factor in segment)


def length(axis: Axis) -> int:
    """Places along an axis."""
    return sum(map(count, axis))


def is_known(segment: Segment) -> bool:
    """Whether anything but the extent is known."""
    return any(factor.source for factor in segment)


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a row-by-row view with this shape: equal ones as they were, others multiplied or split."""
    if 0 in shape or prod(map(length, axes)) != prod(shape):
        return tuple(map(unknown, shape))
    given = [axis for axis in axes if length(axis) != 1]
    wanted = [extent for extent in shape if extent != 1]
    found: list[Axis] = []
    while wanted:
        taken, asked = [given.pop(0)], [wanted.pop(0)]
        while (have := prod(map(length, taken))) != (need := prod(asked)):
            if have < need:
                taken.append(given.pop(0))
            else:
                asked.append(wanted.pop(0))
        found += taken if len(taken) == len(asked) == 1 else _divided(taken, asked)
    rest = iter(found)
    return tuple(((),) if extent == 1 else next(rest) for extent in shape)


def _divided(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The same factors, outermost first, dealt out to axes of these extents."""
    if any(len(axis) > 1 for axis in axes):
        return [unknown(extent) for extent in shape]
    factors = [factor for axis in axes for factor in axis[0]]
    found: list[Axis] = []
    for extent in shape:
        segment: Segment = ()
        while (rest := extent // count(segment)) > 1:
            factor = factors.pop(0)
            if factor.extent > rest and factor.extent % rest == 0:
                factor, inner = split(factor, (rest, factor.extent // rest))
                factors.insert(0, inner)
            if rest % factor.extent:
                return [unknown(extent) for extent in shape]
            segment = (*segment, factor)
        found.append((segment,))
    return found


def split(factor: Factor, extents: Sequence[int]) -> Segment:
    """The factor as a product of factors of these extents, the outermost first."""
    return tuple(
        replace(factor, extent=extent, stride=factor.stride * prod(extents[place + 1 :]))
        for place, extent in enumerate(extents)
    )


def joined(first: Axis, second: Axis) -> Axis:
    """What is known of an axis along which both lie side by side, place by place."""
    if [count(segment) for segment in first] == [count(segment) for segment in second]:
        return tuple(map(_told, first, second))
    return first if any(map(is_known, first)) else second


def _told(first: Segment, second: Segment) -> Segment:
    """The more that two segments tell: an input's axis that a grid of coordinates splits is a grid of that input."""
    if not is_known(first) or not is_known(second):
        return first if is_known(first) else second
    coarse, fine = (first, second) if len(first) <= len(second) else (second, first)
    if len(coarse) == 1 and len(fine) > 1 and not coarse[0].made:
        return split(coarse[0], [factor.extent for factor in fine]) if _is_grid(fine) else fine
    return second if any(factor.made for factor in first) else first


def _is_grid(segment: Segment) -> bool:
    """Whether the factors are the axes of one grid that the graph made, in their order."""
    axes = [factor.axis for factor in segment]
    return segment[0].made and len({factor.source for factor in segment}) == 1 and axes == sorted(set(axes))


def cut(axis: Axis, start: int, end: int) -> Axis:
    """The places from ``start`` up to ``end``: whole segments as they are, of others the extent alone."""
    found: list[Segment] = []
    place = 0
    for segment in axis:
        first, last = max(start, place), min(end, place + count(segment))
        if first < last:
            found.append(segment if last - first == count(segment) else (Factor(last - first),))
        place += count(segment)
    return tuple(found)
