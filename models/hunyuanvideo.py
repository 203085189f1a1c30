"""HunyuanVideo text-to-video transformers in diffusers' own class: two streams that meet in attention, then one."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from intarsia.models.base import Model, cast_parameters
from intarsia.models.libraries import tolerate_torchvision
from intarsia.models.random_weights import enliven
from intarsia.models.sampler import noise

SOURCE = "HunyuanVideo (arXiv 2412.03603), diffusers HunyuanVideoTransformer3DModel"
PATCH = 2  # pixels of the latent video, in height and in width, to a token


def hunyuanvideo_mini() -> Model:
    """hunyuanvideo-mini: 1 dual-stream, 2 single-stream and 1 refiner layer of 4 heads, random weights."""
    config = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=48,
        pooled_projection_dim=24,
        rope_axes_dim=(8, 12, 12),
    )
    # Half of the text of the second row is padding.
    return _model(
        "hunyuanvideo-mini", config, latent=(4, 3, 8, 12), text=(16, 48), lengths=(16, 8), dtype=torch.float32
    )


def hunyuanvideo() -> Model:
    """HunyuanVideo, 129 frames of 720x1280. Configuration: the defaults of diffusers' class, as published."""
    config = dict(
        num_attention_heads=24, num_layers=20, num_single_layers=40, text_embed_dim=4096, pooled_projection_dim=768
    )
    return _model(
        "hunyuanvideo", config, latent=(16, 33, 90, 160), text=(256, 4096), lengths=(256,), dtype=torch.bfloat16
    )


def _model(
    name: str,
    config: Mapping[str, object],
    *,
    latent: tuple[int, int, int, int],
    text: tuple[int, int],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> Model:
    """A model for ``latent`` (channels, frames, height, width) and ``text`` (tokens, width), ``lengths`` by row."""
    _, frames, height, width = latent
    tokens = frames * (height // PATCH) * (width // PATCH)
    pooled = cast(int, config["pooled_projection_dim"])

    def inputs() -> dict[str, Tensor]:
        device, batch = torch.get_default_device(), len(lengths)
        kept = torch.arange(text[0], device=device) < torch.tensor(lengths, device=device)[:, None]
        return {
            "hidden_states": noise(latent, seed=0, count=batch).to(device, dtype),
            "timestep": torch.full((batch,), 500, dtype=torch.int64, device=device),
            "encoder_hidden_states": noise(text, seed=1, count=batch).to(device, dtype),
            "encoder_attention_mask": kept.to(torch.int64),
            "pooled_projections": noise((pooled,), seed=2, count=batch).to(device, dtype),
            # The guidance scale 6, times 1000 as diffusers' pipeline gives it.
            "guidance": torch.full((batch,), 6000.0, dtype=dtype, device=device),
        }

    return Model(
        name=name,
        summary=f"{tokens:,} video and {text[0]} text tokens, {config['num_layers']} dual and "
        f"{config['num_single_layers']} single layers of {config['num_attention_heads']} heads; weights are the user's",
        source=SOURCE,
        dtype=dtype,
        build=lambda: _build(config, dtype),
        inputs=inputs,
        outputs=("velocity",),
        static={"return_dict": False},
    )


def _build(config: Mapping[str, object], dtype: torch.dtype) -> nn.Module:
    tolerate_torchvision()
    from diffusers import HunyuanVideoTransformer3DModel

    module = cast(nn.Module, HunyuanVideoTransformer3DModel(**config))
    return cast_parameters(enliven(module), dtype).eval()
