"""How the loops of a tensor function run on a CPU: register tiles for products, rows for norms, vectors for the rest.

A product of six rows and two vectors of columns keeps twelve sums in registers, which is what AVX2 has room for beside
the operands. Measured on one core of an AMD EPYC 7003: 92 to 100 GFLOP/s, as fast as torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from intarsia.backends.tvm_instructions import MADD, register
from intarsia.backends.tvm_integer_products import LANES
from intarsia.backends.tvm_operators import ROW_TILES, VECTOR, lanes, row_cost

CACHED = 24 * 1024
"""Bytes of input rows over which one task passes with the same columns, so that those stay in the first cache."""

SMALLEST_TASK = 16 * 1024
"""Elements below which a loop is not spread over threads: to wake one takes some 5 microseconds."""

FEWEST_TASKS = 16
"""Tasks below which a product is cut along its columns too, so that no thread waits long for another."""

ATTENTION_ROWS = 64
"""Queries that one task takes, so that there are several tasks to a head."""


def scheduled(function: Any, rank: int = 0) -> Any:
    """A schedule of the function: its loops tiled, vectorized and spread over threads.

    ``rank`` takes another tiling than the one that should be fastest: 1 the second, and so on, the last if there are
    fewer.
    """
    from tvm import s_tir

    names = stages(function)
    rule = next((rule for name, rule in _RULES.items() if name in names), None)
    schedule = s_tir.Schedule(function)
    if rule is None:
        _elementwise(schedule)
    else:
        rule(schedule, rank)
    return schedule


def is_tiled(function: Any) -> bool:
    """Whether there are several tilings of the function."""
    return bool({"product", "product_i8", "attention"} & set(stages(function)))


def stages(function: Any) -> tuple[str, ...]:
    """Names of the function's stages, in order of execution."""
    from tvm import s_tir

    schedule = s_tir.Schedule(function)
    return tuple(_name(schedule, block) for block in _blocks(schedule))


def _product(schedule: Any, rank: int) -> None:
    """Tiles of a product in registers, a vector of columns at a time."""
    _prepare(schedule, "product")
    parts = _tiles(schedule, "product", bytes_per_input=4, tiling=partial(_tiling, rank=rank))
    schedule.vectorize(parts.columns)
    schedule.decompose_reduction(parts.block, parts.reduced[0])


def _integer_product(schedule: Any, rank: int) -> None:
    """Tiles of an integer product in registers, pairs of inputs by one instruction."""
    register()
    _prepare(schedule, "product_i8")
    parts = _tiles(schedule, "product_i8", bytes_per_input=2, tiling=partial(_whole_tiling, rank=rank))
    vector, lane = schedule.split(parts.columns, [None, LANES])
    pairs, pair = schedule.split(parts.reduced[-1], [None, 2])
    schedule.reorder(pairs, parts.rows, vector, lane, pair)
    schedule.unroll(vector)
    first = schedule.decompose_reduction(parts.block, [*parts.reduced[:-1], pairs][0])
    schedule.vectorize(schedule.get_loops(first)[-1])
    schedule.tensorize(lane, MADD)


def _prepare(schedule: Any, name: str) -> None:
    """Inline what can be, and give a form of its inputs that the product ``name`` reads whole a stage before it."""
    _inline(schedule, keep=(name, "padded", "unpacked"))
    for block in _blocks(schedule):
        if _name(schedule, block) in ("padded", "unpacked"):
            _vectors(schedule, block)


@dataclass(frozen=True)
class _Tile:
    """A product cut into tiles: its stage, its reduction loops, the rows and columns of a tile."""

    block: Any
    reduced: Sequence[Any]
    rows: Any
    columns: Any


def _tiles(schedule: Any, name: str, *, bytes_per_input: int, tiling: Callable[[int, int], tuple[int, int]]) -> _Tile:
    """Cut the product ``name`` into tiles; what follows is applied to a tile before it is stored."""
    anchor, last = schedule.get_sblock(name), _blocks(schedule)[-1]
    if _name(schedule, last) == name:
        last = schedule.cache_write(anchor, 0, "local")
    *outer, row, column, reduced = _grouped(schedule, anchor)
    depth = prod(_extent(schedule, loop) for loop in reduced)
    chunk, tile = tiling(_extent(schedule, row), CACHED // (bytes_per_input * depth))
    row_chunk, rows = schedule.split(row, [None, chunk])
    row_tile, row_lane = schedule.split(rows, [None, tile])
    column_tile, column_lane = schedule.split(column, [None, lanes(_extent(schedule, column))])
    schedule.reorder(*outer, row_chunk, column_tile, row_tile, *reduced, row_lane, column_lane)
    tasks = prod(_extent(schedule, loop) for loop in (*outer, row_chunk))
    spread = [*outer, row_chunk] + ([column_tile] if tasks < FEWEST_TASKS else [])
    inside = [row_tile] if tasks < FEWEST_TASKS else [column_tile, row_tile]
    elements = prod(_extent(schedule, loop) for loop in schedule.get_loops(anchor))
    task = schedule.fuse(*spread)
    if elements >= SMALLEST_TASK:
        schedule.parallel(task)
    for loop in inside:
        schedule.annotate(loop, "pragma_loop_partition_hint", 1)
    schedule.set_scope(anchor, 0, "local")
    schedule.reverse_compute_at(last, row_tile)
    *_, store_row, store_column = schedule.get_loops(last)
    schedule.unroll(store_row)
    schedule.vectorize(store_column)
    schedule.unroll(row_lane)
    return _Tile(anchor, reduced, row_lane, column_lane)


def _grouped(schedule: Any, block: Any) -> list[Any]:
    """Spatial loops of a product, rows and columns last, then the list of its reduction loops."""
    loops = schedule.get_loops(block)
    spatial = sum(_is_spatial(var) for var in schedule.get(block).iter_vars)
    return [*loops[:spatial], loops[spatial:]]


def _is_spatial(variable: Any) -> bool:
    return bool(variable.iter_type == _DATA_PARALLEL)


def _tiling(rows: int, most: int, *, rank: int) -> tuple[int, int]:
    """Rows of a task, a divisor of ``rows`` near ``most`` or below, and of a tile: those with the least time a row."""
    tilings = sorted(_tilings(rows, most))
    return tilings[min(rank, len(tilings) - 1)][2:]


def _whole_tiling(rows: int, most: int, *, rank: int) -> tuple[int, int]:
    """As ``_tiling``, and no rows are left over in a task."""
    tilings = sorted(one for one in _tilings(rows, most) if one[2] % one[3] == 0)
    return tilings[min(rank, len(tilings) - 1)][2:]


def _tilings(rows: int, most: int) -> Iterator[tuple[float, int, int, int]]:
    """What a row costs, then what to prefer among equals, rows of a task, rows of a tile."""
    tasks = [n for n in range(1, rows + 1) if rows % n == 0]
    fitting = [n for n in tasks if n <= max(most, ROW_TILES[0])]
    for task in dict.fromkeys((*fitting, rows)):
        for tile in dict.fromkeys(min(tile, task) for tile in ROW_TILES):
            yield row_cost(task, tile) * (1.0 if task in fitting else 1.1), -task, task, tile


def _attention(schedule: Any, rank: int) -> None:
    """Six queries at a time: all their scores, softmax, and the mixture of values, without leaving the cache."""
    packed, result = schedule.get_sblock("packed_keys"), schedule.get_sblock("attention")
    _spread(schedule, packed, 3)
    b, x, y, channel = schedule.get_loops(result)
    head, row = (x, y) if _first_is_head(schedule, result) else (y, x)
    chunk, tile = _tiling(_extent(schedule, row), ATTENTION_ROWS, rank=rank)
    chunks, rows = schedule.split(row, [None, chunk])
    rows, lane = schedule.split(rows, [None, tile])
    schedule.reorder(b, head, chunks, rows, lane, channel)
    schedule.parallel(schedule.fuse(b, head, chunks))
    schedule.annotate(rows, "pragma_loop_partition_hint", 1)
    for name in ("mixed", "row_sum", "lanes_sum", "weights", "row_max", "lanes_max", "logits"):
        schedule.compute_at(schedule.get_sblock(name), rows, preserve_unit_loops=True)
    schedule.vectorize(_vector_of(schedule, channel))
    logits = schedule.get_sblock("logits")
    *_, i, block, wide = schedule.get_loops(logits)
    schedule.reorder(block, i, wide)
    scores = schedule.get_sblock("scores")
    schedule.compute_at(scores, block, preserve_unit_loops=True)
    schedule.set_scope(scores, 0, "local")
    schedule.unroll(i)
    schedule.vectorize(wide)
    _tile(schedule, scores, rows=-4, column=-2)
    for name in ("lanes_max", "lanes_sum"):
        partial = schedule.get_sblock(name)
        *_, i, wide, block = schedule.get_loops(partial)
        schedule.reorder(i, block, wide)
        schedule.vectorize(wide)
        schedule.decompose_reduction(partial, block)
    *_, wide = schedule.get_loops(schedule.get_sblock("weights"))
    schedule.vectorize(wide)
    _mixture(schedule)


def _mixture(schedule: Any) -> None:
    mixed = schedule.get_sblock("mixed")
    store = schedule.cache_write(mixed, 0, "local")
    *_, i, channel, j = schedule.get_loops(mixed)
    tile, wide = schedule.split(channel, [None, lanes(_extent(schedule, channel))])
    schedule.reorder(tile, j, i, wide)
    schedule.annotate(tile, "pragma_loop_partition_hint", 1)
    schedule.reverse_compute_at(store, tile, preserve_unit_loops=True)
    *_, store_row, store_column = schedule.get_loops(store)
    for rows, columns in ((i, wide), (store_row, store_column)):
        schedule.unroll(rows)
        schedule.vectorize(columns)
    schedule.decompose_reduction(mixed, j)


def _tile(schedule: Any, block: Any, *, rows: int, column: int) -> None:
    """Rows and lanes of a small product inside its reduction."""
    loops = schedule.get_loops(block)
    reduced, row, wide = loops[-1], loops[rows], loops[column]
    schedule.reorder(reduced, row, wide)
    schedule.unroll(row)
    schedule.vectorize(wide)
    schedule.decompose_reduction(block, reduced)


def _as_it_is(schedule: Any, rank: int) -> None:
    """The function was written with its loops arranged."""


def _first_is_head(schedule: Any, result: Any) -> bool:
    """Whether the result is (B, H, S, D): its second axis is what the sums over a row call the head."""
    reads = schedule.get(result).reads
    total = next(region for region in reads if len(region.region) == 3)
    second = schedule.get(result).iter_vars[1].var
    return bool(total.region[1].min.same_as(second))


def _rows(schedule: Any, rank: int) -> None:
    """One task per row or several: its sums in the lanes of a vector, then every channel."""
    _inline(schedule, keep=("normalized", "weights", "row", "lanes"))
    last = _blocks(schedule)[-1]
    sums = [block for block in _blocks(schedule) if _name(schedule, block).startswith("row_")]
    rank = len(schedule.get(sums[0]).writes[0].region)
    loops = schedule.get_loops(last)
    elements = prod(_extent(schedule, loop) for loop in loops)
    task = schedule.fuse(*loops[:rank])
    if elements >= SMALLEST_TASK:
        schedule.parallel(task)
    for block in reversed(_blocks(schedule)):
        if _name(schedule, block) != _name(schedule, last):
            schedule.compute_at(block, task, preserve_unit_loops=True)
    for block in _children(schedule, task):
        name = _name(schedule, block)
        if name.startswith("lanes_"):
            *_, wide, reduced = schedule.get_loops(block)
            schedule.reorder(reduced, wide)
            schedule.vectorize(wide)
            schedule.decompose_reduction(block, reduced)
        elif not name.startswith("row_"):
            inner = schedule.get_loops(block)[-1]
            _parity_or_vector(schedule, inner, name)


def _parity_or_vector(schedule: Any, inner: Any, name: str) -> None:
    """Lanes of the last axis; of a rotation the pairs are left to LLVM, which reads both halves at once."""
    if name == "rotated":
        _, pair = schedule.split(inner, [None, 2])
        schedule.unroll(pair)
        return
    schedule.vectorize(_vector_of(schedule, inner))


def _elementwise(schedule: Any) -> None:
    """Everything inlined into the last stage, neighbours in a vector; sums keep a stage of their own."""
    _inline(schedule, keep=())
    for block in _blocks(schedule):
        _vectors(schedule, block)


def _inline(schedule: Any, *, keep: Sequence[str]) -> None:
    """Inline every stage that is no sum, gives no result, and whose name begins with none of ``keep``."""
    kept = {_name(schedule, block) for block in schedule.get_output_blocks("root")}
    for block in _blocks(schedule):
        reduces = any(not _is_spatial(var) for var in schedule.get(block).iter_vars)
        name = _name(schedule, block)
        if not reduces and name not in kept and not name.startswith(tuple(keep)):
            schedule.compute_inline(block)


def _vectors(schedule: Any, block: Any) -> None:
    """The last axis in vectors where it is read so, sums outside them, the rest spread over threads."""
    variables = schedule.get(block).iter_vars
    loops = schedule.get_loops(block)
    spatial = [loop for loop, var in zip(loops, variables, strict=True) if _is_spatial(var)]
    reduced = [loop for loop, var in zip(loops, variables, strict=True) if not _is_spatial(var)]
    if not spatial:
        return
    elements = prod(_extent(schedule, loop) for loop in loops)
    *outer, inner = spatial
    along = not reduced or _reads_along(schedule.get(block), len(spatial))
    width = _width(_extent(schedule, inner)) if along else 1
    tile, lane = schedule.split(inner, [None, width])
    schedule.reorder(*outer, tile, *reduced, lane)
    task = schedule.fuse(*outer, tile)
    if elements >= SMALLEST_TASK:
        schedule.parallel(task)
    if width > 1:
        schedule.vectorize(lane)
    if reduced:
        schedule.decompose_reduction(block, reduced[0])


def _reads_along(block: Any, spatial: int) -> bool:
    """Whether neighbours along the last spatial axis are neighbours in what the stage reads."""
    last = block.iter_vars[spatial - 1].var
    return any(len(read.region) and read.region[-1].min.same_as(last) for read in block.reads)


def _spread(schedule: Any, block: Any, count: int) -> None:
    """The first ``count`` loops over threads, the last in a vector if it is short."""
    loops = schedule.get_loops(block)
    schedule.parallel(schedule.fuse(*loops[:count]))


def _vector_of(schedule: Any, loop: Any) -> Any:
    """The innermost part of ``loop`` that fits a vector."""
    return schedule.split(loop, [None, _width(_extent(schedule, loop))])[1]


def _width(extent: int) -> int:
    return next(width for width in (2 * VECTOR, VECTOR, 4, 2, 1) if extent % width == 0)


def _blocks(schedule: Any) -> list[Any]:
    """Stages in order of execution."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _children(schedule: Any, loop: Any) -> list[Any]:
    return list(schedule.get_child_blocks(loop))


def _name(schedule: Any, block: Any) -> str:
    return str(schedule.get(block).name_hint)


def _extent(schedule: Any, loop: Any) -> int:
    return int(schedule.get(loop).extent)


_DATA_PARALLEL = 0
"""TVM's number for an axis whose iterations do not depend on each other."""

_RULES: Mapping[str, Callable[[Any, int], None]] = {
    "product": _product,
    "product_i8": _integer_product,
    "attention": _attention,
    "sparse_attention": _as_it_is,
    "normalized": _rows,
    "rotated": _rows,
}
"""How a function is scheduled, by the stage that decides it; functions without one are elementwise."""
