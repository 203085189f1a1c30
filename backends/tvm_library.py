"""A Relax module as one shared library: fused, scheduled, compiled by LLVM, the same bytes for the same module."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from intarsia.backends.tvm_schedule import stages
from intarsia.ir.errors import MissingEnvironment

FUSED_AFTER = 4
"""TVM's number for a function to whose result elementwise ones may be fused."""

PRODUCTS = {"product", "product_i8"}
"""Stages to whose tiles what follows is applied before they are stored."""

COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


def compiled(module: Any, target: Any, schedule: Callable[[Any], Any]) -> Any:
    """The executable of a module as the lowering gives it; ``schedule`` gives each tensor function its loops."""
    import tvm
    from tvm import relax

    with target, tvm.transform.PassContext(opt_level=3, config=_CONFIG):
        fused = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                _mark_products(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(["main"]),
            ]
        )(module)
        fused = _with_schedules(fused, schedule)
        return relax.build(fused, target, relax_pipeline=finish())


def compiled_function(function: Any, target: Any) -> Any:
    """One scheduled tensor function, ready to be called with TVM's tensors."""
    import tvm

    with tvm.transform.PassContext(opt_level=3, config=_CONFIG):
        return tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]


def _with_schedules(module: Any, schedule: Callable[[Any], Any]) -> Any:
    import tvm
    from tvm import tirx

    functions = {
        name: schedule(function) if isinstance(function, tirx.PrimFunc) else function
        for name, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _mark_products() -> Any:
    """Let elementwise functions be fused to products, in which TVM's own analysis does not see them."""
    import tvm
    from tvm import tirx

    def mark(module: Any, _: Any) -> Any:
        for name, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc) and PRODUCTS & set(stages(function)):
                module.update_func(name, function.with_attr("op_pattern", FUSED_AFTER))
        return module

    return tvm.transform.module_pass(mark, opt_level=0, name="MarkProducts")


def finish() -> Any:
    """TVM's own lowering of what is left: views, memory planning, calls of the virtual machine."""
    import tvm
    from tvm import relax

    return tvm.transform.Sequential(
        [
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def link(executable: Any, path: Path) -> None:
    """Write the executable as a shared library; equal executables give equal bytes.

    Raises:
        MissingEnvironment: There is no C++ compiler to link with.
    """
    compiler = find_compiler()

    def create(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            names = [f"part{index}.o" for index in range(len(objects))]
            for source, name in zip(objects, names, strict=True):
                shutil.copy(source, Path(folder) / name)
            # No path, no time and no identity of the build may reach the file.
            command = [compiler, "-shared", "-fPIC", "-s", "-Wl,--build-id=none", "-o", "library.so", *names]
            made = subprocess.run([*command, *(options or ())], cwd=folder, capture_output=True, text=True, check=False)
            if made.returncode != 0:
                said = " ".join(made.stderr.split())[:300]
                raise MissingEnvironment(f"backend tvm: {compiler} cannot link a shared library: {said}")
            shutil.copy(Path(folder) / "library.so", output)

    create.object_format = "o"  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=create)


def find_compiler() -> str:
    """The C++ compiler: ``$CXX`` or the first of the usual names on the path."""
    names = [os.environ.get("CXX", ""), *COMPILERS]
    found = next((name for name in names if name and shutil.which(name)), None)
    if found is None:
        raise MissingEnvironment("backend tvm links its library with a C++ compiler, and there is none; install g++")
    return found


_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}
