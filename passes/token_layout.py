"""How tokens lie in a video, read from what the axis of tokens is made of."""

from __future__ import annotations

from intarsia.ir.tokens import TokenLayout
from intarsia.passes.token_axes import Axis, Segment, length

IF_THEY_ARE = "if they are, give tokens='tokens(frames=..., height=..., width=...)'"


def layout_of(axis: Axis) -> TokenLayout | str:
    """How the tokens along an axis lie in a video, or why they do not."""
    grids = [place for place, segment in enumerate(axis) if _grid(segment) is not None]
    if len(grids) != 1:
        return f"its tokens are {described(axis)}, not frames x height x width of a video; {IF_THEY_ARE}"
    (place,) = grids
    frames, height, width = (factor.extent for factor in axis[place])
    before, after = (length(part) for part in (axis[:place], axis[place + 1 :]))
    return TokenLayout(frames, height, width, before, after)


def described(axis: Axis) -> str:
    """What an axis is made of, for messages: ``16 of %text + 3 x 4 x 6 of %video``."""
    return " + ".join(map(_part, axis))


def _part(segment: Segment) -> str:
    extents = " x ".join(str(factor.extent) for factor in segment) or "1"
    sources = dict.fromkeys(f"%{factor.source}" if factor.source else "unknown origin" for factor in segment)
    return f"{extents} of {' and '.join(sources)}" if sources else extents


def _grid(segment: Segment) -> Segment | None:
    """The segment if it is three axes of one source in their order: frames, height, width."""
    if len(segment) != 3 or len({factor.source for factor in segment}) != 1 or not segment[0].source:
        return None
    order = [(factor.axis, -factor.stride) for factor in segment]
    distinct = len({factor.axis for factor in segment}) in (1, 3)
    return segment if distinct and order == sorted(order) else None
