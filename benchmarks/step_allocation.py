"""Tokens that skip steps beside simpler and known ways to spend half or a quarter of the time, on held-out noise.

    python benchmarks/step_allocation.py [--quick] [--json FILE]

wan-mini's 40 steps are the reference, through ONNX Runtime like everything else. Policies are chosen on calibration and
validation noise; the figures are of videos and prompts that the choice never saw, all policies on the same. Seconds are
of whole loops, taken in turns with the dense loop, video by video. The search is that of ``--effort quick``: one video
for calibration, three for validation. ``--quick`` takes 4 held-out videos instead of 32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from harness import Figures, main

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from intarsia.backends.base import Engine

MODEL, TARGET = "wan-mini", "cpu-avx2"
BUDGETS = {"50": 0.5, "25": 0.25}
SAMPLES = 32

WAYS = {
    "hsa": "groups of tokens, velocities and caches moved on: the best that the search found",
    "hsa_held": "groups of tokens as the paper has them, velocities and caches held: the best that the search found",
    "whole": "whole steps left out, velocities moved on: the best that the search found",
    "uniform": "as many steps fewer, evenly, Euler's method",
    "teacache": "TeaCache's rule, with the network's own polynomial or without: the best that the search found",
    "first_block_cache": "the rule of the first block cache: the best that the search found, or where none keeps the "
    "time, the first and the last step alone",
}


def _meanings() -> dict[str, str]:
    found = {}
    for name, budget in BUDGETS.items():
        for way, meaning in WAYS.items():
            found[f"psnr_{way}_{name}"] = f"dB at {budget:.0%} of the time: {meaning}"
            found[f"psnr_{way}_low_{name}"] = "dB, lower end of the 95 % interval over videos"
            found[f"psnr_{way}_worst_{name}"] = "dB, the worst video"
            found[f"time_ratio_{way}_{name}"] = "seconds of a loop over those of the dense loop, median over videos"
        found[f"time_ratio_{name}"] = "that of the tokens' policy"
        found[f"hsa_over_uniform_{name}"] = "dB, tokens above uniform fewer steps, video by video"
        found[f"hsa_over_uniform_low_{name}"] = "dB, lower end of the 95 % interval of that difference"
        found[f"wins_over_uniform_{name}"] = "share of videos on which tokens are nearer to the reference"
    return {**found, "psnr_floor": "dB between unrelated dense videos", "samples": "held-out videos"}


MEANINGS = _meanings()


def measure(quick: bool) -> Figures:
    """Both budgets."""
    from intarsia.search.estimate import Estimate
    from intarsia.search.quality import measure as quality_of

    bench = _Bench(quick)
    found: dict[str, float] = {}
    references: Tensor | None = None
    for name, budget in BUDGETS.items():
        ways = bench.ways(budget)
        references, outputs, ratios = bench.run(ways)
        qualities = {way: quality_of(videos, references)["psnr"] for way, videos in outputs.items()}
        for way, quality in qualities.items():
            print(
                f"{budget:.0%} {way}: {quality.mean:.2f} dB, {ratios[way]:.3f} of the time", file=sys.stderr, flush=True
            )
            found |= {
                f"psnr_{way}_{name}": quality.mean,
                f"psnr_{way}_low_{name}": quality.low if quality.low is not None else quality.mean,
                f"psnr_{way}_worst_{name}": quality.worst,
                f"time_ratio_{way}_{name}": ratios[way],
            }
        pairs = zip(qualities["hsa"].samples, qualities["uniform"].samples, strict=True)
        gains = [ours - theirs for ours, theirs in pairs]
        found |= {
            f"time_ratio_{name}": ratios["hsa"],
            f"hsa_over_uniform_{name}": statistics.mean(gains),
            f"hsa_over_uniform_low_{name}": Estimate(tuple(gains)).interval[0],
            f"wins_over_uniform_{name}": sum(gain > 0 for gain in gains) / len(gains),
            "psnr_floor": qualities["hsa"].floor or float("nan"),
        }
    assert references is not None
    return found | {"samples": len(references)}


class _Bench:
    def __init__(self, quick: bool) -> None:
        from intarsia import subject as subjects
        from intarsia.ir.target import load_target
        from intarsia.search.journal import Journal
        from intarsia.search.progress import Silent
        from intarsia.step_bench import StepBench

        self.count = 4 if quick else SAMPLES
        self.target = load_target(TARGET)
        self.subject = subjects.resolve(MODEL)
        self.bench = StepBench(self.subject, self.target)
        self.work = subjects.workload(self.subject, seed=0, effort="quick", progress=Silent(), record=False)
        self.journal = Journal()

    def ways(self, budget: float) -> Mapping[str, str]:
        """The passes that the search finds, of each kind the best on validation noise, and the uniform policy."""
        from intarsia.ir.allocation import Allocation
        from intarsia.search.step_search import StepSearch, search_steps
        from intarsia.search.step_space import TOKENS, WHOLE, Allocated
        from intarsia.search.step_study import TOLERANCE

        @cache
        def finalists(*, held: bool) -> list[dict[str, Any]]:
            result = search_steps(
                self.subject.program,
                self.target,
                self.work,
                self.bench,
                None,
                how=StepSearch(budget, held=held),
                journal=self.journal,
            )
            steps = result.plan.notes["steps"]
            assert isinstance(steps, dict)
            return list(steps["finalists"])

        def best(kind: str, *, held: bool = False) -> str:
            found = [one for one in finalists(held=held) if one["kind"] == kind]
            if not found:  # no threshold keeps the time: the rule that computes the first and the last step alone
                return f"{kind}(threshold=1e6)"
            within = [one for one in found if one["share"] <= budget * TOLERANCE]
            nearest = max(within, key=lambda one: one["validation_psnr"], default=None)
            return str((nearest or min(found, key=lambda one: one["share"]))["policy"])

        return {
            "hsa": best(TOKENS),
            "hsa_held": best(TOKENS, held=True),
            "whole": best(WHOLE),
            "uniform": Allocated(Allocation(1, 0, (1.0,), (round(1 / budget),))).notation,
            "teacache": best("teacache"),
            "first_block_cache": best("first-block-cache"),
        }

    def engine(self, notation: str) -> Engine:
        """The network of a policy."""
        from intarsia.passes.active_tokens import ActiveTokens
        from intarsia.passes.base import find_pass
        from intarsia.passes.step_caching import StepCaching
        from intarsia.search.step_space import Allocated

        made = find_pass(notation)
        if isinstance(made, StepCaching):
            return self.bench.cached(made)
        assert isinstance(made, ActiveTokens)
        return self.bench.allocated(Allocated.of(made))

    def run(self, ways: Mapping[str, str]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Dense videos, those of each way, and the seconds of each way over the dense ones."""
        import torch

        runs: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {"dense": self.bench.dense()}
        runs |= {way: self.engine(notation) for way, notation in ways.items()}
        for way, notation in ways.items():
            print(f"{way}: {notation}", file=sys.stderr, flush=True)
        videos: dict[str, list[Tensor]] = {way: [] for way in runs}
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        for index in range(self.count):
            for way, run in runs.items():
                start = time.perf_counter()
                videos[way].append(self._video(run, index))
                seconds[way].append(time.perf_counter() - start)
        made = {way: torch.cat(each) for way, each in videos.items()}
        ratios = {
            way: statistics.median(ours / dense for ours, dense in zip(seconds[way], seconds["dense"], strict=True))
            for way in ways
        }
        return made.pop("dense"), made, ratios

    def _video(self, run: Callable[..., tuple[torch.Tensor, ...]], index: int) -> Tensor:
        """Held-out video ``index``: the prompts in another order than the search saw them, noise of another seed."""
        from intarsia.backends.runner import denoiser
        from intarsia.models.sampler import noise
        from intarsia.subject import video_shape

        model, graph = self.subject.model, self.subject.program.graph
        assert model is not None
        assert model.sampler is not None
        assert model.condition is not None
        start = noise(video_shape(graph), seed=HELD_OUT_SEED, count=1, first=index)
        conditioning = model.condition([model.prompts[(5 * index + 33) % len(model.prompts)]])
        return model.sampler.sample(denoiser(run, graph), start, conditioning).clamp(-1, 1)


HELD_OUT_SEED = 7_777
"""Of the noise; the search draws from seeds 0 to 2."""


if __name__ == "__main__":
    main("step_allocation", MEANINGS, measure)
