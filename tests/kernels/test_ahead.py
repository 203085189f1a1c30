"""Every kernel compiles for every architecture without a GPU: with its matrix instruction, and without spills."""

from pathlib import Path

import pytest

from intarsia import kernels
from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.ir.graph import Graph
from intarsia.kernels.ahead import ARCHITECTURES, Compiled, compile_launch
from intarsia.kernels.launch import launch_of

pytest.importorskip("triton")


def attention(channels: int, lengths: str) -> str:
    return f"""graph g {{
  size N in [1, 200000]
  input %q: bf16[2, 12, N, {channels}]
  input %k: bf16[2, 12, N, {channels}]
  input %v: bf16[2, 12, N, {channels}]
  input %l: i64[2]
  %y: bf16[2, 12, N, {channels}] = intarsia.attention(query=%q, key=%k, value=%v, lengths={lengths}, scale=None)
  return %y
}}
"""


def convolution(depth: int, rows: int, groups: int, result: str, ends: str) -> str:
    return f"""graph g {{
  size N in [1, 64]
  input %x: i8[N, {depth * groups}, 56, 56]
  param %w: i8[{rows}, {depth}, 3, 3]
  param %b: i32[{rows}]
  param %m: i32[{rows}]
  param %s: i32[{rows}]
  %y: {result}[N, {rows}, 28, 28] = intarsia.conv2d_i8i8(input=%x, weight=%w, bias=%b, multiplier=%m, shift=%s, \
stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups={groups}, {ends})
  return %y
}}
"""


PRODUCTS = {
    "attention_32": attention(32, "None"),
    "attention_64": attention(64, "None"),
    "attention_128": attention(128, "None"),
    "attention_128_lengths": attention(128, "%l"),
    "block_sparse_attention": """graph g {
  size B in [1, 2]
  input %q: bf16[B, 12, 1000, 128]
  input %l: i64[B]
  param %rows: i32[8, 3]
  param %columns: i32[20]
  param %reach: i32[8]
  param %tokens: i32[1000]
  %y: bf16[B, 12, 1000, 128] = intarsia.block_sparse_attention_tables(query=%q, key=%q, value=%q, lengths=%l, """
    """rows=%rows, columns=%columns, reach=%reach, tokens=%tokens, block_q=128, block_k=128, scale=None)
  return %y
}
""",
    "linear_i8": """graph g {
  size N in [1, 200000]
  input %x: bf16[2, N, 1536]
  param %w: i8[8960, 1536]
  param %s: f32[8960]
  param %b: bf16[8960]
  %y: bf16[2, N, 8960] = intarsia.linear_i8(input=%x, weight=%w, scale=%s, bias=%b)
  return %y
}
""",
    "linear_i4": """graph g {
  size N in [1, 200000]
  input %x: f16[2, N, 1536]
  param %w: u8[8960, 768]
  param %s: f32[8960, 12]
  %y: f16[2, N, 8960] = intarsia.linear_i4(input=%x, packed=%w, scale=%s, bias=None, group=128)
  return %y
}
""",
    "linear_i8i8": """graph g {
  size N in [1, 200000]
  input %x: i8[2, N, 1536]
  param %w: i8[8960, 1536]
  param %b: i32[8960]
  param %m: i32[8960]
  param %s: i32[8960]
  %y: i8[2, N, 8960] = intarsia.linear_i8i8(input=%x, weight=%w, bias=%b, multiplier=%m, shift=%s)
  return %y
}
""",
    "conv2d_i8i8": convolution(128, 256, 1, "i16", "low=-32768, high=32767"),
    "conv2d_i8i8_by_channel": convolution(1, 96, 96, "i8", "low=0, high=15"),
}

INTEGERS = PRODUCTS["conv2d_i8i8"]

ROWS = {
    "modulated_norm": """graph g {
  size N in [1, 200000]
  input %x: bf16[2, N, 5120]
  input %a: f32[2, 1, 5120]
  input %b: f32[2, 1, 5120]
  %y: bf16[2, N, 5120] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%a, shift=%b, eps=1e-06)
  return %y
}
""",
    "gated_residual": """graph g {
  size N in [1, 200000]
  input %r: bf16[2, N, 5120]
  input %x: bf16[2, N, 5120]
  input %gate: f32[2, 1, 5120]
  %y: bf16[2, N, 5120] = intarsia.gated_residual(residual=%r, input=%x, gate=%gate)
  return %y
}
""",
    "add_requantized": """graph g {
  size N in [1, 64]
  input %x: i16[N, 256, 56, 56]
  input %y: i16[N, 256, 56, 56]
  param %m: i32[1]
  param %s: i32[1]
  %z: i16[N, 256, 56, 56] = intarsia.add_requantized(input=%x, other=%y, multiplier=%m, shift=%s, """
    """other_multiplier=%m, other_shift=%s, low=-32768, high=32767)
  return %z
}
""",
    "norm_rope": """graph g {
  size N in [1, 200000]
  input %x: bf16[2, N, 5120]
  param %w: bf16[5120]
  input %cos: f32[N, 64]
  input %sin: f32[N, 64]
  %y: bf16[2, N, 40, 128] = intarsia.norm_rope(input=%x, weight=%w, cos=%cos, sin=%sin, heads=40, eps=1e-06)
  return %y
}
""",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))


def compiled(text: str, architecture: str) -> Compiled:
    graph = Graph.parse(text)
    launch = launch_of(graph.nodes[-1], graph, architecture)
    assert launch is not None
    return compile_launch(launch, architecture)


def check_code(code: Compiled, architecture: str) -> None:
    assert code.spills == 0
    assert 16 <= code.registers <= 512
    assert code.shared_bytes <= (
        65_536 if architecture == "gfx942" else 101_376 if architecture == "sm_89" else 232_448
    )
    assert code.binary[:4] == b"\x7fELF"
    assert code.name in code.assembly
    assert architecture in code.assembly
    assert code.threads_per_warp == (64 if architecture == "gfx942" else 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_matrix_instruction_and_spill_nothing(name: str, architecture: str) -> None:
    code = compiled(PRODUCTS[name], architecture)
    check_code(code, architecture)
    assert code.instructions[ARCHITECTURES[architecture].matrix] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ROWS)
def test_kernels_without_products_spill_nothing(name: str, architecture: str) -> None:
    code = compiled(ROWS[name], architecture)
    check_code(code, architecture)
    assert code.instructions == {}


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name.startswith("linear")])
def test_the_tile_of_a_single_token_spills_nothing_either(name: str) -> None:
    code = compiled(PRODUCTS[name].replace("[2, N,", "[1, 1,"), "sm_90")
    check_code(code, "sm_90")
    assert code.instructions["mma.sync"] > 0


def test_integer_products_are_those_of_the_tensor_cores() -> None:
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in compiled(INTEGERS, "sm_80").assembly
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in compiled(INTEGERS, "sm_90").assembly
    assert "tcgen05.mma.cta_group::1.kind::i8" in compiled(INTEGERS, "sm_100").assembly


def test_ptx_is_of_a_version_that_older_drivers_take() -> None:
    assert ".version 8.3" in compiled(ROWS["gated_residual"], "sm_90").assembly
    assert ".version 8.6" in compiled(ROWS["gated_residual"], "sm_100").assembly


def test_loads_are_as_wide_as_the_alignment_that_a_launch_promises() -> None:
    assert "ld.global.v4.b32" in compiled(PRODUCTS["attention_64"], "sm_80").assembly
    odd = ROWS["gated_residual"].replace("5120", "5121")
    assert "ld.global.v4.b32" not in compiled(odd, "sm_80").assembly


def test_every_operator_with_a_kernel_is_compiled_here() -> None:
    kernels.register()
    launched = {op for contract in kernels.operators().values() for op in contract.LAUNCHES}
    assert launched == {Graph.parse(text).nodes[-1].op for text in (*PRODUCTS.values(), *ROWS.values())}


def test_an_architecture_that_is_not_known_is_refused_with_the_known_ones() -> None:
    graph = Graph.parse(ROWS["gated_residual"])
    launch = launch_of(graph.nodes[0], graph, "sm_75")
    assert launch is not None
    with pytest.raises(Unsupported, match=r"sm_75 is none that .*; those are sm_80, sm_89, sm_90, sm_100, gfx942"):
        compile_launch(launch, "sm_75")


def test_the_interpreter_does_not_pass_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(MissingEnvironment, match="TRITON_INTERPRET is set, so that Triton compiles nothing; unset it"):
        compiled(ROWS["gated_residual"], "sm_90")
