"""Build the TensorRT engine from model.onnx and build.json beside this file: ``python build.py [--check]``.

Needs NVIDIA's package tensorrt (the engine is for the GPU of this machine) or tensorrt_rtx (for the architecture in
build.json, with or without a GPU), and nothing else. Writes ``engine.PACKAGE.plan``, and the facts about it into
build.json; with ``--check`` it only parses.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Where the builder may come from; the last is the second without the thin package around it."""

MODEL = "model.onnx"
SETTINGS = "build.json"
RESTARTED = "--restarted"


class Refused(Exception):
    """TensorRT does not take the model; one reason a line, each with the node's name where TensorRT tells it."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = tuple(reasons)


def main(arguments: Sequence[str]) -> int:
    """Build beside this file, or only parse with ``--check``; exit codes are those of intarsia.

    ``--timing-cache FILE`` keeps what the builder timed, so that another build takes the same tactics in less time.
    """
    if RESTARTED not in arguments:
        _fix_addresses()
    folder = Path(__file__).parent
    settings = json.loads((folder / SETTINGS).read_text())
    cache = Path(arguments[arguments.index("--timing-cache") + 1]) if "--timing-cache" in arguments else None
    try:
        trt = library()
        with _quiet():
            layers, plan = build_plan(trt, folder / MODEL, settings, parse_only="--check" in arguments, cache=cache)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 6
    except Refused as error:
        print(error, file=sys.stderr)
        return 3
    builder = f"{package(trt)} {trt.__version__}"
    if plan:
        file = f"engine.{package(trt)}.plan"
        (folder / file).write_bytes(plan)
        digest = hashlib.sha256(plan).hexdigest()
        settings["engine"] = {"file": file, "builder": builder, "bytes": len(plan), "sha256": digest, "layers": layers}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    print(f"{builder}: {layers} layers, {len(plan):,} bytes")
    return 0


def library() -> Any:
    """The first of ``PACKAGES`` that is installed; ImportError says what to install."""
    for name in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ImportError(
        "no TensorRT builder is installed; pip install tensorrt on a machine with a data-centre GPU, "
        "or tensorrt-rtx-cu13 for RTX GPUs"
    )


def package(trt: Any) -> str:
    """``tensorrt`` or ``tensorrt_rtx``, whatever wraps it."""
    return str(trt.__name__).removesuffix("_bindings")


def architectures(trt: Any) -> tuple[str, ...]:
    """``sm_75``, ...: what the builder makes engines for; empty if only for the GPU of this machine."""
    known = getattr(trt, "ComputeCapability", None)
    names = [] if known is None else [name for name in known.__members__ if name.startswith("SM")]
    return tuple(f"sm_{name[2:]}" for name in sorted(names, key=lambda name: int(name[2:])))


def build_plan(
    trt: Any, model: Path, settings: Mapping[str, Any], *, parse_only: bool = False, cache: Path | None = None
) -> tuple[int, bytes]:
    """Number of layers that the parser makes of the model, and the engine.

    Args:
        model: ONNX, with an element type on everything and explicit quantization.
        settings: name; architecture; level, 0 to 5; tf32; version_compatible; profile, extents "min", "opt" and "max"
            of each input whose extents vary.
        parse_only: Build no engine; gives none.
        cache: A file of timings, made if it is not there.

    Raises:
        Refused: The parser or the builder does not take the model.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = _parse(trt, builder, log, model)
    if parse_only:
        return network.num_layers, b""
    network.name = settings["name"]  # a counter otherwise, and a plan holds it
    config = builder.create_builder_config()
    config.builder_optimization_level = settings["level"]
    _set(config, trt.BuilderFlag.TF32, settings["tf32"])
    _set(config, trt.BuilderFlag.VERSION_COMPATIBLE, settings["version_compatible"])
    if architectures(trt):
        capability = settings["architecture"].replace("sm_", "SM")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    if settings["profile"]:
        profile = builder.create_optimization_profile()
        for name, extents in settings["profile"].items():
            profile.set_shape(name, extents["min"], extents["opt"], extents["max"])
        config.add_optimization_profile(profile)
    with _timing_cache(config, cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(_explained(trt, network, log.errors))
    return network.num_layers, bytes(plan)


def _parse(trt: Any, builder: Any, log: Any, model: Path) -> Any:
    """The strongly typed network; Refused with every error of NVIDIA's parser."""
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other kind
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise Refused([_located(parser.get_error(index)) for index in range(parser.num_errors)])
    return network


def _fix_addresses() -> None:
    """Start this process again without randomized addresses, where the system allows it.

    TensorRT-RTX 1.7 numbers kernels in the order of addresses: with random ones a few bytes of a plan differ.
    """
    current, fixed, unknown = 0xFFFFFFFF, 0x0040000, -1  # ADDR_NO_RANDOMIZE of sys/personality.h
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    found = libc.personality(current)
    if found == unknown or found & fixed or libc.personality(found | fixed) == unknown:
        return
    os.execv(sys.executable, [sys.executable, *sys.argv, RESTARTED])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the library writes to the error stream past its log, which tells the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _log(trt: Any) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))

    return Log()


def _set(config: Any, flag: Any, wanted: bool) -> None:
    if wanted:
        config.set_flag(flag)
    else:
        config.clear_flag(flag)


@contextlib.contextmanager
def _timing_cache(config: Any, file: Path | None) -> Iterator[None]:
    """Timings of tactics kept in a file, so that a second build takes the same ones and less time."""
    if file is None:
        yield
        return
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    config.set_timing_cache(cache, False)
    yield
    file.write_bytes(bytes(config.get_timing_cache().serialize()))


def _located(error: Any) -> str:
    """One line of the parser's error: node, operator, reason."""
    reason = str(error.desc()).split("\n[")[0].removeprefix(f"Invalid Node - {error.node_name()}")
    return f"%{error.node_name()} ({error.node_operator()}): {_short(reason)}"


def _explained(trt: Any, network: Any, errors: Sequence[str]) -> list[str]:
    """The builder's errors, with the nodes that have the element type which an error names."""
    known = {"fp8": trt.DataType.FP8, "fp4": trt.DataType.FP4, "int4": trt.DataType.INT4, "bf16": trt.DataType.BF16}
    reasons = []
    for error in errors or ["the builder gave no engine and no reason"]:
        dtype = next((dtype for name, dtype in known.items() if name in error.lower()), None)
        nodes = _giving(network, dtype)
        reasons.append(f"%{nodes[0]} and {len(nodes) - 1} more: {_short(error)}" if nodes else _short(error))
    return reasons


def _giving(network: Any, dtype: Any) -> list[str]:
    """Names of the layers that give this element type."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [layer.name for layer in layers if dtype is not None and layer.get_output_type(0) == dtype]


def _short(text: str) -> str:
    return " ".join(text.split())[:400]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
