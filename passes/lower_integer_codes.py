"""Values of which the codes are there already, and what their codes mean."""

from __future__ import annotations

from dataclasses import dataclass, field

from intarsia.passes.quantize_integer_grids import Grid


@dataclass
class Codes:
    """A table that grows with the graph.

    Attributes:
        names: What the codes of a value are called.
        grids: What the codes of a value stand for.
        dtypes: Element types of the codes.
    """

    names: dict[str, str] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def add(self, value: str, codes: str, grid: Grid, dtype: str) -> None:
        """Codes of a value."""
        self.names[value], self.grids[value], self.dtypes[value] = codes, grid, dtype

    def are_alike(self, values: tuple[str, ...]) -> bool:
        """Whether all values have codes of one scale and one element type."""
        if not all(value in self.names for value in values):
            return False
        return len({(self.grids[value].scale, self.dtypes[value]) for value in values}) == 1


def integer_dtype(low: int, high: int) -> str:
    """The smallest element type that holds both."""
    return next(f"i{bits}" for bits in (8, 16, 32) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
