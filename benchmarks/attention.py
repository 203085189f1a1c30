"""Attention on a GPU: our Triton kernel, every backend of scaled_dot_product_attention, and FlexAttention.

    python benchmarks/attention.py [--quick] [--json FILE]

Self-attention of whole videos in bf16, heads side by side in memory as linear layers leave them. A kernel that refuses
a shape, or whose scores do not fit into memory, has 0 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Figures, launched, main, paired, peak_flops, require_gpu
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from intarsia import kernels

SHAPES = {
    "wan_1_3b": (1, 12, 32_760, 128),
    "wan_14b": (1, 40, 32_760, 128),
    "cogvideox": (1, 48, 17_776, 64),
}
"""Batch, heads, tokens and channels of a head: Wan2.1 at 480x832x81, CogVideoX-5B at 480x720x49."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OTHERS = (*BACKENDS, "flex")

CALLS = 3
"""Launches between two looks at the clock."""

MEANINGS = {
    "peak_tflops": "bf16 matrix product of 8,192 cubed, cuBLAS",
    **{
        f"{kernel}_tflops_{shape}": f"TFLOP/s of {kernel}, {' x '.join(map(str, SHAPES[shape]))}"
        for shape in SHAPES
        for kernel in ("ours", *OTHERS)
    },
    **{f"ours_over_best_{shape}": f"seconds of ours over those of the fastest other, {shape}" for shape in SHAPES},
    **{f"ours_fraction_of_peak_{shape}": f"TFLOP/s of ours over the peak, {shape}" for shape in SHAPES},
}


def measure(quick: bool) -> Figures:
    """In turns with ours, medians over 3 rounds (quick) or 9."""
    require_gpu("attention")
    kernels.register()
    peak = peak_flops() / 1e12
    figures = {"peak_tflops": peak}
    for shape in SHAPES:
        figures |= _figures(shape, peak, rounds=3 if quick else 9)
    return figures


def _figures(shape: str, peak: float, *, rounds: int) -> dict[str, float]:
    batch, heads, tokens, channels = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)
    by_token = [torch.randn(batch, tokens, heads, channels, device="cuda", generator=generator) for _ in range(3)]
    operands = [tensor.bfloat16().transpose(1, 2) for tensor in by_token]
    ours = launched(lambda: torch.ops.intarsia.attention(*operands, None, None), times=CALLS)
    pairs = {}
    for other in OTHERS:
        theirs = launched(partial(_callable(other), *operands), times=CALLS)
        if _runs(theirs):
            pairs[other] = paired(ours, theirs, rounds=rounds, warmup=1)
    best = min(pairs.values(), key=lambda pair: pair.second)
    tflops = CALLS * 4 * batch * heads * tokens**2 * channels / 1e12
    return {
        **{f"{other}_tflops_{shape}": tflops / pairs[other].second if other in pairs else 0.0 for other in OTHERS},
        f"ours_tflops_{shape}": tflops / best.first,
        f"ours_over_best_{shape}": best.ratio,
        f"ours_fraction_of_peak_{shape}": tflops / best.first / peak,
    }


def _callable(name: str) -> Callable[[Tensor, Tensor, Tensor], object]:
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(query, key, value)

    return attend


def _runs(call: Callable[[], None]) -> bool:
    """Whether it gives anything: PyTorch says with a RuntimeError that no kernel fits, or no memory is left."""
    try:
        call()
    except RuntimeError:
        torch.cuda.empty_cache()
        return False
    return True


if __name__ == "__main__":
    main("attention", MEANINGS, measure)
