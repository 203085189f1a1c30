"""What can go wrong for a user, one class per mistake, each with its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class IntarsiaError(Exception):
    """A mistake or a limit that one line can explain: where, which rule, what was found, what to do."""

    exit_code: ClassVar[int] = 2


class UsageError(IntarsiaError):
    """The command or the configuration asks for something that does not exist."""


class InvalidGraph(IntarsiaError):
    """The graph breaks a rule of the IR; the message names the node and the rule."""


class ParseError(IntarsiaError):
    """The text is not a graph; the message gives line and column."""


class SpecError(IntarsiaError):
    """The text is not of the form ``name(key=value, ...)``, or the name or a key is unknown."""


class PlanError(IntarsiaError):
    """The plan was made for another graph, or asks for what is not offered."""


class TargetError(IntarsiaError):
    """The machine is unknown, or its file breaks a rule."""


class Unsupported(IntarsiaError):
    """A model or an operator that cannot be represented or lowered; carries all reasons at once."""

    exit_code = 3

    def __init__(self, headline: str, reasons: Sequence[str] = ()) -> None:
        super().__init__("\n".join([headline, *(f"  {reason}" for reason in reasons)]))
        self.reasons = tuple(reasons)


class QualityError(IntarsiaError):
    """The quality that was asked for cannot be reached, or a claim does not hold."""

    exit_code = 4


class NoGain(IntarsiaError):
    """Nothing found is better than the unchanged model."""

    exit_code = 5


class MissingEnvironment(IntarsiaError):
    """A package, a driver, a device or disk space that the work needs is not there."""

    exit_code = 6
