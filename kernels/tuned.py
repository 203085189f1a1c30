"""Which records of tuning are about a call: the key of a kernel, for a machine and the versions that are installed."""

from __future__ import annotations

import inspect
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from intarsia.ir.target import Target
from intarsia.kernels.launch import Launch, imported
from intarsia.kernels.records import Key
from intarsia.kernels.tiling import Space


def key_of(op: str, space: Space, launch: Launch, target: Target) -> Key:
    """What records about the call are kept under; ``launch`` names its kernel.

    Raises:
        MissingEnvironment: Triton is not installed.
    """
    return Key(
        kernel=op,
        source=source_of(launch.kernel),
        bucket=space.bucket,
        dtype=space.dtype,
        target=target.name,
        architecture=target.architecture,
        torch=plain_version("torch"),
        compiler=f"triton {plain_version('triton')}",
    )


def plain_version(package: str) -> str:
    """The installed version without what tells builds apart: ``2.13.0`` of ``2.13.0+cpu``."""
    return version(package).partition("+")[0]


@lru_cache(maxsize=64)
def source_of(kernel: str) -> str:
    """SHA-256 of the source of the kernel at this import path and of all kernels that it calls."""
    found: dict[str, str] = {}
    _collect(imported(kernel), found)
    return sha256("\n".join(found[name] for name in sorted(found)).encode()).hexdigest()


def _collect(kernel: Any, found: dict[str, str]) -> None:
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    found[name] = inspect.getsource(function)
    for called in function.__code__.co_names:
        other = function.__globals__.get(called)
        if hasattr(other, "fn") and getattr(other.fn, "__module__", "").startswith("intarsia."):
            _collect(other, found)
