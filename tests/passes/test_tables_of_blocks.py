"""Tables of sparse attention as arrays: what the graph becomes, and that it computes the same."""

from collections.abc import Callable

import torch

from intarsia.ir.graph import Graph
from intarsia.ir.program import Program, example_inputs, materialize
from intarsia.ir.target import Target, load_target
from intarsia.passes.apply import run_passes
from intarsia.passes.conformance import check_pass
from intarsia.passes.tables_of_blocks import TablesOfBlocks

BAND, FRAMES_LAST = "3:0-1;0-2;-", "0:12*1+4*12,48:2*1"


def attention(name: str, order: str | None = None, *, scale: str = "None") -> str:
    text = "None" if order is None else f'"{order}"'
    table = f'blocks="{BAND}", order={text}, block_q=20, block_k=20'
    call = f"query=%q, key=%q, value=%q, lengths=None, {table}, scale={scale}"
    return f"  %{name}: f32[2, 3, 50, 16] = intarsia.block_sparse_attention({call})\n"


def graph(*calls: str) -> Graph:
    last = calls[-1].split(":")[0].strip()
    return Graph.parse(f"graph g {{\n  input %q: f32[2, 3, 50, 16]\n{''.join(calls)}  return {last}\n}}\n")


def test_texts_become_arrays_that_are_made_before(target: Target) -> None:
    changed = TablesOfBlocks().run(graph(attention("y")), target, {})
    table = (
        "%y.rows: i32[3, 3], %y.columns: i32[5], %y.reach: i32[3], %y.tokens: i32[0] = intarsia.block_tables("
        f'blocks="{BAND}", order=None, keys=50, block_k=20)'
    )
    call = (
        "%y: f32[2, 3, 50, 16] = intarsia.block_sparse_attention_tables(query=%q, key=%q, value=%q, lengths=None, "
        "rows=%y.rows, columns=%y.columns, reach=%y.reach, tokens=None, block_q=20, block_k=20, scale=None)"
    )
    body = str(changed).splitlines()[2:4]
    assert [line.strip() for line in body] == [table, call]


def test_calls_with_one_table_share_its_arrays(target: Target) -> None:
    several = graph(attention("a"), attention("b", FRAMES_LAST), attention("c", FRAMES_LAST, scale="0.3"))
    changed = TablesOfBlocks().run(several, target, {})
    assert [node.name for node in changed.nodes] == ["a.rows", "a", "b.rows", "b", "c"]
    assert changed.producers["c"].ref("tokens") == "b.tokens"


def test_materialize_runs_what_makes_the_arrays_and_keeps_those_that_are_read(target: Target) -> None:
    program = Program(TablesOfBlocks().run(graph(attention("y", FRAMES_LAST)), target, {}), {})
    made = materialize(program)
    assert [str(param.type) for param in made.graph.params] == ["i32[3, 3]", "i32[5]", "i32[3]", "i32[50]"]
    assert [node.op for node in made.graph.nodes] == ["intarsia.block_sparse_attention_tables"]
    plain = materialize(Program(TablesOfBlocks().run(graph(attention("y")), target, {}), {}))
    assert [param.name for param in plain.graph.params] == ["y.rows", "y.columns", "y.reach"]


def test_arrays_and_texts_compute_the_same(target: Target) -> None:
    for order in (None, FRAMES_LAST):
        before = Program(graph(attention("y", order)), {})
        after = materialize(Program(TablesOfBlocks().run(before.graph, target, {}), {}))
        inputs = example_inputs(before.graph)
        torch.testing.assert_close(after.module()(*inputs), before.module()(*inputs))


def test_it_keeps_a_passs_promises_where_there_is_sparse_attention(
    target: Target, with_weights: Callable[[Graph], Program]
) -> None:
    check_pass(TablesOfBlocks(), with_weights(graph(attention("y", FRAMES_LAST))), target, error=1e-12)


def test_fuse_kernels_leaves_sparse_attention_alone() -> None:
    sparse = graph(attention("a"), attention("b", FRAMES_LAST))
    assert run_passes(["fuse-kernels(everywhere=True)"], sparse, load_target("h100")) is sparse
