"""Schedules that were measured: found among tilings, kept in a MetaSchedule database, applied again from there."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from intarsia.backends.tvm_library import compiled_function
from intarsia.backends.tvm_schedule import is_tiled, scheduled
from intarsia.ir.errors import UsageError

RECORDS = ("database_workload.json", "database_tuning_record.json")
"""Files of a MetaSchedule database: the functions, and the schedules with the seconds they took."""

REPEATS = 7
"""Calls of a candidate, of which the fastest counts."""


class Tuning:
    """Gives each function a schedule: the stored one, else the fastest of ``trials``, else the one that should be.

    Attributes:
        measured: How many candidates have been timed; none where the database knows all functions.
    """

    def __init__(self, target: Any, trials: int, database: Path | None) -> None:
        if trials < 0:
            raise UsageError(f"tvm: trials is {trials}; it is a number of measurements, 0 or more")
        if database is not None and not trials and not (database / RECORDS[1]).is_file():
            raise UsageError(f"tvm: database {database} holds no {RECORDS[1]}; tune with trials=4 to make one")
        self.measured = 0
        self._target = target
        self._trials = trials
        self._folder = database
        self._records: Any = None
        if database is not None or trials:
            self._temporary = tempfile.TemporaryDirectory()
            self._work = Path(self._temporary.name)
            for name in RECORDS:
                if database is not None and (database / name).is_file():
                    shutil.copy(database / name, self._work / name)
            self._records = _database(self._work)

    def schedule(self, function: Any) -> Any:
        """The function with its loops arranged."""
        if self._records is None or not is_tiled(function):
            return scheduled(function).mod["main"]
        import tvm
        from tvm import s_tir

        # What a function is called is no part of it, and would keep equal ones apart.
        plain = function.without_attr("global_symbol") if "global_symbol" in function.attrs else function
        module = tvm.IRModule({"main": plain.with_attr("global_symbol", "main")})
        found = self._records.query_tuning_record(module, self._target, "main")
        if found is None and not self._trials:
            return scheduled(function).mod["main"]
        if found is None:
            found = self._search(module)
        schedule = s_tir.Schedule(function)
        found.trace.apply_to_schedule(schedule, remove_postproc=False)
        return schedule.mod["main"]

    def _search(self, module: Any) -> Any:
        from tvm.s_tir.meta_schedule.database import TuningRecord

        workload = self._records.commit_workload(module)
        for rank in range(self._trials):
            candidate = scheduled(module["main"], rank)
            seconds = self._seconds(candidate.mod["main"])
            self._records.commit_tuning_record(TuningRecord(candidate.trace, workload, [seconds], self._target))
        return self._records.query_tuning_record(module, self._target, "main")

    def _seconds(self, function: Any) -> float:
        import numpy
        import tvm

        call = compiled_function(function, self._target)
        tensors = [
            tvm.runtime.tensor(numpy.zeros([int(n) for n in param.ty.shape], str(param.ty.dtype)))
            for param in function.params
        ]
        self.measured += 1
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call(*tensors)
            times.append(time.perf_counter() - start)
        return min(times)

    def save(self, folder: Path) -> None:
        """Put the database into ``folder``, and back to where it came from if anything was measured."""
        if self._records is None:
            return
        places = [folder] if self._folder is None or not self.measured else [folder, self._folder]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for name in RECORDS:
                shutil.copy(self._work / name, place / name)


def _database(folder: Path) -> Any:
    from tvm.s_tir.meta_schedule.database import JSONDatabase

    for name in RECORDS:
        (folder / name).touch()
    try:
        return JSONDatabase(*(str(folder / name) for name in RECORDS), module_equality="structural")
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise UsageError(f"tvm: the database cannot be read: {' '.join(str(error).split())[:200]}") from error
