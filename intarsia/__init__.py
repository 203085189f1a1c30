"""Search sparsity, steps and precision of video diffusion transformers jointly; ship a verified engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.flow import bench, explain, export, load, optimize, run, search, trace, verify
    from intarsia.inspection import inspect

__all__ = [
    "bench",
    "explain",
    "export",
    "inspect",
    "load",
    "optimize",
    "run",
    "search",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used, so that ``import intarsia`` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module 'intarsia' has no attribute {name!r}")
    return getattr(import_module("intarsia.inspection" if name == "inspect" else "intarsia.flow"), name)
