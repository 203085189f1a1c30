import pytest
import torch

from intarsia.models.sheet import contact_sheet

pytest.importorskip("PIL")


def test_a_strip_of_frames_for_each_video() -> None:
    videos = torch.full((3, 3, 4, 10, 20), -1.0)
    videos[2, 0] = 1.0
    sheet = contact_sheet(videos, ["a", "b", "c"], columns=2)
    assert sheet.size == (2 * (4 * 20 + 6) + 6, 2 * (10 + 12 + 6) + 6)
    # The third video is the first of the second row: all red.
    assert sheet.getpixel((6, 6 + 28 + 12)) == (255, 0, 0)
    assert sheet.getpixel((6, 6 + 12)) == (0, 0, 0)
