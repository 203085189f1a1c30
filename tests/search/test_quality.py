"""Metrics are compared with hand-computed values and with loops over windows."""

from __future__ import annotations

import math

import pytest
import torch

from intarsia.ir.errors import QualityError, UsageError
from intarsia.search.quality import CEILING, Goal, Quality, measure, motion_psnr, psnr, ssim


def videos(count: int = 3, *, seed: int = 0, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 4, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def test_psnr_of_a_constant_error_is_what_the_formula_gives():
    reference = torch.zeros(1, 1, 2, 4, 4)
    assert float(psnr(reference + 0.02, reference)) == pytest.approx(20 * math.log10(2 / 0.02))
    assert float(psnr(reference + 0.1, reference, peak=1.0)) == pytest.approx(20.0)


def test_identical_outputs_reach_the_ceiling_and_no_more():
    found = measure(videos(), videos())
    assert found["psnr"].mean == found["motion_psnr"].mean == CEILING
    assert found["ssim"].mean == pytest.approx(1.0)


def test_motion_psnr_sees_flicker_that_frames_hide_and_forgives_a_constant_shift_in_brightness():
    reference = torch.zeros(1, 1, 4, 4, 4)
    brighter = reference + 0.1
    flicker = reference + 0.1 * torch.tensor([1.0, -1, 1, -1])[None, None, :, None, None]
    assert float(psnr(brighter, reference)) == pytest.approx(float(psnr(flicker, reference)))
    assert float(motion_psnr(brighter, reference)) == CEILING
    assert float(motion_psnr(flicker, reference)) == pytest.approx(20 * math.log10(2 / 0.2))


def test_ssim_is_the_mean_over_all_gaussian_windows():
    ours, theirs = videos(1, seed=1, size=13), videos(1, seed=2, size=13)
    places = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-places.square() / 4.5)
    window = torch.outer(line, line) / line.sum() ** 2
    total = []
    for channel in range(2):
        for frame in range(4):
            for y in range(3):
                for x in range(3):
                    a, b = (v[0, channel, frame, y : y + 11, x : x + 11] for v in (ours, theirs))
                    ma, mb = (window * a).sum(), (window * b).sum()
                    va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                    cov = (window * (a - ma) * (b - mb)).sum()
                    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
                    total.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert float(ssim(ours, theirs)) == pytest.approx(float(torch.stack(total).mean()))


def test_the_interval_is_students_and_the_floor_compares_unrelated_samples():
    reference = videos(3)
    ours = reference + 0.1 * torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)[:, None, None, None, None]
    found = measure(ours.clamp(-1, 1), reference)["psnr"]
    mean = sum(found.samples) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in found.samples) / 2)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 4.302653 * spread / math.sqrt(3))  # t of 2 degrees of freedom at 97.5 %
    assert found.high == pytest.approx(mean + 4.302653 * spread / math.sqrt(3))
    assert found.worst == min(found.samples)
    assert found.floor == pytest.approx(float(psnr(reference.roll(1, 0), reference).mean()))


def test_a_single_sample_has_neither_interval_nor_floor():
    found = measure(videos(1), videos(1, seed=1))["psnr"]
    assert (found.low, found.high, found.floor) == (None, None, None)


def test_outputs_that_are_no_videos_have_psnr_alone_with_their_own_range_as_peak():
    reference = torch.tensor([[0.0, 10.0], [4.0, 8.0]])
    found = measure(reference + 1, reference)
    assert set(found.metrics) == {"psnr"}
    assert found["psnr"].mean == pytest.approx(20.0)


def test_videos_are_cut_to_their_range_before_they_are_compared():
    reference = torch.ones(2, 1, 2, 4, 4)
    assert measure(reference * 3, reference)["psnr"].mean == CEILING


def test_refuses_values_that_are_not_finite_and_other_shapes():
    with pytest.raises(QualityError, match="not finite"):
        measure(videos() * math.nan, videos())
    with pytest.raises(QualityError, match="outputs are"):
        measure(videos(2), videos(3))


def test_quality_survives_json():
    found = measure(videos(), videos(seed=1))
    assert Quality.from_json(found.to_json()) == found


def test_a_goal_reads_what_it_prints():
    goal = Goal.parse("psnr>=35, motion-psnr >= 30.5,ssim>=0.9")
    assert str(goal) == "psnr>=35,motion_psnr>=30.5,ssim>=0.9"
    assert Goal.parse(str(goal)) == goal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharpness>=3", "metric 'sharpness' is unknown. Known: psnr, ssim, motion_psnr"),
        ("psnr=35", "'psnr=35' is not of the form psnr>=35"),
        ("psnr>=nan", "'psnr>=nan' is not of the form"),
        ("psnr>=1e999", "is not of the form"),
        ("", "'' is not of the form"),
        ("psnr>=3,psnr>=4", "psnr is bounded twice"),
    ],
)
def test_a_goal_that_cannot_be_read_says_which_term_and_why(text: str, message: str):
    with pytest.raises(UsageError) as caught:
        Goal.parse(text)
    assert message in str(caught.value)


def test_a_goal_is_met_when_every_mean_reaches_its_bound():
    reference = videos()
    quality = measure((reference + 0.02).clamp(-1, 1), reference)
    level = quality["psnr"].mean
    assert Goal.parse(f"psnr>={level - 0.01},ssim>=0.5").met(quality)
    assert not Goal.parse(f"psnr>={level + 0.01}").met(quality)
    assert not Goal.parse(f"psnr>={level - 0.01},ssim>=0.99999").met(quality)
    assert Goal.parse(f"psnr>={level - 2}").margin(quality) == pytest.approx(2.0)
    assert "of 99" in Goal.parse("psnr>=99").reached(quality)


def test_confidence_takes_one_standard_error_off_the_mean():
    reference = torch.zeros(3, 1, 1, 4, 4)
    ours = torch.tensor([0.1, 0.2, 0.4])[:, None, None, None, None].expand_as(reference)
    quality = measure(ours, reference)
    values = quality["psnr"].samples
    mean = sum(values) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    expected = mean - spread / math.sqrt(3) - 10
    assert Goal.parse("psnr>=10").confidence_margin(quality) == pytest.approx(expected)


def test_a_goal_for_a_metric_that_does_not_apply_says_which_do():
    quality = measure(torch.ones(2, 3), torch.zeros(2, 3))
    with pytest.raises(UsageError, match="ssim does not apply to this model's outputs; it has psnr"):
        Goal.parse("ssim>=0.9").met(quality)
