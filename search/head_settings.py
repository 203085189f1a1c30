"""How patterns of heads are searched: what the user may say about it."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ir.spec import spec_of
from intarsia.search.head_policy import SCORES

CHOOSE = ("exact", "greedy")
COSTS = ("predicted", "measured")


@dataclass(frozen=True)
class HeadSearch:
    """How patterns of heads are searched; ``heads(choose='greedy', score='mse')``.

    Attributes:
        choose: ``exact``: errors of the whole answer for every head, option and phase, and an integer program.
            ``greedy``: Sparse-vDiT's algorithm 1, closed loop, head by head.
        phases: Into how many ranges the steps are cut, the first the shortest, each with patterns of its own; 0 for
            every step.
        density: Share of all pairs of queries and keys that may be computed, in the mean over heads and steps; 0 if
            time or quality decides.
        seconds: Predicted time of one call, in the mean over steps, that may be taken; 0 if density or quality decides.
        probes: Random vectors for each calibration call, for ``exact``.
        means: Whether the mean of all values makes up for what a pattern leaves out, in a share that calibration finds,
            for ``exact``.
        score: ``relative`` or, as in the paper, ``mse``, for ``greedy``.
        epsilon: A head stays dense where every loss exceeds this, for ``greedy``; 0 finds the one that fits.
        weight: Of the cost in the loss, lambda in the paper.
        rows: Queries of a head that ``greedy`` looks at; 0 for all.
        transfer: Whether the choice is compared with the one that other prompts and noise would have led to.
        table: Errors of all options in place of measured ones: a safetensors file, key ``errors`` (steps, heads,
            options); nothing is run then, and the model needs no weights.
        steps: Steps of the loop, where a model on the meta device with a ``table`` has no sampler that says it.
    """

    choose: str = "exact"
    phases: int = 8
    density: float = 0.0
    seconds: float = 0.0
    probes: int = 4
    means: bool = True
    score: str = "relative"
    epsilon: float = 0.0
    weight: float = 0.5
    rows: int = 64
    transfer: bool = True
    table: str = ""
    steps: int = 0
    costs: str = "predicted"

    def __post_init__(self) -> None:
        if self.choose not in CHOOSE:
            raise ValueError(f"choose is {self.choose!r}; it is one of {', '.join(CHOOSE)}")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; it is one of {', '.join(SCORES)}")
        if self.costs not in COSTS:
            raise ValueError(f"costs is {self.costs!r}; it is one of {', '.join(COSTS)}")
        if not 0 <= self.density <= 1:
            raise ValueError(f"density is {self.density}; it is a share of all pairs, above 0 and at most 1")
        if self.density and self.seconds:
            raise ValueError("density and seconds are both given; one budget decides")
        if min(self.phases, self.rows, self.steps) < 0 or self.probes < 1:
            raise ValueError("phases, rows and steps are at least 0, probes at least 1")
        if min(self.seconds, self.epsilon, self.weight) < 0:
            raise ValueError("seconds, epsilon and weight are at least 0")
        if self.table and self.choose == "greedy":
            raise ValueError("table is given; greedy measures in closed loop and takes none")
        if self.epsilon and (self.choose != "greedy" or self.density or self.seconds):
            raise ValueError("epsilon is given; it decides by itself, for choose='greedy' without density or seconds")

    @property
    def bounded(self) -> bool:
        """Whether a budget decides rather than quality."""
        return bool(self.density or self.seconds)

    def __str__(self) -> str:
        return str(spec_of("heads", self))
