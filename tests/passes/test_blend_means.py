"""The share of the mean of all values that sparse attention mixes in: what it computes, and what backends are given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intarsia.backends.base import Backend, find_backend
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.apply import run_passes
from intarsia.passes.blend_means import BlendMeans
from intarsia.passes.conformance import check_pass

BAND, NOTHING = "3:0-1;0-2;-", "3:3*-"


def graph(blocks: str, *, lengths: bool = False, mean: float = 0.25) -> Graph:
    second = "  input %n: i64[2]\n" if lengths else ""
    call = (
        f'query=%q, key=%k, value=%v, lengths={"%n" if lengths else None}, blocks="{blocks}", order=None, '
        f"block_q=20, block_k=20, scale=None, mean={mean}"
    )
    inputs = "".join(f"  input %{name}: f32[2, 3, 50, 16]\n" for name in "qkv")
    call = f"  %y: f32[2, 3, 50, 16] = intarsia.block_sparse_attention({call})\n"
    return Graph.parse(f"graph g {{\n{inputs}{second}{call}  return %y\n}}\n")


def inputs_of(of: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(2, 3, 50, 16, generator=generator) for _ in "qkv"]
    return [*noise, torch.tensor([50, 21])][: len(of.inputs)]


@pytest.mark.parametrize("blocks", [BAND, NOTHING])
@pytest.mark.parametrize("lengths", [False, True])
def test_the_result_is_attention_and_the_mean_of_the_values_that_may_be_attended_to(blocks: str, lengths: bool) -> None:
    blended, plain = graph(blocks, lengths=lengths), graph(blocks, lengths=lengths, mean=0.0)
    inputs = inputs_of(blended)
    ends = [50, 21] if lengths else [50, 50]
    means = torch.stack([inputs[2][row, :, :end].mean(1, keepdim=True) for row, end in enumerate(ends)])
    (found,), (attended,) = (Program(one, {}).module()(*inputs) for one in (blended, plain))
    torch.testing.assert_close(found, 0.75 * attended + 0.25 * means)


@pytest.mark.parametrize("blocks", [BAND, NOTHING])
@pytest.mark.parametrize("lengths", [False, True])
def test_spelled_out_it_is_the_same_and_no_call_has_a_mean(blocks: str, lengths: bool, target: Target) -> None:
    before = graph(blocks, lengths=lengths)
    after = BlendMeans().run(before, target, {})
    sparse = [node for node in after.nodes if node.op == "intarsia.block_sparse_attention"]
    assert len(sparse) == (blocks == BAND)
    assert all("mean" not in node.args for node in sparse)
    (found,), (expected,) = (Program(one, {}).module()(*inputs_of(before)) for one in (after, before))
    torch.testing.assert_close(found, expected)


def test_attention_without_a_mean_is_left_alone(target: Target) -> None:
    plain = graph(BAND, mean=0.0)
    assert BlendMeans().run(plain, target, {}) is plain


@pytest.mark.parametrize("lengths", [False, True])
def test_it_keeps_a_passs_promises(target: Target, with_weights: Callable[[Graph], Program], lengths: bool) -> None:
    check_pass(BlendMeans(), with_weights(graph(BAND, lengths=lengths)), target, error=1e-12)


@pytest.mark.parametrize("name", ["onnx", "tvm"])
def test_engines_mix_it_in(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(name, name))
    backend: Backend = find_backend(name)
    cpu = load_target("cpu-avx2")
    for blocks in (BAND, NOTHING):
        for lengths in (False, True):
            before = graph(blocks, lengths=lengths)
            ready = materialize(Program(run_passes(backend.passes, before, cpu), {}))
            folder = tmp_path / f"{len(blocks)}{lengths}"
            folder.mkdir()
            engine = backend.load(folder, backend.build(ready, cpu, folder).files)
            inputs = inputs_of(before)
            (expected,) = Program(before, {}).module()(*inputs)
            torch.testing.assert_close(engine(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["triton", "tensorrt"])
def test_backends_that_need_a_gpu_are_given_ordinary_calls(name: str) -> None:
    ready = run_passes(find_backend(name).passes, graph(BAND, lengths=True), load_target("h100"))
    assert not any("mean" in node.args for node in ready.nodes)
    inputs = example_inputs(ready)
    torch.testing.assert_close(
        Program(ready, {}).module()(*inputs)[0], Program(graph(BAND, lengths=True), {}).module()(*inputs)[0]
    )
