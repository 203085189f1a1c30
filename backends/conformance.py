"""What every backend must satisfy; run it on yours."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import torch

from intarsia.backends import agreement
from intarsia.backends.base import Backend, Engine, require_support
from intarsia.backends.manifest import files_below
from intarsia.ir.graph import Node, Value
from intarsia.ir.program import Program, example_inputs
from intarsia.ir.target import Target
from intarsia.ir.types import TensorType


def check_backend(backend: Backend, program: Program, target: Target, folder: Path) -> None:
    """Raise AssertionError, with a sentence that says what is wrong, unless ``backend`` keeps its contract.

    Args:
        program: One that the backend takes, its weight-only nodes already run.
        folder: An empty folder to write into.
    """
    _refuses_with_reasons(backend, program, target)
    first, second = folder / "first", folder / "second"
    files = [_build(backend, program, target, place) for place in (first, second)]
    _require(files[0] == files[1], f"{backend.name}: two builds list other files: {files[0]} and {files[1]}")
    for name in files[0]:
        same = (first / name).read_bytes() == (second / name).read_bytes()
        _require(same, f"{backend.name}: two builds of the same program wrote other bytes into {name}")
        _tells_no_paths(backend, first / name, folder)
    shutil.rmtree(second)
    moved = first.rename(folder / "moved")
    _answers_like_the_reference(backend.load(moved, files[0]), backend, program)


def _refuses_with_reasons(backend: Backend, program: Program, target: Target) -> None:
    require_support(backend, program.graph, target)
    unknown = Node("nowhere.nothing", {}, (Value("nothing", TensorType("f32", (1,))),))
    reason = backend.why_not(unknown, program.graph, target)
    _require(bool(reason), f"{backend.name}: why_not gives no reason for an operator that does not exist")


def _build(backend: Backend, program: Program, target: Target, folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    built = backend.build(program, target, folder)
    found = files_below(folder)
    _require(sorted(built.files) == found, f"{backend.name}: build lists {sorted(built.files)} and wrote {found}")
    return tuple(built.files)


def _tells_no_paths(backend: Backend, path: Path, folder: Path) -> None:
    content = path.read_bytes()
    for text in (str(folder.absolute()), sysconfig.get_paths()["purelib"], 'File "'):
        said = f"{backend.name}: {path.name} holds {text!r}, which differs between machines"
        _require(text.encode() not in content, said)


def _answers_like_the_reference(engine: Engine, backend: Backend, program: Program) -> None:
    """For two sets of inputs, of other sizes where sizes have names, and twice alike."""
    name, allowed = backend.name, backend.tolerance(program.graph)
    _require(bool(engine.device), f"{name}: the engine does not say what it runs on")
    for seed, extent in enumerate((4, 6)):
        sizes = {size.name: min(max(size.minimum, extent), size.maximum or extent) for size in program.graph.sizes}
        inputs = example_inputs(program.graph, sizes, seed=seed)
        with torch.no_grad():
            expected = tuple(program.module()(*inputs))
        answer = engine(*inputs)
        found = agreement.error(answer, expected)
        said = f"{name}: differs from the reference by {found:.1e} for sizes {sizes}; {allowed:.0e} is allowed"
        _require(found <= allowed, said)
        _require(agreement.error(engine(*inputs), answer) == 0, f"{name}: the same inputs gave another answer")


def _require(holds: bool, said: str) -> None:
    if not holds:
        raise AssertionError(said)
