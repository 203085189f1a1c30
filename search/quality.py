"""Quality: how near videos are to the reference's, frame by frame and in their motion, and what was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from torch import Tensor

from intarsia.ir.errors import QualityError, UsageError

CEILING = 150.0
"""dB that count as identical: an f32 number in [-1, 1] is rounded at about -150 dB of the peak of 2."""

PEAK = 2.0
"""Range of a video in [-1, 1]."""


@dataclass(frozen=True)
class Metric:
    """One measure over samples, larger is better.

    Attributes:
        mean: Mean over the samples.
        low: Lower end of the 95 % t-interval of the mean; None for a single sample.
        high: Upper end.
        worst: The worst sample.
        floor: The same measure between the references of unrelated samples; None for a single sample.
        samples: Every sample's value, in order.
    """

    mean: float
    low: float | None
    high: float | None
    worst: float
    floor: float | None
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """How near outputs are to the reference's, by metric: ``psnr``, and for videos ``ssim`` and ``motion_psnr``."""

    metrics: Mapping[str, Metric]

    def __getitem__(self, metric: str) -> Metric:
        """The metric of that name; KeyError if it does not apply to these outputs."""
        return self.metrics[metric]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, metric by metric."""
        return {name: asdict(metric) for name, metric in self.metrics.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, object]]) -> Quality:
        """What ``to_json`` gave; TypeError for anything else."""
        found: dict[str, Metric] = {}
        for name, fields in data.items():
            samples = fields["samples"]
            if not isinstance(samples, list | tuple):
                raise TypeError(f"quality: samples of {name} are {samples!r}, not a list of numbers")
            found[name] = Metric(**{**fields, "samples": tuple(samples)})  # type: ignore[arg-type]
        return cls(MappingProxyType(found))

    def __str__(self) -> str:
        return ", ".join(f"{name} {_show(name, metric.mean)}" for name, metric in self.metrics.items())


def measure(outputs: Tensor, references: Tensor) -> Quality:
    """How near ``outputs`` are to ``references``, both (N, ...); five axes are videos (N, C, F, H, W) in [-1, 1].

    Videos are cut to [-1, 1] first, as a viewer would. The peak of anything else is the range of its references.

    Raises:
        QualityError: The shapes differ, or a value is not finite.
    """
    if outputs.shape != references.shape:
        raise QualityError(f"outputs are {tuple(outputs.shape)}, their references {tuple(references.shape)}")
    ours, theirs = outputs.double(), references.double()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise QualityError("outputs hold values that are not finite; no quality can be stated")
    if ours.ndim == 5:
        ours, theirs = ours.clamp(-1, 1), theirs.clamp(-1, 1)
        found = {"psnr": _metric(psnr, ours, theirs), "ssim": _metric(ssim, ours, theirs)}
        if ours.shape[2] > 1:
            found["motion_psnr"] = _metric(motion_psnr, ours, theirs)
        return Quality(MappingProxyType(found))
    peak = float(theirs.max() - theirs.min()) or 1.0
    return Quality(MappingProxyType({"psnr": _metric(lambda a, b: psnr(a, b, peak=peak), ours, theirs)}))


def psnr(ours: Tensor, theirs: Tensor, *, peak: float = PEAK) -> Tensor:
    """Peak signal-to-noise ratio (N) in dB, at most 150, of samples (N, ...)."""
    error = (ours - theirs).square().flatten(1).mean(1)
    return (10 * torch.log10(peak**2 / error.clamp_min(1e-300))).clamp_max(CEILING)


def motion_psnr(ours: Tensor, theirs: Tensor) -> Tensor:
    """PSNR (N) in dB of the differences of neighbouring frames of videos (N, C, F, H, W); peak 2, as of the frames."""
    return psnr(ours.diff(dim=2), theirs.diff(dim=2))


def ssim(ours: Tensor, theirs: Tensor) -> Tensor:
    """Structural similarity (N) of videos (N, C, F, H, W), the mean over channels, frames and places.

    Gaussian window of 11 x 11, sigma 1.5 (smaller for smaller frames), K1 0.01, K2 0.03, no padding.
    Source: Wang et al., Image quality assessment, IEEE TIP 13(4), 2004.
    """
    count = len(ours)
    height, width = ours.shape[-2:]
    window = _gaussian(min(11, height - 1 + height % 2, width - 1 + width % 2)).to(ours)

    def blur(images: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(images, window[None, None, :, None]), window[None, None, None, :])

    a, b = (video.transpose(1, 2).reshape(-1, 1, height, width) for video in (ours, theirs))
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    first, second = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + first) / (mean_a**2 + mean_b**2 + first)
    structure = (2 * covariance + second) / (variance_a + variance_b + second)
    return (luminance * structure).reshape(count, -1).mean(1)


def _gaussian(width: int) -> Tensor:
    places = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    weights = torch.exp(-places.square() / (2 * 1.5**2))
    return weights / weights.sum()


def _metric(compare: Callable[[Tensor, Tensor], Tensor], ours: Tensor, theirs: Tensor) -> Metric:
    values = [float(value) for value in compare(ours, theirs)]
    floor = float(compare(theirs.roll(1, 0), theirs).mean()) if len(values) > 1 else None
    mean = sum(values) / len(values)
    half = _half_width(values)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Metric(mean, low, high, min(values), floor, tuple(values))


def _half_width(values: list[float]) -> float | None:
    """Half of the 95 % interval of the mean of normally distributed samples; None for a single one."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * _spread(values) / math.sqrt(len(values))


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


METRICS = ("psnr", "ssim", "motion_psnr")
"""What a goal may bound from below: dB, a share, dB."""

_TERM = re.compile(r"\s*([A-Za-z_-]+)\s*>=\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Goal:
    """Lower bounds on the means of metrics, all of which must hold; ``psnr>=35,motion_psnr>=30``."""

    bounds: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read the notation; UsageError says which term is wrong and what would be right."""
        bounds: dict[str, float] = {}
        for term in text.split(","):
            match = _TERM.fullmatch(term)
            value = _number(match[2]) if match else None
            if match is None or value is None:
                raise UsageError(f"quality {text!r}: {term.strip()!r} is not of the form psnr>=35")
            name = match[1].replace("-", "_")
            if name not in METRICS:
                raise UsageError(f"quality {text!r}: metric {match[1]!r} is unknown. Known: {', '.join(METRICS)}")
            if name in bounds:
                raise UsageError(f"quality {text!r}: {name} is bounded twice")
            bounds[name] = value
        return cls(MappingProxyType(bounds))

    def met(self, quality: Quality) -> bool:
        """Whether every mean reaches its bound; UsageError if a metric does not apply to these outputs."""
        return self.margin(quality) >= 0

    def margin(self, quality: Quality) -> float:
        """By how much the tightest bound is met, in dB, negative where it is missed.

        A structural similarity s counts as -10 log10(1 - s) dB. UsageError if a metric does not apply.
        """
        return min(_decibels(n, quality[n].mean) - _decibels(n, bound) for n, bound in self._terms(quality))

    def confidence_margin(self, quality: Quality) -> float:
        """The margin less one standard error of the mean; of a single sample its own.

        Five of six repetitions with other samples reach it. Student's 95 % bound would be safer, but from the two to
        eight samples that a search can afford it takes 5 to 30 dB off, and the engine is held to account on held-out
        noise anyway.
        """
        margins: list[float] = []
        for name, bound in self._terms(quality):
            values = [_decibels(name, value) for value in quality[name].samples]
            margins.append(sum(values) / len(values) - _standard_error(values) - _decibels(name, bound))
        return min(margins)

    def reached(self, quality: Quality) -> str:
        """What was measured beside what was asked, for a message: ``psnr 31.20 of 35``."""
        return ", ".join(f"{n} {_show(n, quality[n].mean)} of {bound:g}" for n, bound in self._terms(quality))

    def _terms(self, quality: Quality) -> Iterator[tuple[str, float]]:
        for name, bound in self.bounds.items():
            if name not in quality.metrics:
                known = ", ".join(quality.metrics)
                raise UsageError(f"quality: {name} does not apply to this model's outputs; it has {known}")
            yield name, bound

    def __str__(self) -> str:
        return ",".join(f"{name}>={bound:g}" for name, bound in self.bounds.items())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _standard_error(values: list[float]) -> float:
    return _spread(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _decibels(metric: str, value: float) -> float:
    return -10 * math.log10(max(1 - value, 10 ** (-CEILING / 10))) if metric == "ssim" else value


def _show(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "ssim" else f"{value:.2f}"
