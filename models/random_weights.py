"""Random weights under which every part of a network shows in its output, so that a wrong engine is noticed."""

import math

import torch
from torch import nn

GAIN = 2.0
"""Standard deviation of what a layer gives for inputs of standard deviation 1; PyTorch's initial weights give 0.6.

With those, query, key and text of a small HunyuanVideo move its output by 1e-6 to 1e-4, no more than rounding does.
"""


def enliven(module: nn.Module) -> nn.Module:
    """The same module, its linear layers and convolutions drawn anew, in place; norms and tables stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            with torch.no_grad():
                layer.weight.normal_(0, GAIN / math.sqrt(layer.weight[0].numel()))
    return module


def draw_statistics(module: nn.Module) -> nn.Module:
    """The same module, statistics and scales of its batch norms drawn anew, in place.

    Those of a fresh norm are 0 and 1, with which it does nothing that could go wrong. The bias stays mostly above the
    mean, so that few channels are dead after the ReLU.
    """
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.2)
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 1)
                norm.bias.normal_(0.1, 0.2)
    return module
