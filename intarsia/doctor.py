"""What this machine has, what is missing, what that costs, and which command brings it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from intarsia.terminal import cache_folder


@dataclass(frozen=True)
class Part:
    """One package: what it is for, and what has to be done where it is missing.

    Attributes:
        distributions: Names under which pip may know it, the usual one first.
        module: What is imported.
        extra: The extra of ours that brings it; empty for the core.
        costs: What does not work without it.
    """

    distributions: tuple[str, ...]
    module: str
    extra: str
    costs: str


CORE = (
    Part(("torch",), "torch", "", "nothing works"),
    Part(("numpy",), "numpy", "", "nothing works"),
    Part(("networkx",), "networkx", "", "no analysis of graphs"),
    Part(("safetensors",), "safetensors", "", "no weights can be read or written"),
    Part(("scipy",), "scipy.optimize", "", "no search: its solver is the one of HiGHS in SciPy"),
    Part(("onnx",), "onnx", "", "no export to ONNX"),
    Part(("onnxscript",), "onnxscript", "", "no export to ONNX"),
    Part(("onnxruntime", "onnxruntime-gpu"), "onnxruntime", "", "ONNX engines do not run"),
    Part(("optuna",), "optuna", "", "no search over several passes at once"),
    Part(("pillow",), "PIL", "", "no pictures or videos are written"),
    Part(("jinja2",), "jinja2", "", "no reports"),
)

OPTIONAL = (
    Part(("diffusers",), "diffusers", "models", "the models wan-mini and wan2.1-* cannot be built"),
    Part(("transformers",), "transformers", "models", "models that come with a text encoder cannot be built"),
    Part(("triton",), "triton", "triton", "our GPU kernels do not run; their eager references do"),
    Part(
        ("tensorrt-rtx-cu13", "tensorrt_rtx", "tensorrt"),
        "tensorrt_rtx",
        "tensorrt",
        "no engines for TensorRT",
    ),
    Part(("apache-tvm",), "tvm", "tvm", "no engines for TVM"),
    Part(("apache-tvm-ffi",), "tvm_ffi", "tvm", "TVM's tuning ends with a segmentation fault"),
)

COMPILERS = ("g++", "clang++", "nvcc")


@dataclass(frozen=True)
class Finding:
    """What was found of one part: ``ok``, ``missing``, ``broken`` or ``other`` (version), and what to do about it."""

    name: str
    status: str
    version: str
    core: bool
    costs: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The whole of it; ``working`` says whether the core does its job."""

    working: bool
    python: str
    platform: str
    findings: tuple[Finding, ...]
    machine: dict[str, object]

    def to_json(self) -> dict[str, object]:
        """The diagnosis as plain data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at everything; takes as long as importing torch and onnxruntime, a few seconds."""
    core = [_tried(part) for part in CORE]
    findings = (*core, *(_present(part) for part in OPTIONAL), _cache_finding())
    return Diagnosis(
        working=all(finding.status == "ok" for finding in findings if finding.core),
        python=f"{platform.python_version()} at {sys.executable}",
        platform=platform.platform(),
        findings=findings,
        machine=_machine(torch_works=core[0].status == "ok"),
    )


def _tried(part: Part) -> Finding:
    """A part of the core, imported to see whether it works."""
    name, found = _version(part)
    try:
        importlib.import_module(part.module)
    except ModuleNotFoundError as error:
        if error.name != part.module.partition(".")[0]:
            return _broken(part, found, error)
        remedy = f"pip install '{_requirement(name)}'"
        return Finding(name, "missing", "", core=True, costs=part.costs, remedy=remedy)
    except Exception as error:  # a broken package may raise anything, and to say what is the purpose here
        return _broken(part, found, error)
    return Finding(name, "ok", found, core=True)


def _broken(part: Part, found: str, error: Exception) -> Finding:
    name = part.distributions[0]
    costs = f"{part.costs}; importing it raises {type(error).__name__}: {str(error).split(chr(10))[0]}"
    remedy = f"pip install --force-reinstall '{_requirement(name)}'"
    return Finding(name, "broken", found, core=not part.extra, costs=costs, remedy=remedy)


def _present(part: Part) -> Finding:
    """An optional part, by whether it is installed; importing some of them takes half a minute."""
    name, found = _version(part)
    remedy = f"pip install 'intarsia[{part.extra}]'"
    if not found or find_spec(part.module.partition(".")[0]) is None:
        return Finding(name, "missing", "", core=False, costs=part.costs, remedy=remedy)
    stated = _stated(name, part.extra)
    if stated is not None and not stated.specifier.contains(found, prereleases=True):
        costs = f"{part.costs}, perhaps: it was tried with {stated.specifier}"
        return Finding(name, "other", found, core=False, costs=costs, remedy=remedy)
    return Finding(name, "ok", found, core=False)


def _version(part: Part) -> tuple[str, str]:
    """Name and version of the first installed distribution; an empty version if none is."""
    for distribution in part.distributions:
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return part.distributions[0], ""


def _requirement(name: str) -> str:
    """The requirement of the core as our own metadata states it, such as ``torch>=2.11``."""
    stated = _stated(name, "")
    return name if stated is None else f"{stated.name}{stated.specifier}"


def _stated(name: str, extra: str) -> Requirement | None:
    """What our own metadata asks of a package, for the core or for an extra; None if it does not name it."""
    try:
        texts = requires("intarsia") or []
    except PackageNotFoundError:
        return None
    wanted = canonicalize_name(name)
    for stated in map(Requirement, texts):
        asked = stated.marker is None or stated.marker.evaluate({"extra": extra})
        if canonicalize_name(stated.name) == wanted and asked:
            return stated
    return None


def _cache_finding() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        costs = f"searches cannot resume, crashes leave no log ({error.strerror})"
        remedy = "set INTARSIA_CACHE_DIR to a folder that can be written"
        return Finding(f"cache folder {folder}", "broken", "", core=True, costs=costs, remedy=remedy)
    free = shutil.disk_usage(folder).free
    return Finding(f"cache folder {folder}", "ok", f"{free / 1e9:.1f} GB free", core=True)


def _machine(*, torch_works: bool) -> dict[str, object]:
    """Cores, memory in bytes, compilers, and the GPU if torch sees one."""
    gpus = _gpus() if torch_works else []
    features = _cpu_features()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "cpu_features": features,
        "compilers": {name: path for name in COMPILERS if (path := shutil.which(name))},
        "gpus": gpus,
        "driver": _driver() if gpus or shutil.which("nvidia-smi") else None,
        "suggested_target": suggested_target(gpus, features),
    }


def _memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cpu_features() -> list[str]:
    """Those of the vector instructions that decide how fast integers are."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set[str]()
    return [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if name in words]


def _gpus() -> list[dict[str, object]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append({"name": properties.name, "architecture": capability, "memory": properties.total_memory})
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def suggested_target(gpus: list[dict[str, object]], features: list[str]) -> str | None:
    """The shipped target that describes this machine, if one does."""
    from intarsia.ir.target import shipped_targets

    for gpu in gpus:
        name = str(gpu["name"]).lower().replace(" ", "")
        if match := next((target for target in shipped_targets() if target in name), None):
            return match
    return "cpu-avx2" if "avx2" in features and "cpu-avx2" in shipped_targets() else None


def lines(diagnosis: Diagnosis, *, size: Callable[[int], str]) -> list[str]:
    """The diagnosis for a person, one line a fact; ``size`` words a number of bytes."""
    machine = diagnosis.machine
    shown = [f"python       {diagnosis.python}", f"platform     {diagnosis.platform}"]
    memory = machine["memory"]
    shown.append(f"machine      {machine['cores']} cores, {size(memory) if isinstance(memory, int) else '? memory'}")
    features = machine["cpu_features"]
    shown.append(f"processor    {' '.join(features) if isinstance(features, list) else ''}")
    gpus = machine["gpus"]
    assert isinstance(gpus, list)
    for gpu in gpus:
        shown.append(
            f"GPU          {gpu['name']}, {gpu['architecture']}, {size(gpu['memory'])}, driver {machine['driver']}"
        )
    if not gpus:
        shown.append("GPU          none that torch can use: targets with a GPU are predicted, not measured")
    compilers = machine["compilers"]
    assert isinstance(compilers, dict)
    shown.append(f"compilers    {', '.join(compilers) or 'none: TVM and native kernels cannot be built'}")
    for finding in diagnosis.findings:
        kind = "core" if finding.core else "optional"
        shown.append(f"{finding.status:<12} {finding.name} {finding.version} ({kind})".replace("  (", " ("))
        if finding.status != "ok":
            shown.append(f"{'':<12}   without it: {finding.costs}")
            shown.append(f"{'':<12}   to get it:  {finding.remedy}")
    if machine["suggested_target"]:
        shown.append(f"this machine is described by --target {machine['suggested_target']}")
    return shown
