"""Weights that the programs of a bundle share: equal ones are stored once; others get names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.ir.graph import Value
from intarsia.ir.program import Program
from intarsia.ir.rewrite import fresh, rename_uses


def share_weights(programs: Mapping[int, Program]) -> dict[int, Program]:
    """The programs, by phase, with parameters renamed where an earlier program has other bits under the same name.

    What two programs have under the same name is the same tensor in both.

        phase 0:  param %to_q.scale: f32[64]        phase 0:  param %to_q.scale: f32[64]
        phase 1:  param %to_q.scale: f32[64, 2]  -> phase 1:  param %to_q.scale.phase1: f32[64, 2]

    Raises:
        UsageError: Weights are on the meta device and have no bits.
    """
    held: dict[str, Tensor] = {}
    spelled: dict[str, list[str]] = {}
    made: dict[int, Program] = {}
    for phase, program in programs.items():
        if program.is_meta:
            raise UsageError(f"graph {program.graph.name}: weights are on the meta device and have no bytes")
        names: dict[str, str] = {}
        for param in program.graph.params:
            tensor = program.weights[param.name]
            known = (name for name in spelled.get(param.name, []) if _fits(name, param.name, program))
            name = next((name for name in known if _same_bits(held[name], tensor)), None)
            if name is None:
                name = param.name
                if name in held:
                    name = fresh(f"{name}.phase{phase}", {*held, *program.graph.values})
                spelled.setdefault(param.name, []).append(name)
                held[name] = tensor
            names[param.name] = name
        made[phase] = _renamed(program, names, held)
    return made


def _fits(name: str, own: str, program: Program) -> bool:
    return name == own or name not in program.graph.values


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _renamed(program: Program, names: Mapping[str, str], held: Mapping[str, Tensor]) -> Program:
    graph = rename_uses(program.graph, {old: new for old, new in names.items() if old != new})
    params = tuple(Value(names[param.name], param.type) for param in graph.params)
    return Program(replace(graph, params=params), {param.name: held[param.name] for param in params})
