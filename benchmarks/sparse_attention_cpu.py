"""Attention that computes a quarter of its pairs, beside attention that computes all, on ONNX Runtime on the CPU.

    python benchmarks/sparse_attention_cpu.py [--quick] [--json FILE]

Both are graphs of one node, built and run by our ONNX backend in f32. Sparse is ``intarsia.block_sparse_attention``
with the table and the order of tokens that a pattern gives; dense is ``aten.scaled_dot_product_attention``, which
becomes one ONNX ``Attention`` node of all heads without a mask. All answers are held against PyTorch's before anything
is timed, then all are timed in turns, in one process, with as many threads as there are cores: ``taskset`` gives fewer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import Figures, in_turns, main, ratio

if TYPE_CHECKING:
    from intarsia.ir.graph import Graph
    from intarsia.ir.tokens import TokenLayout
    from intarsia.passes.patterns.masks import Mask

HEADS, CHANNELS, BLOCK, DENSITY = 2, 64, 128, 0.25

LAYOUTS = {4096: (16, 16, 16), 8192: (32, 16, 16), 16_384: (16, 32, 32)}
"""Frames, rows and columns of a video of so many tokens."""

MODES = {
    "diagonal": f"diagonal(density={DENSITY})",
    "multi_diagonal": f"multi-diagonal(density={DENSITY})",
    "stripe": f"vertical-stripe(density={DENSITY})",
}
"""Those of Sparse-vDiT, whose slowest is the figure of a length."""

PATTERNS = {
    **MODES,
    "radial": f"radial(density={DENSITY})",
    "tiles": f"tile-offsets(density={DENSITY}, tile=(2, 8, 8), offsets='0.0.0,1.0.0,-2.1.0,3.0.1,0.-1.1')",
}

TOLERANCE = 1e-5
"""Largest difference in f32 between an engine and PyTorch."""

MEANINGS = {
    **{f"speedup_25pct_{tokens}": f"dense / slowest mode at density 0.25, {tokens} tokens" for tokens in LAYOUTS},
    "speedup_stripe_25pct_8192": "dense / stripe at density 0.25, 8192 tokens",
    **{f"{name}_speedup_{tokens}": f"dense / {name}, {tokens} tokens" for tokens in LAYOUTS for name in PATTERNS},
    **{
        f"{name}_density_{tokens}": f"share of the pairs that the table of {name} computes, {tokens} tokens"
        for tokens in LAYOUTS
        for name in PATTERNS
    },
    **{f"{name}_{tokens}_seconds": f"{name}, {tokens} tokens" for tokens in LAYOUTS for name in PATTERNS},
    **{f"dense_onnx_attention_{tokens}_seconds": f"one ONNX Attention, {tokens} tokens" for tokens in LAYOUTS},
}


def measure(quick: bool) -> Figures:
    """Medians over 15 rounds, 3 if quick."""
    figures: dict[str, float] = {}
    for tokens, sizes in LAYOUTS.items():
        figures |= _figures(tokens, sizes, rounds=3 if quick else 15)
    slowest = {f"speedup_25pct_{n}": min(figures[f"{mode}_speedup_{n}"] for mode in MODES) for n in LAYOUTS}
    return {**figures, **slowest, "speedup_stripe_25pct_8192": figures["stripe_speedup_8192"]}


def _figures(tokens: int, sizes: tuple[int, int, int], *, rounds: int) -> dict[str, float]:
    from intarsia.ir.tokens import TokenLayout
    from intarsia.passes.patterns.base import find_pattern
    from intarsia.passes.patterns.masks import Mask

    layout = TokenLayout(*sizes)
    masks = {name: Mask(find_pattern(text), layout, BLOCK, BLOCK) for name, text in PATTERNS.items()}
    graphs = {"dense": _dense(layout), **{name: _sparse(mask) for name, mask in masks.items()}}
    with tempfile.TemporaryDirectory() as folder:
        seconds = in_turns({name: _call(graph, Path(folder) / name) for name, graph in graphs.items()}, rounds=rounds)
    medians: Mapping[str, float] = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        **{f"{name}_speedup_{tokens}": ratio(seconds, "dense", name) for name in PATTERNS},
        **{f"{name}_density_{tokens}": mask.density for name, mask in masks.items()},
        **{f"{name}_{tokens}_seconds": medians[name] for name in PATTERNS},
        f"dense_onnx_attention_{tokens}_seconds": medians["dense"],
    }


def _dense(layout: TokenLayout) -> Graph:
    return _graph(layout.tokens, "aten.scaled_dot_product_attention(query=%q, key=%k, value=%v)")


def _sparse(mask: Mask) -> Graph:
    order = "None" if mask.order is None else f'"{mask.order}"'
    operands = f'query=%q, key=%k, value=%v, lengths=None, blocks="{mask.table}", order={order}'
    call = f"{operands}, block_q={mask.block_q}, block_k={mask.block_k}, scale=None"
    return _graph(mask.layout.tokens, f"intarsia.block_sparse_attention({call})")


def _graph(tokens: int, call: str) -> Graph:
    from intarsia.ir.graph import Graph

    type_ = f"f32[1, {HEADS}, {tokens}, {CHANNELS}]"
    inputs = "".join(f"  input %{name}: {type_}\n" for name in "qkv")
    return Graph.parse(f"graph attends {{\n{inputs}  %y: {type_} = {call}\n  return %y\n}}\n")


def _call(graph: Graph, folder: Path) -> Callable[[], object]:
    """The engine on normal random numbers, once its answer is PyTorch's; SystemExit if it is not."""
    from intarsia.backends.base import find_backend
    from intarsia.ir.execute import to_module
    from intarsia.ir.program import Program, example_inputs, materialize
    from intarsia.ir.target import load_target

    backend, program = find_backend("onnx"), materialize(Program(graph, {}))
    folder.mkdir()
    engine = backend.load(folder, backend.build(program, load_target("cpu-avx2"), folder).files)
    inputs = example_inputs(graph)
    expected = to_module(graph, {})(*inputs)
    difference = float((engine(*inputs)[0] - (expected[0] if isinstance(expected, tuple) else expected)).abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"{folder.name}: differs from PyTorch by {difference:g}, more than {TOLERANCE:g}")
    return lambda: engine(*inputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    main("sparse_attention_cpu", MEANINGS, measure)
