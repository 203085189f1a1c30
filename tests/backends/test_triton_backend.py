"""Triton engines where there is no GPU: compiled, checked, run on their reference, and launched on paper."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from intarsia import kernels
from intarsia.backends.base import find_backend
from intarsia.backends.bundle import Bundle
from intarsia.backends.packing import Build, write_bundle
from intarsia.backends.triton import TritonBackend, fitting
from intarsia.backends.triton_engine import _sizes, laid_out, steps
from intarsia.backends.triton_files import Manual, read_manual
from intarsia.backends.verify import verify_bundle
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import Target, load_target
from intarsia.kernels.launch import launch_of, prepare

TWO_KERNELS = """graph two_kernels {
  size N in [1, 64]
  input %x: f32[2, N, 64]
  param %w: f32[64, 64]
  param %gate: f32[1, 1, 64]
  %y: f32[2, N, 64] = aten.linear(input=%x, weight=%w, bias=None)
  %r: f32[2, N, 64] = intarsia.gated_residual(residual=%x, input=%y, gate=%gate)
  %s: f32[2, N, 64] = intarsia.gated_residual(residual=%r, input=%x, gate=%gate)
  return %s
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    kernels.register()
    graph = Graph.parse(TWO_KERNELS)
    generator = torch.Generator().manual_seed(0)
    return Program(graph, {p.name: torch.randn(p.type.shape, generator=generator) for p in graph.params})


@pytest.fixture(scope="module")
def gpu() -> Target:
    return load_target("h100")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, program: Program, gpu: Target) -> Bundle:
    folder = tmp_path_factory.mktemp("triton") / "out"
    builds = [Build(TritonBackend(), program)]
    return write_bundle(folder, program=program, plan=None, builds=builds, target=gpu, command="intarsia export")


@pytest.fixture
def engine(tmp_path: Path, bundle: Bundle) -> Path:
    """A copy of the engine's folder, to be altered."""
    import shutil

    return Path(shutil.copytree(bundle.folder / "engine" / "triton", tmp_path / "engine"))


def test_two_calls_of_one_kernel_share_its_code(bundle: Bundle) -> None:
    claims = bundle.manifest["engines"]["triton"]
    assert claims["check"] == "1 kernels for sm_90, 0 spilling; they take 2 of 3 calls"
    assert claims["info"]["calls"] == {"intarsia.gated_residual": 2, "through PyTorch": 1}


def test_two_builds_give_the_same_bytes_and_tell_no_paths(
    tmp_path: Path, bundle: Bundle, program: Program, gpu: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another cache"))
    (tmp_path / "again").mkdir()
    built = TritonBackend().build(program, gpu, tmp_path / "again")
    for name in built.files:
        content = (tmp_path / "again" / name).read_bytes()
        assert content == (bundle.folder / "engine/triton" / name).read_bytes()
        assert b"site-packages" not in content
        assert b".py" not in content


def test_without_a_gpu_the_run_is_refused_unless_the_reference_is_asked_for(bundle: Bundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingEnvironment, match="triton does not run here: no GPU that PyTorch can use"):
        bundle.engine()
    assert [check.name for check in verify_bundle(bundle.folder).not_run] == ["triton: loads"]
    assert verify_bundle(bundle.folder, reference=True).passed


def corrupt_binary(folder: Path) -> str:
    (path,) = folder.glob("kernels/*.cubin")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    return "its bytes are not those that were compiled"


def no_machine_code(folder: Path) -> str:
    (path,) = folder.glob("kernels/*.cubin")
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, 18, 62)  # x86-64
    return rewrite(folder, path, bytes(content)) or "is no cubin: its ELF header says otherwise"


def no_symbol(folder: Path) -> str:
    (path,) = folder.glob("kernels/*.cubin")
    return rewrite(folder, path, path.read_bytes().replace(b"gated_residual", b"other_residual")) or "holds no symbol"


def rewrite(folder: Path, path: Path, content: bytes) -> None:
    """Put the content there with a fitting hash, as a forger would."""
    import hashlib

    path.write_bytes(content)
    data = json.loads((folder / "engine.json").read_text())
    for kernel in data["compiled"].values():
        kernel["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "engine.json").write_text(json.dumps(data))


def other_assembly(folder: Path) -> str:
    (path,) = folder.glob("kernels/*.ptx")
    path.write_text(path.read_text().replace("sm_90", "sm_75"))
    return "its assembly is not of _gated_residual for sm_90"


def edited(key: str, value: object) -> object:
    def edit(folder: Path) -> str:
        data = json.loads((folder / "engine.json").read_text())
        for kernel in data["compiled"].values():
            kernel[key] = value
        (folder / "engine.json").write_text(json.dumps(data))
        return {"shared_bytes": "bytes of shared memory; sm_90 has 232,448", "registers": "there are 65,536"}[key]

    return edit


def a_call_that_is_not_there(folder: Path) -> str:
    data = json.loads((folder / "engine.json").read_text())
    data["calls"]["sm_90"]["nowhere"] = next(iter(data["calls"]["sm_90"].values()))
    (folder / "engine.json").write_text(json.dumps(data))
    return "launches %nowhere for sm_90, which the graph has not"


def a_launch_that_is_not_described(folder: Path) -> str:
    data = json.loads((folder / "engine.json").read_text())
    data["launches"] = {}
    (folder / "engine.json").write_text(json.dumps(data))
    return "which is not described"


def a_stump(folder: Path) -> str:
    (path,) = folder.glob("kernels/*.cubin")
    return rewrite(folder, path, b"\x7fELF") or "is no cubin: its ELF header says otherwise"


def an_unknown_architecture(folder: Path) -> str:
    text = (folder / "engine.json").read_text().replace("sm_90", "sm_77")
    for path in folder.glob("kernels/*"):
        path.rename(path.with_name(path.name.replace("sm_90", "sm_77")))
    (folder / "engine.json").write_text(text)
    (path,) = folder.glob("kernels/*.ptx")
    path.write_text(path.read_text().replace("sm_90", "sm_77"))
    return "is for sm_77, of which nothing is known"


def no_json(folder: Path) -> str:
    (folder / "engine.json").write_text("{")
    return "is not what a Triton engine holds"


def no_graph(folder: Path) -> str:
    (folder / "model.graph").write_text("graph g {")
    return "model.graph: line"


@pytest.mark.parametrize(
    "damage",
    [
        corrupt_binary,
        no_machine_code,
        no_symbol,
        other_assembly,
        edited("shared_bytes", 300_000),
        edited("registers", 255 * 100),
        a_call_that_is_not_there,
        a_launch_that_is_not_described,
        a_stump,
        an_unknown_architecture,
        no_json,
        no_graph,
    ],
)
def test_a_damaged_engine_is_found_without_a_gpu(engine: Path, damage) -> None:  # type: ignore[no-untyped-def]
    said = damage(engine)
    with pytest.raises(QualityError) as caught:
        TritonBackend().check(engine, [])
    assert said in str(caught.value)


class OnPaper:
    """What a compiled gated_residual does with the addresses it is given: (r + x * gate) over (B * N, C)."""

    def __init__(self) -> None:
        self.grids: list[list[int]] = []

    def launch(self, grid: Sequence[int], arguments: Sequence[int], *, stream: int) -> None:
        self.grids.append(list(grid))
        self.arguments = list(arguments)


def test_a_kernel_is_given_its_operands_where_the_launch_says(bundle: Bundle, program: Program) -> None:
    manual = read_manual(bundle.folder / "engine/triton")
    paper = OnPaper()
    (identity,) = {*manual.calls["sm_90"].values()}
    launch = manual.launches[identity]
    run = steps(program.graph, manual, "sm_90", {identity: paper}, torch.device("cpu"))  # type: ignore[dict-item]
    x = torch.randn(2, 5, 64)
    table = {**program.weights, "x": x}
    run[0](table, {"N": 5})
    projected = table["y"]
    run[1](table, {"N": 5})
    assert "y" not in table, "let go after its last use"
    given = dict(zip(launch.arguments, paper.arguments, strict=True))
    assert given["residual"] == x.data_ptr()
    assert given["input"] == projected.data_ptr()
    assert given["gate"] == program.weights["gate"].data_ptr()
    assert given["output"] == table["r"].data_ptr()
    assert table["r"].shape == (2, 5, 64)
    read = np.ctypeslib.as_array((ctypes.c_float * 640).from_address(given["input"]))
    assert np.array_equal(read, projected.numpy().ravel())
    run[2](table, {"N": 5})
    assert {*table} == {"w", "gate", "s"}
    assert paper.grids[0] == paper.grids[1]


def test_no_kernel_is_started_for_no_tokens(bundle: Bundle, program: Program) -> None:
    manual = read_manual(bundle.folder / "engine/triton")
    paper = OnPaper()
    functions = dict.fromkeys(manual.calls["sm_90"].values(), paper)
    table = {**program.weights, "x": torch.randn(2, 0, 64)}
    for step in steps(program.graph, manual, "sm_90", functions, torch.device("cpu")):  # type: ignore[arg-type]
        step(table, {"N": 0})
    assert paper.grids == []
    assert table["s"].shape == (2, 0, 64)


def test_sizes_are_told_by_the_inputs(program: Program) -> None:
    assert _sizes(program.graph, [torch.zeros(2, 7, 64)]) == {"N": 7}
    for shape, said in (((2, 7), "a tensor of shape"), ((3, 7, 64), "dimension 2 is 3"), ((2, 7, 65), "64 is 65")):
        with pytest.raises(UsageError, match=said):
            _sizes(program.graph, [torch.zeros(shape)])
    with pytest.raises(UsageError, match="takes x; 2 tensors are given"):
        _sizes(program.graph, [torch.zeros(2, 7, 64)] * 2)


@pytest.mark.parametrize(
    ("device", "architectures", "taken"),
    [
        ("sm_90", ("sm_80", "sm_90"), "sm_90"),
        ("sm_86", ("sm_80", "sm_90"), "sm_80"),
        ("sm_89", ("sm_80",), "sm_80"),
        ("sm_90", ("sm_80",), None),
        ("sm_80", ("sm_89",), None),
        ("gfx942", ("sm_90",), None),
    ],
)
def test_code_is_taken_that_runs_on_the_device(device: str, architectures: tuple[str, ...], taken: str | None) -> None:
    if taken:
        assert fitting(device, architectures) == taken
        return
    with pytest.raises(MissingEnvironment, match=f"the GPU here is {device}, the engine was compiled for"):
        fitting(device, architectures)


def test_a_target_without_a_compiler_is_refused_with_what_takes_it(program: Program) -> None:
    backend = find_backend("triton(architectures='sm_80')")
    assert backend.why_not_target(load_target("a100")) is None
    reason = backend.why_not_target(load_target("cpu-avx2"))
    known = "sm_80, sm_89, sm_90, sm_100, gfx942"
    assert reason == f"x86-64-v3 is no GPU that kernels are compiled for ({known}); take onnx or tvm there"
    assert "sm_75 is no GPU" in str(backend.why_not_target(load_target("t4")))


def test_what_a_kernel_does_not_take_is_refused_with_its_reason(gpu: Target) -> None:
    graph = Graph.parse(
        "graph g {\n  input %q: f32[1, 2, 8, 40]\n"
        "  %a: f32[1, 2, 8, 40] = intarsia.attention(query=%q, key=%q, value=%q, lengths=None, scale=None)\n"
        "  return %a\n}\n"
    )
    reason = TritonBackend().why_not(graph.nodes[0], graph, gpu)
    assert reason == "a head has 40 channels; on a GPU intarsia.attention takes 32, 64, 128"


CONVOLUTION = """graph convolution {
  input %x: i8[2, 16, 9, 9]
  param %w: i8[32, 16, 3, 3]
  param %n: i32[32]
  %y: i8[2, 32, 9, 9] = intarsia.conv2d_i8i8(input=%x, weight=%w, bias=%n, multiplier=%n, shift=%n, """
CONVOLUTION += """stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
  return %y
}
"""


def test_weights_lie_in_memory_as_their_kernels_read_them() -> None:
    graph = Graph.parse(CONVOLUTION)
    launch = launch_of(graph.nodes[0], graph, "sm_90")
    assert launch is not None
    manual = Manual("3.9.0", {"sm_90": {"y": "one"}}, {"one": launch}, {}, {})
    weights = {"w": torch.randint(-128, 128, (32, 16, 3, 3)).to(torch.int8), "n": torch.ones(32, dtype=torch.int32)}
    found = laid_out(graph, manual, "sm_90", weights)
    assert torch.equal(found["w"], weights["w"])
    assert found["w"].permute(0, 2, 3, 1).is_contiguous()
    assert torch.equal(found["n"], weights["n"])
    again = prepare(launch, {"weight": found["w"]})
    assert again["weight"].data_ptr() == found["w"].data_ptr()


@pytest.mark.parametrize(("found", "said"), [(None, "which is missing"), ("3.2.0", "3.6 or later, 3.2.0 is installed")])
def test_a_missing_or_old_triton_is_one_line(  # noqa: PLR0917
    tmp_path: Path, program: Program, gpu: Target, monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(MissingEnvironment, match=said):
        TritonBackend().build(program, gpu, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_compiles_nothing(
    tmp_path: Path, program: Program, gpu: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises((MissingEnvironment, Unsupported), match="TRITON_INTERPRET is set"):
        TritonBackend().build(program, gpu, tmp_path)
