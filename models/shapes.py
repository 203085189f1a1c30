"""Videos of one coloured shape that moves and bounces, drawn from a label: what wan-mini is trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from intarsia.ir.errors import UsageError
from intarsia.models.sampler import Conditioning

SHAPES = ("disc", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
MOTIONS = ("left", "right", "up", "down")
WORDS = (*SHAPES, *COLOURS, *MOTIONS, "")  # the last word is said when nothing is asked
NULL = len(WORDS) - 1
TEXT_TOKENS = 3  # a shape, a colour and a motion
TEXT_DIM = 16
TEXT_SCALE = 4.0  # the root of TEXT_DIM: components of a one-hot row then have mean square 1

FRAMES = 8
SIZE = 32  # pixels, height and width
RADII = (4.5, 5.5)  # pixels, of the disc; the other shapes have the disc's area
SPEEDS = (2.0, 3.0)  # pixels a frame
STRAIGHT_FRAMES = 3  # no shape meets a wall before it has taken this many steps
BACKGROUND = (-0.8, -0.8, -0.8)  # RGB in [-1, 1]
PALETTE = ((0.9, -0.6, -0.6), (-0.6, 0.7, -0.5), (-0.5, -0.3, 0.9), (0.9, 0.75, -0.6))  # RGB, as COLOURS

SQUARE_HALF = math.sqrt(math.pi) / 2  # half the side of the square of area pi
TRIANGLE_HALF = math.sqrt(math.pi / math.sqrt(3))  # half the side of the equilateral triangle of area pi
# Half the width and half the height of each shape's box, for radius 1.
HALF_SIZES = ((1.0, 1.0), (SQUARE_HALF, SQUARE_HALF), (TRIANGLE_HALF, TRIANGLE_HALF * math.sqrt(3) / 2))
# How far below the centre of its box a shape's centroid lies, for radius 1.
CENTROID_DROPS = (0.0, 0.0, TRIANGLE_HALF / (2 * math.sqrt(3)))


class UnknownWord(UsageError):
    """Text that is not a label."""


@dataclass(frozen=True)
class Label:
    """What a video shows; `motion` is where the shape heads before it meets a wall."""

    shape: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        for kind, known in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS)):
            word = getattr(self, kind)
            if word not in known:
                raise UnknownWord(f"label: '{word}' is no {kind}; known: {', '.join(known)}")

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} moving {self.motion}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The label that `text` says, as in "red disc moving left"; raises UnknownWord."""
        parts = text.lower().split()
        if len(parts) != 4 or parts[2] != "moving":
            raise UnknownWord(
                f"label '{text}': expected '<colour> <shape> moving <motion>'; colours: {', '.join(COLOURS)}; "
                f"shapes: {', '.join(SHAPES)}; motions: {', '.join(MOTIONS)}"
            )
        return cls(shape=parts[1], colour=parts[0], motion=parts[3])


def labels() -> tuple[Label, ...]:
    """All 48 labels, ordered so that neighbours differ in shape, colour and motion."""
    count = len(SHAPES) * len(COLOURS) * len(MOTIONS)
    return tuple(
        Label(
            shape=SHAPES[index % len(SHAPES)],
            colour=COLOURS[index % len(COLOURS)],
            motion=MOTIONS[(index + index // 12) % len(MOTIONS)],
        )
        for index in range(count)
    )


def condition(prompts: Sequence[str]) -> Conditioning:
    """Text embeddings (B, 3, 16) of prompts such as "red disc moving left"; raises UnknownWord."""
    text = embed(words([Label.parse(prompt) for prompt in prompts]))
    return Conditioning(text=text, null=embed(torch.full((len(prompts), TEXT_TOKENS), NULL)))


def words(asked: Sequence[Label]) -> Tensor:
    """Places in WORDS (B, 3), int64: of the shape, the colour and the motion of each label."""
    return torch.tensor([[WORDS.index(word) for word in (one.shape, one.colour, one.motion)] for one in asked])


def random_words(count: int, generator: torch.Generator) -> Tensor:
    """Places in WORDS (count, 3) of labels drawn uniformly, on the generator's device."""
    columns = [
        torch.randint(
            WORDS.index(kind[0]), WORDS.index(kind[-1]) + 1, (count,), generator=generator, device=generator.device
        )
        for kind in (SHAPES, COLOURS, MOTIONS)
    ]
    return torch.stack(columns, dim=1)


def embed(said: Tensor) -> Tensor:
    """Fixed text embeddings (B, 3, 16), f32, of places in WORDS (B, 3): scaled one-hot rows."""
    return TEXT_SCALE * functional.one_hot(said, TEXT_DIM).float()


def draw(said: Tensor, generator: torch.Generator) -> Tensor:
    """Videos (B, 3, 8, 32, 32), f32 RGB in [-1, 1], of labels given as places in WORDS (B, 3), on their device.

    Size, speed, starting point and lane are drawn from `generator`. Edges are anti-aliased.
    """
    shape, colour, motion = (said - said.new_tensor([0, len(SHAPES), len(SHAPES) + len(COLOURS)])).unbind(1)
    drawn = torch.rand(4, len(said), generator=generator, device=said.device)
    radius = RADII[0] + (RADII[1] - RADII[0]) * drawn[0]
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * drawn[1]
    half = radius[:, None] * drawn.new_tensor(HALF_SIZES)[shape]
    centre = _path(half, motion, speed=speed, start=drawn[2], lane=drawn[3])
    return paint(coverage(shape, radius[:, None].expand(-1, FRAMES), centre), colour)


def coverage(shape: Tensor, radius: Tensor, centre: Tensor) -> Tensor:
    """How much of each pixel a shape covers (B, F, 32, 32), in [0, 1].

    shape (B) places in SHAPES; radius (B, F) and the centre of its box (B, F, 2), x then y, in pixels.
    """
    grid = torch.arange(SIZE, device=centre.device) + 0.5
    across = (grid - centre[..., 0, None, None]).abs()
    down = grid[:, None] - centre[..., 1, None, None]
    radius = radius[..., None, None]
    disc = torch.hypot(across, down) - radius
    square = torch.maximum(across, down.abs()) - SQUARE_HALF * radius
    height = HALF_SIZES[2][1] * radius
    triangle = torch.maximum(down - height, across * (math.sqrt(3) / 2) - (down + height) / 2)
    distance = torch.stack(torch.broadcast_tensors(disc, square, triangle))
    return (0.5 - distance[shape, torch.arange(len(shape), device=shape.device)]).clamp(0, 1)


def paint(cover: Tensor, colour: Tensor) -> Tensor:
    """Videos (B, 3, F, 32, 32) in [-1, 1] of coverage (B, F, 32, 32) in colours (B), places in COLOURS."""
    ground = cover.new_tensor(BACKGROUND)[None, :, None, None, None]
    ink = cover.new_tensor(PALETTE)[colour][:, :, None, None, None]
    return ground + (ink - ground) * cover[:, None]


def _path(half: Tensor, motion: Tensor, *, speed: Tensor, start: Tensor, lane: Tensor) -> Tensor:
    """Centres (B, 8, 2) in pixels of boxes with half sizes (B, 2) that head along `motion` (B) and bounce."""
    vertical = motion >= MOTIONS.index("up")
    backward = (motion == MOTIONS.index("left")) | (motion == MOTIONS.index("up"))
    room = SIZE - 2 * half
    along = torch.where(vertical, room[:, 1], room[:, 0])[:, None]
    # Measured from the wall behind, so that the wall ahead is out of reach for STRAIGHT_FRAMES steps.
    begin = start[:, None] * (along - STRAIGHT_FRAMES * speed[:, None])
    travelled = begin + speed[:, None] * torch.arange(FRAMES, device=half.device)
    bounced = along - (along - travelled).abs()
    moving = torch.where(backward[:, None], along - bounced, bounced)
    resting = (lane[:, None] * torch.where(vertical[:, None], room[:, :1], room[:, 1:])).expand_as(moving)
    places = torch.stack(
        [torch.where(vertical[:, None], resting, moving), torch.where(vertical[:, None], moving, resting)], dim=-1
    )
    return half[:, None] + places
