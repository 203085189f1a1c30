"""Weight-only linear layers on a GPU: our Triton kernels against cuBLAS in bf16, and the roofline against the clock.

    python benchmarks/weight_only_linear.py [--quick] [--json FILE]

The layer is a projection of Wan2.1-14B, 5,120 x 5,120, bf16 activations. A figure over dense below 1 is faster.
"""

from __future__ import annotations

import os

import torch
from harness import Figures, launched, main, paired, require_gpu

from intarsia import kernels
from intarsia.ir.graph import Graph
from intarsia.ir.target import load_target
from intarsia.search.roofline import predict

TOKENS = (1, 512, 32_760)
WIDTH = 5_120
CALLS = 20
"""Launches between two looks at the clock."""

MEANINGS = {
    **{f"i8_over_dense_{n}": f"seconds of linear_i8 over cuBLAS bf16, {n:,} tokens" for n in TOKENS},
    **{f"i4_over_dense_{n}": f"seconds of linear_i4, groups of 128, over cuBLAS bf16, {n:,} tokens" for n in TOKENS},
    **{f"dense_seconds_{n}": f"cuBLAS bf16, {n:,} tokens" for n in TOKENS},
    **{f"dense_predicted_over_measured_{n}": f"roofline of the target over the clock, {n:,} tokens" for n in TOKENS},
    "dense_tflops": f"cuBLAS bf16 at {TOKENS[-1]:,} tokens",
}  # fmt: skip


def measure(quick: bool) -> Figures:
    """Ratios in turns, medians over 5 rounds (quick) or 15."""
    require_gpu("weight_only_linear")
    target = os.environ.get("INTARSIA_BENCH_TARGET") or ("h200" if "H200" in torch.cuda.get_device_name() else "h100")
    kernels.register()
    figures: dict[str, float] = {}
    for tokens in TOKENS:
        figures |= _figures(tokens, target, rounds=5 if quick else 15)
    figures["dense_tflops"] = 2 * TOKENS[-1] * WIDTH**2 / figures[f"dense_seconds_{TOKENS[-1]}"] / 1e12
    return figures


def _figures(tokens: int, target: str, *, rounds: int) -> dict[str, float]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, WIDTH, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(WIDTH, WIDTH, device="cuda", generator=generator).bfloat16()
    eight = torch.ops.intarsia.quantize_rows(weight)
    four = torch.ops.intarsia.quantize_groups(weight, 128)
    dense = launched(lambda: torch.nn.functional.linear(x, weight), times=CALLS)
    i8 = paired(launched(lambda: torch.ops.intarsia.linear_i8(x, *eight, None), times=CALLS), dense, rounds=rounds)
    i4 = paired(launched(lambda: torch.ops.intarsia.linear_i4(x, *four, None, 128), times=CALLS), dense, rounds=rounds)
    seconds = i8.second / CALLS
    return {
        f"i8_over_dense_{tokens}": i8.ratio,
        f"i4_over_dense_{tokens}": i4.ratio,
        f"dense_seconds_{tokens}": seconds,
        f"dense_predicted_over_measured_{tokens}": predict(_graph(tokens), load_target(target)).seconds / seconds,
    }


def _graph(tokens: int) -> Graph:
    return Graph.parse(
        f"""graph linear {{
  input %x: bf16[{tokens}, {WIDTH}]
  param %w: bf16[{WIDTH}, {WIDTH}]
  %y: bf16[{tokens}, {WIDTH}] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}}"""
    )


if __name__ == "__main__":
    main("weight_only_linear", MEANINGS, measure)
