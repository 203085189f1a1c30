"""Block-sparse attention on a GPU, up to the tokens of a video, against exact attention of some of its queries."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.backends.null import NullEngine
from intarsia.backends.packing import Build, write_bundle
from intarsia.backends.triton import TritonBackend
from intarsia.backends.verify import verify_bundle
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder
from intarsia.kernels.block_sparse_attention.reference import block_sparse_attention
from intarsia.kernels.block_sparse_attention.table import BlockTable
from intarsia.kernels.launch import architecture_of
from intarsia.passes.apply import run_passes
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest output; weights and results are rounded to the element type."""

ROWS = 64
"""Queries whose exact attention is computed in f64."""

VIDEOS = {
    "wan": (TokenLayout(21, 45, 80), 128, 0.298),
    "hunyuan": (TokenLayout(33, 45, 80, after=256), 128, 0.150),
    "cogvideox": (TokenLayout(11, 48, 85, before=226), 64, 0.265),
}
"""Layout, channels of a head and density that Sparse-vDiT reports."""

BAND = "8:0-1;0-2;1-3;2-4;3-5;4-6;5-7;6-7"
FRAMES_LAST = "0:16*1+6*16,96:20*1"

SPARSE = f"""graph sparse {{
  size B in [1, 4]
  input %q: f16[B, 2, 116, 64]
  %y: f16[B, 2, 116, 64] = intarsia.block_sparse_attention(query=%q, key=%q, value=%q, lengths=None, \
blocks="{BAND}", order="{FRAMES_LAST}", block_q=16, block_k=16, scale=None)
  return %y
}}
"""


@pytest.fixture(autouse=True)
def registered() -> None:
    kernels.register()


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest magnitude."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_k", [128, 64])
@pytest.mark.parametrize("pattern", ["diagonal", "multi-diagonal", "vertical-stripe"])
@pytest.mark.parametrize("video", VIDEOS)
def test_videos_attend_to_the_blocks_of_every_mode(video: str, pattern: str, block_k: int, dtype: torch.dtype) -> None:
    layout, channels, density = VIDEOS[video]
    mask = Mask(find_pattern(f"{pattern}(density={density})"), layout, 128, block_k)
    query, key, value = (normal(1, layout.tokens, 2, channels, dtype=dtype, seed=i).transpose(1, 2) for i in range(3))
    lengths = torch.tensor([layout.tokens - 100], device="cuda") if layout.after else None
    order = None if mask.order is None else str(mask.order)
    found = torch.ops.intarsia.block_sparse_attention(
        query, key, value, lengths, str(mask.table), order, 128, block_k, None
    )
    some = torch.linspace(0, layout.tokens - 1, ROWS, device="cuda").long()
    rows = mask_rows(mask.table, mask.order, some, layout.tokens, block_k)
    if lengths is not None:
        rows[:, int(lengths) :] = False
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query[:, :, some].double(), key.double(), value.double(), attn_mask=rows)
    assert found.transpose(1, 2).is_contiguous()
    assert difference(found[:, :, some], expected) <= TOLERANCE[dtype]


def mask_rows(table: BlockTable, order: TokenOrder | None, some: Tensor, tokens: int, block_k: int) -> Tensor:
    """Which keys (S) these queries (N) attend to, both by token."""
    positions = torch.arange(tokens) if order is None else torch.from_numpy(order.inverse())
    blocks = torch.from_numpy(table.blocks())[positions[some.cpu()] // 128]
    return blocks[:, positions // block_k].cuda()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("order", [None, FRAMES_LAST])
@pytest.mark.parametrize("lengths", [None, (70, 0), (116, 200)])
@pytest.mark.parametrize(("channels", "block"), [(32, 16), (64, 32), (64, 64), (128, 128)])
def test_ragged_blocks_lengths_and_orders_agree(
    channels: int, block: int, lengths: tuple[int, int] | None, order: str | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(block)
    count = -(-116 // block)
    table = str(BlockTable.of((torch.rand(count, count, generator=generator) < 0.6).numpy()))
    query, key, value = (normal(2, 3, 116, channels, dtype=dtype, seed=i) for i in range(3))
    cut = None if lengths is None else torch.tensor(lengths, device="cuda")
    found = torch.ops.intarsia.block_sparse_attention(query, key, value, cut, table, order, block, block, 0.3)
    exact = (query.double(), key.double(), value.double(), cut, table, order, block, block, 0.3)
    expected = block_sparse_attention(*exact)
    assert torch.equal(found == 0, expected == 0)
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * value.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("lengths", [None, (790, 300)])
@pytest.mark.parametrize("pattern", ["diagonal", "multi-diagonal", "vertical-stripe"])
def test_every_mode_agrees_with_the_cpu_where_ends_are_ragged_and_a_row_is_empty(  # noqa: PLR0917
    pattern: str, lengths: tuple[int, int] | None, block_q: int, block_k: int, channels: int, dtype: torch.dtype
) -> None:
    layout = TokenLayout(6, 8, 16, after=50)
    mask = Mask(find_pattern(f"{pattern}(density=0.7)"), layout, block_q, block_k)
    blocks = mask.table.blocks().copy()
    blocks[2] = False
    order = None if mask.order is None else str(mask.order)
    rest = (str(BlockTable.of(blocks)), order, block_q, block_k, None)
    operands = [normal(2, layout.tokens, 2, channels, dtype=dtype, seed=i).transpose(1, 2) for i in range(3)]
    cut = None if lengths is None else torch.tensor(lengths)
    on_gpu = None if cut is None else cut.to(operands[0].device)
    found = torch.ops.intarsia.block_sparse_attention(*operands, on_gpu, *rest).cpu()
    expected = block_sparse_attention(*(tensor.cpu().float() for tensor in operands), cut, *rest)
    empty = (expected == 0).all(-1)
    assert int(empty.sum()) >= 2 * 2 * block_q
    assert not found[empty].any()
    assert difference(found, expected) <= TOLERANCE[dtype]


def test_queries_without_blocks_give_zeros() -> None:
    query = normal(2, 3, 64, 64, dtype=torch.float16, seed=0)
    found = torch.ops.intarsia.block_sparse_attention(query, query, query, None, "4:-;0;-;1-3", None, 16, 16, None)
    assert not found[:, :, :16].any()
    assert not found[:, :, 32:48].any()
    assert found[:, :, 16:32].isfinite().all()


def test_operands_are_read_where_they_lie() -> None:
    fused = normal(2, 116, 4, 3 * 64, dtype=torch.bfloat16, seed=0)
    heads = [part.transpose(1, 2) for part in fused.chunk(3, dim=-1)]
    rest = (None, BAND, FRAMES_LAST, 16, 16, None)
    expected = torch.ops.intarsia.block_sparse_attention(*(part.contiguous() for part in heads), *rest)
    assert torch.equal(torch.ops.intarsia.block_sparse_attention(*heads, *rest), expected)


@pytest.fixture
def here() -> Target:
    return replace(load_target("h100"), architecture=architecture_of(torch.device("cuda", 0)))


def test_a_compiled_engine_answers_as_its_graph(here: Target, tmp_path: Path) -> None:
    graph = Graph.parse(SPARSE)
    program = materialize(Program(run_passes(TritonBackend.passes, graph, here), {}))
    backend = TritonBackend()
    engine = backend.load(tmp_path, backend.build(program, here, tmp_path).files)
    for batch in (1, 3):
        inputs = example_inputs(graph, {"B": batch})
        (found,), (expected,) = engine(*inputs), NullEngine(Program(graph, {}))(*inputs)
        assert difference(found, expected) <= 2 * TOLERANCE[torch.float16]


def test_a_bundle_holds_what_it_claims_and_answers_as_its_graph(here: Target, tmp_path: Path) -> None:
    program = Program(Graph.parse(SPARSE), {})
    prepared = materialize(Program(run_passes(TritonBackend.passes, program.graph, here), {}))
    builds = [Build(TritonBackend(), prepared)]
    bundle = write_bundle(
        tmp_path / "out", program=program, plan=None, builds=builds, target=here, command="intarsia export"
    )
    assert verify_bundle(bundle.folder, engine="triton").passed
    inputs = example_inputs(program.graph, {"B": 3})
    (found,), (expected,) = bundle.engine("triton")(*inputs), NullEngine(program)(*inputs)
    assert difference(found, expected) <= 2 * TOLERANCE[torch.float16]
