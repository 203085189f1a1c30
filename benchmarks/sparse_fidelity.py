"""How near sparse videos of wan-mini are to the dense ones: searched patterns beside one pattern for all heads.

    python benchmarks/sparse_fidelity.py [--quick] [--json FILE]

Everything is compared at the same share of computed pairs, on the same held-out noise and prompts, which the search
never sees; PSNR is against the dense model's videos, its floor between unrelated ones. The uniform patterns stay the
same in all layers, heads and steps, the stripes with the columns that calibration gives each head; random masks differ
from head to head. The searched plan has sixteen phases and what the pass offers unless told otherwise: the paper's
modes, tiles at distances, and shares of the mean. ``--quick`` takes three videos and the density of 25 %.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from harness import Figures, main

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.search.heads import SearchResult
    from intarsia.search.quality import Quality

MODEL, TARGET = "wan-mini", "cpu-avx2"
DENSITIES = {"50": 0.5, "25": 0.25, "12_5": 0.125}
UNIFORM = {
    "diagonal": "diagonal(density={})",
    "multi_diagonal": "multi-diagonal(density={})",
    "stripe": "vertical-stripe(density={}, sink=0)",
}
PHASES, PROBES = 16, 16


def _meanings() -> dict[str, str]:
    found = {}
    for name, density in DENSITIES.items():
        found[f"psnr_searched_{name}"] = f"dB, searched patterns that compute {density:.1%} of the pairs"
        found |= {f"psnr_uniform_{mode}_{name}": f"dB, all heads {mode.replace('_', ' ')}" for mode in UNIFORM}
        found[f"psnr_best_uniform_{name}"] = "dB, the best of these"
        found[f"psnr_random_{name}"] = "dB, random blocks"
        found[f"margin_{name}"] = "dB, searched above the best of the others"
        found[f"margin_low_{name}"] = "dB, lower end of the 95 % interval of that difference, sample by sample"
        found[f"density_searched_{name}"] = "share of pairs that the searched plan computes"
        found[f"density_uniform_{name}"] = "share of pairs that the best of the others computes"
        found[f"fusion_error_{name}"] = "largest relative difference that fusing heads makes in f32, one call"
    found["psnr_floor"] = "dB between unrelated dense videos"
    found["transfer_loss_db"] = "dB that choosing on other prompts and noise would have gained, at 25 %"
    found["transfer_agreement"] = "share of heads and phases that those would have chosen alike, at 25 %"
    found["samples"] = "held-out videos"
    return found


MEANINGS = _meanings()


def measure(quick: bool) -> Figures:
    """All densities; the figures that ``--quick`` leaves out are those of 25 %."""
    bench = _Bench("quick" if quick else "default")
    found: dict[str, float] = {}
    for name, density in DENSITIES.items():
        found |= bench.figures("25" if quick else name, 0.25 if quick else density, name)
    return found | {
        "psnr_floor": bench.floor,
        "transfer_loss_db": bench.transfer["loss_db"],
        "transfer_agreement": bench.transfer["agreement"],
        "samples": len(bench.reference),
    }


class _Bench:
    def __init__(self, effort: str) -> None:
        from intarsia import subject as subjects
        from intarsia.ir.target import load_target
        from intarsia.passes.base import find_pass
        from intarsia.search.journal import Journal
        from intarsia.search.progress import Silent

        self.subject = subjects.resolve(MODEL)
        self.target = load_target(TARGET)
        self.effort = effort
        self.work = subjects.workload(self.subject, seed=0, effort=effort, progress=Silent(), record=False)
        # Half of the held-out videos of the default effort say enough and take half of the time.
        self.held_out = subjects.workload(self.subject, seed=0, effort="quick", progress=Silent(), record=False)
        self.passes = [find_pass("sparse-attention"), find_pass("fuse-heads")]
        self.journal = Journal()
        self.transfer: Mapping[str, float] = {"loss_db": float("nan"), "agreement": float("nan")}
        self._known: dict[str, dict[str, float]] = {}

    def figures(self, name: str, density: float, told: str) -> dict[str, float]:
        """The figures of one density, called ``told``."""
        if name not in self._known:
            self._known[name] = self._measured(name, density)
        return {f"{key}_{told}": value for key, value in self._known[name].items()}

    def _measured(self, name: str, density: float) -> dict[str, float]:
        from intarsia.search.estimate import Estimate

        found = self._search(name, density)
        searched = self._quality([(phase.first, phase.last, phase.steps[0].chosen) for phase in found.plan.phases])
        others = {f"uniform_{mode}": self._uniform(text.format(density)) for mode, text in UNIFORM.items()}
        others["random"] = self._random(density)
        psnr = {key: quality["psnr"].mean for key, (quality, _) in others.items()}
        best = max(psnr, key=psnr.__getitem__)
        gains = [a - b for a, b in zip(searched["psnr"].samples, others[best][0]["psnr"].samples, strict=True)]
        print(f"{density:.1%}: searched {searched}; {psnr}", file=sys.stderr, flush=True)
        return {
            "psnr_searched": searched["psnr"].mean,
            **{f"psnr_{key}": value for key, value in psnr.items()},
            "psnr_best_uniform": max(value for key, value in psnr.items() if key != "random"),
            "margin": sum(gains) / len(gains),
            "margin_low": Estimate(tuple(gains)).interval[0],
            "density_searched": float(str(found.plan.notes["density"])),
            "density_uniform": others[best][1],
            "fusion_error": self._fusion(found.plan.phases[0].steps[0].chosen),
        }

    def _search(self, name: str, density: float) -> SearchResult:
        from intarsia.search.head_settings import HeadSearch
        from intarsia.search.heads import search_heads

        how = HeadSearch(density=density, phases=PHASES, probes=PROBES, transfer=name == "25")
        found = search_heads(
            self.subject.program,
            self.target,
            self.passes,
            self.work,
            None,
            how=how,
            effort=self.effort,
            journal=self.journal,
        )
        transfer = found.plan.notes.get("transfer")
        if isinstance(transfer, dict):
            self.transfer = transfer
        return found

    def _uniform(self, option: str) -> tuple[Quality, float]:
        """One pattern for all heads, stripes with each head's own columns."""
        position = next(n for n, text in enumerate(self._plain.options[0]) if text == option)
        chosen = {place: options[position] for place, options in zip(self._plain.places, self._calibrated, strict=True)}
        return self._quality([(0, None, chosen)]), self._density(option)

    def _random(self, density: float) -> tuple[Quality, float]:
        options = {place: f"random(density={density}, seed={n})" for n, place in enumerate(self._plain.places)}
        return self._quality([(0, None, options)]), self._density(f"random(density={density})")

    def _density(self, option: str) -> float:
        return float(self._plain.density(self._plain.sites[0], option))

    @cached_property
    def _plain(self):  # type: ignore[no-untyped-def]  # Heads; the import would come before the arguments are read
        from intarsia.passes.sparse_attention import SparseAttention
        from intarsia.search.head_errors import Heads

        patterns = tuple(text.format(density) for density in DENSITIES.values() for text in UNIFORM.values())
        return Heads.of(SparseAttention(patterns=patterns), self.subject.program.graph, self.target, {})

    @cached_property
    def _calibrated(self) -> Sequence[Sequence[str]]:
        from intarsia.ir.program import materialize
        from intarsia.search.head_mass import attention_mass, calibrated
        from intarsia.search.progress import Silent

        assert self.work.loop is not None
        steps = range(2, self.work.loop.steps, 5)
        calls = [call for calls in self.work.loop.record("calibration", steps, Silent()) for call in calls]
        mass = attention_mass(materialize(self.subject.program), calls, self._plain)
        return calibrated(self._plain, mass).options

    def _quality(self, phases: Sequence[tuple[int, int | None, Mapping[str, str]]]) -> Quality:
        from intarsia.search.quality import measure as compared

        return compared(self._videos(phases), self.reference)

    @cached_property
    def reference(self) -> Tensor:
        """The dense videos."""
        return self._videos([(0, None, {})])

    @cached_property
    def floor(self) -> float:
        """PSNR between unrelated dense videos."""
        from intarsia.search.quality import measure as compared

        return compared(self.reference, self.reference)["psnr"].floor or 0.0

    def _videos(self, phases: Sequence[tuple[int, int | None, Mapping[str, str]]]) -> Tensor:
        from intarsia.search.progress import Silent

        assert self.held_out.loop is not None
        last = self.held_out.loop.steps - 1
        served = [(first, last if end is None else end, self._run(chosen)) for first, end, chosen in phases]
        run = self.held_out.loop.by_step(served) if len(served) > 1 else served[0][2]
        return self.held_out.outputs(run, "held-out", Silent())

    def _run(self, chosen: Mapping[str, str]):  # type: ignore[no-untyped-def]
        import torch

        from intarsia.ir.program import Program, materialize
        from intarsia.search.places import run_passes

        graph = run_passes(self.passes, self.subject.program.graph, self.target, {0: chosen})
        module = materialize(Program(graph, self.subject.program.weights)).module()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(module(*inputs))

        return run

    def _fusion(self, chosen: Mapping[str, str]) -> float:
        """Largest difference of one call with fused and unfused heads, relative to the largest answer."""
        from intarsia.ir.program import Program, example_inputs
        from intarsia.search.places import run_passes

        program = self.subject.program
        inputs = example_inputs(program.graph)
        apart = run_passes(self.passes[:1], program.graph, self.target, {0: chosen})
        (unfused,) = Program(apart, program.weights).module()(*inputs)
        (fused,) = self._run(chosen)(*inputs)
        return float((fused - unfused).abs().max() / unfused.abs().max())


if __name__ == "__main__":
    main("sparse_fidelity", MEANINGS, measure)
