"""What tuning found, in one append-only file of JSON lines: a record a candidate, by all that its worth depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from intarsia.ir.errors import MissingEnvironment

SCHEMA = 1

MEASURED, RANKED = "measured", "ranked"
"""How a record's seconds were come by: by a clock, or by a cost model alone."""


@dataclass(frozen=True)
class Key:
    """What a record is about; where one of these differs, it says nothing.

    Attributes:
        kernel: The operator, ``intarsia.linear_i8``; of TVM, the name of the tensor function.
        source: SHA-256 of the kernel's source; of TVM, of the tensor function.
        bucket: The shapes that share the record, as ``Space.bucket`` writes them.
        dtype: Element type.
        target: Name of the machine.
        architecture: What its compiler is told.
        torch: Version of PyTorch.
        compiler: What compiles, with its version: ``triton 3.9.0``.
    """

    kernel: str
    source: str
    bucket: str
    dtype: str
    target: str
    architecture: str
    torch: str
    compiler: str

    @property
    def task(self) -> tuple[str, str, str, str, str]:
        """The key without what grows old: sources and versions."""
        return self.kernel, self.bucket, self.dtype, self.target, self.architecture

    def __str__(self) -> str:
        return f"{self.kernel} [{self.bucket}] {self.dtype} on {self.target}"


@dataclass(frozen=True)
class Record:
    """What is known of one candidate.

    Attributes:
        key: What it is about.
        choice: The candidate: a tile; of TVM, a trace of a schedule.
        how: ``measured`` or ``ranked``.
        seconds: Of one call, by that means; None where it was refused before.
        refused: Why it is no answer: what does not fit, or an error that is too large; empty if it is one.
        facts: The shape it was found at, whether it is the default, its error and what that was checked with,
            registers, spills, the device; JSON values.
    """

    key: Key
    choice: Mapping[str, Any]
    how: str
    seconds: float | None
    refused: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def order(self) -> tuple[bool, float, bool, str]:
        """Better records come first: measured before ranked, fast before slow, of equals the default."""
        seconds = float("inf") if self.seconds is None else self.seconds
        return self.how != MEASURED, seconds, not self.facts.get("default", False), choice_text(self.choice)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)

    @staticmethod
    def from_json(line: str | bytes) -> Record:
        """What ``to_json`` wrote; ValueError for anything else."""
        data = json.loads(line)
        try:
            if data.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            record = Record(**{**data, "key": Key(**data["key"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no record: {error}") from error
        numbers = isinstance(record.seconds, int | float) or (record.seconds is None and bool(record.refused))
        texts = all(isinstance(value, str) for value in (*asdict(record.key).values(), record.how, record.refused))
        tables = isinstance(record.choice, dict) and isinstance(record.facts, dict)
        if not (numbers and texts and tables and record.how in (MEASURED, RANKED)):
            raise ValueError("no record: a value is of the wrong kind")
        return record


class Database:
    """The records of a file; the last one about a candidate counts.

    Attributes:
        path: The file; it need not exist yet.
        broken: Lines that are no records, such as the last one of a killed process.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, 0
        self._records: dict[Key, dict[str, Record]] = {}
        self._ends_mid_line = False
        self._read()

    def add(self, record: Record) -> None:
        """Keep a record; on disk when this returns. MissingEnvironment if the disk does not take it."""
        line = "\n" * self._ends_mid_line + record.to_json() + "\n"
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
        self._keep(record)

    def records(self, key: Key) -> tuple[Record, ...]:
        """All that is known about a key, in the order of the file."""
        return tuple(self._records.get(key, {}).values())

    def best(self, key: Key) -> Record | None:
        """The best candidate that was not refused."""
        return next(iter(self.top(key, 1)), None)

    def top(self, key: Key, count: int | None = None) -> tuple[Record, ...]:
        """The best few that were not refused, the best first; all of them without a number."""
        return tuple(sorted((one for one in self.records(key) if not one.refused), key=lambda one: one.order)[:count])

    def stale(self, key: Key) -> int:
        """Records of the same task with another source or other versions."""
        return sum(len(table) for other, table in self._records.items() if other != key and other.task == key.task)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What there are records about."""
        return tuple(self._records)

    def __len__(self) -> int:
        return sum(map(len, self._records.values()))

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise MissingEnvironment(f"{self.path}: cannot be read: {error.strerror}") from error
        self._ends_mid_line = bool(data) and not data.endswith(b"\n")
        for line in data.splitlines():
            try:
                self._keep(Record.from_json(line))
            except ValueError:
                self.broken += 1

    def _keep(self, record: Record) -> None:
        """What a clock said of a candidate and what a model says stand beside each other."""
        table = self._records.setdefault(record.key, {})
        table[f"{record.how} {choice_text(record.choice)}"] = record


def choice_text(choice: Mapping[str, Any]) -> str:
    """A candidate as text that tells it from others."""
    return json.dumps(dict(choice), sort_keys=True)


def write_records(records: Iterable[Record], path: Path) -> None:
    """A file of these records, which ``Database`` reads."""
    path.write_text("".join(record.to_json() + "\n" for record in records))


def tuning_file() -> Path:
    """``tuning.jsonl`` in ``$INTARSIA_CACHE_DIR``, or in ``intarsia`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("INTARSIA_CACHE_DIR")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intarsia"
    return folder / "tuning.jsonl"
