"""A model resolved by its name: with weights and without it is the same graph."""

from __future__ import annotations

import pytest

from intarsia import subject as subjects


@pytest.mark.parametrize("name", ["wan-mini", "cogvideox-mini", "ltx-mini", "resnet20-cifar10"])
def test_a_plan_made_without_weights_fits_the_model_with_them(name: str) -> None:
    without, with_weights = (subjects.resolve(name, meta=meta).program.graph for meta in (True, False))
    assert without.fingerprint == with_weights.fingerprint
