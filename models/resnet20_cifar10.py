"""ResNet-20 for CIFAR-10: the network of He et al. section 4.2, with trained weights that ship."""

from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from intarsia.models.base import Model
from intarsia.models.sampler import noise

SOURCE = "Deep residual learning (arXiv 1512.03385), section 4.2, n = 3; shortcuts of option B"
WEIGHTS = Path(__file__).parent / "weights" / "resnet20-cifar10.safetensors"


def resnet20_cifar10() -> Model:
    """ResNet-20, 0.27 million parameters; pictures are fed as `models.cifar10.normalised` gives them."""
    return Model(
        name="resnet20-cifar10",
        summary="one picture of 32x32 to CIFAR-10's 10 classes, 9 residual blocks; weights ship",
        source=SOURCE,
        dtype=torch.float32,
        build=lambda: ResNet20().eval(),
        inputs=lambda: {"pictures": noise((3, 32, 32), seed=0, count=1).to(torch.get_default_device())},
        outputs=("logits",),
        dynamic={"pictures": {0: "batch"}},
        weights=WEIGHTS,
    )


class ResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels wide, on 32x32, 16x16 and 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _convolution(3, 16)
        self.norm = nn.BatchNorm2d(16)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in pairwise(widths)))
        self.classifier = nn.Linear(64, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 10) of pictures (B, 3, 32, 32)."""
        hidden = functional.relu(self.norm(self.conv(pictures)))
        hidden = functional.adaptive_avg_pool2d(self.blocks(hidden), 1)
        return cast(Tensor, self.classifier(hidden.flatten(1)))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution of stride 2 where the width doubles."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = _convolution(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _convolution(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        inner = functional.relu(self.norm1(self.conv1(hidden)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(hidden))


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
