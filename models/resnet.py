"""ResNet-18 and ResNet-50 in transformers' own class, with the published configurations and random weights."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from intarsia.models.base import Model
from intarsia.models.libraries import tolerate_torchvision
from intarsia.models.random_weights import draw_statistics
from intarsia.models.sampler import noise

PICTURE = (3, 224, 224)
SOURCE = "Deep residual learning (arXiv 1512.03385), transformers ResNetForImageClassification"


def resnet18() -> Model:
    """ResNet-18. Configuration: microsoft/resnet-18, config.json."""
    return _resnet("resnet18", "basic", (64, 128, 256, 512), (2, 2, 2, 2))


def resnet50() -> Model:
    """ResNet-50, strides in the 3x3 convolutions. Configuration: microsoft/resnet-50, config.json."""
    return _resnet("resnet50", "bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3))


def _resnet(name: str, layer: str, widths: tuple[int, ...], depths: tuple[int, ...]) -> Model:
    return Model(
        name=name,
        summary=f"one picture of 224x224 to 1,000 classes, {sum(depths)} residual blocks; weights are the user's",
        source=SOURCE,
        dtype=torch.float32,
        build=lambda: _build(layer, widths, depths),
        inputs=_inputs,
        outputs=("logits",),
        static={"return_dict": False},
        dynamic={"pixel_values": {0: "batch"}},
    )


def _build(layer: str, widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Module:
    tolerate_torchvision()
    from transformers import ResNetConfig, ResNetForImageClassification

    config: dict[str, Any] = {"embedding_size": 64, "hidden_sizes": list(widths), "depths": list(depths)}
    config |= {"layer_type": layer, "num_labels": 1000}
    module = cast(nn.Module, ResNetForImageClassification(ResNetConfig(**config)))
    return draw_statistics(module).eval()


def _inputs() -> dict[str, Tensor]:
    return {"pixel_values": noise(PICTURE, seed=0, count=1).to(torch.get_default_device())}
