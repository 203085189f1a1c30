from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.backends.base import Backend, Built, Engine, find_backend
from intarsia.backends.conformance import check_backend
from intarsia.backends.null import NullBackend, NullEngine
from intarsia.ir.errors import UsageError
from intarsia.ir.program import Program
from intarsia.ir.target import Target


@pytest.mark.parametrize("name", ["null", "onnx"])
def test_our_backends_keep_their_contract(name: str, program: Program, target: Target, tmp_path: Path) -> None:
    check_backend(find_backend(name), program, target, tmp_path)


class _Random(NullBackend):
    def build(self, program: Program, target: Target, folder: Path) -> Built:
        built = super().build(program, target, folder)
        (folder / "noise").write_text(folder.name)
        return Built((*built.files, "noise"))


class _Untidy(NullBackend):
    def build(self, program: Program, target: Target, folder: Path) -> Built:
        built = super().build(program, target, folder)
        (folder / "log.txt").write_text("done")
        return built


class _Local(NullBackend):
    def build(self, program: Program, target: Target, folder: Path) -> Built:
        built = super().build(program, target, folder)
        (folder / "trace").write_text('File "model.py", line 3')
        return Built((*built.files, "trace"))


class _Yes(NullBackend):
    def why_not(self, *_: object) -> None:
        return None


class _Inexact(NullBackend):
    def load(self, folder: Path, files: Sequence[str]) -> NullEngine:
        return _Rounding(super().load(folder, files))  # type: ignore[return-value]


class _Rounding(Engine):
    device = "a machine"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(answer.half().float() for answer in self.engine(*inputs))


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (_Random(), "two builds of the same program wrote other bytes into noise"),
        (_Untidy(), "wrote .*log.txt"),
        (_Local(), "trace holds 'File"),
        (_Yes(), "why_not gives no reason"),
        (_Inexact(), "differs from the reference"),
    ],
)
def test_a_backend_that_breaks_its_contract_is_told_how(
    backend: Backend, said: str, program: Program, target: Target, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=said):
        check_backend(backend, program, target, tmp_path)


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="did you mean onnx\\? Known: null, onnx"):
        find_backend("onxx")


def test_the_null_engine_is_the_program_itself(program: Program) -> None:
    inputs = torch.ones(2, 8)
    assert torch.equal(NullEngine(program)(inputs)[0], program.module()(inputs)[0])
