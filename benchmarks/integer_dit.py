"""How near the videos of wan-mini in integers are to those of the float network, and what integers save.

    python benchmarks/integer_dit.py [--quick] [--json FILE]

Linear layers are integer products (W8A8, W4A8, or bits chosen by layer and half of the loop), what lies between them is
float; every engine is ONNX Runtime's on one thread, and makes whole videos from held-out noise and prompts, which
calibration never sees. PSNR is against the videos of the float engine; its floor is between unrelated ones. Weight-only
is int8 weights with f32 products. ``--quick`` takes three videos, of validation noise, which nothing here has seen
either, calibrates on fewer steps, and mixes bits by layer only.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from harness import Figures, in_turns, main

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.backends.onnx import OnnxEngine
    from intarsia.ir.graph import Graph
    from intarsia.ir.program import Program
    from intarsia.loop_data import Recorded
    from intarsia.search.quality import Quality

MODEL, TARGET = "wan-mini", "cpu-avx2"
FLOAT, MIXED = "float", "mixed"
UNIFORM = {
    "weight_only": "int8 weights, products in f32",
    "w8a8": "all linear layers W8A8, inputs smoothed",
    "w8a8_unsmoothed": "all linear layers W8A8, inputs as they are",
    "w4a8": "linear layers W4A8 but the first and the last, inputs smoothed",
    "w4a8_unsmoothed": "the same, inputs as they are",
}
OPTIONS = {"w32a32": "keep", "w8a8": "w8a8", "w4a8": "w4a8", "w4a4": "w4a4"}
"""What a layer may get in a mix, and what ``quantize-integer`` calls it."""

SHARE = 0.5
"""Of the way from W4A4 to W8A8, in operations on bits: what a mix may take."""

RANGES = "minmax(widest=True)"


def _meanings() -> dict[str, str]:
    mixed = {MIXED: "bits by layer and half of the loop, half way from W4A4 to W8A8 in operations on bits"}
    found = {f"psnr_{name}": f"dB, {told}" for name, told in {**UNIFORM, **mixed}.items()}
    found["psnr_floor"] = "dB between unrelated float videos"
    for name in (FLOAT, *UNIFORM, MIXED):
        found[f"bytes_{name}"] = f"bytes of the engine, {name}" + (", one for each half" if name == MIXED else "")
        found[f"seconds_{name}"] = f"seconds of one call, one thread, {name}"
    found["bops_share_mixed"] = "operations on bits of the mix, relative to W8A8"
    found["float_layers_mixed"] = "layers that the mix keeps in float, over both halves"
    found["w8a8_layers_mixed"] = "layers that the mix has at W8A8"
    found["layers_mixed"] = "layers that were asked about, over both halves"
    found["samples"] = "held-out videos"
    return found


MEANINGS = _meanings()


def measure(quick: bool) -> Figures:
    """All engines, one after the other; then all calls in turns."""
    with tempfile.TemporaryDirectory() as folder:
        return _Bench(Path(folder), quick).figures()


@dataclass(frozen=True)
class _Engine:
    """What runs the loop.

    Attributes:
        parts: The engine of each phase.
        files: The bytes of all of them.
    """

    parts: tuple[OnnxEngine, ...]
    files: int


class _Bench:
    def __init__(self, folder: Path, quick: bool) -> None:
        from intarsia import subject as subjects
        from intarsia.ir.target import load_target
        from intarsia.search.progress import Silent

        self.folder, self.quick, self.silent = folder, quick, Silent()
        subject, effort = subjects.resolve(MODEL), "quick" if quick else "default"
        self.subject = subject
        self.program: Program = subject.program
        self.target = load_target(TARGET)
        self.work = subjects.workload(subject, seed=0, effort=effort, progress=self.silent, record=False)
        self.held_out = subjects.workload(subject, seed=0, effort="quick", progress=self.silent, record=False)
        assert self.work.loop is not None
        self.loop = self.work.loop
        self.notes: dict[str, float] = {}

    def figures(self) -> dict[str, float]:
        """Everything that is announced."""
        engines = {FLOAT: self._engine(FLOAT, [self.program.graph])}
        self.float = engines[FLOAT].parts[0]
        reference = self._videos(engines[FLOAT])
        found: dict[str, float] = {}
        for name in (*UNIFORM, MIXED):
            graphs = self._mixed() if name == MIXED else [self._uniform(name)]
            engines[name] = self._engine(name, graphs)
            quality = self._compared(self._videos(engines[name]), reference)
            found[f"psnr_{name}"] = quality["psnr"].mean
            print(f"{name}: {quality}", file=sys.stderr, flush=True)
        found["psnr_floor"] = self._compared(reference, reference)["psnr"].floor or 0.0
        found |= {f"bytes_{name}": float(engine.files) for name, engine in engines.items()}
        return {**found, **self._seconds(engines), **self.notes, "samples": float(len(reference))}

    def _uniform(self, name: str) -> Graph:
        """The graph with the same bits everywhere."""
        option, _, unsmoothed = name.partition("_")
        if name == "weight_only":
            from intarsia.passes.quantize_linear import QuantizeLinear

            rounding = QuantizeLinear()
            offered = rounding.choices(self.program.graph, self.target)
            return rounding.run(self.program.graph, self.target, dict.fromkeys(offered, "i8"))
        graph = self._calibrated(self.program.graph if unsmoothed else self._smoothed(option), self._calls)
        return self._integers(graph, dict.fromkeys(graph.producers, option))

    def _smoothed(self, option: str) -> Graph:
        """The graph with what its layers read smoothed for these bits."""
        from intarsia.passes.smooth_linear import SmoothLinear
        from intarsia.search.calibration import find_method
        from intarsia.search.smoothing import smooth

        found = smooth(self.program, self._calls, bits=option, method=find_method(RANGES))
        return SmoothLinear().run(self.program.graph, self.target, found.chosen)

    def _calibrated(self, graph: Graph, calls: Sequence[tuple[Tensor, ...]]) -> Graph:
        from intarsia.ir.program import Program
        from intarsia.passes.calibrate import Calibrate
        from intarsia.search.calibration import calibrate, find_method

        ranges = calibrate(Program(graph, self.program.weights), calls, find_method(RANGES))
        return Calibrate().run(graph, self.target, ranges)

    def _integers(self, graph: Graph, wanted: Mapping[str, str]) -> Graph:
        """The calibrated graph in integers, each layer with the bits wanted of it, or eight where it has no fewer."""
        from intarsia.passes.lower_integer import LowerInteger
        from intarsia.passes.quantize_integer import QuantizeInteger

        rounding = QuantizeInteger()
        offered = rounding.choices(graph, self.target)
        chosen = {name: wanted[name] if wanted[name] in options else "w8a8" for name, options in offered.items()}
        return LowerInteger().run(rounding.run(graph, self.target, chosen), self.target, {})

    @cached_property
    def _calls(self) -> list[tuple[Tensor, ...]]:
        """Calls of the float network, from all parts of the loop."""
        return [call.inputs for call in self._recorded]

    @cached_property
    def _recorded(self) -> Sequence[Recorded]:
        """The same with their steps."""
        from intarsia.loop_data import recorded

        every, ends = 20 if self.quick else 8, (0, self.loop.steps - 1)
        return recorded(self.subject, every=every, always=ends, seed=0, progress=self.silent, run=self.float)

    def _mixed(self) -> list[Graph]:
        """A graph for each phase, the bits of all phases chosen by one integer program."""
        from intarsia.passes.quantize_integer import QuantizeInteger
        from intarsia.passes.quantize_integer_layers import ties
        from intarsia.search.bit_counts import bops, counts, problem
        from intarsia.search.bits import solve

        smoothed = self._smoothed("w4a8")
        graphs, layers, tied, errors = [], [], [], {}
        for number, (first, last) in enumerate(self._phases):
            calls = [call.inputs for call in self._recorded if first <= call.step <= last]
            graph = self._calibrated(smoothed, calls)
            offered = QuantizeInteger().choices(graph, self.target)
            groups = ties(graph)
            alone = [(layer,) for layer in offered if not any(layer in group for group in groups)]
            for group, found in self._errors(graph, (*groups, *alone), calls).items():
                errors |= {
                    f"{number}/{layer}": {name: cost / len(group) for name, cost in found.items()} for layer in group
                }
            tied += [[f"{number}/{layer}" for layer in group] for group in groups]
            layers += [replace(n, name=f"{number}/{n.name}") for n in counts(smoothed) if n.name in offered]
            graphs.append(graph)
        eight = bops(layers, {layer.name: "w8a8" for layer in layers})
        found = solve(problem(layers, errors, tied=tied), {"bops": eight * (1 / 4 + SHARE * 3 / 4)})
        self.notes = {
            "bops_share_mixed": found.used["bops"] / eight,
            "float_layers_mixed": float(found.chosen.count("w32a32")),
            "w8a8_layers_mixed": float(found.chosen.count("w8a8")),
            "layers_mixed": float(len(found.chosen)),
        }
        chosen = {layer.name: OPTIONS[option] for layer, option in zip(layers, found.chosen, strict=True)}
        kept = [name for name, option in chosen.items() if option == "keep"]
        print(f"mixed: in float {', '.join(kept) or 'nothing'}", file=sys.stderr, flush=True)
        return [self._integers(graph, _of_phase(number, chosen)) for number, graph in enumerate(graphs)]

    @property
    def _phases(self) -> list[tuple[int, int]]:
        """First and last step of each half of the loop, or of all of it."""
        middle, last = self.loop.steps // 2, self.loop.steps - 1
        return [(0, last)] if self.quick else [(0, middle - 1), (middle, last)]

    def _errors(
        self, graph: Graph, groups: Sequence[tuple[str, ...]], calls: Sequence[tuple[Tensor, ...]]
    ) -> Mapping[tuple[str, ...], Mapping[str, float]]:
        """What each option costs each group of layers alone: the squared error of the output, relative."""
        from intarsia.ir.program import Program
        from intarsia.passes.quantize_integer import QuantizeInteger
        from intarsia.search.journal import Journal
        from intarsia.search.sensitivity import sensitivities

        rounding = QuantizeInteger()
        offered = rounding.choices(graph, self.target)
        asked = [
            (group, option)
            for group in groups
            for option in OPTIONS
            if all(option in offered[layer] for layer in group) and not (self.quick and option == "w4a4")
        ]
        changes = [partial(rounding.run, graph, self.target, dict.fromkeys(group, option)) for group, option in asked]
        some = calls[:: max(1, len(calls) // (2 if self.quick else 4))]
        program = Program(graph, self.program.weights)
        found = sensitivities(program, changes, some, journal=Journal(), measured=lambda: None)
        table: dict[tuple[str, ...], dict[str, float]] = {group: {"w32a32": 0.0} for group in groups}
        for (group, option), error in zip(asked, found, strict=True):
            table[group][option] = error
        return table

    def _engine(self, name: str, graphs: Sequence[Graph]) -> _Engine:
        """ONNX Runtime's engine of each graph, one thread."""
        from intarsia.backends.onnx import MODEL as FILE
        from intarsia.backends.onnx import OnnxBackend, OnnxEngine
        from intarsia.ir.program import Program, materialize

        parts, files = [], 0
        for number, graph in enumerate(graphs):
            folder = self.folder / f"{name}{number}"
            folder.mkdir()
            OnnxBackend().build(materialize(Program(graph, self.program.weights)), self.target, folder)
            files += sum(file.stat().st_size for file in folder.iterdir())
            parts.append(OnnxEngine(folder / FILE, threads=1))
        return _Engine(tuple(parts), files)

    def _videos(self, engine: _Engine) -> Tensor:
        run: Callable[..., tuple[Tensor, ...]] = engine.parts[0]
        if len(engine.parts) > 1:
            run = self.loop.by_step(
                [(first, last, part) for (first, last), part in zip(self._phases, engine.parts, strict=True)]
            )
        return self.held_out.outputs(run, "validation" if self.quick else "held-out", self.silent)

    @staticmethod
    def _compared(outputs: Tensor, references: Tensor) -> Quality:
        from intarsia.search.quality import measure as compared

        return compared(outputs, references)

    def _seconds(self, engines: Mapping[str, _Engine]) -> dict[str, float]:
        """Median seconds of a call of each, in turns; of several phases the mean over them."""
        call = self._calls[len(self._calls) // 2]

        def calls(engine: _Engine) -> None:
            for part in engine.parts:
                part(*call)

        timed = {name: partial(calls, engine) for name, engine in engines.items()}
        seconds = in_turns(timed, rounds=5 if self.quick else 21)
        return {f"seconds_{name}": median(seconds[name]) / len(engines[name].parts) for name in engines}


def _of_phase(number: int, chosen: Mapping[str, str]) -> dict[str, str]:
    """The options of one phase by layer."""
    start = f"{number}/"
    return {name.removeprefix(start): option for name, option in chosen.items() if name.startswith(start)}


if __name__ == "__main__":
    main("integer_dit", MEANINGS, measure)
