"""The layout of a video transformer's tokens: frames x rows x columns, and text before or behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from .errors import SpecError
from .spec import Spec, construct, spec_of


@dataclass(frozen=True)
class TokenLayout:
    """Video tokens frame by frame, row by row, with text tokens before or behind them.

    Attributes:
        frames: Frames of the video in tokens (after the autoencoder and the patch embedding).
        height: Rows of a frame in tokens.
        width: Columns of a frame in tokens.
        before: Text tokens before the video's.
        after: Text tokens behind the video's.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or min(self.before, self.after) < 0:
            raise ValueError("frames, height and width are at least 1, before and after at least 0")

    @property
    def frame(self) -> int:
        """Tokens of a frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.frame

    @property
    def tokens(self) -> int:
        """All tokens, text included."""
        return self.before + self.video + self.after

    def __str__(self) -> str:
        return str(spec_of("tokens", self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``tokens(frames=8, height=8, width=8, after=16)``; SpecError if it is not of that form."""
        spec = Spec.parse(text)
        if spec.name != "tokens":
            raise SpecError(f"expected 'tokens(frames=..., height=..., width=...)', found {text!r}")
        return construct(cls, spec)
