"""Looks at a page in headless Chromium: does it fit, can it be read, is everything drawn?"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = [320, 390, 1280]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
_LOOK = """
  const inner = frame.contentDocument, root = inner.documentElement;
  const size = (node) => parseFloat(frame.contentWindow.getComputedStyle(node).fontSize);
  const sizes = [...inner.querySelectorAll('p, span, dd, h2, td, small, figcaption')].map(size);
  const plots = [...inner.querySelectorAll('svg')].map((plot) => {
    const text = size(plot.querySelector('text')) * plot.clientWidth / 320;
    return plot.clientWidth > 200 && plot.clientHeight > 150 ? text : 0; });
  const shown = [...inner.images].every((image) => image.complete && image.naturalWidth > 0);
  document.title =
    [root.scrollWidth, Math.min(...sizes), Math.min(999, ...plots), shown].join(' ');
"""


@dataclass(frozen=True, slots=True)
class Look:
    """What a page looks like in a frame of some width.

    Attributes:
        width: Its own width in pixels; over the frame's it would scroll sideways.
        smallest_text, smallest_label: Font sizes in pixels, of texts and of labels in plots (0 for
            a plot that is not drawn).
        images_shown: Every image is there.
        colours: Distinct colours in the screenshot.
    """

    width: int
    smallest_text: float
    smallest_label: float
    images_shown: bool
    colours: int


def look_at(page: Path, width: int) -> Look:
    """Opens a page in a frame, asks the browser what it shows, and takes a screenshot."""
    frame, shot = page.with_name("frame.html"), page.with_name(f"shot-{width}.png")
    frame.write_text(
        f'<iframe id="frame" src="{page.name}" width="{width}" height="2000" style="border:0">'
        f"</iframe><script>frame.onload = () => {{ {_LOOK} }};</script>"
    )
    told = _run("--dump-dom", frame.as_uri())
    found = re.search(r"<title>(\d+) ([\d.]+) ([\d.]+) (true|false)</title>", told.stdout)
    assert found, told.stderr[-2000:]
    _run(f"--screenshot={shot}", f"--window-size={width},2000", frame.as_uri())
    with Image.open(shot) as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    return Look(
        int(found[1]), float(found[2]), float(found[3]), found[4] == "true", len(colours or ())
    )


def assert_readable(page: Path, width: int) -> None:
    """Nothing overflows sideways, text is readable, plots and pictures are drawn."""
    look = look_at(page, width)
    assert look.width <= width
    assert look.smallest_text >= 12.0 and look.smallest_label >= 9.0
    assert look.images_shown and look.colours > 50


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BROWSER), *_FLAGS, "--virtual-time-budget=5000", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
    )
