"""Rules of heads for calls that take values apart along an axis, or put them together along one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import cast

from intarsia.passes.head_blocks import HeadAxis
from intarsia.passes.head_place import Carried, Place, tensors


def slice(place: Place) -> Carried | str:
    """A part of the input, which begins at ``start``."""
    node, whole = place.node, place.node.ref("self")
    dim, start = place.dim(whole), node.args.get("start") or 0
    if dim != place.axis.axis:
        return _parts(place, whole, [(node.name, 0)], dim)
    extent = place.shape(whole)[dim]
    if node.args.get("step", 1) != 1 or not isinstance(start, int) or not isinstance(extent, int):
        return f"{node.op} takes entries of the heads' axis from {start} in steps of {node.args.get('step', 1)}"
    first = min(max(start + extent if start < 0 else start, 0), extent)
    return _parts(place, whole, [(node.name, first)], dim)


def split(place: Place) -> Carried | str:
    """Parts of the input, one after the other."""
    whole = place.node.ref("self")
    return _lined_up(place, whole, [value.name for value in place.node.outputs], place.dim(whole))


def cat(place: Place) -> Carried | str:
    """Parts of the result, one after the other."""
    return _lined_up(place, place.node.name, place.node.inputs, place.dim(place.node.name))


def _lined_up(place: Place, whole: str, parts: Sequence[str], dim: int) -> Carried | str:
    extents = [place.shape(part)[dim] for part in parts]
    starts = [0] * len(parts)
    if place.axis.axis == dim:
        if not all(isinstance(extent, int) for extent in extents):
            return f"{place.node.op} puts parts of unknown extents on the heads' axis"
        starts = [0, *accumulate(cast("list[int]", extents))][:-1]
    return _parts(place, whole, list(zip(parts, starts, strict=True)), dim)


def _parts(place: Place, whole: str, parts: Sequence[tuple[str, int]], dim: int) -> Carried | str:
    """``parts`` hold the entries of ``whole`` along ``dim`` from these entries on."""
    if place.axis.axis != dim:
        return Carried(dict.fromkeys((whole, *(part for part, _ in parts)), place.axis))
    if place.name != whole:
        starts = sorted({start + first for part, first in parts if part == place.name for start in place.axis.starts})
        return Carried({whole: replace(place.axis, starts=tuple(starts))})
    found: dict[str, HeadAxis] = {}
    for part, first in parts:
        extent = cast("int", place.shape(part)[dim])
        inside = place.axis.within(first, extent, place.heads)
        if inside is None:
            return f"{place.node.op} cuts between the {place.heads} heads of %{whole}"
        if inside.starts:
            found[part] = inside
    return Carried(found)


def unbind(place: Place) -> Carried | str:
    """The axis disappears from all parts."""
    source = place.node.ref("self")
    return _removed(place, source, [value.name for value in place.node.outputs], place.dim(source))


def select(place: Place) -> Carried | str:
    """The axis disappears from the one part that is left."""
    source = place.node.ref("self")
    return _removed(place, source, [place.node.name], place.dim(source))


def stack(place: Place) -> Carried | str:
    """The axis is new in the result."""
    return _removed(place, place.node.name, place.node.inputs, place.dim(place.node.name))


def _removed(place: Place, whole: str, parts: Sequence[str], dim: int) -> Carried | str:
    """``whole`` has the axis ``dim``, which its parts have not."""
    axis = place.axis.axis
    if place.name == whole:
        if axis == dim:
            return f"{place.node.op} takes the heads of %{whole} apart"
        axis -= axis > dim
    parted = replace(place.axis, axis=axis)
    return Carried({**dict.fromkeys(parts, parted), whole: replace(parted, axis=axis + (axis >= dim))})


def scatter(place: Place) -> Carried | str:
    """``src`` takes the place of a part of ``self``, along an axis without heads."""
    if place.axis.axis == place.dim(place.node.name):
        return f"{place.node.op} writes into the heads' axis"
    return Carried(dict.fromkeys(tensors(place.node, place.graph), place.axis))


def take(place: Place) -> Carried | str:
    """An index takes entries of an axis without heads."""
    index = place.node.ref("index")
    if place.name == index or place.axis.axis == place.dim(place.node.ref("self")):
        return f"{place.node.op} takes single heads of %{place.name}"
    return Carried({place.other("self"): place.axis})
