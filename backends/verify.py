"""Does a bundle hold what it claims? Files, fingerprints, and the engine against the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.bundle import Bundle, Chosen, fingerprints, load_bundle
from intarsia.backends.manifest import faults
from intarsia.backends.segmented import SegmentedEngine
from intarsia.backends.variant import Variant
from intarsia.ir.errors import IntarsiaError, MissingEnvironment, QualityError
from intarsia.ir.rewrite import drop_unused
from intarsia.ir.verify import verify

PASSED = "passed"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Check:
    """One claim, whether it was ``passed`` or ``not run``, and what was found; one that fails is an error."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All claims of a bundle, in the order in which they were checked."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every claim was checked and holds."""
        return not self.not_run

    @property
    def not_run(self) -> tuple[Check, ...]:
        """What this machine could not check."""
        return tuple(check for check in self.checks if check.status == NOT_RUN)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {"folder": self.folder, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify_bundle(
    folder: Path,
    *,
    engine: str | None = None,
    reference: bool = False,
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Check every claim that can be checked without the model's own code; seconds for a small model.

    Args:
        engine: The backend whose engine is checked; all engines otherwise.
        reference: Where this machine cannot run an engine, run its reference: the same files by other means.
        seed: Of the inputs on which engine and reference are compared afresh, beside the stored sample.
        progress: Called with the name of each check as it starts.

    Raises:
        UsageError: The folder is no bundle, or holds no such engine.
        QualityError: A claim does not hold; names the file or the claim.
    """
    bundle = load_bundle(folder)
    engines = (bundle.known(engine),) if engine else bundle.engines
    checking = _Checking(bundle, progress or (lambda _: None))
    checking.done.append(Check("manifest", PASSED, "its text is what its seal says"))
    checking.check("files", partial(_files, bundle))
    for variant in bundle.variants:
        checking.check(f"graph{variant.suffix}", partial(_graph, variant))
    checking.check("fingerprints", partial(_fingerprints, bundle))
    for variant in bundle.segments:
        checking.check(f"graph{variant.suffix}", partial(_graph, variant))
    if bundle.segments:
        checking.check("segments", partial(_segments, bundle))
    for name in engines:
        for variant in bundle.built:
            checking.check(f"{name}{variant.suffix}: structure", partial(variant.check, name))
        chosen = checking.load(name, reference=reference)
        if chosen is None:
            continue
        for variant in bundle.segments:
            own = _segment_of(chosen, variant)
            checking.check(f"{name}{variant.suffix}: stored sample", partial(_stored_sample, variant, own))
        for variant in bundle.variants:
            checking.check(f"{name}{variant.suffix}: stored sample", partial(_stored_sample, variant, chosen))
            checking.check(f"{name}{variant.suffix}: fresh inputs", partial(_fresh_inputs, variant, chosen, seed))
    return VerifyReport(str(folder), tuple(checking.done))


class _Checking:
    """Checks of a bundle, one after the other."""

    def __init__(self, bundle: Bundle, progress: Callable[[str], None]) -> None:
        self.bundle = bundle
        self.progress = progress
        self.done: list[Check] = []

    def check(self, name: str, find: Callable[[], str]) -> None:
        """Note what ``find`` says; any error but a missing environment is a claim that does not hold."""
        self.progress(name)
        try:
            self.done.append(Check(name, PASSED, find()))
        except (QualityError, MissingEnvironment):
            raise
        except IntarsiaError as error:
            raise QualityError(f"{self.bundle.folder}: {name}: {error}") from error

    def load(self, engine: str, *, reference: bool) -> Chosen | None:
        """The engine, ready to run; None, noted as not run, where this machine cannot."""
        name = f"{engine}: loads"
        self.progress(name)
        try:
            chosen = self.bundle.choose(engine, reference=reference)
        except MissingEnvironment as error:
            self.done.append(Check(name, NOT_RUN, str(error).removeprefix(f"{self.bundle.folder}: ")))
            return None
        self.done.append(Check(name, PASSED, chosen.why))
        return chosen


def _files(bundle: Bundle) -> str:
    if found := faults(bundle.folder, bundle.manifest):
        raise QualityError(f"{bundle.folder}: {'; '.join(found)}")
    return f"{len(bundle.manifest['files'])} files have the bytes that the manifest says"


def _graph(variant: Variant) -> str:
    verify(variant.graph)
    return f"{len(variant.graph.nodes)} nodes, well formed"


def _segments(bundle: Bundle) -> str:
    """Segments that have every call of the whole graph; a few are in several, and signals of caching come on top."""
    calls = Counter(node for variant in bundle.segments for node in variant.graph.nodes)
    needed = drop_unused(bundle.graph).nodes
    if missing := Counter(needed) - calls:
        raise QualityError(f"{bundle.folder}: %{next(iter(missing)).name} of {bundle.graph.name} is in no segment")
    counts = ", ".join(str(len(variant.graph.nodes)) for variant in bundle.segments)
    return f"{counts} nodes, among them all {len(needed)} of the graph"


def _segment_of(chosen: Chosen, variant: Variant) -> Chosen:
    """The engine of one segment alone."""
    assert isinstance(chosen.engine, SegmentedEngine)
    return replace(chosen, engine=chosen.engine.segments[variant.number].engine)


def _fingerprints(bundle: Bundle) -> str:
    programs = {variant.phase: variant.program for variant in bundle.variants}
    found = fingerprints(programs, bundle.plan, [variant.graph for variant in bundle.segments])
    for key, claimed in bundle.manifest["fingerprints"].items():
        if found.get(key) != claimed:
            raise QualityError(f"{bundle.folder}: the {key} has fingerprint {found.get(key)}, claimed is {claimed}")
    return ", ".join(f"{key} {value}" for key, value in found.items() if value)


def _stored_sample(variant: Variant, chosen: Chosen) -> str:
    sample = variant.sample
    answer = chosen.engine(*sample.inputs)
    stored = sample.engines.get(chosen.name)
    against = [(stored, "its stored answer")] if stored else []
    return "; ".join(
        _agree(variant, chosen.name, answer, expected, f"{_subject(chosen)} on the stored sample against {what}")
        for expected, what in (*against, (sample.reference, "the stored reference"))
    )


def _subject(chosen: Chosen) -> str:
    return f"the reference of {chosen.name}" if chosen.on_reference else "the engine"


def _fresh_inputs(variant: Variant, chosen: Chosen, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(_like(tensor, generator) for tensor in variant.sample.inputs)
    with torch.no_grad():
        reference = tuple(variant.program.module()(*inputs))
    what = f"{_subject(chosen)} on fresh inputs (seed {seed}) against the reference"
    return _agree(variant, chosen.name, chosen.engine(*inputs), reference, what)


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Another input of the same kind: normal with the same mean and spread, or the same integers in another order."""
    if not tensor.is_floating_point():
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
    values = tensor.double()
    spread = values.std(correction=0) if tensor.numel() else 0.0
    return (values.mean() + spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(
        tensor.dtype
    )


def _agree(variant: Variant, name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> str:
    allowed = variant.bundle.backend(name).tolerance(variant.graph)
    error = agreement.error(found, expected)
    if not error <= allowed:
        place = f"{variant.bundle.folder}{variant.suffix}"
        more = f"{allowed:.0e} is allowed" if allowed else "integers are equal, so nothing is allowed"
        raise QualityError(f"{place}: {what} differs by {error:.1e}; {more}")
    return f"{what}: {f'{error:.1e} of {allowed:.0e} allowed' if allowed else 'equal, as integers are'}"
