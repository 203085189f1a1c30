"""What was measured before: one line a measurement, so that a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from intarsia.ir.errors import MissingEnvironment
from intarsia.ir.program import Program
from intarsia.search.workload import Workload


class Journal:
    """Measurements by key, kept in an append-only file of JSON lines, or in memory where no path is given.

    Attributes:
        path: The file; None keeps nothing.
        broken: Lines that could not be read, such as the last one of a killed search; they are measured again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.broken = 0
        self._values: dict[str, object] = {}
        self._ends_mid_line = False
        if path is not None:
            self._read(path)

    def get(self, key: str) -> object | None:
        """What was measured under ``key``, or None."""
        return self._values.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep a plain JSON value; on disk when this returns. MissingEnvironment if the disk does not take it."""
        self._values[key] = value
        if self.path is None:
            return
        line = "\n" * self._ends_mid_line + json.dumps({"key": key, "value": value}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MissingEnvironment(
                f"{self.path}: cannot be written: {error.strerror}; set INTARSIA_CACHE_DIR to a folder that can"
            ) from error
        self._ends_mid_line = False

    def __len__(self) -> int:
        return len(self._values)

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise MissingEnvironment(f"{path}: cannot be read: {error.strerror}; set INTARSIA_CACHE_DIR") from error
        self._ends_mid_line = bool(data) and not data.endswith(b"\n")
        for line in data.splitlines():
            self._read_line(line)

    def _read_line(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and entry.keys() == {"key", "value"} and isinstance(entry["key"], str):
            self._values[entry["key"]] = entry["value"]
        else:
            self.broken += 1


def open_journal(program: Program, workload: Workload, *, fresh: bool = False) -> Journal:
    """The journal of this graph with these weights on this workload; ``fresh`` forgets what is in it.

    Raises:
        MissingEnvironment: The cache folder cannot be read or written.
        UsageError: The program has no weights.
    """
    facts = {
        "graph": program.graph.fingerprint,
        "weights": program.fingerprint(),
        "workload": dict(workload.describe),
        "torch": version("torch"),
        "kernels": _kernels_fingerprint(),
    }
    path = journal_folder() / f"{program.graph.name}-{_digest(facts)}.jsonl".replace("/", "_")
    if fresh:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise MissingEnvironment(f"{path}: cannot be removed: {error.strerror}") from error
    return Journal(path)


def journal_folder() -> Path:
    """``journals`` in ``$INTARSIA_CACHE_DIR``, or in ``intarsia`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("INTARSIA_CACHE_DIR")
    if given:
        return Path(given) / "journals"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intarsia" / "journals"


def _digest(facts: Mapping[str, object]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _kernels_fingerprint() -> str:
    """Changes with the source of our operators: what was measured with another rounding no longer counts."""
    import intarsia.kernels

    digest = sha256()
    for folder in intarsia.kernels.__path__:
        for source in sorted(Path(folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
