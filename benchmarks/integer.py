"""ResNet-50 in exact integers: seconds against f32 and against ONNX Runtime's own quantization, and who keeps its word.

    python benchmarks/integer.py [--quick] [--json FILE]

One picture of 224x224, one thread, all in turns. Weights are random, which says nothing about accuracy and does not
matter for speed. ``ours`` is the integer network of ``fold-batch-norm``, ``calibrate``, ``quantize-integer`` with w8a8
everywhere and ``lower-integer``, with 16 bits between residual units and, in figures of ``trunk8``, with
``quantize-integer(trunk=8)``; ``quantize_static`` is what ``onnxruntime.quantization`` makes of the f32 file of the
same network: QDQ, u8 activations, i8 weights of each channel, and 7-bit weights (``reduce_range``) where the processor
has no VNNI, as ONNX Runtime's documentation advises, since pairs of products saturate there otherwise.

A mismatch is a logit that is another integer than the network defines: for both of ours by the operators' reference in
PyTorch, which tests hold equal to ``intarsia.kernels.integers.golden``; for quantize_static by its own Q/DQ graph,
computed operator by operator with all of ONNX Runtime's optimizations off.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM is imported

import torch
from harness import Figures, in_turns, main, paired, ratio
from torch import Tensor

if TYPE_CHECKING:
    import onnxruntime

    from intarsia.backends.base import Engine
    from intarsia.ir.program import Program

CPU = "cpu-avx2"
SPEED, SMALLER = "resnet50", "resnet18"

MEANINGS = {
    "resnet50_exact_int8_speedup_over_fp32": "ONNX Runtime, one thread: seconds of f32 over those of exact integers",
    "resnet50_exact_int8_seconds_over_quantize_static": "the same: seconds of exact integers over quantize_static's",
    "resnet50_exact_int8_trunk8_speedup_over_fp32": "the same: seconds of f32 over exact integers', 8 bits throughout",
    "resnet50_exact_int8_trunk8_seconds_over_quantize_static": "the same: of those over quantize_static's",
    "resnet50_fp32_seconds": "a picture in f32",
    "resnet50_exact_int8_seconds": "a picture in exact integers, 16 bits between residual units",
    "resnet50_exact_int8_trunk8_seconds": "a picture in exact integers, 8 bits between residual units",
    "resnet50_quantize_static_seconds": "a picture by quantize_static, 8 bits between residual units",
    "quantize_static_weight_bits": "bits that quantize_static gave weights: 7 without VNNI",
    "mismatch_rate_ours": "share of our engine's logits that are another integer than defined",
    "mismatch_rate_trunk8": "the same with 8 bits between residual units",
    "mismatch_rate_quantize_static": "share of quantize_static's logits that are another code than its graph defines",
    "mismatch_pictures": "pictures for both rates",
    "resnet18_tvm_int8_speedup_over_fp32": "TVM, one thread, no tuning: seconds of f32 over those of exact integers",
}


def measure(quick: bool) -> Figures:
    """Medians over 40 rounds, 5 if quick; mismatches over 8 pictures, 1 if quick."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rounds, pictures = (5, 1) if quick else (40, 8)
    with tempfile.TemporaryDirectory() as folder:
        return {
            **_onnx(Path(folder), rounds=rounds, pictures=pictures),
            "resnet18_tvm_int8_speedup_over_fp32": _tvm(Path(folder), rounds=max(3, rounds // 4)),
        }


def _onnx(folder: Path, *, rounds: int, pictures: int) -> dict[str, float]:
    programs = _programs(SPEED, trunks=(16, 8))
    full, ours, narrow = (_onnx_engine(program, folder / f"{index}") for index, program in enumerate(programs))
    bits = 8 if _has_vnni() else 7
    theirs = folder / "quantized.onnx"
    _quantize_static(folder / "0" / "model.onnx", theirs, bits=bits)
    fast, plain = _session(theirs), _session(theirs, optimized=False)
    x = next(_pictures(1))
    seconds = in_turns(
        {
            "full": lambda: full(x),
            "ours": lambda: ours(x),
            "narrow": lambda: narrow(x),
            "theirs": lambda: _run(fast, x),
        },
        rounds=rounds,
    )
    module, narrow_module = (program.module() for program in programs[1:])
    return {
        "resnet50_exact_int8_speedup_over_fp32": ratio(seconds, "full", "ours"),
        "resnet50_exact_int8_seconds_over_quantize_static": ratio(seconds, "ours", "theirs"),
        "resnet50_exact_int8_trunk8_speedup_over_fp32": ratio(seconds, "full", "narrow"),
        "resnet50_exact_int8_trunk8_seconds_over_quantize_static": ratio(seconds, "narrow", "theirs"),
        "resnet50_fp32_seconds": statistics.median(seconds["full"]),
        "resnet50_exact_int8_seconds": statistics.median(seconds["ours"]),
        "resnet50_exact_int8_trunk8_seconds": statistics.median(seconds["narrow"]),
        "resnet50_quantize_static_seconds": statistics.median(seconds["theirs"]),
        "quantize_static_weight_bits": bits,
        "mismatch_rate_ours": _mismatches(lambda x: ours(x)[0], lambda x: module(x)[0], pictures),
        "mismatch_rate_trunk8": _mismatches(lambda x: narrow(x)[0], lambda x: narrow_module(x)[0], pictures),
        "mismatch_rate_quantize_static": _mismatches(lambda x: _run(fast, x), lambda x: _run(plain, x), pictures),
        "mismatch_pictures": pictures,
    }


def _tvm(folder: Path, *, rounds: int) -> float:
    from intarsia.backends.base import find_backend
    from intarsia.ir.target import load_target

    builder, target = find_backend("tvm"), load_target(CPU)
    engines: list[Engine] = []
    for name, program in zip(("full", "integer"), _programs(SMALLER), strict=True):
        place = folder / f"tvm-{name}"
        place.mkdir()
        ready = _passed(program, builder.passes)
        engines.append(builder.load(place, builder.build(ready, target, place).files))
    x = next(_pictures(1))
    return paired(lambda: engines[0](x), lambda: engines[1](x), rounds=rounds, warmup=1).ratio


def _programs(name: str, trunks: tuple[int, ...] = (16,)) -> tuple[Program, ...]:
    """The network in f32, its norms folded, and in integers calibrated on two pictures of noise, ready to build.

    With residual sums of as many bits as ``trunks`` says, one network each.
    """
    import intarsia
    from intarsia.ir.program import Program
    from intarsia.ir.target import load_target
    from intarsia.passes.base import find_pass
    from intarsia.passes.quantize_integer import QuantizeInteger
    from intarsia.search.calibration import calibrate, find_method

    target = load_target(CPU)
    folded = _passed(intarsia.trace(name), ("fold-batch-norm",))
    ranges = calibrate(folded, [(picture,) for picture in _pictures(2, first=100)], find_method("minmax"))
    graph = find_pass("calibrate").run(folded.graph, target, ranges)
    chosen = dict.fromkeys(QuantizeInteger().choices(graph, target), "w8a8")
    rounded = (QuantizeInteger(trunk=bits).run(graph, target, chosen) for bits in trunks)
    return folded, *(_passed(Program(one, folded.weights), ("lower-integer",)) for one in rounded)


def _passed(program: Program, passes: tuple[str, ...]) -> Program:
    from intarsia.ir.program import Program, materialize
    from intarsia.ir.target import load_target
    from intarsia.passes.apply import run_passes

    return materialize(Program(run_passes(passes, program.graph, load_target(CPU)), program.weights))


def _pictures(count: int, *, first: int = 0) -> Iterator[Tensor]:
    from intarsia.models.sampler import noise

    for index in range(count):
        yield noise((3, 224, 224), seed=0, count=1, first=first + index)


def _onnx_engine(program: Program, folder: Path) -> Engine:
    from intarsia.backends.onnx import OnnxBackend, OnnxEngine
    from intarsia.ir.target import load_target

    folder.mkdir()
    OnnxBackend().build(program, load_target(CPU), folder)
    return OnnxEngine(folder / "model.onnx", threads=1)


def _quantize_static(source: Path, result: Path, *, bits: int) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = _session(source).get_inputs()[0].name
    feeds = iter([{name: picture.numpy()} for picture in _pictures(2, first=100)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    ready = source.with_name("ready.onnx")
    quant_pre_process(source, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        result,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=bits == 7,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _session(path: Path, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(answer)


def _mismatches(found: Callable[[Tensor], Tensor], defined: Callable[[Tensor], Tensor], pictures: int) -> float:
    """Logits are integers times one scale, so they are equal where the integers are."""
    different = [(found(x) != defined(x)).float().mean().item() for x in _pictures(pictures)]
    return statistics.fmean(different)


def _has_vnni() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_vnni", "avx_vnni"))


if __name__ == "__main__":
    main("integer", MEANINGS, measure)
