"""The policies of a loop's steps that a search weighs: what is computed when, for a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import sqrt
from typing import Self

from intarsia.ir.allocation import Allocation
from intarsia.ir.spec import Spec
from intarsia.passes.active_tokens import ActiveTokens
from intarsia.passes.step_caching import FirstBlockCache, StepCaching, TeaCache

WARM_UPS, TAILS = (2, 3, 4), (0, 1, 2, 3)

WHOLE = "whole steps"
TOKENS = "tokens"

ENDS = ((1, 1), (3, 1), (1, 3))
"""First and last steps that caching rules always compute, for each of which a threshold is looked for."""

TRIES = 8
"""Thresholds that are tried for each; behind the last few the steps that are computed hardly differ."""

GROUPS: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = (
    ((1, 2), (1.0,)),
    ((1, 3), (1.0,)),
    ((1, 4), (1.0,)),
    ((2, 4), (1.0,)),
    ((2, 6), (1.0,)),
    ((3, 6), (1.0,)),
    ((3, 9), (1.0,)),
    ((4, 8), (1.0,)),
    ((5, 10), (1.0,)),
    ((1, 2, 4), (0.5, 0.5)),
    ((2, 4, 8), (0.5, 0.5)),
    ((3, 6, 12), (0.5, 0.5)),
)
"""Divisors of the groups, and how what the first group leaves is split among the others."""


@dataclass(frozen=True)
class Allocated:
    """Which tokens a loop computes at its steps.

    Attributes:
        allocation: Which tokens are computed when.
        caches: Whether keys and values of other tokens are ``held`` or move on, ``linear``; ``none`` where steps
            compute all tokens or none, by the unchanged network.
    """

    allocation: Allocation
    caches: str = "held"

    @classmethod
    def of(cls, made: ActiveTokens) -> Self:
        """The policy that a pass with an allocation stands for."""
        allocation = Allocation.parse(made.allocation)
        return cls(allocation, "none" if allocation.is_whole else made.caches)

    @property
    def kind(self) -> str:
        """``whole steps`` where all tokens have one divisor, else ``tokens``."""
        return WHOLE if len(set(self.allocation.divisors)) == 1 else TOKENS

    @property
    def notation(self) -> str:
        """The pass that computes so."""
        args: dict[str, str] = {"allocation": str(self.allocation)}
        return str(Spec("active-tokens", {"caches": self.caches, **args} if self.caches == "linear" else args))


@dataclass(frozen=True)
class Cached:
    """Whole steps that skip blocks where a rule, which looks at the data, says so."""

    rule: StepCaching

    @property
    def kind(self) -> str:
        """The name of the rule's pass."""
        return self.rule.name

    @property
    def notation(self) -> str:
        """The pass that computes so."""
        return str(self.rule)


Policy = Allocated | Cached


Seconds = Callable[[str, float], float]
"""What a call takes that computes a share of the tokens, 0 to 1, with such caches; 0 for share 0."""


def loop_seconds(policy: Allocated, steps: int, seconds: Seconds) -> float:
    """What all calls of a loop take."""
    return sum(seconds(policy.caches, share) for share in policy.allocation.shares_by_step(steps))


def space(steps: int, limit: float, seconds: Seconds, *, held: bool = False) -> list[Allocated]:
    """Policies that take at most ``limit`` seconds for a loop, each nearly all of it, whatever the data.

    Every other step, every third and so on, for all tokens, evenly or with whole steps at either end; and groups of
    tokens whose shares are as large as the time allows.

    Args:
        held: Whether to look at what the paper has, held velocities and caches, alone.
    """
    every = [*_evenly(steps), *_windows(steps, held=held), *_grouped(steps, limit, seconds, held=held)]
    alike = {_computed(policy, steps): policy for policy in reversed(every)}
    kept = {
        policy: taken for policy in reversed(alike.values()) if (taken := loop_seconds(policy, steps, seconds)) <= limit
    }
    most = {
        kind: max(taken for policy, taken in kept.items() if policy.kind == kind) for kind in {p.kind for p in kept}
    }
    return [policy for policy, taken in kept.items() if taken >= 0.9 * most[policy.kind]]


def quickest(steps: int, seconds: Seconds) -> float:
    """Seconds of the loop that computes least, which is one whole step."""
    return min(loop_seconds(policy, steps, seconds) for policy in _evenly(steps))


@dataclass(frozen=True)
class CachedSeconds:
    """What a step takes, in seconds, that runs all segments of a caching rule, and one that skips the blocks."""

    computed: float
    skipped: float

    def loop(self, steps: int, share: float) -> float:
        """Of a loop that computes this share of its steps."""
        return steps * (share * self.computed + (1 - share) * self.skipped)


def rules(steps: int, limit: float, seconds: CachedSeconds, kind: type[StepCaching]) -> Iterator[StepCaching]:
    """Rules of a kind whose first and last steps leave time, one for each number of both; thresholds are to be found.

    Args:
        limit: Seconds that a loop may take.
    """
    for warm_up, tail in ENDS:
        if warm_up + tail <= steps and seconds.loop(steps, (warm_up + tail) / steps) <= limit:
            yield kind(warm_up=warm_up, tail=tail)


def thresholds(taken: Callable[[float], float], limit: float, *, first: float, tries: int = TRIES) -> tuple[float, ...]:
    """Thresholds whose loops take at most ``limit`` seconds and most of it, in rising order; none if none was found.

    Found by bisection on a scale of factors: a loop is expected to take less time the higher its threshold is.

    Args:
        taken: Seconds of a loop by threshold, measured.
        first: Where to begin.
        tries: Thresholds that are measured at most.
    """
    low, high, value = 0.0, 0.0, first
    kept: dict[float, float] = {}
    for _ in range(tries):
        seconds = taken(value)
        if seconds <= limit:
            high, kept[value] = value, seconds
        else:
            low = value
        if 0.97 * limit <= seconds <= limit or 0 < high < 1.05 * low:
            break
        between = high / 4 if not low else low * 4 if not high else sqrt(low * high)
        value = float(f"{between:.3g}")
    return tuple(sorted(value for value in kept if kept[value] >= 0.8 * max(kept.values())))


KINDS: Sequence[type[StepCaching]] = (TeaCache, FirstBlockCache)
"""Caching rules that are in the space."""


def _computed(policy: Allocated, steps: int) -> tuple[object, ...]:
    """What tells policies apart that a loop of so many steps can tell apart."""
    allocation = policy.allocation
    return (
        allocation.shares_by_step(steps),
        allocation.shares,
        allocation.divisors,
        allocation.velocity,
        policy.caches,
    )


def _evenly(steps: int) -> Iterator[Allocated]:
    """Fewer steps: Euler's method on every d-th noise level, where that ends with the loop."""
    for divisor in range(1, steps + 1):
        if steps % divisor == 0:
            yield Allocated(Allocation(1, 0, (1.0,), (divisor,)), "none")


def _windows(steps: int, *, held: bool) -> Iterator[Allocated]:
    for warm_up, tail, divisor in product((1, *WARM_UPS), TAILS, range(2, steps // 2 + 1)):
        if warm_up + tail < steps:
            moved = "held" if held else "linear"
            yield Allocated(Allocation(warm_up, tail, (1.0,), (divisor,), velocity=moved), "none")


def _grouped(steps: int, limit: float, seconds: Seconds, *, held: bool) -> Iterator[Allocated]:
    for warm_up, tail, (divisors, rest) in product(WARM_UPS, TAILS, GROUPS):
        if warm_up + tail >= steps:
            continue

        policies = partial(_policy, warm_up, tail, divisors, rest, "held" if held else "linear")
        if found := _largest(policies, steps, limit, seconds):
            yield found


def _policy(  # noqa: PLR0917 - bound one after the other
    warm_up: int, tail: int, divisors: tuple[int, ...], rest: tuple[float, ...], moved: str, first: float
) -> Allocated:
    """The policy whose first group has the share ``first``, the others parts of what that leaves."""
    shares = [round(first, 3), *(round((1 - first) * part, 3) for part in rest[:-1])]
    shares.append(round(1 - sum(shares), 3))
    return Allocated(Allocation(warm_up, tail, tuple(shares), divisors, velocity=moved), moved)


def _largest(policy: Callable[[float], Allocated], steps: int, limit: float, seconds: Seconds) -> Allocated | None:
    """The policy of the largest first group that keeps the limit; None where none of 2 to 98 % just does."""
    low, high = 0.02, 0.98
    if loop_seconds(policy(low), steps, seconds) > limit or loop_seconds(policy(high), steps, seconds) < limit:
        return None
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if loop_seconds(policy(middle), steps, seconds) <= limit else (low, middle)
    return policy(low)
