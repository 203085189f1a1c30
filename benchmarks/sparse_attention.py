"""Block-sparse attention on a GPU, beside the time that its share of dense attention would take, and FlexAttention.

    python benchmarks/sparse_attention.py [--quick] [--json FILE]

Self-attention at the three sizes of Sparse-vDiT (arXiv 2506.03065), bf16, heads side by side in memory as linear layers
leave them, blocks of 128 x 128, at the densities that the paper's PFLOPs mean. There are 8 heads, not the 24 to 48 of
the models: time is proportional to heads, which ratios cancel, and neither memory nor minutes are unlimited. Dense is
the fastest backend of ``scaled_dot_product_attention`` at that size.

FlexAttention is compiled and given the same blocks. Its operands are copied into the pattern's order of tokens, which
ours reads through, and padded to whole blocks, as it checks bounds in every block where ends are ragged. Neither is in
its time, nor is the copy of its result back: that favours it. For the mode that has an order there is also a ratio with
these copies in its time.

Some rows of every answer are held against exact attention before anything is timed; then all are timed in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from harness import Figures, in_turns, launched, main, median_seconds, ratio, require_gpu
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from intarsia.passes.patterns.masks import Mask

HEADS, BLOCK = 8, 128

ROWS, TOLERANCE = 64, 1.5e-2
"""Queries whose answers are held against exact attention, and their largest difference, relative to the largest."""

CALLS = 2
"""Launches between two looks at the clock."""


@dataclass(frozen=True)
class Video:
    """Attention of a model at the size of the paper.

    Attributes:
        layout: Notation of its tokens.
        channels: Of a head.
        density: Share of the pairs that Sparse-vDiT computes where it is sparse.
    """

    layout: str
    channels: int
    density: float


VIDEOS = {
    "wan": Video("tokens(frames=21, height=45, width=80)", 128, 0.298),
    "hunyuan": Video("tokens(frames=33, height=45, width=80, after=256)", 128, 0.150),
    "cogvideox": Video("tokens(frames=11, height=48, width=85, before=226)", 64, 0.265),
}
"""75,600, 119,056 and 45,106 tokens: Wan2.1 and HunyuanVideo at 720p, CogVideoX1.5 at 1360 x 768."""

MODES = {"diagonal": "diagonal", "multi_diagonal": "multi-diagonal", "stripe": "vertical-stripe"}

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

PLACES = [(video, mode) for video in VIDEOS for mode in MODES]

MEANINGS = {
    **{f"ideal_ratio_{video}": f"ours / (dense x density), the slowest mode, {video}" for video in VIDEOS},
    **{f"over_flex_{video}": f"ours / FlexAttention, the slowest mode beside it, {video}" for video in VIDEOS},
    **{f"error_{video}": f"ours - exact, over the largest exact, the worst mode, {video}" for video in VIDEOS},
    "dense_tflops": "TFLOP/s of dense attention at the size of wan",
    **{f"dense_tflops_{video}": f"TFLOP/s of dense attention, {video}" for video in VIDEOS},
    **{f"{name}_tflops_{video}": f"TFLOP/s of {name}, {video}; 0: it refuses" for video in VIDEOS for name in BACKENDS},
    **{f"{mode}_density_{video}": f"share of the pairs that {mode} computes, {video}" for video, mode in PLACES},
    **{f"{mode}_ideal_ratio_{video}": f"ours / (dense x density), {mode}, {video}" for video, mode in PLACES},
    **{f"{mode}_over_flex_{video}": f"ours / FlexAttention, {mode}, {video}" for video, mode in PLACES},
    **{
        f"multi_diagonal_over_flex_copying_{video}": f"the same, FlexAttention's copies timed, {video}"
        for video in VIDEOS
    },
    **{f"{mode}_tflops_{video}": f"TFLOP/s of ours, {mode}, {video}" for video, mode in PLACES},
}


def measure(quick: bool) -> Figures:
    """Medians over 3 rounds (quick) or 9."""
    require_gpu("sparse_attention")
    from intarsia import kernels

    kernels.register()
    figures: dict[str, float] = {}
    for video in VIDEOS:
        figures |= _figures(video, rounds=3 if quick else 9)
    return {**figures, "dense_tflops": figures["dense_tflops_wan"]}


def masks(video: str) -> Mapping[str, Mask]:
    """What each mode computes of a video."""
    from intarsia.ir.tokens import TokenLayout
    from intarsia.passes.patterns.base import find_pattern
    from intarsia.passes.patterns.masks import Mask

    layout, density = TokenLayout.parse(VIDEOS[video].layout), VIDEOS[video].density
    patterns = {mode: find_pattern(f"{text}(density={density})") for mode, text in MODES.items()}
    return {mode: Mask(pattern, layout, BLOCK, BLOCK) for mode, pattern in patterns.items()}


def _figures(video: str, *, rounds: int) -> dict[str, float]:
    found, channels = masks(video), VIDEOS[video].channels
    tokens = found["diagonal"].layout.tokens
    generator = torch.Generator("cuda").manual_seed(0)
    by_token = [torch.randn(1, tokens, HEADS, channels, device="cuda", generator=generator) for _ in range(3)]
    operands = [tensor.bfloat16().transpose(1, 2) for tensor in by_token]
    tflop = 4 * HEADS * channels * tokens**2 / 1e12
    dense = {name: _dense_seconds(name, operands) for name in BACKENDS}
    best = min(dense, key=lambda name: dense[name])
    calls, errors = {"dense": partial(attend_dense, best, *operands)}, []
    for mode, mask in found.items():
        theirs = Flex(mask, operands[0].device)
        calls |= {mode: ours(mask, operands), f"{mode} flex": partial(theirs.attend, *theirs.ready(operands))}
        errors.append(check(f"{mode} {video}", calls[mode](), mask, operands))
        check(f"{mode} flex {video}", theirs.by_token(calls[f"{mode} flex"]()), mask, operands)
    calls["copying"] = flex(found["multi_diagonal"], operands)
    timed = {name: launched(call, times=CALLS) for name, call in calls.items()}
    seconds = in_turns(timed, rounds=rounds, warmup=1)
    medians = {name: statistics.median(times) / CALLS for name, times in seconds.items()}
    ideal = {mode: ratio(seconds, mode, "dense") / mask.density for mode, mask in found.items()}
    over = {mode: ratio(seconds, mode, f"{mode} flex") for mode in found}
    return {
        f"ideal_ratio_{video}": max(ideal.values()),
        f"over_flex_{video}": max(over.values()),
        f"error_{video}": max(errors),
        f"multi_diagonal_over_flex_copying_{video}": ratio(seconds, "multi_diagonal", "copying"),
        f"dense_tflops_{video}": tflop / medians["dense"],
        **{f"{name}_tflops_{video}": tflop / found for name, found in dense.items()},
        **{f"{mode}_density_{video}": mask.density for mode, mask in found.items()},
        **{f"{mode}_ideal_ratio_{video}": ideal[mode] for mode in found},
        **{f"{mode}_over_flex_{video}": over[mode] for mode in found},
        **{f"{mode}_tflops_{video}": mask.density * tflop / medians[mode] for mode, mask in found.items()},
    }


def attend_dense(backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of all pairs by one backend of PyTorch's; RuntimeError if it does not take these operands."""
    with sdpa_kernel(BACKENDS[backend]):
        return scaled_dot_product_attention(query, key, value)


def _dense_seconds(backend: str, operands: Sequence[Tensor]) -> float:
    """Of one call; infinite if the backend refuses."""
    call = launched(partial(attend_dense, backend, *operands), times=CALLS)
    try:
        call()
    except RuntimeError:
        return float("inf")
    return median_seconds(call, rounds=3) / CALLS


def ours(mask: Mask, operands: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call of our operator."""
    order = None if mask.order is None else str(mask.order)
    rest = (None, str(mask.table), order, mask.block_q, mask.block_k, None)
    return partial(torch.ops.intarsia.block_sparse_attention, *operands, *rest)


def flex(mask: Mask, operands: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call of FlexAttention on operands as they lie; copies into and out of an order are part of it."""
    theirs = Flex(mask, operands[0].device)
    return lambda: theirs.by_token(theirs.attend(*theirs.ready(operands)))


class Flex:
    """FlexAttention on the blocks of a mask, compiled on a GPU; its operands and result stand by position."""

    def __init__(self, mask: Mask, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        positions = torch.arange(mask.layout.tokens)
        order, places = (
            (positions, positions)
            if mask.order is None
            else map(torch.from_numpy, (mask.order.indices(), mask.order.inverse()))
        )
        self._order, self._places = order.to(device), places.to(device)
        self._sizes = (mask.block_q, mask.block_k, mask.block_k)
        self._blocks = block_mask(mask, device)
        # Without fullgraph, what cannot be compiled would run eagerly, over all pairs, and be timed as such.
        compiled = device.type == "cuda"
        self._attend = torch.compile(flex_attention, dynamic=False, fullgraph=True) if compiled else flex_attention

    def ready(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Query, key and value copied into the order, with zeros behind them up to whole blocks."""
        ordered = [tensor.index_select(2, self._order) for tensor in operands]
        return [pad(x, (0, 0, 0, -x.shape[2] % size)) for x, size in zip(ordered, self._sizes, strict=True)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The result of what ``ready`` gives, padded as the query."""
        return self._attend(query, key, value, block_mask=self._blocks)

    def by_token(self, found: Tensor) -> Tensor:
        """A result copied back into the order of tokens, without what was padded."""
        return found.index_select(2, self._places)


def block_mask(mask: Mask, device: torch.device) -> BlockMask:
    """The table as FlexAttention takes it: all blocks whole, but for the padded ones, which are masked inside."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens, block_q, block_k = mask.layout.tokens, mask.block_q, mask.block_k
    blocks = torch.from_numpy(mask.table.blocks()).to(device)
    padded = torch.arange(1, blocks.shape[1] + 1, device=device) * block_k > tokens
    return BlockMask.from_kv_blocks(
        *_listed(blocks & padded),
        *_listed(blocks & ~padded),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=lambda batch, head, q, k: blocks[q // block_q, k // block_k] & (k < tokens),
        seq_lengths=(blocks.shape[0] * block_q, blocks.shape[1] * block_k),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries attends to, and their numbers with the others behind them, i32."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return blocks.sum(1, dtype=torch.int32)[None, None], numbers[None, None]


def check(name: str, found: Tensor, mask: Mask, operands: Sequence[Tensor]) -> float:
    """How far some rows of the answer are from exact attention under the mask, in f64; SystemExit if too far.

    The largest difference, relative to the largest of the exact rows.
    """
    query, key, value = operands
    tokens, device = mask.layout.tokens, query.device
    some = torch.linspace(0, tokens - 1, ROWS, device=device).long()
    places = torch.arange(tokens) if mask.order is None else torch.from_numpy(mask.order.inverse())
    rows = torch.from_numpy(mask.table.blocks())[places[some.cpu()] // mask.block_q]
    kept = rows[:, places // mask.block_k].to(device)
    exact = scaled_dot_product_attention(query[:, :, some].double(), key.double(), value.double(), attn_mask=kept)
    difference = float((found[:, :, some].double() - exact).abs().max() / exact.abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"{name}: differs from exact attention by {difference:g}, more than {TOLERANCE:g}")
    return difference


if __name__ == "__main__":
    main("sparse_attention", MEANINGS, measure)
