"""Pictures of an iteration's verdicts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from arr_fast.rpo.metrics import LINE_HEIGHT, sample_grid


def grid(prompt):
    images = [[Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]]
    return np.asarray(sample_grid(images, [prompt], [["won", "lost"]]))


def test_a_grid_shows_whole_captions():
    """A caption of three lines makes the grid two lines higher, and there is ink in each."""
    one, three = grid("a red circle"), grid("a red circle and a blue square " * 3)
    assert len(three) - len(one) == 2 * LINE_HEIGHT
    for line in (1, 2, 3):
        top = 64 + line * LINE_HEIGHT
        assert (three[top : top + LINE_HEIGHT] < 255).any(), line


def test_a_caption_of_many_lines_is_cut():
    assert len(grid("a red circle " * 100)) == len(grid("a red circle and a blue square " * 3))
