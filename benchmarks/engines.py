"""Engines of every backend, side by side: seconds on the CPU, and what is built for GPUs that are not here.

    python benchmarks/engines.py [--quick] [--json FILE]

Eager PyTorch, ``torch.compile``, what ``torch.onnx.export`` makes of the same module on ONNX Runtime with its default
settings, and our engines through ONNX and TVM, of the unchanged model in f32: all in turns, in one process.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import Figures, in_turns, main, paired, ratio

if TYPE_CHECKING:
    from intarsia.backends.base import Engine
    from intarsia.ir.program import Program

MODELS = {"wan_mini": "wan-mini", "resnet50": "resnet50"}
CONTENDERS = {
    "eager": "PyTorch, eager",
    "compiled": "torch.compile",
    "plain_ort": "torch.onnx.export on ONNX Runtime",
    "ours_onnx": "ours through ONNX",
    "ours_tvm": "ours through TVM",
}
OVER_PLAIN = ("eager", "compiled", "ours_onnx", "ours_tvm")
CPU, RTX = "cpu-avx2", "rtx4090"
GPU_MODELS = ("wan2.1-t2v-1.3b", "cogvideox-5b")

CONV = """graph conv {
  input %x: f32[1, 64, 56, 56]
  param %w: f32[64, 64, 3, 3]
  %y: f32[1, 64, 56, 56] = aten.conv2d(input=%x, weight=%w, bias=None, stride=[1, 1], padding=[1, 1])
  return %y
}"""
CONV_I8 = """graph conv_i8 {
  input %x: i8[1, 64, 56, 56]
  param %w: i8[64, 64, 3, 3]
  param %m: i32[64]
  param %s: i32[64]
  %y: i8[1, 64, 56, 56] = intarsia.conv2d_i8i8(input=%x, weight=%w, bias=None, multiplier=%m, shift=%s, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
  return %y
}"""  # noqa: E501
LINEAR = """graph linear {
  input %x: f32[128, 768]
  param %w: f32[768, 768]
  %y: f32[128, 768] = aten.linear(input=%x, weight=%w, bias=None)
  return %y
}"""
LINEAR_I8 = """graph linear_i8 {
  input %x: i8[128, 768]
  param %w: i8[768, 768]
  param %m: i32[768]
  param %s: i32[768]
  %y: i8[128, 768] = intarsia.linear_i8i8(input=%x, weight=%w, bias=None, multiplier=%m, shift=%s)
  return %y
}"""

MEANINGS = {
    **{f"{m}_{c}_seconds": f"a call of {name}, {what}" for m, name in MODELS.items() for c, what in CONTENDERS.items()},
    **{
        f"{m}_{c}_over_plain_ort": f"{name}: seconds of {CONTENDERS[c]} over those of {CONTENDERS['plain_ort']}"
        for m, name in MODELS.items()
        for c in OVER_PLAIN
    },
    "int8_conv_tvm_over_tvm_fp32": "TVM: 64-channel 3x3 convolution on 56x56, int8 over f32",
    "int8_linear_tvm_over_tvm_fp32": "TVM: 128x768x768 linear layer, int8 over f32",
    "rtx_engines_built": "TensorRT-RTX engines built: wan-mini in f16, bf16 and 4-bit weights, five others in f16",
    "triton_kernels_compiled": f"kernels that {' and '.join(GPU_MODELS)} need, compiled for five architectures",
    "triton_kernels_spilling": "those of them that keep registers in memory",
}


def measure(quick: bool) -> Figures:
    """Medians over 30 rounds, 5 if quick; builds are the same."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rounds = 5 if quick else 30
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, name in MODELS.items():
            figures |= _model(key, name, Path(folder), rounds=rounds)
        pairs = {"int8_conv": (CONV_I8, CONV), "int8_linear": (LINEAR_I8, LINEAR)}
        for key, texts in pairs.items():
            eight, full = (_calls(_engine("tvm", _random(text), Path(folder))) for text in texts)
            figures[f"{key}_tvm_over_tvm_fp32"] = paired(eight, full, rounds=rounds).ratio
        figures["rtx_engines_built"] = _rtx_engines(Path(folder))
        compiled, spilling = _triton_kernels(Path(folder))
    return {**figures, "triton_kernels_compiled": compiled, "triton_kernels_spilling": spilling}


@dataclass(frozen=True)
class _Loaded:
    """An engine and inputs for it."""

    engine: Engine
    inputs: tuple[torch.Tensor, ...]


def _call(loaded: _Loaded) -> Callable[[], object]:
    return lambda: loaded.engine(*loaded.inputs)


def _calls(loaded: _Loaded) -> Callable[[], object]:
    """Twenty calls of an engine that takes a few milliseconds."""
    return lambda: [loaded.engine(*loaded.inputs) for _ in range(20)]


def _model(key: str, name: str, folder: Path, *, rounds: int) -> dict[str, float]:
    import intarsia
    from intarsia.models import find, load

    model = find(name)
    module = load(model)
    arguments = {**model.inputs(), **model.static}
    program = intarsia.trace(name)
    plain = _plain(module, arguments, folder / f"{key}.onnx")
    compiled = torch.compile(module)
    onnx, tvm = (_engine(backend, program, folder, model.inputs()) for backend in ("onnx", "tvm"))
    with torch.no_grad():
        seconds = in_turns(
            {
                "eager": lambda: module(**arguments),
                "compiled": lambda: compiled(**arguments),
                "plain_ort": plain,
                "ours_onnx": _call(onnx),
                "ours_tvm": _call(tvm),
            },
            rounds=rounds,
        )
    return {
        **{f"{key}_{name}_seconds": statistics.median(seconds[name]) for name in CONTENDERS},
        **{f"{key}_{name}_over_plain_ort": ratio(seconds, name, "plain_ort") for name in OVER_PLAIN},
    }


def _plain(module: torch.nn.Module, arguments: Mapping[str, Any], path: Path) -> Callable[[], object]:
    import onnxruntime

    torch.onnx.export(module, (), path, kwargs=dict(arguments), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    feed = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: session.run(None, feed)


def _engine(backend: str, program: Program, folder: Path, inputs: Mapping[str, torch.Tensor] | None = None) -> _Loaded:
    from intarsia.backends.base import find_backend
    from intarsia.ir.program import example_inputs, materialize
    from intarsia.ir.target import load_target
    from intarsia.passes.apply import run_passes

    builder, target = find_backend(backend), load_target(CPU)
    graph = run_passes(builder.passes, program.graph, target)
    place = folder / f"{backend}-{program.graph.name}"
    place.mkdir()
    built = builder.build(materialize(replace(program, graph=graph)), target, place)
    given = tuple(inputs[value.name] for value in graph.inputs) if inputs else example_inputs(graph)
    return _Loaded(builder.load(place, built.files), given)


def _random(text: str) -> Program:
    """The graph with random parameters: 8-bit weights of the whole range, dyadic numbers near 2^-9."""
    from intarsia.ir.graph import Graph
    from intarsia.ir.operators import DTYPES
    from intarsia.ir.program import Program

    graph, weights = Graph.parse(text), {}
    generator = torch.Generator().manual_seed(0)
    for param in graph.params:
        type_ = graph.type(param.name)
        shape = [int(extent) for extent in type_.shape]
        match param.name:
            case "m":
                weights["m"] = torch.randint(2**29, 2**30, shape, generator=generator, dtype=torch.int32)
            case "s":
                weights["s"] = torch.full(shape, 39, dtype=torch.int32)
            case _ if type_.dtype == "i8":
                weights[param.name] = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
            case _:
                weights[param.name] = torch.randn(shape, generator=generator, dtype=DTYPES[type_.dtype])
    return Program(graph, weights)


def _rtx_engines(folder: Path) -> int:
    """How many of the engines NVIDIA's builder made; one that it refuses raises."""
    from intarsia import flow
    from intarsia.ir.plan import Phase, Plan, Step
    from intarsia.ir.target import load_target
    from intarsia.passes.base import find_pass

    f16, bf16 = (f"cast-floats(dtype='{dtype}')" for dtype in ("f16", "bf16"))
    jobs = [("wan-mini", [f16]), ("wan-mini", [bf16]), ("wan-mini", ["quantize-linear", f16])]
    jobs += [(name, [f16]) for name in ("resnet18", "resnet50", "cogvideox-mini", "hunyuanvideo-mini", "ltx-mini")]
    built = 0
    for name, passes in jobs:
        program = flow.trace(name)
        choices = find_pass(passes[0]).choices(program.graph, load_target(RTX))
        four_bits = {
            place: next(o for o in offers if "i4" in o) for place, offers in choices.items() if len(offers) > 2
        }
        steps = tuple(Step(text, four_bits if text == "quantize-linear" else {}) for text in passes)
        plan = Plan(program.graph.fingerprint, RTX, (Phase(steps),))
        bundle = flow.export(name, plan, backends=("tensorrt",), target=RTX, output=folder / f"rtx-{built}")
        built += "tensorrt" in bundle.engines
    return built


def _triton_kernels(folder: Path) -> tuple[int, int]:
    """Kernels compiled for full-size models, traced without weights, and how many of them spill."""
    from importlib.metadata import version

    import intarsia
    from intarsia.backends.triton import TritonBackend, compile_calls
    from intarsia.ir.target import load_target
    from intarsia.kernels.ahead import ARCHITECTURES
    from intarsia.passes.apply import run_passes

    compiled: dict[str, int] = {}
    for name in GPU_MODELS:
        graph = run_passes(TritonBackend.passes, intarsia.trace(name, meta=True).graph, load_target("h100"))
        place = folder / name
        place.mkdir()
        manual = compile_calls(graph, tuple(ARCHITECTURES), place, triton=version("triton"))
        compiled |= {identity: kernel.spills for identity, kernel in manual.compiled.items()}
    return len(compiled), sum(spills > 0 for spills in compiled.values())


if __name__ == "__main__":
    main("engines", MEANINGS, measure)
