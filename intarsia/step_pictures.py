"""Pictures of step allocation: how many steps each token got, over the video, and which tokens each step computed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from intarsia.allocated import AllocatedEngine
from intarsia.backends.base import Engine
from intarsia.backends.bundle import STEPS, STEPS_MOVING
from intarsia.cached import CachedEngine
from intarsia.models.sampler import FlowMatchEuler

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Colour = tuple[int, int, int]

# The report's colours, in its light and its dark scheme.
TEXT, QUIET, LINE, PAGE, BEFORE, ACCENT = "#2b2118", "#75675a", "#e4dacd", "#faf7f2", "#c9bcab", "#8a4b1f"
GLOW = ((45, 38, 32), (93, 65, 37), (138, 91, 44), (182, 122, 56), (219, 165, 92), (245, 214, 160))
PALE = ((241, 235, 226), (230, 196, 143), (207, 143, 78), (166, 95, 43), (113, 58, 25))

HEAT = 0.68
"""How much of a pixel is the layer of steps; the rest is the video, in grey."""

VEIL = 0.62
"""How much of a pixel of a resting token is hidden."""

SHOWN = 8
"""Frames of the video that are shown, at most."""

MARGIN, GAP, LABEL = 16, 8, 84
WIDTH = 1000
MILLISECONDS, LAST_MILLISECONDS = 280, 2200


@dataclass(frozen=True)
class StepTrace:
    """Which tokens each step of a loop computed.

    Attributes:
        active: Of each step the numbers of its tokens, frame by frame, row by row.
        extents: Frames, rows and columns of tokens.
    """

    active: Sequence[Sequence[int]]
    extents: tuple[int, int, int]

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Whether each step computed each token (steps, frames, rows, columns)."""
        made = np.zeros((len(self.active), int(np.prod(self.extents))), dtype=np.bool_)
        for step, tokens in enumerate(self.active):
            made[step, list(tokens)] = True
        return made.reshape(-1, *self.extents)


def step_pictures(engine: Engine, video: Tensor, sampler: FlowMatchEuler) -> dict[str, bytes]:
    """The map and the animation of the last loop that an engine ran, by the names of their files.

    None for an engine whose steps all compute everything.

    Args:
        video: What that loop made (3, F, H, W), in [-1, 1].
    """
    trace = _trace(engine)
    if trace is None:
        return {}
    return {STEPS: step_map(video, trace), STEPS_MOVING: step_animation([video], trace, sampler.sigmas().tolist())}


def _trace(engine: Engine) -> StepTrace | None:
    if isinstance(engine, AllocatedEngine):
        return StepTrace(engine.loop.active, engine.grid.extents)
    if isinstance(engine, CachedEngine):
        return StepTrace([(0,) if computed else () for computed in engine.watch.computed], (1, 1, 1))
    return None


def estimates(states: Sequence[Tensor], sigmas: Sequence[float]) -> list[Tensor]:
    """What each step takes for the clean video, from where Euler's method went: state - sigma * velocity.

    Args:
        states: Samples before each step, and the last: one more than steps.
        sigmas: Noise levels of the states.
    """
    return [
        state - now * (ahead - state) / (after - now)
        for (state, ahead), (now, after) in zip(pairwise(states), pairwise(sigmas), strict=True)
    ]


def step_map(video: Tensor, trace: StepTrace) -> bytes:
    """A PNG: frames of a video (3, F, H, W) in [-1, 1] under a layer of steps, and which share each step computed."""
    from PIL import Image, ImageDraw

    frames, computed = _frames(video), trace.computed
    steps, count = computed.sum(axis=0), len(computed)
    columns = min(SHOWN, len(frames))
    side = (WIDTH - 2 * MARGIN - LABEL - (columns - 1) * GAP) // columns
    tall = round(side * frames.shape[1] / frames.shape[2])
    row = max(10, min(20, 200 // computed.shape[1]))
    chart = MARGIN + 40 + 2 * (tall + GAP) + 72
    sheet = Image.new("RGB", (WIDTH, chart + 30 + row * (computed.shape[1] + 1) + GAP + 20 + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    share = computed.mean()
    title = f"Steps that each token got, of {count}; {share:.0%} of all token steps were computed"
    pen.text((MARGIN, MARGIN), title, TEXT, _font(16))
    top = MARGIN + 40
    for label, at in (("video", top), ("steps", top + tall + GAP)):
        pen.text((MARGIN, at + tall / 2), label, QUIET, _font(13), anchor="lm")
    for place, number in enumerate(_chosen(len(frames), columns)):
        left = MARGIN + LABEL + place * (side + GAP)
        picture = _scaled(frames[number], side, tall)
        level = _sized(steps[_token_frame(number, len(frames), trace)] / count, side, tall)
        sheet.paste(picture, (left, top))
        layer = Image.fromarray(np.asarray(_colours(level, GLOW), dtype=np.uint8))
        sheet.paste(Image.blend(picture.convert("L").convert("RGB"), layer, HEAT), (left, top + tall + GAP))
    _step_legend(pen, steps, count, top + 2 * (tall + GAP) + 12)
    _share_chart(sheet, pen, computed, chart, row)
    return _png(sheet)


def step_animation(videos: Sequence[Tensor], trace: StepTrace, sigmas: Sequence[float]) -> bytes:
    """A GIF, a picture for each step: what it took for the video, tokens that rested under a veil.

    Args:
        videos: For each step a video (3, F, H, W) in [-1, 1], or one for all.
        trace: Which tokens were computed.
        sigmas: Noise levels of the steps; one behind the last is not looked at.
    """
    from PIL import Image

    computed = trace.computed
    of_step = list(videos) if len(videos) > 1 else [videos[0]] * len(computed)
    shown = [_step_picture(_frames(video), trace, step, sigmas[step]) for step, video in enumerate(of_step)]
    shown = [picture.quantize(128, kmeans=1, dither=Image.Dither.NONE) for picture in shown]
    buffer = io.BytesIO()
    durations = [MILLISECONDS] * (len(shown) - 1) + [LAST_MILLISECONDS]
    shown[0].save(buffer, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _step_picture(frames: Pixels, trace: StepTrace, step: int, sigma: float) -> Image.Image:
    """Frames in two rows, a line that tells the step, and the shares of all steps below."""
    from PIL import Image, ImageDraw

    computed = trace.computed
    chosen = _chosen(len(frames), min(SHOWN, len(frames)))
    columns = -(-len(chosen) // 2)
    side = 128
    tall = round(side * frames.shape[1] / frames.shape[2])
    width = 2 * MARGIN + columns * (side + GAP) - GAP
    rows = -(-len(chosen) // columns)
    foot = MARGIN + 44 + rows * (tall + GAP)
    sheet = Image.new("RGB", (width, foot + 74), "white")
    pen = ImageDraw.Draw(sheet)
    active = int(computed[step].sum())
    told = "all tokens" if active == computed[step].size else f"{active:,} of {computed[step].size:,} tokens"
    pen.text((MARGIN, MARGIN - 4), f"step {step + 1} of {len(computed)}: {told}", TEXT, _font(16))
    pen.text((MARGIN, MARGIN + 18), f"noise level {sigma:.2f}; tokens under a veil rest", QUIET, _font(12))
    for place, number in enumerate(chosen):
        left, top = MARGIN + place % columns * (side + GAP), MARGIN + 44 + place // columns * (tall + GAP)
        picture = _scaled(frames[number], side, tall)
        rests = ~computed[step][_token_frame(number, len(frames), trace)]
        veil = Image.fromarray((_sized(rests, side, tall) * 255 * VEIL).astype(np.uint8))
        picture.paste(Image.new("RGB", (side, tall), PAGE), (0, 0), veil)
        sheet.paste(picture, (left, top))
    _share_bars(pen, computed, step, (MARGIN, foot + 8, width - MARGIN, foot + 52))
    return sheet


def _share_bars(pen: ImageDraw.ImageDraw, computed: Floats | NDArray[np.bool_], now: int, box: tuple[int, ...]) -> None:
    """A bar for each step, as high as its share of tokens; the present one darker."""
    left, top, right, bottom = box
    shares = computed.reshape(len(computed), -1).mean(axis=1)
    wide = (right - left) / len(shares)
    for step, share in enumerate(shares):
        high = max(1, round((bottom - top) * float(share)))
        first, last = round(left + step * wide), round(left + (step + 1) * wide) - 2
        pen.rectangle((first, bottom - high, last, bottom), ACCENT if step == now else BEFORE)
    pen.line((left, bottom + 1, right, bottom + 1), LINE)
    pen.text((left, bottom + 4), "share of tokens that each step computes", QUIET, _font(11))


def _step_legend(pen: ImageDraw.ImageDraw, steps: NDArray[np.int64], count: int, top: int) -> None:
    """The colours of the layer from no step to all, with marks at numbers that tokens got."""
    left, wide = MARGIN + LABEL, 320
    for x in range(wide):
        pen.line((left + x, top, left + x, top + 12), _colours(np.array([x / (wide - 1)]), GLOW)[0])
    found = np.unique(steps)
    marked = found if len(found) <= 6 else np.array([found[0], found[-1]])
    for number in marked:
        at = left + float(number) / count * (wide - 1)
        pen.line((at, top + 12, at, top + 16), QUIET)
        pen.text((at, top + 18), str(int(number)), TEXT, _font(12), anchor="ma")
    pen.text((left + wide + 14, top - 2), "steps of a token", QUIET, _font(13))


def _share_chart(sheet: Image.Image, pen: ImageDraw.ImageDraw, computed: NDArray[np.bool_], top: int, row: int) -> None:
    """Frames of tokens downwards, steps to the right: the share of a frame's tokens that a step computes."""
    shares = computed.reshape(*computed.shape[:2], -1).mean(axis=2)
    steps, frames = shares.shape
    left, wide = MARGIN + LABEL, (WIDTH - 2 * MARGIN - LABEL) / steps
    pen.text((MARGIN, top), "Share of a frame's tokens that each step computes", TEXT, _font(14))
    _share_legend(pen, WIDTH - MARGIN, top)
    top += 30
    every = max(1, -(-14 // row))
    for frame in [*range(frames), frames]:
        at = top + frame * row + (GAP if frame == frames else 0)
        values = shares[:, frame] if frame < frames else shares.mean(axis=1)
        if frame == frames or frame % every == 0:
            label = "all" if frame == frames else f"frame {frame + 1}"
            pen.text((left - 10, at + row / 2), label, QUIET, _font(12), anchor="rm")
        for step, colour in enumerate(_colours(values, PALE)):
            box = (left + round(step * wide), at, left + round((step + 1) * wide) - 2, at + row - 2)
            pen.rectangle(box, colour)
    bottom = top + (frames + 1) * row + GAP
    for step in (0, *range(4, steps, 5)):
        pen.text((left + (step + 0.5) * wide, bottom + 4), str(step + 1), QUIET, _font(12), anchor="ma")
    pen.text((left - 10, bottom + 4), "step", QUIET, _font(12), anchor="ra")


def _share_legend(pen: ImageDraw.ImageDraw, right: int, top: int) -> None:
    for place, share in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        at = right - (place + 1) * 62
        pen.rectangle((at, top + 2, at + 14, top + 14), _colours(np.array([share]), PALE)[0])
        pen.text((at + 19, top + 8), f"{share:.0%}", QUIET, _font(12), anchor="lm")


def _frames(video: Tensor) -> Pixels:
    """Pixels (F, H, W, 3) of a video (3, F, H, W) in [-1, 1]."""
    levels = ((video.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.permute(1, 2, 3, 0).contiguous().numpy().astype(np.uint8)


def _scaled(frame: Pixels, width: int, height: int) -> Image.Image:
    """A frame (H, W, 3) as a picture of this size: pixels of small ones stay squares."""
    from PIL import Image

    smaller = frame.shape[1] > width
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def _chosen(frames: int, count: int) -> list[int]:
    """Numbers of frames to show, evenly from the first to the last."""
    return [int(at) for at in np.linspace(0, frames - 1, count).round()]


def _token_frame(number: int, frames: int, trace: StepTrace) -> int:
    """The frame of tokens that a frame of the video lies in."""
    return number * trace.extents[0] // frames


def _sized(values: NDArray[np.generic], width: int, height: int) -> Floats:
    """Values of tokens (rows, columns) at each pixel (height, width)."""
    down = np.arange(height) * values.shape[0] // height
    across = np.arange(width) * values.shape[1] // width
    return np.asarray(values[down][:, across], dtype=np.float64)


def _colours(level: Floats, scale: Sequence[Colour]) -> list[Colour] | Pixels:
    """Colours of levels from 0 to 1: a list of them, or pixels for levels of pixels."""
    at = np.clip(level, 0, 1) * (len(scale) - 1)
    known = np.array(scale, dtype=np.float64)
    mixed = np.stack([np.interp(at, range(len(scale)), known[:, part]) for part in range(3)], axis=-1).round()
    if level.ndim > 1:
        return mixed.astype(np.uint8)
    return [(int(r), int(g), int(b)) for r, g, b in mixed]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow: the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
