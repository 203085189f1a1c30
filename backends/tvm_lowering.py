"""A program as a Relax module: TVM's own importer reads it, and asks for what Intarsia computes itself.

``tvm_converters`` answers; operators that neither knows are decomposed first, ours into their references.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from intarsia import kernels
from intarsia.backends.tvm_converters import OWN, Converters
from intarsia.ir.exported import export_program
from intarsia.ir.program import Program


def relax_module(program: Program, *, kind: str = "cpu") -> Any:
    """The program with its weights as constants: one function ``main``, inputs in the graph's order, a tuple out.

    What Intarsia computes itself is scheduled for a CPU; for another ``kind`` of target TVM's own operators do it.
    """
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    exported = export_program(program).run_decompositions(decompositions(kind))
    ours = Converters(exported).by_operator() if kind == "cpu" else None
    module = from_exported_program(exported, custom_convert_map=ours, run_ep_decomposition=False)
    return relax.transform.DeadCodeElimination(["main"])(module)


def is_lowered(call: Callable[..., Any], kind: str) -> bool:
    """Whether the importer, or this module for a CPU, takes the operator as it is."""
    return call.__name__ in _imported() or (kind == "cpu" and call.__name__ in OWN)


def decompositions(kind: str) -> dict[Any, Callable[..., Any]]:
    """How operators are spelled in others; for a CPU without those that are taken as they are."""
    kernels.register()
    table = {**torch.export.default_decompositions(), **kernels.decompositions()}
    if kind != "cpu":
        return table
    return {call: function for call, function in table.items() if not is_lowered(call, kind)}


@lru_cache(maxsize=1)
def _imported() -> frozenset[str]:
    """Names of the operators that TVM's importer reads."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return frozenset(ExportedProgramImporter().convert_map)
