"""Networks the tool knows by name: how to build them, feed them, load their weights and sample from them."""

from intarsia.models.base import (
    MODELS,
    Model,
    UnknownModel,
    WeightsMismatch,
    WeightsNotFound,
    WeightsUnreadable,
    find,
    load,
    meta,
    names,
)
from intarsia.models.sampler import Conditioning, Denoise, FlowMatchEuler, denoiser, noise

__all__ = [
    "MODELS",
    "Conditioning",
    "Denoise",
    "FlowMatchEuler",
    "Model",
    "UnknownModel",
    "WeightsMismatch",
    "WeightsNotFound",
    "WeightsUnreadable",
    "denoiser",
    "find",
    "load",
    "meta",
    "names",
    "noise",
]
