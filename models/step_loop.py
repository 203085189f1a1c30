"""Which tokens each step of a denoising loop computes, and what is known of the velocity of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad

from intarsia.ir.allocation import Allocation
from intarsia.ir.errors import UsageError


@dataclass(frozen=True)
class Clock:
    """How far the noise level went since each token was computed.

    Attributes:
        elapsed: The noise level less that at which a token was last computed (N), f32; 0 where it never was.
        rate: One over that (N), f32; 0 where it never was.
    """

    elapsed: Tensor
    rate: Tensor


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens lie in a sample.

    Attributes:
        axes: Of a sample with its batch axis, those that frames, rows and columns of tokens are on; all the same where
            the sample is a sequence of tokens already.
        extents: Frames, rows and columns of tokens.
    """

    axes: tuple[int, int, int]
    extents: tuple[int, int, int]

    @property
    def count(self) -> int:
        """N, all tokens."""
        frames, height, width = self.extents
        return frames * height * width

    def means(self, sample: Tensor) -> Tensor:
        """The mean over each token of a sample (B, ...): (B, frames, height, width)."""
        batch = len(sample)
        if len(set(self.axes)) == 1:
            (axis,) = set(self.axes)
            return sample.movedim(axis, 1).reshape(batch, self.count, -1).mean(-1).reshape(batch, *self.extents)
        moved = sample.movedim(self.axes, (1, 2, 3))
        split = [
            part
            for extent, whole in zip(self.extents, moved.shape[1:4], strict=True)
            for part in (extent, whole // extent)
        ]
        return moved.reshape(batch, *split, -1).mean(dim=(2, 4, 6, 7))

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of tokens (N) at each place of a sample (1, ...), with an axis of 1 where there are no tokens."""
        shape = [1] * like.ndim
        if len(set(self.axes)) == 1:
            shape[self.axes[0]] = self.count
            return values.reshape(shape)
        grid = values.reshape(self.extents)
        for number, axis in enumerate(self.axes):
            grid = grid.repeat_interleave(like.shape[axis] // self.extents[number], number)
        order = sorted(range(3), key=lambda number: self.axes[number])
        for number, axis in enumerate(self.axes):
            shape[axis] = grid.shape[number]
        return grid.permute(order).reshape(shape)


def scores(now: Tensor, before: Tensor, grid: TokenGrid, *, smooth: bool) -> Tensor:
    """How much the velocity of each token changes, relative to what it was: (B, N).

    Source: Heterogeneous Step Allocation, the relative L1 change of the velocity; the smoothing is ours.
    """
    change = grid.means((now - before).abs()) / (grid.means(before.abs()) + 1e-6)
    if smooth:
        inside = pad(torch.ones_like(change[:1]), (1,) * 6)
        change = avg_pool3d(pad(change, (1,) * 6), 3, stride=1) / avg_pool3d(inside, 3, stride=1)
    return change.flatten(1)


class Loop:
    """Which tokens each step of a loop computes, and what is known of the velocity of every token.

    Args:
        allocation: The budget of each token.
        steps: Steps of the loop.
        grid: How the tokens lie in a sample.
        guide: The velocity that is followed, of a call's rows; tokens are chosen by it.

    Raises:
        UsageError: The steps leave no room for the window.

    Attributes:
        active: The tokens of each step so far.
        orders: Tokens by falling change, each time that groups were formed.
    """

    def __init__(self, allocation: Allocation, steps: int, grid: TokenGrid, guide: Callable[[Tensor], Tensor]) -> None:
        if allocation.warm_up + allocation.tail > steps:
            raise UsageError(
                f"step allocation: warm_up {allocation.warm_up} and tail {allocation.tail} exceed {steps} steps"
            )
        self.allocation, self.steps, self.grid, self.guide = allocation, steps, grid, guide
        self.active: list[tuple[int, ...]] = []
        self.orders: list[tuple[int, ...]] = []
        self._groups: tuple[tuple[tuple[int, ...], ...], ...] = ()
        self._called: float | None = None
        self._since = torch.full((grid.count,), torch.nan, dtype=torch.float64)
        self._before = self._since
        self._last = self._earlier = torch.empty(0)

    def begin(self, number: int) -> Tensor:
        """The tokens that step ``number`` computes."""
        dense = self.allocation.is_dense(number, self.steps)
        self.active.append(tuple(range(self.grid.count)) if dense else self.allocation.active(self._groups, number))
        return torch.tensor(self.active[-1], dtype=torch.int64)

    def clock(self, now: float) -> Clock:
        """How far the noise level ``now`` is from where caches were written."""
        elapsed = now - self._since
        return Clock(elapsed.nan_to_num(0.0).float(), (1 / elapsed).nan_to_num(0.0, 0.0, 0.0).float())

    def learn(self, number: int, active: Tensor, now: float, velocity: Tensor) -> None:
        """Take the velocity (R, ...) of the active tokens, and form groups where it is time to."""
        first = self._called is None
        computed = torch.zeros(self.grid.count, dtype=torch.bool).index_fill(0, active, True)
        self._before = torch.where(computed, self._since, self._before)
        self._since = torch.where(computed, now, self._since)
        where = self.grid.spread(computed, velocity)
        self._earlier = velocity if first else torch.where(where, self._last, self._earlier)
        self._last = velocity if first else torch.where(where, velocity, self._last)
        self._called = now
        if self.allocation.regroups(number, self.steps):
            now_and_before = self.guide(self._last), self.guide(self._earlier)
            change = scores(*now_and_before, self.grid, smooth=self.allocation.smooth)[0]
            self.orders.append(tuple(change.argsort(descending=True, stable=True).tolist()))
            self._groups = self.allocation.groups(self.orders[-1])

    def velocity(self, now: float) -> Tensor:
        """Of all tokens (R, ...) at noise level ``now``: what each had last, or where its last two lead."""
        if self.allocation.velocity == "held":
            return self._last
        ahead = ((now - self._since) / (self._since - self._before)).nan_to_num(0.0, 0.0, 0.0).float()
        if not ahead.any():
            return self._last
        return self._last + self.grid.spread(ahead, self._last) * (self._last - self._earlier)
