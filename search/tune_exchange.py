"""Records of tuning that go from machine to machine: written to a file, and looked at again before they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intarsia.ir.errors import IntarsiaError, UsageError
from intarsia.kernels.records import Database, Record, write_records
from intarsia.kernels.tuned import plain_version, source_of
from intarsia.search.progress import Progress
from intarsia.search.tune_laboratory import Laboratory
from intarsia.search.tune_problem import Problem

TOP = 3
"""The best records of each key that are written, and looked at again."""

Laboratories = Callable[[str], Laboratory]
"""The laboratory for an architecture."""


@dataclass(frozen=True)
class Imported:
    """What became of a file's records.

    Attributes:
        taken: Records that hold here too, and are in the database now.
        refused: A line for each record that does not: what it is about, and why.
        stale: Records of another kernel source, or of other versions, which say nothing here.
        broken: Lines that are no records.
    """

    taken: int
    refused: tuple[str, ...]
    stale: int
    broken: int


def exported(database: Database, path: Path) -> int:
    """Write the best few records of every key to a file; how many those are. UsageError if there are none."""
    records = [record for key in sorted(database.keys, key=str) for record in database.top(key, TOP)]
    if not records:
        raise UsageError(f"{database.path}: holds no records to export; run intarsia tune")
    write_records(records, path)
    return len(records)


def imported(path: Path, database: Database, laboratories: Laboratories, progress: Progress) -> Imported:
    """Take the best few records of every key into the database, each compiled and compared with its reference again.

    Raises:
        UsageError: There is no such file, or it holds no record.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give one that intarsia tune export wrote")
    given = Database(path)
    if not len(given):
        raise UsageError(f"{path}: holds no records of tuning ({given.broken} lines are none)")
    best = [record for key in given.keys for record in given.top(key, TOP)]
    fresh = [record for record in best if _current(record)]
    taken, refused = 0, list[str]()
    progress.start("look at records again", len(fresh))
    for record in fresh:
        if reason := _fault(record, laboratories):
            refused.append(f"{record.key}: {_tile(record)}: {reason}")
        else:
            database.add(record)
            taken += 1
        progress.advance()
    progress.finish()
    return Imported(taken, tuple(refused), len(best) - len(fresh), given.broken)


def _current(record: Record) -> bool:
    """Whether the record says something here: kernel and versions are those that are installed."""
    key = record.key
    if (key.torch, key.compiler) != (plain_version("torch"), f"triton {plain_version('triton')}"):
        return False
    try:
        problem = _problem(record)
        launch = problem.launch(key.architecture, problem.space(key.architecture).default)
    except _WRONG:
        return True  # ``_fault`` says what is wrong with it
    return source_of(launch.kernel) == key.source


def _problem(record: Record) -> Problem:
    return Problem(record.key.kernel, dict(record.facts["shape"]), record.key.dtype)


_WRONG = (KeyError, TypeError, ValueError, RuntimeError, AssertionError, IntarsiaError)
"""What a kernel's example raises for extents that are none of it."""


def _fault(record: Record, laboratories: Laboratories) -> str:
    """Why the record does not hold here; empty if it does."""
    try:
        problem = _problem(record)
        offered = problem.space(record.key.architecture).offers(record.choice)
    except _WRONG as error:
        return f"its shape is none of this kernel: {str(error).strip().splitlines()[0]}"
    if not offered:
        return "it is no tile of this kernel"
    tile = {name: int(value) for name, value in record.choice.items()}
    laboratory = laboratories(record.key.architecture)
    return str(laboratory.compiled(problem, tile)["refused"] or laboratory.error(problem, tile)["refused"])


def _tile(record: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(record.choice.items()))
