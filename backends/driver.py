"""Load compiled GPU code and launch it through the machine's own driver: CUDA's, or HIP's, which is spelled alike."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from intarsia.ir.errors import MissingEnvironment, QualityError

_DYNAMIC_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES. Source: CUDA driver API, CUfunction_attribute."""

_STATIC_LIMIT = 48 * 1024
"""Shared memory, in bytes, that a kernel has without asking. Source: CUDA C++ programming guide, shared memory."""


@dataclass(frozen=True)
class Interface:
    """How a driver's library and its functions are called; the functions take the same arguments.

    ``allow_shared`` is empty where a kernel need not ask for its shared memory.
    """

    libraries: tuple[str, ...]
    load: str
    find: str
    launch: str
    allow_shared: str = ""


CUDA = Interface(
    ("libcuda.so.1", "nvcuda.dll"), "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuFuncSetAttribute"
)
HIP = Interface(
    ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"),
    "hipModuleLoadData",
    "hipModuleGetFunction",
    "hipModuleLaunchKernel",
)

_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64}


class Function:
    """A kernel of a loaded module; the module stays loaded as long as the process runs.

    Args:
        binary: What was compiled: a cubin, a code object, or PTX, which the driver compiles now.
        symbol: The kernel's name in it.
        types: Triton's spelling of the arguments, ``*fp16`` or ``i32``.
        threads: Of one block.
        shared_bytes: Shared memory of one block.

    Raises:
        MissingEnvironment: The driver is not there, or refuses to run this code on this device.
        QualityError: There is no such kernel in the binary.
    """

    def __init__(
        self, interface: Interface, binary: bytes, *, symbol: str, types: Sequence[str], threads: int, shared_bytes: int
    ) -> None:
        self._library, self._interface = _library(interface), interface
        self._types, self._threads, self._shared = tuple(types), threads, shared_bytes
        module = ctypes.c_void_p()
        self._call(interface.load, ctypes.byref(module), ctypes.c_char_p(binary))
        self._function = ctypes.c_void_p()
        try:
            self._call(interface.find, ctypes.byref(self._function), module, symbol.encode())
        except MissingEnvironment as error:
            raise QualityError(f"the compiled code holds no kernel {symbol}: {error}") from error
        if interface.allow_shared and shared_bytes > _STATIC_LIMIT:
            self._call(interface.allow_shared, self._function, _DYNAMIC_SHARED_BYTES, shared_bytes)

    def launch(self, grid: Sequence[int], arguments: Sequence[int], *, stream: int) -> None:
        """Start the kernel on ``stream``: addresses for pointers, numbers for the rest; two null pointers follow.

        Triton's kernels take two pointers to scratch memory after their own arguments; ours use none.
        """
        values = [_as_c(type_, value) for type_, value in zip(self._types, arguments, strict=True)]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        extents = [ctypes.c_uint(extent) for extent in (*grid, self._threads, 1, 1)]
        shared, on = ctypes.c_uint(self._shared), ctypes.c_void_p(stream)
        self._call(self._interface.launch, self._function, *extents, shared, on, pointers, None)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise MissingEnvironment(f"the driver answers {name} with error {status}; see its list of error codes")


def _as_c(type_: str, value: int) -> ctypes._SimpleCData[int]:
    return ctypes.c_uint64(value) if type_.startswith("*") else _NUMBERS[type_](value)


@lru_cache
def _library(interface: Interface) -> ctypes.CDLL:
    for name in interface.libraries:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MissingEnvironment(
        f"there is no GPU driver: {interface.libraries[0]} is not found; install it, or take another machine"
    )
