"""What a pattern is, and the registry of patterns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.ir.spec import spec_of
from intarsia.ir.tokens import TokenLayout
from intarsia.kernels.block_sparse_attention.order import TokenOrder

PATTERNS: dict[str, str] = {}
"""Patterns that come with Intarsia, by name; others join by entry points of the group ``intarsia.patterns``."""

GROUP = "intarsia.patterns"


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys a query attends to, block by block.

    Subclasses are frozen dataclasses; ``str`` of a pattern is ``name(key=value)``, from which ``find_pattern`` makes it
    again.
    """

    name: ClassVar[str]

    @abstractmethod
    def blocks(self, layout: TokenLayout, block_q: int, block_k: int) -> NDArray[np.bool_]:
        """Which blocks of keys each block of queries attends to (blocks of queries, blocks of keys), over positions."""

    def order(self, layout: TokenLayout) -> TokenOrder | None:
        """Which token stands at each position; None where they stand as they come."""
        return None

    def __str__(self) -> str:
        return str(spec_of(self.name, self))
