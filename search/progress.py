"""How long work tells where it stands."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of one phase at a time; phases do not nest, and ``start`` ends the phase before it."""

    def start(self, phase: str, total: int | None) -> None:
        """A phase begins that has ``total`` equal parts, or None where nobody knows."""

    def advance(self, done: int = 1, *, note: str = "") -> None:
        """``done`` more parts are finished; ``note`` is what a person wants to know now, such as the best so far."""

    def finish(self) -> None:
        """The phase is over; harmless when none runs."""


class Silent:
    """Tells nobody."""

    def start(self, phase: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, done: int = 1, *, note: str = "") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
