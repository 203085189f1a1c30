"""Quantization-aware fine-tuning: the program's weights are trained so that the network on its grids answers well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from intarsia.ir.errors import PlanError, UsageError
from intarsia.ir.graph import Graph
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program
from intarsia.ir.spec import Spec
from intarsia.ir.target import Target
from intarsia.passes.apply import apply
from intarsia.search.finetune_loss import Call, Loss, Score
from intarsia.search.finetune_network import ROUNDING
from intarsia.search.finetune_recipe import Recipe
from intarsia.search.finetune_state import State
from intarsia.search.finetune_training import Epochs, Training
from intarsia.search.progress import Progress, Silent

__all__ = ["Call", "Epochs", "Loss", "Recipe", "Score", "Tuned", "finetune", "rounded"]

QUANTIZE = "quantize-integer"


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
        **how.settings(),
        "plan": student.graph.fingerprint,
        "weights": program.fingerprint(),
        **(identity or {}),
    }
    state = State(folder, facts)
    training = Training(student, program, how, state, progress or Silent())
    training.run(data, held_out)
    logged = state.logged()
    scores = [Score.from_json(facts["held_out"]) for facts in logged if "held_out" in facts]
    weights = {name: leaf.detach().cpu().clone() for name, leaf in training.network.leaves.items()}
    return Tuned(
        weights={**program.weights, **weights},
        before=scores[0] if scores else None,
        after=scores[-1] if scores else None,
        losses=tuple(float(str(facts["loss"])) for facts in logged if "loss" in facts),
        seconds=training.position.seconds,
    )


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
