"""CogVideoX text-to-video transformers in diffusers' own class: text and video tokens in one stream."""

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from intarsia.models.base import Model, cast_parameters
from intarsia.models.libraries import tolerate_torchvision
from intarsia.models.random_weights import enliven
from intarsia.models.sampler import noise

SOURCE = "CogVideoX (arXiv 2408.06072), diffusers CogVideoXTransformer3DModel"
PATCH = 2  # pixels of the latent video, in height and in width, to a token

PATCHES_1_5 = {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
"""What sets CogVideoX1.5 apart: patches of two frames through a linear layer, positions cut from a larger grid."""


def cogvideox_mini() -> Model:
    """cogvideox-mini: 2 layers of 4 heads, random weights; structure and operators of CogVideoX-5B."""
    config = dict(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=64,
        text_embed_dim=48,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
    )
    return _model("cogvideox-mini", config, latent=(3, 4, 8, 12), text=(16, 48), dtype=torch.float32, batch=2)


def cogvideox_5b() -> Model:
    """CogVideoX-5B, 49 frames of 480x720. Configuration: THUDM/CogVideoX-5b, transformer/config.json."""
    config = dict(num_attention_heads=48, attention_head_dim=64, num_layers=42, sample_frames=49)
    return _model("cogvideox-5b", config, latent=(13, 16, 60, 90), text=(226, 4096), dtype=torch.bfloat16, batch=1)


def cogvideox15_mini() -> Model:
    """cogvideox1.5-mini: cogvideox-mini with the patches of CogVideoX1.5, two frames to a token."""
    config = dict(
        PATCHES_1_5,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=64,
        text_embed_dim=48,
        num_layers=2,
        max_text_seq_length=16,
    )
    return _model("cogvideox1.5-mini", config, latent=(6, 4, 8, 12), text=(16, 48), dtype=torch.float32, batch=2)


def cogvideox15_5b() -> Model:
    """CogVideoX1.5-5B, 81 frames of 768x1360, which its pipeline pads to 22 frames of the latent video.

    Configuration: diffusers, scripts/convert_cogvideox_to_diffusers.py, version 1.5 (pull request 9877); 300 x 300
    as in THUDM/CogVideoX1.5-5B, transformer/config.json.
    """
    config = dict(PATCHES_1_5, num_attention_heads=48, attention_head_dim=64, num_layers=42, sample_frames=81)
    latent = (22, 16, 96, 170)
    return _model("cogvideox1.5-5b", config, latent=latent, text=(226, 4096), dtype=torch.bfloat16, batch=1)


def _model(
    name: str,
    config: Mapping[str, int],
    *,
    latent: tuple[int, int, int, int],
    text: tuple[int, int],
    dtype: torch.dtype,
    batch: int,
) -> Model:
    """A model for videos of ``latent`` (frames, channels, height, width) and ``text`` (tokens, width)."""
    frames, _, height, width = latent
    grid = (frames // config.get("patch_size_t", 1), height // PATCH, width // PATCH)

    def inputs() -> dict[str, Tensor]:
        device = torch.get_default_device()
        return {
            "hidden_states": noise(latent, seed=0, count=batch).to(device, dtype),
            "encoder_hidden_states": noise(text, seed=1, count=batch).to(device, dtype),
            "timestep": torch.full((batch,), 500, dtype=torch.int64, device=device),
        }

    return Model(
        name=name,
        summary=f"{prod(grid):,} video and {text[0]} text tokens in one attention, {config['num_layers']} layers of "
        f"{config['num_attention_heads']} heads; weights are the user's",
        source=SOURCE,
        dtype=dtype,
        build=lambda: _build(config, grid, dtype),
        inputs=inputs,
        outputs=("prediction",),
        static={"return_dict": False},
        dynamic={key: {0: "batch"} for key in ("hidden_states", "encoder_hidden_states", "timestep")},
    )


def _build(config: Mapping[str, int], grid: tuple[int, int, int], dtype: torch.dtype) -> nn.Module:
    tolerate_torchvision()
    from diffusers import CogVideoXTransformer3DModel

    module = cast(nn.Module, CogVideoXTransformer3DModel(**config, use_rotary_positional_embeddings=True))
    _hold_tables(module, config, grid)
    return cast_parameters(enliven(module), dtype).eval()


def _hold_tables(module: nn.Module, config: Mapping[str, int], grid: tuple[int, int, int]) -> None:
    """Let the module hold what its pipeline would give it: rotary tables f32 (tokens, channels) for this grid."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    channels, size = config["attention_head_dim"], (height, width)
    if "patch_size_t" in config:
        largest = (config["sample_height"] // PATCH, config["sample_width"] // PATCH)
        cos, sin = get_3d_rotary_pos_embed(channels, None, size, frames, grid_type="slice", max_size=largest)
    else:
        cos, sin = get_3d_rotary_pos_embed(channels, ((0, 0), size), size, frames)
    module.register_buffer("rotary_cos", cos, persistent=False)
    module.register_buffer("rotary_sin", sin, persistent=False)

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tables = (module.get_buffer("rotary_cos"), module.get_buffer("rotary_sin"))
        return args, {**kwargs, "image_rotary_emb": tables}

    module.register_forward_pre_hook(give, with_kwargs=True)
