"""Integer convolutions and sums on a GPU give the integers of their definition."""

import pytest
import torch
from torch import Tensor

from intarsia import kernels
from intarsia.kernels.integers import golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(low, high, shape, device="cuda", generator=torch.Generator("cuda").manual_seed(7)).to(dtype)


def arrays(case: dict[str, object]) -> dict[str, object]:
    return {key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in case.items()}


@pytest.mark.parametrize("ends", [(-128, 127), (0, 15), (-32768, 32767)])
@pytest.mark.parametrize(
    ("depth", "rows", "window", "stride", "groups"),
    [(3, 64, 7, 2, 1), (64, 64, 3, 1, 1), (256, 96, 1, 1, 1), (1, 96, 3, 1, 96), (12, 40, 3, 2, 2)],
)
def test_convolutions_are_exact(  # noqa: PLR0917
    depth: int, rows: int, window: int, stride: int, groups: int, ends: tuple[int, int]
) -> None:
    kernels.register()
    case: dict[str, object] = {
        "input": whole(-128, 128, 2, depth * groups, 29, 27, dtype=torch.int8),
        "weight": whole(-128, 128, rows, depth, window, window, dtype=torch.int8),
        "bias": whole(-9000, 9000, rows),
        "multiplier": whole(1 << 30, (1 << 31) - 1, rows),
        "shift": whole(36, 44, rows),
        "stride": [stride, stride],
        "padding": [window // 2, window // 2],
        "dilation": [1, 1],
        "groups": groups,
        "low": ends[0],
        "high": ends[1],
    }
    found = torch.ops.intarsia.conv2d_i8i8(**case)
    assert torch.equal(found.cpu(), torch.from_numpy(golden.conv2d_i8i8(**arrays(case))))


@pytest.mark.parametrize("other", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(7,), (3, 48, 29, 27)])
def test_sums_are_exact(shape: tuple[int, ...], other: torch.dtype) -> None:
    kernels.register()
    info = torch.iinfo(other)
    numbers = {"multiplier": 3, "shift": 2, "other_multiplier": -(2**31), "other_shift": 33}
    case: dict[str, object] = {
        "input": whole(-32768, 32768, *shape, dtype=torch.int16),
        "other": whole(info.min, info.max + 1, *shape, dtype=other),
        **{key: torch.tensor([value], dtype=torch.int32, device="cuda") for key, value in numbers.items()},
        "low": -32768,
        "high": 32767,
    }
    found = torch.ops.intarsia.add_requantized(**case)
    assert torch.equal(found.cpu(), torch.from_numpy(golden.add_requantized(**arrays(case))))
