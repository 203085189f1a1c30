"""Linear layers on a GPU: our Triton kernels in 8 and 4 bits against cuBLAS in bf16 and int8.

    python benchmarks/linear.py [--quick] [--json FILE]

The layers are those of a block of Wan2.1-T2V-14B at 480x832x81: 32,760 tokens, a projection of 5,120 x 5,120 and the
first of the feed-forward's, 13,824 x 5,120. ``torch._int_mm`` gives raw int32 sums, which still have to be scaled; ours
gives int8. Few tokens are measured by ``weight_only_linear``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Figures, launched, main, paired, peak_flops, require_gpu

from intarsia import kernels

TOKENS, COLUMNS = 32_760, 5_120
ROWS = {"projection": 5_120, "feed_forward": 13_824}
CALLS = 10
"""Launches between two looks at the clock."""

KERNELS = {
    "i8i8": "linear_i8i8, int8 times int8, requantized",
    "i8": "linear_i8, weight in 8 bits, bf16 products",
    "i4": "linear_i4, weight in 4 bits, groups of 128, bf16 products",
    "int_mm": "torch._int_mm, int8 times int8, raw int32",
}

MEANINGS = {
    "peak_tflops": "bf16 matrix product of 8,192 cubed, cuBLAS",
    **{f"dense_tflops_{layer}": f"TFLOP/s of cuBLAS bf16, {layer}" for layer in ROWS},
    **{f"{kernel}_tflops_{layer}": f"TFLOP/s of {KERNELS[kernel]}, {layer}" for layer in ROWS for kernel in KERNELS},
    **{
        f"{kernel}_over_dense_{layer}": f"seconds of {kernel} over cuBLAS bf16, {layer}"
        for layer in ROWS
        for kernel in KERNELS
    },
    **{f"i8i8_over_int_mm_{layer}": f"seconds of i8i8 over those of torch._int_mm, {layer}" for layer in ROWS},
    **{f"i8i8_fraction_of_peak_{layer}": f"TFLOP/s of i8i8 over the bf16 peak, {layer}" for layer in ROWS},
}


def measure(quick: bool) -> Figures:
    """In turns with cuBLAS bf16, medians over 5 rounds (quick) or 15."""
    require_gpu("linear")
    kernels.register()
    peak = peak_flops() / 1e12
    figures = {"peak_tflops": peak}
    for layer in ROWS:
        figures |= _figures(layer, peak, rounds=5 if quick else 15)
    return figures


def _figures(layer: str, peak: float, *, rounds: int) -> dict[str, float]:
    dense, calls = _calls(ROWS[layer])
    pairs = {kernel: paired(calls[kernel], dense, rounds=rounds) for kernel in KERNELS}
    tflops = CALLS * 2 * TOKENS * ROWS[layer] * COLUMNS / 1e12
    return {
        f"dense_tflops_{layer}": tflops / pairs["i8"].second,
        **{f"{kernel}_tflops_{layer}": tflops / pair.first for kernel, pair in pairs.items()},
        **{f"{kernel}_over_dense_{layer}": pair.ratio for kernel, pair in pairs.items()},
        f"i8i8_over_int_mm_{layer}": paired(calls["i8i8"], calls["int_mm"], rounds=rounds).ratio,
        f"i8i8_fraction_of_peak_{layer}": tflops / pairs["i8i8"].first / peak,
    }


def _calls(rows: int) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """cuBLAS in bf16, and each of ``KERNELS``, for a weight of so many rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(rows, COLUMNS, device="cuda", generator=generator).bfloat16()
    eight, four = torch.ops.intarsia.quantize_rows(weight), torch.ops.intarsia.quantize_groups(weight, 128)
    x8 = torch.randint(-128, 128, x.shape, device="cuda", generator=generator, dtype=torch.int8)
    dyadic = [torch.full((rows,), number, dtype=torch.int32, device="cuda") for number in (1 << 30, 44)]
    ours = torch.ops.intarsia
    calls: dict[str, Callable[[], object]] = {
        "i8i8": lambda: ours.linear_i8i8(x8, eight[0], None, *dyadic),
        "i8": lambda: ours.linear_i8(x, *eight, None),
        "i4": lambda: ours.linear_i4(x, *four, None, 128),
        "int_mm": lambda: torch._int_mm(x8, eight[0].t()),
    }
    dense = launched(lambda: torch.nn.functional.linear(x, weight), times=CALLS)
    return dense, {name: launched(call, times=CALLS) for name, call in calls.items()}


if __name__ == "__main__":
    main("linear", MEANINGS, measure)
