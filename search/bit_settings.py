"""How bits of layers are searched: what the user may say about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from intarsia.ir.spec import spec_of
from intarsia.passes.quantize_integer_layers import BITS, KEEP
from intarsia.search.bit_files import UNITS, limit_of, read_limit
from intarsia.search.bit_layers import MEASURES, Problem
from intarsia.search.bit_sensitivity import METHODS
from intarsia.search.calibration import find_method

GRIDS = "grids"
"""The sensitivity that measures the network with a layer's weights and input on grids."""

AUTO, NO = "auto", "no"

SENSITIVITIES = (GRIDS, *METHODS)
OUTPUTS = (AUTO, "classes", "numbers")
COSTS = ("predicted", "measured")


@dataclass(frozen=True)
class BitSearch:
    """How bits of layers are searched; ``bits(bops=0.5)``. Without a limit every layer has eight bits.

    UsageError for a limit that is no share and no value with a unit.

    Attributes:
        size: Limit on bytes of weights: a share of the way from the fewest bits of all layers to the most, or text with
            a unit such as '6.5MiB'. Over phases, each of which has weights of its own, their sum.
        bops: The same for operations on bits of one call, '70G'; over phases, in the mean over the steps of the loop.
        latency: The same for the seconds of the layers of one call, '4ms'.
        options: What convolutions and linear layers may have, as far as ``quantize-integer`` offers it to them;
            ``keep``, beside others, lets a layer stay in float, which counts as 32 by 32 bits.
        ranges: How ranges of activations are found, as ``intarsia calibrate --method`` takes it; ``auto`` is
            ``minmax(widest=True)`` for a loop, whose outliers matter, and ``percentile(keep=99.99)`` otherwise.
        narrow: The same for values that only layers with inputs of four bits read.
        sensitivity: What bits cost in accuracy: ``grids`` measures the network with a layer's weights and input
            rounded; ``hessian``, ``fisher`` and ``output`` look at weights alone.
        samples: Calibration samples that sensitivities are measured on, in calls evenly spread over those given; 0 for
            64, or by effort 4, 16 or 32 of each phase of a loop.
        smooth: Bits, such as 'w4a8', for which what linear layers read is smoothed before it is calibrated; ``no`` for
            none; ``auto`` smooths for a loop, for inputs of eight bits.
        outputs: Whether the network's first output are scores of ``classes`` or ``numbers``; ``auto`` takes an output
            (N, C) of a network without a loop for classes.
        phases: Into how many ranges the steps of a loop are cut, each with ranges and bits of its own.
        costs: Whether ``latency`` is ``predicted`` by the target's roofline or ``measured`` here.
    """

    size: float | str | None = None
    bops: float | str | None = None
    latency: float | str | None = None
    options: str = "w8a8,w4a8,w4a4"
    ranges: str = AUTO
    narrow: str = "mse(bits=4)"
    sensitivity: str = GRIDS
    samples: int = 0
    smooth: str = AUTO
    outputs: str = AUTO
    phases: int = 1
    costs: str = "predicted"

    def __post_init__(self) -> None:
        for measure in MEASURES:
            if not isinstance(getattr(self, measure), float | int | str | None):
                raise ValueError(f"{measure} is a share such as 0.5, or text such as '6{next(iter(UNITS[measure]))}'")
        for measure, value in self.asked.items():
            limit_of(str(value), measure, where=_where(measure, value))
        if not set(self.offered) & BITS.keys() or set(self.offered) - {KEEP, *BITS}:
            raise ValueError(f"options is {self.options!r}; it is some of {','.join(BITS)}, and keep beside them")
        for method in (self.narrow, *([] if self.ranges == AUTO else [self.ranges])):
            find_method(method)
        for name, known in (("sensitivity", SENSITIVITIES), ("outputs", OUTPUTS), ("costs", COSTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")
        if self.smooth not in (AUTO, NO, *BITS):
            raise ValueError(f"smooth is {self.smooth!r}; it is one of {', '.join((AUTO, NO, *BITS))}")
        if self.samples < 0 or self.phases < 1:
            raise ValueError("samples is at least 0, phases at least 1")

    @property
    def offered(self) -> tuple[str, ...]:
        """The options by name."""
        return tuple(part.strip() for part in self.options.split(",") if part.strip())

    def for_loop(self) -> BitSearch:
        """What ``auto`` stands for in a denoising loop."""
        eight = [option for option in self.offered if BITS.get(option, (0, 0))[1] == 8]
        found = min(eight, key=lambda option: BITS[option], default=NO)
        return self._settled("minmax(widest=True)", found, "numbers", 16)

    def for_call(self, *, classes: bool) -> BitSearch:
        """What ``auto`` stands for in a network that is called once."""
        return self._settled("percentile(keep=99.99)", NO, "classes" if classes else "numbers", 64)

    def _settled(self, ranges: str, smooth: str, outputs: str, samples: int) -> BitSearch:
        return replace(
            self,
            ranges=ranges if self.ranges == AUTO else self.ranges,
            smooth=smooth if self.smooth == AUTO else self.smooth,
            outputs=outputs if self.outputs == AUTO else self.outputs,
            samples=self.samples or samples,
        )

    @property
    def asked(self) -> dict[str, float | str]:
        """The limits as they were given, by measure."""
        found = {measure: cast("float | str | None", getattr(self, measure)) for measure in MEASURES}
        return {measure: value for measure, value in found.items() if value is not None}

    def limits(self, problem: Problem) -> dict[str, float]:
        """The limits in bytes, operations and seconds."""
        return {
            measure: read_limit(str(value), measure, problem, where=_where(measure, value))
            for measure, value in self.asked.items()
        }

    def __str__(self) -> str:
        return str(spec_of("bits", self))


def _where(measure: str, value: float | str) -> str:
    return f"strategy bits: {measure}={value}"
