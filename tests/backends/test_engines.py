"""Several engines in one bundle, and engines that the machine at hand cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from intarsia.backends import base
from intarsia.backends.base import Engine
from intarsia.backends.bundle import Bundle, Chosen
from intarsia.backends.null import NullBackend, NullEngine
from intarsia.backends.packing import Build, Evidence, write_bundle
from intarsia.backends.verify import verify_bundle
from intarsia.ir.errors import MissingEnvironment, QualityError, Unsupported, UsageError
from intarsia.ir.graph import Graph, Node
from intarsia.ir.program import Program
from intarsia.ir.target import Target


@dataclass(frozen=True)
class Distant(NullBackend):
    """Its engines run on a machine that is not here."""

    name: ClassVar[str] = "distant"

    def load(self, folder: Path, files: Sequence[str]) -> NullEngine:
        raise MissingEnvironment("no such device here")

    def check(self, folder: Path, files: Sequence[str]) -> str:
        if (folder / "model.graph").read_text().startswith("graph"):
            return "2 files, well formed"
        raise QualityError(f"{folder / 'model.graph'} is no graph")


@dataclass(frozen=True)
class Checkable(Distant):
    """Has a reference beside its engine."""

    name: ClassVar[str] = "checkable"
    offset: float = 0.0

    def load_reference(self, folder: Path, files: Sequence[str]) -> Engine:
        return NullBackend.load(self, folder, files)


@dataclass(frozen=True)
class Narrow(NullBackend):
    """Takes no gelu, and builds for nothing but a null target."""

    name: ClassVar[str] = "narrow"

    def why_not_target(self, target: Target) -> str | None:
        return None if target.kind == "null" else f"it is a {target.kind} machine; take a null one"

    def why_not(self, node: Node, graph: Graph, target: Target) -> str | None:
        return "it is a curve; use aten.relu" if node.op == "aten.gelu" else None


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Distant, Checkable, Narrow):
        monkeypatch.setitem(base.BACKENDS, cls.name, f"{__name__}:{cls.__name__}")
    monkeypatch.setattr("intarsia.ir.registry.import_path", _import_path)


def _import_path(path: str) -> object:
    import importlib

    module, _, name = path.partition(":")
    return globals()[name] if module == __name__ else getattr(importlib.import_module(module), name)


def write(folder: Path, program: Program, target: Target, *backends: NullBackend, **more: object) -> Bundle:
    builds = [Build(backend, program) for backend in backends]
    return write_bundle(
        folder, program=program, plan=None, builds=builds, target=target, command="intarsia export", **more
    )


def test_the_engine_that_runs_here_is_taken_and_the_reason_names_the_others(
    tmp_path: Path, program: Program, target: Target
) -> None:
    bundle = write(tmp_path / "out", program, target, Distant(), NullBackend())
    assert bundle.engines == ("null", "distant")
    chosen = bundle.choose()
    assert (chosen.name, chosen.on_reference) == ("null", False)
    assert chosen.why.startswith("null runs on CPU, ")
    with pytest.raises(MissingEnvironment, match=r"out: distant does not run here: no such device here"):
        bundle.choose("distant")
    with pytest.raises(UsageError, match="holds no engine of onnx, but of null, distant"):
        bundle.choose("onnx")


def test_an_engine_that_does_not_run_here_is_checked_and_reported_as_not_run(
    tmp_path: Path, program: Program, target: Target
) -> None:
    bundle = write(tmp_path / "out", program, target, Distant())
    claims = bundle.manifest["engines"]["distant"]
    assert claims["check"] == "2 files, well formed"
    assert claims["sample"] == "not run: no such device here"
    assert bundle.sample.engines == {}
    report = verify_bundle(bundle.folder)
    assert not report.passed
    assert [(check.name, check.detail) for check in report.not_run] == [
        ("distant: loads", "distant does not run here: no such device here")
    ]


def test_a_reference_runs_in_its_place_only_when_asked(tmp_path: Path, program: Program, target: Target) -> None:
    bundle = write(tmp_path / "out", program, target, Checkable(offset=1.5))
    assert bundle.manifest["engines"]["checkable"]["backend"] == "checkable(offset=1.5)"
    assert bundle.manifest["engines"]["checkable"]["sample"] == "its reference's: no such device here"
    assert not verify_bundle(bundle.folder).passed
    with pytest.raises(MissingEnvironment):
        bundle.choose()
    report = verify_bundle(bundle.folder, reference=True)
    assert report.passed
    assert "the reference of checkable runs in its place" in report.checks[5].detail
    assert bundle.choose(reference=True).on_reference


def test_evidence_is_asked_of_what_runs_and_of_nothing_where_nothing_does(
    tmp_path: Path, program: Program, target: Target
) -> None:
    asked: list[Chosen | None] = []

    def evidence(chosen: Chosen | None) -> Evidence:
        asked.append(chosen)
        return Evidence()

    write(tmp_path / "a", program, target, Distant(), evidence=evidence)
    write(tmp_path / "b", program, target, Distant(), Checkable(), evidence=evidence)
    write(tmp_path / "c", program, target, Checkable(), NullBackend(), evidence=evidence)
    assert [one and (one.name, one.on_reference) for one in asked] == [None, ("checkable", True), ("null", False)]


def test_a_corrupt_engine_is_found_without_running_it(tmp_path: Path, program: Program, target: Target) -> None:
    @dataclass(frozen=True)
    class Broken(Distant):
        def build(self, program, target, folder):  # type: ignore[no-untyped-def]
            built = super().build(program, target, folder)
            (folder / "model.graph").write_text("nothing")
            return built

    with pytest.raises(QualityError, match=r"model\.graph is no graph"):
        write(tmp_path / "out", program, target, Broken())
    assert list(tmp_path.iterdir()) == []


def test_what_any_backend_refuses_is_said_before_anything_is_built(
    tmp_path: Path, program: Program, target: Target
) -> None:
    with pytest.raises(Unsupported) as caught:
        write(tmp_path / "out", program, target, NullBackend(), Narrow())
    assert caught.value.reasons == ("aten.gelu: 1 call, first %hidden (model.py:4): it is a curve; use aten.relu",)
    other = Target("box", "a box", "cpu", "x86", {"f32": 1e12}, 1e11, 2**30, 1e-6)
    with pytest.raises(Unsupported, match="backend narrow cannot build for box: it is a cpu machine; take a null one"):
        write(tmp_path / "out", program, other, Narrow())
    assert list(tmp_path.iterdir()) == []
