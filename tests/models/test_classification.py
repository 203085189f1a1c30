from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.ir.errors import UsageError
from intarsia.models.classification import classify

PICTURES = torch.eye(7).view(7, 7, 1, 1)
"""Seven pictures of seven channels and one pixel: the n-th lights channel n."""


def lit(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)


def test_accuracy_is_the_share_of_pictures_whose_largest_logit_is_the_labels() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    found = classify(lit, PICTURES, labels, batch=7)
    assert found.accuracy == 5 / 7
    assert torch.equal(found.logits, torch.eye(7))


def test_every_batch_is_whole_so_that_an_engine_of_fixed_shape_runs() -> None:
    seen: list[tuple[int, ...]] = []

    def engine(pictures: Tensor) -> tuple[Tensor, ...]:
        seen.append(tuple(pictures.shape))
        return (pictures.flatten(1).double() + 1, pictures)

    found = classify(engine, PICTURES, torch.arange(7), batch=3)
    assert seen == [(3, 7, 1, 1)] * 3
    assert found.accuracy == 1
    assert found.logits.shape == (7, 7)
    assert found.logits.dtype == torch.float32


@pytest.mark.parametrize("labels", [torch.arange(6), torch.arange(0)])
def test_counts_that_differ_are_one_line(labels: Tensor) -> None:
    with pytest.raises(UsageError, match=rf"7 pictures and {len(labels)} labels"):
        classify(lit, PICTURES, labels)


def test_nothing_to_judge_is_one_line() -> None:
    with pytest.raises(UsageError, match="at least one"):
        classify(lit, PICTURES[:0], torch.arange(0))
