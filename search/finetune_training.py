"""The steps of a fine-tuning: they begin where a checkpoint is, and each leaves a line in the log."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from intarsia.ir.errors import QualityError, Unsupported, UsageError
from intarsia.ir.program import Program, materialize
from intarsia.ir.target import load_target
from intarsia.passes.base import find_pass
from intarsia.search.finetune_loss import Call, check, score
from intarsia.search.finetune_network import Network, statistics
from intarsia.search.finetune_recipe import Recipe
from intarsia.search.finetune_state import Position, State
from intarsia.search.progress import Progress

FOLD = "fold-batch-norm"
CHECKPOINT_SECONDS = 60.0

Epochs = Callable[[int], Iterable[Call]]
"""The calls of the epoch of a number, the same each time it is asked: so a training that was killed goes on."""


class Training:
    """A student on its grids, its teacher in float, and what a step changes; ``state`` is where it is kept."""

    def __init__(self, student: Program, program: Program, how: Recipe, state: State, told: Progress) -> None:
        self.how, self.state, self.told, self.program = how, state, told, program
        self.network = Network(student, frozen=statistics(program.graph), device=how.device)
        self.teacher = _teacher(program, how.device)
        self.optimizer = how.optimizer_of(list(self.network.leaves.values()))
        self.position = Position()

    def run(self, data: Epochs, held_out: Sequence[Call]) -> None:
        """Train from where the state is to the last step."""
        if self.state.begun:
            self.position = self.state.restore(self.network.leaves, self.optimizer)
        self.told.start("fine-tuning", self.how.steps)
        self.told.advance(self.position.step)
        if not self.position.step:
            self._score(held_out)
        if self.position.step < self.how.steps:
            self._steps(data, held_out)
        self.told.finish()

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
            differentiate(loss)
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
        for call, output in zip(held_out, outputs, strict=True):
            check(call, output, self.how.loss)
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


def differentiate(loss: Tensor) -> None:
    """Add up gradients; Unsupported for an operator that has none."""
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        found = re.search(r"backward through (\S+?)(?:\.default)? but no autograd", str(error))
        if found is None:
            raise
        raise Unsupported(
            f"fine-tuning: {found[1]} has no gradient; give a plan that leaves out the pass that puts it there"
        ) from error


def _on(labels: Tensor | None, device: str) -> Tensor | None:
    return None if labels is None else labels.to(device)
