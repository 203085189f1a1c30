"""InceptionV3 as torchvision builds it, names included, so that torchvision's and timm's weights load by name."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from intarsia.models import imagenet
from intarsia.models.base import Model
from intarsia.models.random_weights import draw_statistics, enliven
from intarsia.models.sampler import noise

SIDE = 299  # pixels
SOURCE = "Rethinking the Inception architecture (arXiv 1512.00567), torchvision Inception3"


def inceptionv3() -> Model:
    """InceptionV3 without its auxiliary classifier, which only training uses: 23.8 million parameters."""
    return Model(
        name="inceptionv3",
        summary="one picture of 299x299 to 1,000 classes, 11 inception blocks; weights are the user's",
        source=SOURCE,
        dtype=torch.float32,
        build=lambda: draw_statistics(enliven(InceptionV3())).eval(),
        inputs=lambda: {"pictures": noise((3, SIDE, SIDE), seed=0, count=1).to(torch.get_default_device())},
        outputs=("logits",),
        dynamic={"pictures": {0: "batch"}},
        training_only=("AuxLogits.",),
    )


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, 299, 299), uint8, as the network reads them: f32 in [-1, 1].

    This is what torchvision's own weights come to after ImageNet's mean and deviation and `transform_input`.
    """
    return imagenet.normalised(pixels, mean=127.5, deviation=127.5)


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        return functional.relu(self.bn(self.conv(hidden)))


class InceptionV3(nn.Module):
    """A stem to 35x35, three blocks there, five at 17x17, three at 8x8; comments give shapes for 299x299."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, narrow=128)
        self.Mixed_6c = InceptionC(768, narrow=160)
        self.Mixed_6d = InceptionC(768, narrow=160)
        self.Mixed_6e = InceptionC(768, narrow=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 1000) of pictures (B, 3, H, W), of 75x75 at least."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pictures)))  # (B, 64, 147, 147)
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))  # (B, 192, 71, 71)
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # (B, 288, 35, 35)
        hidden = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))
        hidden = self.Mixed_6e(self.Mixed_6d(hidden))  # (B, 768, 17, 17)
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))  # (B, 2048, 8, 8)
        return cast(Tensor, self.fc(functional.adaptive_avg_pool2d(hidden, 1).flatten(1)))


class InceptionA(nn.Module):
    """1x1, 5x5, two 3x3 and a pool beside each other (figure 5 of the paper): 224 + `pooled` channels."""

    def __init__(self, inputs: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64)
        self.branch5x5_1 = Convolution(inputs, 48)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 224 + pooled, H, W)."""
        five = self.branch5x5_2(self.branch5x5_1(hidden))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden)))
        return torch.cat([self.branch1x1(hidden), five, three, self.branch_pool(_pooled(hidden))], 1)


class InceptionB(nn.Module):
    """Halves height and width: 3x3, two 3x3 and a maximum, all of stride 2 (figure 10)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 480 + inputs, (H - 1) / 2, (W - 1) / 2)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden)))
        return torch.cat([self.branch3x3(hidden), double, functional.max_pool2d(hidden, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """7x7 convolutions as rows and columns, `narrow` channels wide inside (figure 6)."""

    def __init__(self, inputs: int, *, narrow: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 192)
        self.branch7x7_1 = Convolution(inputs, narrow)
        self.branch7x7_2 = _row(narrow, narrow, 7)
        self.branch7x7_3 = _column(narrow, 192, 7)
        self.branch7x7dbl_1 = Convolution(inputs, narrow)
        self.branch7x7dbl_2 = _column(narrow, narrow, 7)
        self.branch7x7dbl_3 = _row(narrow, narrow, 7)
        self.branch7x7dbl_4 = _column(narrow, narrow, 7)
        self.branch7x7dbl_5 = _row(narrow, 192, 7)
        self.branch_pool = Convolution(inputs, 192)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 768, H, W)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(hidden), seven, double, self.branch_pool(_pooled(hidden))], 1)


class InceptionD(nn.Module):
    """Halves height and width: 3x3, 7x7 then 3x3, and a maximum, all of stride 2."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inputs, 192)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 512 + inputs, (H - 1) / 2, (W - 1) / 2)."""
        three = self.branch3x3_2(self.branch3x3_1(hidden))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(hidden)))
        return torch.cat([three, self.branch7x7x3_4(seven), functional.max_pool2d(hidden, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """Rows and columns of 3x3 convolutions side by side rather than in a chain (figure 7)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 320)
        self.branch3x3_1 = Convolution(inputs, 384)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(inputs, 448)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = Convolution(inputs, 192)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 2048, H, W)."""
        single = self.branch3x3_1(hidden)
        single = torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return torch.cat([self.branch1x1(hidden), single, double, self.branch_pool(_pooled(hidden))], 1)


def _row(inputs: int, outputs: int, width: int) -> Convolution:
    return Convolution(inputs, outputs, (1, width), padding=(0, width // 2))


def _column(inputs: int, outputs: int, height: int) -> Convolution:
    return Convolution(inputs, outputs, (height, 1), padding=(height // 2, 0))


def _pooled(hidden: Tensor) -> Tensor:
    """Means of 3x3; the border's zeros count."""
    return functional.avg_pool2d(hidden, 3, stride=1, padding=1)
