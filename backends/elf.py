"""What a shared library says of itself, read from its bytes: nothing is loaded, nothing runs."""

from __future__ import annotations

import struct
from pathlib import Path

from intarsia.ir.errors import QualityError

X86_64 = 62
"""``e_machine`` of x86-64."""

DYNAMIC_SYMBOLS = 11
"""``sh_type`` of the table of symbols that a loader sees."""


def check_library(path: Path) -> frozenset[str]:
    """Names of the symbols that the library defines.

    Raises:
        QualityError: The file is no whole ELF library for x86-64. To load such a file may end the process.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QualityError(f"{path} cannot be read: {error.strerror}; build the engine again") from error
    if content[:4] != b"\x7fELF" or len(content) < 64 or content[4] != 2:
        raise QualityError(f"{path} is no 64-bit ELF library; build the engine again")
    machine = struct.unpack_from("<H", content, 18)[0]
    if machine != X86_64:
        raise QualityError(f"{path} is a library for machine {machine}, not for x86-64; build the engine again")
    table, size, count = struct.unpack_from("<Q", content, 40)[0], *struct.unpack_from("<HH", content, 58)
    if table + size * count > len(content):
        raise QualityError(f"{path} is cut off at {len(content):,} bytes; build the engine again")
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, table + size * index) for index in range(count)]
    return frozenset(_defined(content, sections))


def _defined(content: bytes, sections: list[tuple[int, ...]]) -> list[str]:
    found = []
    for section in sections:
        if section[1] != DYNAMIC_SYMBOLS:
            continue
        offset, length, strings = section[4], section[5], sections[section[6]][4]
        for at in range(offset, offset + length, 24):
            name, _, _, index = struct.unpack_from("<IBBH", content, at)
            if index:
                end = content.index(b"\0", strings + name)
                found.append(content[strings + name : end].decode("ascii", "replace"))
    return found
