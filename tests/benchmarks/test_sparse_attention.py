"""The benchmark of sparse attention on a GPU: its sizes, its masks, and what it holds answers against."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from intarsia import kernels
from intarsia.ir.tokens import TokenLayout
from intarsia.passes.patterns.base import find_pattern
from intarsia.passes.patterns.masks import Mask

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SMALL = TokenLayout(5, 4, 8, after=10)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    kernels.register()
    return importlib.import_module("sparse_attention")


@pytest.mark.parametrize(("video", "tokens"), [("wan", 75_600), ("hunyuan", 119_056), ("cogvideox", 45_106)])
def test_every_mode_fits_the_papers_sizes_and_nearly_fills_its_densities(
    benchmark: ModuleType, video: str, tokens: int
) -> None:
    for mask in benchmark.masks(video).values():
        assert mask.layout.tokens == tokens
        assert 0.97 * benchmark.VIDEOS[video].density < mask.density <= benchmark.VIDEOS[video].density


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["diagonal", "multi-diagonal", "vertical-stripe"])
def test_ours_and_flex_attention_are_given_the_same_blocks(benchmark: ModuleType, pattern: str) -> None:
    mask = Mask(find_pattern(f"{pattern}(density=0.6)"), SMALL, 16, 16)
    assert benchmark.block_mask(mask, torch.device("cpu")).to_dense()[0, 0].bool().numpy().tolist() == (
        mask.table.blocks().tolist()
    )
    operands = [torch.randn(1, 2, SMALL.tokens, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    theirs, found = benchmark.flex(mask, operands)(), benchmark.ours(mask, operands)()
    torch.testing.assert_close(theirs, found)
    benchmark.check("flex", theirs, mask, operands)


def test_an_answer_under_another_mask_ends_the_benchmark(benchmark: ModuleType) -> None:
    band, stripe = (
        Mask(find_pattern(f"{name}(density=0.6)"), SMALL, 16, 16) for name in ("diagonal", "vertical-stripe")
    )
    operands = [torch.randn(1, 2, SMALL.tokens, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with pytest.raises(SystemExit, match="diagonal: differs from exact attention by"):
        benchmark.check("diagonal", benchmark.ours(stripe, operands)(), band, operands)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_leaves_with_one_line() -> None:
    command = [sys.executable, BENCHMARKS / "sparse_attention.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr == "sparse_attention: needs a CUDA device, and torch sees none\n"
