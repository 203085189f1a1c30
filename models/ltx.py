"""LTX-Video text-to-video transformers in diffusers' own class: coarse tokens, tables that run across all heads."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from intarsia.models.base import Model, cast_parameters
from intarsia.models.libraries import tolerate_torchvision
from intarsia.models.random_weights import enliven
from intarsia.models.sampler import noise

SOURCE = "LTX-Video (arXiv 2501.00103), diffusers LTXVideoTransformer3DModel"
COMPRESSION = (8, 32, 32)  # of the VAE, in time, height and width
FRAMES_PER_SECOND = 25


def ltx_mini() -> Model:
    """ltx-mini: 2 layers of 4 heads, random weights; structure and operators of LTX-Video 2B."""
    config = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=48,
    )
    # A quarter of the text of the second row is padding.
    return _model("ltx-mini", config, grid=(3, 4, 6), text=(16, 48), lengths=(16, 12), dtype=torch.float32)


def ltx_2b() -> Model:
    """LTX-Video 2B, 121 frames of 480x704. Configuration: the defaults of diffusers' class, as published."""
    config = dict(in_channels=128, num_attention_heads=32, num_layers=28)
    return _model("ltx-2b", config, grid=(16, 15, 22), text=(128, 4096), lengths=(128,), dtype=torch.bfloat16)


def _model(
    name: str,
    config: Mapping[str, int],
    *,
    grid: tuple[int, int, int],
    text: tuple[int, int],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> Model:
    """A model for tokens on ``grid`` (frames, height, width) and ``text`` (tokens, width), ``lengths`` by row."""
    frames, height, width = grid
    tokens = frames * height * width

    def inputs() -> dict[str, Tensor]:
        device, batch = torch.get_default_device(), len(lengths)
        kept = torch.arange(text[0], device=device) < torch.tensor(lengths, device=device)[:, None]
        return {
            "hidden_states": noise((tokens, config["in_channels"]), seed=0, count=batch).to(device, dtype),
            "encoder_hidden_states": noise(text, seed=1, count=batch).to(device, dtype),
            "timestep": torch.full((batch,), 500, dtype=torch.int64, device=device),
            "encoder_attention_mask": kept.to(torch.int64),
        }

    return Model(
        name=name,
        summary=f"{tokens:,} video and {text[0]} text tokens, {config['num_layers']} layers of "
        f"{config['num_attention_heads']} heads; weights are the user's",
        source=SOURCE,
        dtype=dtype,
        build=lambda: _build(config, dtype),
        inputs=inputs,
        outputs=("velocity",),
        static={
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (COMPRESSION[0] / FRAMES_PER_SECOND, *COMPRESSION[1:]),
            "return_dict": False,
        },
    )


def _build(config: Mapping[str, int], dtype: torch.dtype) -> nn.Module:
    tolerate_torchvision()
    from diffusers import LTXVideoTransformer3DModel

    module = cast(nn.Module, LTXVideoTransformer3DModel(**config))
    return cast_parameters(enliven(module), dtype).eval()
