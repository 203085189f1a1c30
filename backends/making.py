"""Make the engines of a bundle: build each program with each backend, prove what can be, load what runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.backends.base import Backend, Built, Engine, require_support
from intarsia.backends.bundle import Chosen, preference
from intarsia.backends.manifest import OWN, PHASES, SEGMENTS
from intarsia.backends.parts import Parts, SegmentParts
from intarsia.ir.errors import MissingEnvironment, Unsupported
from intarsia.ir.graph import Graph
from intarsia.ir.program import Program
from intarsia.ir.target import Target


@dataclass(frozen=True)
class Build:
    """What an engine is made with: a backend, and the program as that backend's passes left it, materialized."""

    backend: Backend
    program: Program


@dataclass(frozen=True)
class Planned:
    """A program as the plan made it, materialized, and what engines are built of it, one of each backend."""

    program: Program
    builds: Sequence[Build]


@dataclass(frozen=True)
class Written:
    """An engine on disk: where, what the backend wrote, and what was proven of it."""

    folder: Path
    built: Built
    check: str

    def claims(self) -> dict[str, object]:
        """Its part of the manifest."""
        return {"check": self.check, "files": list(self.built.files), "info": dict(self.built.info)}


@dataclass(frozen=True)
class Made:
    """Engines of one backend, one a program, and what of them runs here.

    Attributes:
        parts: What their programs are to the model.
        written: By the number of their program.
        chosen: What runs here, of all programs together.
        obstacle: Why the engines themselves do not run here; empty if they do.
    """

    backend: Backend
    parts: Parts
    written: Mapping[int, Written]
    chosen: Chosen | None
    obstacle: str

    def claims(self) -> dict[str, object]:
        """Their entry in the manifest; engines of later phases stand below ``phases``, segments' below ``segments``."""
        sample = OWN if not self.obstacle else f"not run: {self.obstacle}"
        if self.chosen and self.chosen.on_reference:
            sample = f"its reference's: {self.obstacle}"
        head = {"backend": str(self.backend), "sample": sample}
        if isinstance(self.parts, SegmentParts):
            return {**head, SEGMENTS: {str(number): one.claims() for number, one in self.written.items()}}
        later = {str(phase): one.claims() for phase, one in self.written.items() if phase}
        return {**head, **self.written[0].claims(), **({PHASES: later} if later else {})}


def make_engines(
    programs: Mapping[int, Planned],
    parts: Parts,
    whole: Graph,
    *,
    target: Target,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Made]:
    """Build every engine below ``folder``, the preferred backend's first, and load what runs here.

    Args:
        programs: By number; they ask for the same backends.
        parts: What they are to the model, whose graph is ``whole``.

    Raises:
        MissingEnvironment: A package that a backend needs is not there.
    """
    graphs = {number: planned.program.graph for number, planned in programs.items()}

    def join(engines: Mapping[int, Engine]) -> Engine:
        return parts.join(engines, whole, graphs)

    made: list[Made] = []
    for builds in _by_backend(programs):
        written: dict[int, Written] = {}
        for number, build in builds.items():
            place = folder / "engine" / build.backend.name / parts.folder(number)
            written[number] = _written(build, target, place, f"{build.backend.name}{parts.suffix(number)}", progress)
        chosen, obstacle = _loaded(builds[0].backend, written, join, folder)
        made.append(Made(builds[0].backend, parts, written, chosen, obstacle))
    return made


def require_every_support(programs: Mapping[int, Planned], target: Target) -> None:
    """Raise Unsupported with what any backend refuses in any program, each once; the only error as it is."""
    refused: dict[str, Unsupported] = {}
    for build in (build for builds in _by_backend(programs) for build in builds.values()):
        try:
            require_support(build.backend, build.program.graph, target)
        except Unsupported as error:
            refused.setdefault(str(error), error)
    if len(refused) == 1:
        raise next(iter(refused.values()))
    if refused:
        raise Unsupported("backends cannot build:", [line for text in refused for line in text.splitlines()])


def preferred(made: Sequence[Made]) -> Chosen | None:
    """The first that runs itself, else the first whose reference does."""
    chosen = [one.chosen for one in made if one.chosen]
    return next((one for one in chosen if not one.on_reference), next(iter(chosen), None))


def _by_backend(programs: Mapping[int, Planned]) -> list[dict[int, Build]]:
    """The builds of each backend by their program's number, the preferred backend first."""
    backends = sorted((build.backend.name for build in programs[0].builds), key=preference)
    return [
        {
            number: next(build for build in planned.builds if build.backend.name == name)
            for number, planned in programs.items()
        }
        for name in backends
    ]


def _written(build: Build, target: Target, folder: Path, what: str, progress: Callable[[str], None]) -> Written:
    progress(f"build engine, {what}")
    folder.mkdir(parents=True)
    built = build.backend.build(build.program, target, folder)
    progress(f"check engine, {what}")
    return Written(folder, built, build.backend.check(folder, built.files))


def _loaded(
    backend: Backend, written: Mapping[int, Written], join: Callable[[Mapping[int, Engine]], Engine], root: Path
) -> tuple[Chosen | None, str]:
    """What runs here: the engines, else their references, else nothing; and what keeps the engines from running.

    ``root`` is cut from what that says.
    """
    try:
        engine = join({number: backend.load(one.folder, one.built.files) for number, one in written.items()})
        return Chosen(backend.name, engine, ""), ""
    except MissingEnvironment as error:
        obstacle = str(error).replace(f"{root}/", "")
    try:
        engine = join({number: backend.load_reference(one.folder, one.built.files) for number, one in written.items()})
    except MissingEnvironment:
        return None, obstacle
    return Chosen(backend.name, engine, obstacle, on_reference=True), obstacle
