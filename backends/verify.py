"""Does a bundle hold what it claims? Files, fingerprints, and the engine against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from intarsia.backends import agreement
from intarsia.backends.base import Engine
from intarsia.backends.bundle import Bundle, fingerprints, load_bundle
from intarsia.backends.manifest import faults
from intarsia.ir.errors import IntarsiaError, MissingEnvironment, QualityError
from intarsia.ir.verify import verify


@dataclass(frozen=True)
class Check:
    """One claim and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All claims of a bundle, in the order in which they were checked."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {"folder": self.folder, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify_bundle(folder: Path, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> VerifyReport:
    """Check every claim that can be checked without the model's own code; seconds for a small model.

    Args:
        seed: Of the inputs on which engine and reference are compared afresh, beside the stored sample.
        progress: Called with the name of each check as it starts.

    Raises:
        UsageError: The folder is no bundle.
        QualityError: A claim does not hold; names the file or the claim.
        MissingEnvironment: This machine cannot run the engine.
    """
    bundle = load_bundle(folder)
    checks: list[Check] = [Check("manifest", True, "its text is what its seal says")]
    engine: list[Engine] = []
    pending: tuple[tuple[str, Callable[[], str]], ...] = (
        ("files", lambda: _files(bundle)),
        ("graph", lambda: _graph(bundle)),
        ("fingerprints", lambda: _fingerprints(bundle)),
        ("engine loads", lambda: _load(bundle, engine)),
        ("stored sample", lambda: _stored_sample(bundle, engine[0])),
        ("fresh inputs", lambda: _fresh_inputs(bundle, engine[0], seed)),
    )
    for name, check in pending:
        if progress is not None:
            progress(name)
        try:
            checks.append(Check(name, True, check()))
        except (QualityError, MissingEnvironment):
            raise
        except IntarsiaError as error:
            raise QualityError(f"{folder}: {name}: {error}") from error
    return VerifyReport(str(folder), tuple(checks))


def _files(bundle: Bundle) -> str:
    if found := faults(bundle.folder, bundle.manifest):
        raise QualityError(f"{bundle.folder}: {'; '.join(found)}")
    return f"{len(bundle.manifest['files'])} files have the bytes that the manifest says"


def _graph(bundle: Bundle) -> str:
    verify(bundle.graph)
    return f"{len(bundle.graph.nodes)} nodes, well formed"


def _fingerprints(bundle: Bundle) -> str:
    found = fingerprints(bundle.program, bundle.plan)
    for key, claimed in bundle.manifest["fingerprints"].items():
        if found.get(key) != claimed:
            raise QualityError(f"{bundle.folder}: the {key} has fingerprint {found.get(key)}, claimed is {claimed}")
    return ", ".join(f"{key} {value}" for key, value in found.items() if value)


def _load(bundle: Bundle, engine: list[Engine]) -> str:
    engine.append(bundle.engine())
    return engine[0].device


def _stored_sample(bundle: Bundle, engine: Engine) -> str:
    sample = bundle.sample
    answer = engine(*sample.inputs)
    return "; ".join(
        _agree(bundle, answer, expected, f"the engine on the stored sample against {what}")
        for expected, what in ((sample.engine, "its stored answer"), (sample.reference, "the stored reference"))
    )


def _fresh_inputs(bundle: Bundle, engine: Engine, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(_like(tensor, generator) for tensor in bundle.sample.inputs)
    with torch.no_grad():
        reference = tuple(bundle.program.module()(*inputs))
    return _agree(bundle, engine(*inputs), reference, f"the engine on fresh inputs (seed {seed}) against the reference")


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Another input of the same kind: normal with the same mean and spread, or the same integers in another order."""
    if not tensor.is_floating_point():
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
    values = tensor.double()
    spread = values.std(correction=0) if tensor.numel() else 0.0
    return (values.mean() + spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(
        tensor.dtype
    )


def _agree(bundle: Bundle, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> str:
    allowed = agreement.tolerance(bundle.graph)
    error = agreement.error(found, expected)
    if not error <= allowed:
        raise QualityError(f"{bundle.folder}: {what} differs by {error:.1e}; {allowed:.0e} is allowed")
    return f"{what}: {error:.1e} of {allowed:.0e} allowed"
