"""Quantization-aware fine-tuning: the program's weights are trained so that the network on its grids answers well."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from intarsia.ir.errors import PlanError, QualityError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, materialize
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target, load_target
from intarsia.passes.apply import apply
from intarsia.passes.base import find_pass
from intarsia.search.finetune_loss import Call, Loss, Score, check, score
from intarsia.search.finetune_network import ROUNDING, Network, statistics
from intarsia.search.finetune_state import Position, State
from intarsia.search.progress import Progress, Silent

FOLD, QUANTIZE = "fold-batch-norm", "quantize-integer"
CHECKPOINT_SECONDS = 60.0
OPTIMIZERS = ("sgd", "adamw")

Epochs = Callable[[int], Iterable[Call]]
"""The calls of the epoch of a number, the same each time it is asked: so a training that was killed goes on."""


@dataclass(frozen=True)
class Recipe:
    """How the weights move: up to ``learning_rate`` along a line, and down to 0 along half a cosine.

    Attributes:
        steps: In all; the data begins anew, with the next epoch's number, where it ends.
        learning_rate: At its peak.
        calls: Of the network in each step, whose gradients are added up.
        optimizer: ``sgd`` (Nesterov's momentum) or ``adamw``.
        momentum: Of ``sgd``.
        weight_decay: On weights of two or more axes.
        warm_up: Share of the steps.
        loss: What is made small.
        device: Where PyTorch trains.
    """

    steps: int
    learning_rate: float = 0.01
    calls: int = 1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: float = 0.05
    loss: Loss = field(default_factory=Loss)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"optimizer {self.optimizer!r} is unknown. Known: {', '.join(OPTIMIZERS)}")
        if self.steps < 1 or self.calls < 1:
            raise UsageError(f"fine-tuning: {self.steps} steps of {self.calls} calls; it takes one of each or more")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"fine-tuning: warm_up is {self.warm_up}; it is a share of the steps, below 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UsageError(f"fine-tuning: the learning rate is {self.learning_rate}; it is above 0")

    def rate(self, step: int) -> float:
        """The learning rate of the step of this number, from 0."""
        share = (step + 0.5) / self.steps
        if share < self.warm_up:
            return self.learning_rate * share / self.warm_up
        return self.learning_rate * (1 + math.cos(math.pi * (share - self.warm_up) / (1 - self.warm_up))) / 2


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning gave.

    Attributes:
        weights: The program's parameters, by name, in their element types, on the CPU.
        before: The score on held-out calls of the weights as they came; None without such calls.
        after: The same of the trained ones.
        losses: Of each step.
        seconds: That training took, over all starts.
    """

    weights: Mapping[str, Tensor]
    before: Score | None
    after: Score | None
    losses: tuple[float, ...]
    seconds: float


def finetune(
    program: Program,
    plan: Plan,
    target: Target,
    data: Epochs,
    folder: Path,
    *,
    how: Recipe,
    held_out: Sequence[Call] = (),
    identity: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Train the program's weights under the plan's passes up to ``quantize-integer``; ranges stay the plan's.

    Rounding passes gradients straight through, activations where they lie on their grid. Batch norms keep the
    statistics that they have and are folded, their gains and offsets trained. The teacher is the program in float.

    A minute's work at most is lost when the process is killed: the same call goes on from the checkpoint in ``folder``
    and, on a CPU with as many threads, ends with the same numbers. The log beside it has a line a step with loss and
    learning rate, and one for each time that held-out calls were scored: before, after each epoch, and at the end.

    Args:
        data: Calls by epoch.
        folder: For checkpoint and log.
        held_out: Calls that are never trained on.
        identity: What tells these data from others, for the checkpoint.

    Raises:
        PlanError: The plan is for another graph, has phases, or rounds nothing.
        UsageError: There is no data, labels that do not fit, or a checkpoint of other settings.
        QualityError: The loss is not finite; the last checkpoint stays.
    """
    if program.is_meta:
        raise UsageError(f"graph {program.graph.name}: fine-tuning needs weights, and they are on the meta device")
    student = Program(rounded(plan, program.graph, target), program.weights)
    facts = {
        **_flat(how),
        "plan": sha256(student.graph.fingerprint.encode()).hexdigest()[:12],
        "weights": program.fingerprint(),
        **(identity or {}),
    }
    training = _Training(student, program, how, State(folder, facts), progress or Silent())
    return training.run(data, held_out)


def rounded(plan: Plan, graph: Graph, target: Target) -> Graph:
    """What the plan's passes up to ``quantize-integer`` make of the graph; PlanError where they round nothing."""
    if len(plan.phases) > 1:
        raise PlanError(
            f"the plan has {len(plan.phases)} phases; fine-tuning takes one of one phase, as weights are one"
        )
    steps = plan.phases[0].steps
    places = [number for number, step in enumerate(steps) if Spec.parse(step.run).name == QUANTIZE]
    if not places:
        raise PlanError(f"the plan has no {QUANTIZE}: nothing is rounded that weights could be trained for")
    short = replace(plan, phases=(replace(plan.phases[0], steps=steps[: places[-1] + 1]),))
    made = apply(short, graph, target)
    if not any(made.find(ROUNDING)):
        raise PlanError(
            f"{QUANTIZE} of the plan keeps every layer: nothing is rounded that weights could be trained for"
        )
    return made


class _Training:
    def __init__(self, student: Program, program: Program, how: Recipe, state: State, told: Progress) -> None:
        self.how, self.state, self.told, self.program = how, state, told, program
        self.network = Network(student, frozen=statistics(program.graph), device=how.device)
        self.teacher = _teacher(program, how.device)
        self.optimizer = _optimizer(list(self.network.leaves.values()), how)
        self.position = Position()

    def run(self, data: Epochs, held_out: Sequence[Call]) -> Tuned:
        leaves, how = self.network.leaves, self.how
        if self.state.begun:
            self.position = self.state.restore(leaves, self.optimizer)
        self.told.start("fine-tuning", how.steps)
        self.told.advance(self.position.step)
        if not self.position.step and not self.state.logged():
            self._score(held_out)
        if self.position.step < how.steps:
            self._steps(data, held_out)
        self.told.finish()
        logged = self.state.logged()
        scores = [Score(**facts["held_out"]) for facts in logged if isinstance(facts.get("held_out"), dict)]  # type: ignore[arg-type]
        weights = {name: self.program.weights[name] for name in self.program.weights}
        weights |= {name: leaf.detach().cpu().clone() for name, leaf in leaves.items()}
        losses = tuple(float(str(facts["loss"])) for facts in logged if "loss" in facts)
        ends = (scores[0], scores[-1]) if scores else (None, None)
        return Tuned(weights, *ends, losses, self.position.seconds)

    def _steps(self, data: Epochs, held_out: Sequence[Call]) -> None:
        at, began, saved = self.position, time.monotonic() - self.position.seconds, time.monotonic()
        for calls in self._groups(data, held_out):
            rate, loss = self.how.rate(at.step), self._step(calls)
            at.step += 1
            at.seconds = time.monotonic() - began
            self.state.log({"step": at.step, "loss": loss, "learning_rate": rate, "seconds": round(at.seconds, 1)})
            self.told.advance(note=f"loss {loss:.4g}")
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
            if at.step == self.how.steps:
                break
        self._score(held_out)
        self._save()

    def _groups(self, data: Epochs, held_out: Sequence[Call]) -> Iterator[list[Call]]:
        """The calls of one step after another, for ever; what an epoch has left over is not used."""
        at = self.position
        while True:
            skipped, group, whole = at.taken, [], False
            for number, call in enumerate(data(at.epoch)):
                if number < skipped:
                    continue
                group.append(call)
                if len(group) == self.how.calls:
                    at.taken += len(group)
                    whole = True
                    yield group
                    group = []
            if not whole and not skipped:
                raise UsageError(
                    f"fine-tuning: epoch {at.epoch} of the data has {len(group)} calls; one step takes {self.how.calls}"
                )
            at.epoch, at.taken = at.epoch + 1, 0
            self._score(held_out)
            self._save()

    def _step(self, calls: Sequence[Call]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(self.position.step)
        value = 0.0
        for call in calls:
            output, taught, labels = self.network(call.inputs), self._taught(call), _on(call.labels, self.how.device)
            check(call, output, self.how.loss)
            loss = self.how.loss(output, taught, labels) / len(calls)
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss of step {self.position.step + 1} is {value}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _taught(self, call: Call) -> Tensor:
        with torch.no_grad():
            return self.teacher(call.inputs)

    def _score(self, held_out: Sequence[Call]) -> None:
        """Score the network as it is, and log that; nothing without held-out calls, or at a step that has its score."""
        logged = [facts for facts in self.state.logged() if "held_out" in facts]
        if not held_out or (logged and logged[-1]["step"] == self.position.step):
            return
        with torch.no_grad():
            outputs = [self.network(call.inputs) for call in held_out]
        check(held_out[0], outputs[0], self.how.loss)
        found = score(outputs, [self._taught(call) for call in held_out], held_out, self.how.loss)
        self.state.log({"step": self.position.step, "held_out": asdict(found)})
        self.told.advance(0, note=f"held out: {found}")

    def _save(self) -> None:
        """Write a checkpoint, unless what it would hold is broken."""
        for name, leaf in self.network.leaves.items():
            if not bool(leaf.isfinite().all()):
                raise self._diverged(f"after step {self.position.step}, %{name} is not finite")
        self.state.save(self.network.leaves, self.optimizer, self.position)

    def _diverged(self, what: str) -> QualityError:
        kept = (
            f"the checkpoint before it stays in {self.state.folder}"
            if self.state.begun
            else "no checkpoint was made yet"
        )
        return QualityError(
            f"fine-tuning: {what}; {kept}; look at the data, or begin anew with a learning rate below "
            f"{self.how.learning_rate:g}"
        )


def _teacher(program: Program, device: str) -> Network:
    """The program in float, all that hangs on parameters alone computed."""
    graph = find_pass(FOLD).run(program.graph, load_target("null"), {})
    ready = materialize(Program(graph, program.weights))
    return Network(ready, frozen=frozenset(param.name for param in ready.graph.params), device=device)


def _optimizer(leaves: Sequence[Tensor], how: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim > 1], "weight_decay": how.weight_decay},
        {"params": [leaf for leaf in leaves if leaf.ndim <= 1], "weight_decay": 0.0},
    ]
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.learning_rate)
    nesterov = how.momentum > 0
    return torch.optim.SGD(groups, lr=how.learning_rate, momentum=how.momentum, nesterov=nesterov)


def _on(labels: Tensor | None, device: str) -> Tensor | None:
    return None if labels is None else labels.to(device)


def _flat(how: Recipe) -> dict[str, object]:
    """The recipe's settings, those of its loss among them, by name."""
    settings = asdict(how)
    return {**settings, **settings.pop("loss")}
