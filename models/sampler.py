"""The denoising loop: flow matching integrated by Euler's method, with classifier-free guidance."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from intarsia.ir.errors import UsageError

TIMESTEPS = 1000  # timestep = sigma * 1000, as in Wan and diffusers' flow matching schedulers


class Denoise(Protocol):
    """A module, an engine, anything that gives the velocity (N, ...) of hidden_states (N, ...) at timestep (N)."""

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The velocity, of the shape of hidden_states."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What is asked for: text (B, L, D), and null (B, L, D), what the network was given when nothing was asked."""

    text: Tensor
    null: Tensor

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same on another device."""
        return Conditioning(self.text.to(device), self.null.to(device))


@dataclass(frozen=True)
class FlowMatchEuler:
    """Euler's method from noise (sigma 1) to data (sigma 0) along the learnt velocity (noise - data).

    `shift` above 1 spends more steps near noise: sigma <- shift * sigma / (1 + (shift - 1) * sigma). `guidance` is the
    factor w in v_null + w * (v_text - v_null); at 1 the null branch is not computed.
    Source: Wan 2.1, wan/utils/fm_solvers.py, get_sampling_sigmas.
    """

    steps: int = 40
    shift: float = 3.0
    guidance: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"sampler: steps is {self.steps}; it must be 1 or more")
        if self.shift <= 0:
            raise UsageError(f"sampler: shift is {self.shift}; it must be above 0")

    def sigmas(self) -> Tensor:
        """Noise levels (steps + 1), f64 on the CPU, from 1 down to exactly 0."""
        linear = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64, device="cpu")
        return self.shift * linear / (1 + (self.shift - 1) * linear)

    def timesteps(self) -> list[float]:
        """What the network is told at each step, from 1000 down."""
        return [sigma * TIMESTEPS for sigma in self.sigmas()[:-1].tolist()]

    def sample(
        self,
        denoise: Denoise,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Samples (B, ...) in f32 from noise (B, ...); no randomness but the noise.

        Guided, `denoise` sees 2B rows: the B asked for, then the same B with null. `progress` gets (steps done, steps).
        """
        if len(noise) != len(conditioning.text):
            raise UsageError(f"sampler: {len(noise)} rows of noise for {len(conditioning.text)} of conditioning")
        guided = self.guidance != 1
        text = torch.cat([conditioning.text, conditioning.null]) if guided else conditioning.text
        sigmas = self.sigmas().tolist()
        state = noise.float()
        with torch.no_grad():
            for step, (now, after) in enumerate(pairwise(sigmas)):
                rows = torch.cat([state, state]) if guided else state
                timestep = torch.full((len(rows),), now * TIMESTEPS, dtype=torch.float32, device=rows.device)
                velocity = denoise(hidden_states=rows, timestep=timestep, encoder_hidden_states=text).float()
                state = state + (after - now) * self.guide(velocity)
                if progress is not None:
                    progress(step + 1, self.steps)
        return state

    def guide(self, velocity: Tensor) -> Tensor:
        """The velocity that is followed, of the rows asked for and as many with null; without guidance all rows."""
        if self.guidance == 1:
            return velocity
        asked, null = velocity.chunk(2)
        return null + self.guidance * (asked - null)

    def to_json(self) -> str:
        """One JSON object, one key per field."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The sampler that `to_json` wrote; raises UsageError for keys that are not its fields."""
        values = json.loads(text)
        known = [item.name for item in fields(cls)]
        if not isinstance(values, dict) or set(values) - set(known):
            found = ", ".join(sorted(values)) if isinstance(values, dict) else text
            raise UsageError(f"sampler: found {found}; the fields are {', '.join(known)}")
        return cls(**values)


def noise(shape: Sequence[int], *, seed: int, count: int, first: int = 0) -> Tensor:
    """Standard normal noise (count, *shape), f32 on the CPU; row i depends on `seed` and `first + i` alone."""
    return torch.stack([_row(shape, seed, first + index) for index in range(count)])


def denoiser(module: nn.Module) -> Denoise:
    """The velocity function of a diffusers module: inputs go to its device and dtype, and the tuple is opened."""
    reference = next(module.parameters())

    def denoise(*, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        velocity: Tensor = module(
            hidden_states=hidden_states.to(reference),
            timestep=timestep.to(reference.device),
            encoder_hidden_states=encoder_hidden_states.to(reference),
            return_dict=False,
        )[0]
        return velocity.to(hidden_states.device)

    return denoise


def _row(shape: Sequence[int], seed: int, index: int) -> Tensor:
    # The CPU generator keeps 32 bits of its seed, so the pair is hashed into them.
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(tuple(shape), generator=generator, device="cpu")
