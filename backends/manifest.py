"""The manifest: what a bundle says about itself, in a text of which no byte can change unnoticed.

The text is canonical (sorted keys, one fact a line) and sealed with its own SHA-256. What a clock said differs from run
to run, so the line of ``measurements.json`` stays outside the seal; that file carries a seal of its own, and the hash
of the report.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from intarsia.ir.errors import QualityError, UsageError

SCHEMA = 2
"""Of a bundle whose program is the same at every step."""

PHASED_SCHEMA = 3
"""Of a bundle with phases: a reader that knows ``SCHEMA`` alone would run the first program at every step."""

SEGMENTED_SCHEMA = 4
"""Of a bundle with segments: a reader that knows the other schemas alone would find no engine."""

PHASES, SEGMENTS = "phases", "segments"
"""Keys of the manifest: what it says of a loop's phases or of a step's segments, and of their engines."""

MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
REPORT = "report.html"

OWN = "its own"
"""What a manifest says of an engine's stored answer when the engine itself gave it."""


def canonical(data: Mapping[str, object]) -> str:
    """JSON with sorted keys, one line for each key of the first two levels; numbers that JSON lacks become strings."""
    lines = [f"  {json.dumps(key)}: {_block(plain(value))}" for key, value in sorted(data.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _block(value: object) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    lines = [
        f"    {json.dumps(key)}: {json.dumps(value[key], sort_keys=True, allow_nan=False)}" for key in sorted(value)
    ]
    return "{\n" + ",\n".join(lines) + "\n  }"


def plain(value: object) -> Any:
    """``value`` as JSON holds it; infinities and NaN as the strings that ``float`` reads."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case Path():
            return str(value)
    return value


def sealed(data: Mapping[str, object]) -> dict[str, object]:
    """``data`` with the key ``seal``, the SHA-256 of its canonical text without the measurements' line."""
    return {**data, "seal": _seal(data)}


def _seal(data: Mapping[str, object]) -> str:
    content = {key: value for key, value in data.items() if key != "seal"}
    files = content.get("files")
    if isinstance(files, Mapping):
        content["files"] = {name: entry for name, entry in files.items() if name != MEASUREMENTS}
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file that ``sealed`` wrote; QualityError if a byte of it has changed."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise QualityError(f"{path} has been altered: it is not the JSON that Intarsia wrote") from error
    if not isinstance(data, dict) or data.get("seal") != _seal(data) or canonical(data).encode() != path.read_bytes():
        raise QualityError(f"{path} has been altered: its content is not what its seal says")
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the bundle in ``folder``.

    Raises:
        UsageError: The folder is not there or holds no manifest, or a later Intarsia wrote it.
        QualityError: The manifest has been altered.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; give one that intarsia export or optimize wrote")
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is no bundle: it holds no {MANIFEST}; give a folder that intarsia export wrote")
    data = read_sealed(folder / MANIFEST)
    if data.get("schema") not in (SCHEMA, PHASED_SCHEMA, SEGMENTED_SCHEMA):
        raise UsageError(
            f"{folder}: manifest of schema {data.get('schema')!r}; "
            f"this Intarsia reads schemas {SCHEMA}, {PHASED_SCHEMA} and {SEGMENTED_SCHEMA}"
        )
    return data


def entry_of(path: Path) -> dict[str, object]:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def entries_below(folder: Path) -> dict[str, dict[str, object]]:
    """Bytes and SHA-256 of every file below ``folder`` but the manifest and the report, by path with slashes."""
    return {name: entry_of(folder / name) for name in files_below(folder) if name not in (MANIFEST, REPORT)}


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, sorted, by path with slashes; links count as files."""
    return sorted(str(PurePosixPath(path.relative_to(folder))) for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is not as the manifest says, file by file: changed, missing, or not listed."""
    listed: dict[str, Mapping[str, object]] = dict(manifest["files"])
    report = _report_entry(folder)
    if report is not None:
        listed[REPORT] = report
    wrong = [found for name in sorted(listed) if (found := fault(folder, name, listed[name]))]
    extra = [name for name in files_below(folder) if name != MANIFEST and name not in listed]
    return wrong + [f"{name} is not listed in the manifest" for name in extra]


def _report_entry(folder: Path) -> Mapping[str, object] | None:
    try:
        entry = read_sealed(folder / MEASUREMENTS).get(REPORT)
    except (OSError, QualityError):
        return entry_of(folder / REPORT) if (folder / REPORT).is_file() else None
    return entry if isinstance(entry, dict) else None


def fault(folder: Path, name: str, entry: Mapping[str, object]) -> str | None:
    """Why the file ``name`` is not what ``entry`` says, or None if it is."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        if entry_of(path) == entry:
            return None
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if name == MEASUREMENTS and _is_sealed(path):
        return f"{MANIFEST} has been altered: its line for {MEASUREMENTS} is not that file's"
    return f"{name} has been altered: its bytes are not what the manifest says"


def _is_sealed(path: Path) -> bool:
    try:
        read_sealed(path)
    except QualityError:
        return False
    return True


def claims_by_part(claims: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a manifest says of a backend's engines, by ``phase 1`` or ``segment 0``; by "" for the only or first one."""
    if SEGMENTS in claims:
        return {f"segment {number}": one for number, one in claims[SEGMENTS].items()}
    return {"": claims, **{f"phase {number}": one for number, one in claims.get(PHASES, {}).items()}}
