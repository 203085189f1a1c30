"""Wan 2.1 text-to-video transformers in diffusers' own class: those published, and a small one that is trained."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from intarsia.models import shapes
from intarsia.models.base import Model, cast_parameters
from intarsia.models.libraries import tolerate_torchvision
from intarsia.models.sampler import FlowMatchEuler, noise

# 81 frames, through a VAE that divides time by 4 and height and width by 8
LATENT = (16, 21, 60, 104)  # of 480x832
LATENT_720P = (16, 21, 90, 160)  # of 720x1280
TEXT = (512, 4096)  # tokens and width of the UMT5-XXL text encoder
MINI_VIDEO = (3, shapes.FRAMES, shapes.SIZE, shapes.SIZE)
SOURCE = "Wan 2.1 (arXiv 2503.20314), diffusers WanTransformer3DModel"


def wan_mini() -> Model:
    """wan-mini: 1.8 million parameters, in pixel space, trained on `intarsia.models.shapes`."""
    config = dict(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=shapes.TEXT_DIM,
        freq_dim=256,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=64,
    )
    return Model(
        name="wan-mini",
        summary="8 frames of 32x32 in pixel space, 512 tokens, 6 layers of 4 heads; ships trained on moving shapes",
        source=f"{SOURCE}; trained by intarsia.models.train_wan_mini",
        dtype=torch.float32,
        build=lambda: _build(config, torch.float32),
        inputs=_mini_inputs,
        outputs=("velocity",),
        static={"return_dict": False},
        dynamic={
            "hidden_states": {0: "batch", 2: "frames", 3: "4*height", 4: "4*width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "text"},
        },
        weights=_shipped("wan-mini.safetensors"),
        sampler=FlowMatchEuler(steps=40, shift=3.0, guidance=3.0),
        prompts=tuple(map(str, shapes.labels())),
        condition=shapes.condition,
    )


def wan21_t2v_1_3b() -> Model:
    """Wan2.1-T2V-1.3B. Configuration: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json."""
    # Shift and guidance: Wan 2.1 README, --sample_shift 8 --sample_guide_scale 6 for the 1.3B model.
    sampler = FlowMatchEuler(steps=50, shift=8.0, guidance=6.0)
    return _published("1.3b", sampler, num_attention_heads=12, ffn_dim=8960, num_layers=30)


def wan21_t2v_14b() -> Model:
    """Wan2.1-T2V-14B. Configuration: Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json."""
    # Steps, shift and guidance: Wan 2.1, generate.py, defaults of t2v-14B.
    sampler = FlowMatchEuler(steps=50, shift=5.0, guidance=5.0)
    return _published("14b", sampler, num_attention_heads=40, ffn_dim=13824, num_layers=40)


def wan21_t2v_14b_720p() -> Model:
    """Wan2.1-T2V-14B, the same network at the larger of the two sizes that it is published for."""
    small = wan21_t2v_14b()
    return replace(
        small,
        name="wan2.1-t2v-14b-720p",
        summary="81 frames of 720x1280 as 75,600 tokens, 40 layers of 40 heads; weights are the user's",
        inputs=partial(_published_inputs, LATENT_720P),
    )


def _published(size: str, sampler: FlowMatchEuler, **sizes: int) -> Model:
    config = dict(
        patch_size=(1, 2, 2),
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT[1],
        freq_dim=256,
        rope_max_seq_len=1024,
        **sizes,
    )
    layers, heads = sizes["num_layers"], sizes["num_attention_heads"]
    return Model(
        name=f"wan2.1-t2v-{size}",
        summary=f"81 frames of 480x832 as 32,760 tokens, {layers} layers of {heads} heads; weights are the user's",
        source=SOURCE,
        dtype=torch.bfloat16,
        build=lambda: _build(config, torch.bfloat16),
        inputs=partial(_published_inputs, LATENT),
        outputs=("velocity",),
        static={"return_dict": False},
        dynamic={"hidden_states": {2: "frames", 3: "2*height", 4: "2*width"}, "encoder_hidden_states": {1: "text"}},
        sampler=sampler,
    )


def _build(config: Mapping[str, object], dtype: torch.dtype) -> nn.Module:
    tolerate_torchvision()
    from diffusers import WanTransformer3DModel

    shared = dict(cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6)
    module = cast(nn.Module, WanTransformer3DModel(**config, **shared))
    return cast_parameters(module, dtype).eval()


def _mini_inputs() -> dict[str, Tensor]:
    """One label and no label as one batch of 2, halfway through the denoising."""
    with torch.device("cpu"):
        conditioning = shapes.condition([str(shapes.labels()[0])])
        text = torch.cat([conditioning.text, conditioning.null])
    return _on_default_device(noise(MINI_VIDEO, seed=0, count=2), text)


def _published_inputs(latent: tuple[int, ...]) -> dict[str, Tensor]:
    return _on_default_device(noise(latent, seed=0, count=1).bfloat16(), noise(TEXT, seed=1, count=1).bfloat16())


def _on_default_device(hidden_states: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Inputs of the forward by name. The timestep is f32 whatever the rest: bf16 cannot tell 999 from 1000."""
    device = torch.get_default_device()
    return {
        "hidden_states": hidden_states.to(device),
        "timestep": torch.full((len(hidden_states),), 500.0, dtype=torch.float32, device=device),
        "encoder_hidden_states": text.to(device),
    }


def _shipped(file: str) -> Path:
    return Path(__file__).parent / "weights" / file
