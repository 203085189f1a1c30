"""Which tokens are computed at which step of a denoising loop: shares of the tokens, and a step divisor for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, lcm
from typing import Self

from .errors import SpecError
from .spec import Spec, construct, spec_of

REGROUPING = ("once", "synchronized")
TURNS = ("together", "staggered")
VELOCITIES = ("held", "linear")


@dataclass(frozen=True)
class Allocation:
    """A step budget for every token, from how much its velocity changes.

    The first ``warm_up`` steps and the last ``tail`` steps compute all tokens. Between them, in the window, the share
    ``shares[g]`` of the tokens whose velocity changes most among those not yet dealt out is computed at every
    ``divisors[g]``-th step.

    Attributes:
        warm_up: Steps before the window, at least 2, for the score compares the velocities of two; 1 with one share.
        tail: Steps behind the window.
        shares: Of the tokens, summing to 1; the group of greatest change first.
        divisors: One for each share, rising.
        turns: ``together``, all tokens of a group at one step, so that some steps compute none, or ``staggered``: the
            tokens of a group take turns, so that every step of the window computes as many.
        velocity: What a token moves by while it is not computed: ``held``, as the paper has it, or ``linear``, as its
            last two velocities go on.
        smooth: Whether a token's score is the mean over its neighbours in the video, 3 x 3 x 3.
        regroup: ``once``, after the warm-up, or ``synchronized``: again each time that the turns of all groups end
            together, every least common multiple of the divisors, at a step that computes all tokens.
        dense: Steps of the window that compute all tokens whatever the groups, such as that of an expert's switch.

    Source: Chu and Patel, Heterogeneous Step Allocation, 2026. Groups with step divisors, the window and the cached
    update are theirs; the shares, taking turns and the policies of regrouping are ours, for the paper gives no numbers.
    """

    warm_up: int = 4
    tail: int = 1
    shares: tuple[float, ...] = (0.15, 0.25, 0.6)
    divisors: tuple[int, ...] = (1, 2, 4)
    turns: str = "together"
    velocity: str = "held"
    smooth: bool = True
    regroup: str = "once"
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.warm_up < (2 if len(self.shares) > 1 else 1) or self.tail < 0:
            raise ValueError(
                "warm_up is at least 2, for the score compares two steps, 1 with one share; tail at least 0"
            )
        if not self.shares or len(self.shares) != len(self.divisors):
            raise ValueError(f"shares are {len(self.shares)}, divisors {len(self.divisors)}; give one for each")
        if not all(isfinite(share) and share >= 0 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares are {self.shares}; they are parts of all tokens and sum to 1")
        if not all(isinstance(number, int) for number in (*self.divisors, *self.dense)):
            raise ValueError(f"divisors are {self.divisors}, dense {self.dense}; both are whole numbers of steps")
        if min(self.divisors) < 1 or list(self.divisors) != sorted(self.divisors):
            raise ValueError("divisors are 1 or more and rise: the group of greatest change is first")
        for key, known in (("turns", TURNS), ("velocity", VELOCITIES), ("regroup", REGROUPING)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it is {' or '.join(known)}")
        if any(step < 0 for step in self.dense):
            raise ValueError("dense are numbers of steps, from 0")

    def __str__(self) -> str:
        return str(spec_of("allocation", self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``allocation(warm_up=4, shares=(0.2, 0.8), divisors=(1, 4))``; SpecError if it is not of that form."""
        spec = Spec.parse(text)
        if spec.name != "allocation":
            raise SpecError(f"expected 'allocation(warm_up=..., shares=..., divisors=...)', found {text!r}")
        return construct(cls, spec)

    @property
    def is_whole(self) -> bool:
        """Whether every step computes all tokens or none, so that no token is seen through a cache."""
        return len(set(self.divisors)) == 1 and (self.turns == "together" or self.divisors[0] == 1)

    def is_dense(self, step: int, steps: int) -> bool:
        """Whether step number ``step`` of a loop of ``steps`` computes all tokens."""
        outside = step < self.warm_up or step >= steps - self.tail
        return outside or step in self.dense or (self.regroup == "synchronized" and self._synchronized(step))

    def regroups(self, step: int, steps: int) -> bool:
        """Whether groups are formed, anew or for the first time, behind this step."""
        again = self.regroup == "synchronized" and step < steps - self.tail and self._synchronized(step)
        return step == self.warm_up - 1 or again

    def _synchronized(self, step: int) -> bool:
        """Whether all groups end a round at this step of the window."""
        inside = step - self.warm_up + 1
        return inside > 0 and inside % lcm(*self.divisors) == 0

    def groups(self, order: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Tokens by group and turn.

        Args:
            order: All tokens, greatest change first.

        Returns:
            For each group as many parts as its divisor says, one for each step of a round; those of staggered groups
            differ by a token at most, of others all but the last are empty.
        """
        ends = [round(sum(self.shares[: number + 1]) * len(order)) for number in range(len(self.shares))]
        return tuple(
            tuple(self._part(order[start:end], turn, divisor) for turn in range(divisor))
            for start, end, divisor in zip([0, *ends], ends, self.divisors, strict=False)
        )

    def _part(self, members: Sequence[int], turn: int, divisor: int) -> tuple[int, ...]:
        if self.turns == "staggered":
            return tuple(sorted(members[turn::divisor]))
        return tuple(sorted(members)) if turn == divisor - 1 else ()

    def active(self, groups: Sequence[Sequence[Sequence[int]]], step: int) -> tuple[int, ...]:
        """The tokens that a step of the window computes, in rising order; none at some steps of groups together."""
        inside = step - self.warm_up
        return tuple(sorted(token for parts in groups for token in parts[inside % len(parts)]))

    def shares_by_step(self, steps: int) -> tuple[float, ...]:
        """The share of the tokens that each step of a loop of ``steps`` computes."""
        return tuple(1.0 if self.is_dense(step, steps) else self._share(step - self.warm_up) for step in range(steps))

    def _share(self, inside: int) -> float:
        if self.turns == "staggered":
            return sum(share / divisor for share, divisor in zip(self.shares, self.divisors, strict=True))
        last = (
            (share, inside % divisor == divisor - 1) for share, divisor in zip(self.shares, self.divisors, strict=True)
        )
        return sum(share for share, computed in last if computed)

    def share(self, steps: int) -> float:
        """Token steps that are computed, of all: what a loop costs where cost goes with active tokens."""
        return sum(self.shares_by_step(steps)) / steps
