"""From a model, a plan and a user's data to weights that answer well on the plan's grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from intarsia import subject as subjects
from intarsia.backends.writing import new_file
from intarsia.calibration_files import Scaling
from intarsia.finetune_data import Samples, function_calls, is_function, read_samples, samples_a_call
from intarsia.ir.errors import MissingEnvironment, PlanError, UsageError
from intarsia.ir.plan import Plan
from intarsia.ir.program import Program, save_weights
from intarsia.ir.sizes import names
from intarsia.ir.target import load_target
from intarsia.ir.types import TensorType
from intarsia.models import base as models
from intarsia.search.finetune import Epochs, Recipe, Tuned, finetune, rounded
from intarsia.search.finetune_loss import Call
from intarsia.search.progress import Progress

WEIGHTS, PLAN = "weights.safetensors", "plan.json"
SCORED = 64
"""Samples of one call when held-out samples are scored."""


@dataclass(frozen=True)
class Material:
    """What a network is fine-tuned on.

    Attributes:
        data: A folder or a file, as ``calibrate`` takes it, or ``loader.py:function``.
        labels: An ``.npy`` with one class a sample of ``data``; a function yields them itself.
        held_out: Samples that are never trained on, in the same forms; without it ``share`` of those in files.
        held_out_labels: Their classes.
        scaling: Of pictures.
        share: Of the samples in files, where ``held_out`` is not given.
        seed: Of draws and orders.
    """

    data: str
    labels: Path | None = None
    held_out: str | None = None
    held_out_labels: Path | None = None
    scaling: Scaling | None = None
    share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Wishes:
    """How long and how a network is fine-tuned; ``recipe.steps`` counts only where ``epochs`` is None.

    Attributes:
        epochs: Rounds through samples of files.
        batch: Samples a step, of files; of a function one call is one step.
        recipe: The rest.
    """

    epochs: int | None = 2
    batch: int = 128
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=1))


def finetuned(
    model: str | Path | subjects.Subject,
    plan: Plan,
    material: Material,
    output: Path,
    *,
    wishes: Wishes,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Fine-tune the model's weights under the plan; ``output`` gets weights, plan, log and checkpoint.

    ``export MODEL --plan OUTPUT/plan.json --weights OUTPUT/weights.safetensors`` builds what was trained. A registered
    model is trained with as many samples a call as fit a step, whatever its plan's graph takes.

    Raises:
        UsageError: The model, the data or the labels are none, do not fit, or the folder is of another training.
        PlanError: The plan is for another graph, has phases, or rounds nothing.
        QualityError: The loss is not finite.
        MissingEnvironment: The device is not there.
    """
    _check_device(wishes.recipe.device)
    subject = model if isinstance(model, subjects.Subject) else subjects.resolve(model, weights=weights)
    if subject.program.is_meta:
        raise UsageError(f"{subject.name}: fine-tuning needs weights; give --weights")
    machine = load_target(plan.target)
    rounded(plan, subject.program.graph, machine)
    program, own = _open(subject, plan, weights)
    data, held_out, recipe, identity = _material(program, material, wishes)
    tuned = finetune(
        program, own, machine, data, output, how=recipe, held_out=held_out, identity=identity, progress=progress
    )
    _write(output, plan, {**_beside(subject, weights), **tuned.weights})
    return tuned


def _write(output: Path, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    with new_file(output / PLAN) as file:
        file.write_text(plan.to_json())
    with new_file(output / WEIGHTS) as file:
        save_weights(weights, file)


def _material(
    program: Program, material: Material, wishes: Wishes
) -> tuple[Epochs, list[Call], Recipe, dict[str, object]]:
    """Calls by epoch, held-out calls, the recipe with its steps, and what tells these data from others."""
    graph, recipe = program.graph, wishes.recipe
    identity: dict[str, object] = {"data": material.data, "batch": wishes.batch, "seed": material.seed}
    identity["held out"] = material.held_out
    if is_function(material.data):
        if material.labels:
            raise UsageError(f"--labels {material.labels}: a function yields its labels itself, behind the inputs")
        if wishes.epochs is not None:
            raise UsageError(f"--data {material.data}: nobody knows how many calls a function yields; give --steps")
        held_out = _held_out(material, program)
        return function_calls(material.data, graph), held_out, recipe, identity
    found = read_samples(material.data, material.labels, graph, material.scaling, option="--labels")
    if material.held_out is None:
        found, kept = found.split(material.share, seed=material.seed)
        held_out = _scored(kept, program)
    else:
        held_out = _held_out(material, program)
    identity["data"] = found.fingerprint
    each = samples_a_call(graph) or wishes.batch
    if wishes.batch % each:
        raise UsageError(
            f"--batch {wishes.batch}: graph {graph.name} takes {each} samples a call; give a multiple of it"
        )
    steps = len(found) // wishes.batch
    if not steps:
        raise UsageError(
            f"--data {material.data}: {len(found)} samples to train on; one step takes {wishes.batch}: --batch"
        )
    total = recipe.steps if wishes.epochs is None else wishes.epochs * steps
    recipe = replace(recipe, steps=total, calls=wishes.batch // each)
    return partial(found.epoch, each=each, seed=material.seed), held_out, recipe, identity


def _held_out(material: Material, program: Program) -> list[Call]:
    if material.held_out is None:
        return []
    if is_function(material.held_out):
        return list(function_calls(material.held_out, program.graph)(0))
    labels, scaling = material.held_out_labels, material.scaling
    found = read_samples(material.held_out, labels, program.graph, scaling, option="--held-out-labels")
    return _scored(found, program)


def _scored(found: Samples, program: Program) -> list[Call]:
    """All held-out samples as calls; of a fixed number a call, what is left over is not used."""
    if not len(found):
        return []
    each = samples_a_call(program.graph)
    rows = torch.arange(len(found))
    if each is not None:
        return list(found.calls(rows, each))
    return [call for part in rows.split(SCORED) for call in found.calls(part, len(part))]


def _open(subject: subjects.Subject, plan: Plan, weights: Path | None) -> tuple[Program, Plan]:
    """The program and its plan, traced again with an open number of samples where the model and the plan allow that."""
    graph = subject.program.graph
    sizes = {
        text
        for axes in (subject.model.dynamic if subject.model else {}).values()
        for axis, text in axes.items()
        if axis == 0 and names(text) == {text}
    }
    fixed = all(isinstance(value.type, TensorType) and isinstance(value.type.shape[0], int) for value in graph.inputs)
    if not (sizes and fixed):
        return subject.program, plan
    axes = subjects.dynamic_axes(subject.name, sorted(sizes))
    program = subjects.resolve(subject.name, dynamic=axes, weights=weights).program
    opened = replace(plan, graph=program.graph.fingerprint)
    try:
        rounded(opened, program.graph, load_target(plan.target))
    except PlanError:
        return subject.program, plan
    return Program(program.graph, {name: subject.program.weights[name] for name in program.weights}), opened


def _beside(subject: subjects.Subject, weights: Path | None) -> dict[str, Tensor]:
    """What a registered model's weights hold that its graph does not read, such as counts of batches."""
    if subject.model is None:
        return {}
    state = models.load(subject.model, weights=weights).state_dict()
    return {name: tensor for name, tensor in state.items() if name not in subject.program.weights}


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingEnvironment(f"--device {device}: PyTorch cannot use it here: {reason}") from error
