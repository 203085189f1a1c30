"""Mixes of bits for ResNet-20 on CIFAR-10: all within the same limit, and the figures that are kept."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from intarsia.models import cifar10
from intarsia.search import bit_sensitivity
from intarsia.search.bit_sensitivity import Perturbations
from intarsia.search.estimate import Estimate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark on noise: 80 pictures, and sensitivities that fall from layer to layer."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("INTARSIA_CACHE_DIR", str(tmp_path))
    pixels = torch.randint(0, 256, (80, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = cifar10.Pictures(pixels, torch.zeros(80, dtype=torch.int64))
    monkeypatch.setattr(cifar10, "training_pictures", lambda: noise)
    monkeypatch.setattr(cifar10, "held_out_pictures", lambda: noise)

    def falling(program: object, data: object, *, layers: object = None, **_: object) -> Perturbations:
        names = [node.name for node in program.graph.find("aten.conv2d")][1:]  # type: ignore[attr-defined]
        nothing = Estimate((0.0,))
        return {name: {"w8a8": nothing, "w4a4": Estimate((1 / (n + 1),))} for n, name in enumerate(names)}

    monkeypatch.setattr(bit_sensitivity, "perturbations", falling)
    return importlib.import_module("cifar10")


def test_all_mixes_keep_the_limit_and_use_it_up(bench: ModuleType) -> None:
    found = bench._Bench(True)
    assert found.share(found.uniform("w4a4")) == 0.0
    assert found.share(found.uniform("w8a8")) == 1.0
    mixes = {
        "chosen": found.mixed,
        "reversed": found.filled(found.ranking),
        **{f"random {n}": found.filled(order) for n, order in enumerate(found.random_orders())},
    }
    assert all(0.47 < found.share(mix) <= 0.5 for mix in mixes.values())
    options = {name: mix.phases[0].steps[2].chosen for name, mix in mixes.items()}
    assert len({json.dumps(chosen) for chosen in options.values()}) == len(mixes)
    assert _eights(options["chosen"], "blocks.0") == 2
    assert _eights(options["reversed"], "blocks.0") == 0
    assert all(_agree(chosen) for chosen in options.values())


def test_the_figures_that_are_kept_reach_the_goals(bench: ModuleType) -> None:
    kept = sorted((BENCHMARKS / "results").glob("*-cifar10-*.json"))
    figures = json.loads(kept[-1].read_text())["figures"] if kept else pytest.skip("not measured yet")
    assert figures.keys() == bench.MEANINGS.keys()
    assert figures["pictures"] == 10_000
    assert figures["integers_differing_ort_tvm"] == 0
    lost = {name: figures["accuracy_float"] - figures[f"accuracy_{name}"] for name in ("w8a8", "mixed", "w4a4")}
    assert lost["w8a8"] <= 0.003
    assert lost["mixed"] <= 0.01
    assert lost["w4a4"] <= 0.025
    assert figures["bops_share_mixed"] <= 0.5
    chosen = figures["accuracy_mixed_before_finetuning"]
    assert chosen > max(figures["accuracy_random_mix_best"], figures["accuracy_reversed_mix"])


def _eights(chosen: Mapping[str, str], block: str) -> int:
    return sum(option == "w8a8" for name, option in chosen.items() if name.startswith(f"{block}."))


def _agree(chosen: Mapping[str, str]) -> bool:
    """A shortcut has the bits of the convolution beside it, which reads the same value."""
    rest = "batch_norm"
    return all(chosen[f"blocks.{n}.norm1.{rest}"] == chosen[f"blocks.{n}.shortcut.1.{rest}"] for n in (3, 6))
