"""Heads along an axis of a tensor, and what a reshape makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from intarsia.ir.sizes import Dim

MOST_BLOCKS = 4096
"""Blocks of all heads that one axis may hold; more, as where heads lie within tokens, are not followed."""


@dataclass(frozen=True)
class HeadAxis:
    """Heads along one axis: head h takes the entries ``start + h * inner`` to ``start + (h + 1) * inner - 1``.

        (B, H, S, D)       HeadAxis(1, 1)
        (B, S, H*D)        HeadAxis(2, D)
        (B, S, 3*H*D)      HeadAxis(2, D, (0, H*D, 2*H*D))
        (B, S, H*D + M)    HeadAxis(2, D), the other M entries being no heads'

    Attributes:
        axis: The axis, counted from the first.
        inner: Neighbouring entries that belong to one head.
        starts: Where the first head begins, ascending; more than one if the axis holds all heads several times.
    """

    axis: int
    inner: int
    starts: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return f"blocks of {self.inner} along axis {self.axis} from {', '.join(map(str, self.starts))} on"

    def entries(self, order: Sequence[int], heads: int, extent: int) -> list[int]:
        """The entries of an axis of ``extent`` with the heads as ``order`` has them, those it lacks left out."""
        found: list[int] = []
        done = 0
        for start in self.starts:
            found += range(done, start)
            found += (start + head * self.inner + entry for head in order for entry in range(self.inner))
            done = start + heads * self.inner
        return [*found, *range(done, extent)]

    def moved(self, entry: int, left: int, heads: int) -> int:
        """Where an entry between blocks of heads lies once ``left`` of ``heads`` heads are left in each block."""
        before = sum(1 for start in self.starts if start + heads * self.inner <= entry)
        return entry - before * (heads - left) * self.inner

    def within(self, first: int, extent: int, heads: int) -> HeadAxis | None:
        """The heads in the part of ``extent`` entries from ``first`` on; None if a block of heads is cut."""
        inside: list[int] = []
        for start in self.starts:
            end = start + heads * self.inner
            if first <= start and end <= first + extent:
                inside.append(start - first)
            elif start < first + extent and end > first:
                return None
        return replace(self, starts=tuple(inside))

    def fits(self, shape: Sequence[Dim], heads: int) -> bool:
        """Whether a tensor of this shape has such an axis, on which no two blocks of heads overlap."""
        extent = shape[self.axis] if self.axis < len(shape) else None
        if not isinstance(extent, int):
            return False
        return all(first + heads * self.inner <= second for first, second in pairwise((*self.starts, extent)))


def reshaped(axis: HeadAxis, shape: Sequence[Dim], target: Sequence[Dim], heads: int) -> HeadAxis | None:
    """Where the heads lie after a reshape from ``shape`` to ``target``; None if blocks of heads do not stay whole."""
    for before, after in _groups(shape, target):
        if axis.axis in before:
            if len(before) == len(after) == 1:
                return replace(axis, axis=after[0])
            flat = _flat(axis, shape, before)
            return None if flat is None else _cut(flat, target, after, heads)
    return None


def _groups(shape: Sequence[Dim], target: Sequence[Dim]) -> Iterator[tuple[range, range]]:
    """The axes of both shapes that hold the same entries, as short runs of neighbours as can be told."""
    left, right = _cuts(shape), _cuts(target)
    first = second = 0
    for key, end in left.items():
        if key in right:
            yield range(first, end), range(second, right[key])
            first, second = end, right[key]


def _cuts(shape: Sequence[Dim]) -> dict[tuple[int, tuple[str, ...]], int]:
    """The last place at which the axes before it have a product of extents, by that product."""
    cuts: dict[tuple[int, tuple[str, ...]], int] = {}
    number = 1
    names: tuple[str, ...] = ()
    for place, extent in enumerate(shape):
        if isinstance(extent, int):
            number *= extent
        else:
            names = tuple(sorted((*names, extent)))
        cuts[number, names] = place + 1
    return cuts


@dataclass(frozen=True)
class _Flat:
    """Heads of several axes as if these were one: neighbouring entries of a head, and where the blocks begin."""

    block: int
    starts: frozenset[int]


def _flat(axis: HeadAxis, shape: Sequence[Dim], group: range) -> _Flat | None:
    """The heads along ``axis``, one of the group; None if extents have names, or too many blocks lie there."""
    extents = [extent for extent in (shape[place] for place in group) if isinstance(extent, int)]
    place = axis.axis - group.start
    copies, stride = prod(extents[:place]), prod(extents[place + 1 :])
    if len(extents) < len(group) or copies * len(axis.starts) > MOST_BLOCKS:
        return None
    period = extents[place] * stride
    starts = (copy * period + start * stride for copy in range(copies) for start in axis.starts)
    return _Flat(axis.inner * stride, frozenset(starts))


def _cut(flat: _Flat, target: Sequence[Dim], group: range, heads: int) -> HeadAxis | None:
    """The axis of the group that holds the heads; None if each axis cuts them."""
    extents = [extent for extent in (target[place] for place in group) if isinstance(extent, int)]
    for place in range(len(group)) if len(extents) == len(group) else ():
        stride = prod(extents[place + 1 :])
        inside = sorted(start for start in flat.starts if start < extents[place] * stride)
        if flat.block % stride or not inside:
            continue
        found = HeadAxis(group.start + place, flat.block // stride, tuple(start // stride for start in inside))
        if found.fits(target, heads) and _flat(found, target, group) == flat:
            return found
    return None
