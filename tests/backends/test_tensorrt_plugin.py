"""Kernels as plugins: the code is assembled by NVIDIA's ptxas, the interface stood in for; TensorRT runs none here."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from intarsia.backends.tensorrt_plugin import Plugin, plugin_of, register, reorder
from intarsia.ir.errors import Unsupported
from intarsia.ir.graph import Graph

pytest.importorskip("triton")

NORM = """graph norm {
  size N in [2, 4096]
  input %x: f16[2, N, 128]
  input %scale: f16[2, 1, 128]
  input %shift: f16[2, 1, 128]
  %y: f16[2, N, 128] = intarsia.modulated_norm(input=%x, weight=None, bias=None, scale=%scale, shift=%shift, eps=1e-06)
  return %y
}
"""


SPARSE = """graph sparse {
  size B in [1, 4]
  input %q: f16[B, 2, 64, 32]
  param %rows: i32[4, 3]
  param %columns: i32[9]
  param %reach: i32[4]
  param %tokens: i32[64]
  %y: f16[B, 2, 64, 32] = intarsia.block_sparse_attention_tables(query=%q, key=%q, value=%q, lengths=None, \
rows=%rows, columns=%columns, reach=%reach, tokens=%tokens, block_q=16, block_k=16, scale=None)
  return %y
}
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugin]:
    """The modulated norm above, for an A100."""
    graph = Graph.parse(NORM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield plugin_of(graph.nodes[0], graph, "sm_80")


def parameters(ptx: str) -> list[str]:
    """Type of every parameter of the entry, in order: ``u64`` is a pointer."""
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\n\s*\)", ptx, flags=re.DOTALL)
    assert declared is not None
    return re.findall(r"\.param \.(\w+)", declared[1])


def test_parameters_are_inputs_then_whole_numbers_then_outputs_and_nothing_else(plugin: Plugin) -> None:
    assert tuple(plugin.inputs) == ("input", "scale", "shift")
    assert plugin.extras == ("(1)*(128)", "0", "(1)*(128)", "0", "N")
    assert parameters(plugin.ptx) == ["u64"] * 3 + ["u32"] * 5 + ["u64"]


def test_nvidias_assembler_takes_the_reordered_code(plugin: Plugin, tmp_path: Path) -> None:
    assembled(plugin, tmp_path)


def assembled(plugin: Plugin, folder: Path) -> None:
    """Fail unless NVIDIA's assembler takes the code and no register is spilled."""
    from triton import knobs

    (folder / "kernel.ptx").write_text(plugin.ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_80", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    assert plugin.function in said
    assert "0 bytes spill stores, 0 bytes spill loads" in said


def test_sparse_attention_is_a_plugin_whose_tables_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    graph = Graph.parse(SPARSE)
    found = plugin_of(graph.nodes[0], graph, "sm_80")
    assert found.id == "intarsia::block_sparse_attention_tables"
    assert tuple(found.inputs) == ("query", "key", "value", "rows", "columns", "reach", "tokens")
    assert [str(type_) for type_ in found.outputs.values()] == ["f16[B, 64, 2, 32]"]
    assert parameters(found.ptx) == ["u64"] * 7 + ["u32"] * 12 + ["u64"]
    assert found.extras[:3] == ("(2)*(64)*(32)", "(64)*(32)", "(32)")
    assert found.grid == ("4", "2*(B)", "1")
    assert found.sizes == {"B": (0, 0)}
    assembled(found, tmp_path)


def test_a_parameter_that_the_code_reads_is_not_left_out() -> None:
    code = ".entry f(\n\t.param .u64 f_param_0,\n\t.param .u32 f_param_1\n)\n{\n\tld.param.u32 %r1, [f_param_1];\n}\n"
    assert parameters(reorder(code, [1, 0])) == ["u32", "u64"]
    assert parameters(reorder(code, [1])) == ["u32"]
    with pytest.raises(Unsupported, match="the code reads its parameter 1, which TensorRT does not pass"):
        reorder(code, [0])


class Expression(str):
    """Stands for ``tensorrt.plugin.ShapeExpr``: says what was asked of it; takes numbers on its right only, like it."""

    def __new__(cls, value: object) -> Expression:
        return super().__new__(cls, value)

    def __add__(self, other: object) -> Expression:
        return Expression(f"({self} + {other})")

    def __mul__(self, other: object) -> Expression:
        return Expression(f"({self} * {other})")

    def __floordiv__(self, other: object) -> Expression:
        return Expression(f"({self} // {other})")

    __rmul__ = None  # type: ignore[assignment]


class TensorDesc(SimpleNamespace):
    """Stands for ``tensorrt.plugin.TensorDesc``."""


def stand_in() -> Any:
    """What this project uses of ``tensorrt.plugin``, with the rules that its own decorators check."""
    known: dict[str, Callable[..., Any]] = {}

    def registered(id: str) -> Callable[[Callable[..., Any]], None]:
        def decorate(function: Callable[..., Any]) -> None:
            signature = inspect.signature(function)
            assert all(p.annotation is TensorDesc and p.default is p.empty for p in signature.parameters.values())
            assert signature.return_annotation is TensorDesc
            known[id] = function

        return decorate

    def implemented(id: str) -> Callable[[Callable[..., Any]], None]:
        def decorate(function: Callable[..., Any]) -> None:
            assert [*inspect.signature(function).parameters][-2:] == ["outputs", "tactic"]
            assert [*inspect.signature(function).parameters][:-2] == [*inspect.signature(known[id]).parameters]
            known[f"{id} ahead of time"] = function

        return decorate

    return SimpleNamespace(
        known=known,
        register=registered,
        aot_impl=implemented,
        TensorDesc=TensorDesc,
        ShapeExpr=Expression,
        SymExprs=tuple,
        SymInt32=lambda value: value,
        SymIntExprs=SimpleNamespace(from_tuple=tuple),
        KernelLaunchParams=SimpleNamespace,
        from_shape_expr=lambda shape, dtype: TensorDesc(shape_expr=shape, dtype=dtype),
    )


def test_the_launch_is_told_in_expressions_of_the_inputs_extents(plugin: Plugin) -> None:
    trtp = stand_in()
    register(SimpleNamespace(DataType=SimpleNamespace(HALF="half")), trtp, plugin)
    assert [*trtp.known] == ["intarsia::modulated_norm", "intarsia::modulated_norm ahead of time"]
    tokens = Expression("tokens")
    inputs = [TensorDesc(shape_expr=(2, tokens, 128)), *[TensorDesc(shape_expr=(2, 1, 128))] * 2]
    described = trtp.known["intarsia::modulated_norm"](*inputs)
    assert (described.shape_expr, described.dtype) == ((2, "tokens", 128), "half")
    name, code, launch, numbers = trtp.known["intarsia::modulated_norm ahead of time"](*inputs, (described,), None)
    assert (name, code) == (plugin.function, plugin.ptx)
    assert (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x) == ("(2 * tokens)", 1, 1, 32)
    assert numbers == (128, 0, 128, 0, "tokens")


def test_an_operator_without_a_kernel_is_refused() -> None:
    graph = Graph.parse("graph g {\n  input %x: f16[2]\n  %y: f16[2] = aten.relu(self=%x)\n  return %y\n}")
    with pytest.raises(Unsupported, match=r"%y: aten.relu has no Triton kernel that could be a plugin"):
        plugin_of(graph.nodes[0], graph, "sm_80")
