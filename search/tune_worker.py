"""A process that does tasks of tuning, one line of JSON each way: what kills it costs one candidate, not the search."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from typing import Any

from intarsia.ir.errors import IntarsiaError, MissingEnvironment


class TaskFailed(Exception):
    """The task raised, took too long, or ended its process; the message says which."""


class Worker:
    """A process that is started at its first task, and again after one that ended it.

    With ``interpreted`` Triton's interpreter stands in its compiler's place.
    """

    def __init__(self, *, interpreted: bool, timeout: float) -> None:
        self._interpreted, self._timeout = interpreted, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: str, **arguments: Any) -> Any:
        """What the function ``task`` of ``tune_tasks`` gives for JSON values.

        Raises:
            TaskFailed: It gives nothing.
            MissingEnvironment: A package that it needs is not there.
        """
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"task": task, "arguments": arguments}).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self._timeout)
            line = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [process.stdout], b""
        if not line:
            self.close()
            raise TaskFailed("ended the process" if ready else f"took more than {self._timeout:.0f} s")
        reply = json.loads(line)
        if "value" in reply:
            return reply["value"]
        if reply["kind"] == MissingEnvironment.__name__:
            raise MissingEnvironment(reply["failed"])
        raise TaskFailed(reply["failed"])

    def close(self) -> None:
        """End the process; harmless where none runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TRITON_INTERPRET": "1" if self._interpreted else "0"}
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's; this process ends with its pipe
        )


def serve() -> None:
    """Answer the lines on stdin until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_reply(line)).encode() + b"\n")


def _reply(line: str) -> dict[str, Any]:
    from intarsia.search import tune_tasks
    from intarsia.search.tune_problem import Problem

    asked = json.loads(line)
    arguments = dict(asked["arguments"])
    if "problem" in arguments:
        arguments["problem"] = Problem(**arguments["problem"])
    try:
        return {"value": getattr(tune_tasks, asked["task"])(**arguments)}
    except Exception as error:  # the process's door: whatever a compiler raises about a candidate is the answer
        lines = str(error).strip().splitlines() or [""]
        kind = MissingEnvironment if isinstance(error, MissingEnvironment) else type(error)
        told = lines[0] if isinstance(error, IntarsiaError) else f"{type(error).__name__}: {lines[0][:200]}"
        return {"failed": told, "kind": kind.__name__}


if __name__ == "__main__":
    serve()
