"""The HTML page: self-contained, everything escaped, bars as wide as the numbers say."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from arr_fast.images import to_image
from arr_fast.provenance import Provenance
from arr_fast.report import ReportPair, ReportSection, data_url, render_report
from arr_fast.rubric import Criterion, Rubric
from arr_fast.verdicts import pair_verdicts
from tests.browser import WIDTHS, assert_readable, needs_browser

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}"


def noise(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def page(prompt: str = "a red circle", **options: object) -> str:
    rubric = Rubric(
        name="r",
        criteria=(
            Criterion(id="one", text=f"Shows {{caption}} {prompt}"),
            Criterion(id="two", text="Is sharp.", tips=("No blur.",)),
            Criterion(id="three", text="Has a very long word: " + "x" * 300),
        ),
    )
    images = [to_image(noise(seed), name="x") for seed in range(3)]
    pairs = [
        ReportPair(prompt, images[0], images[1], rubric),
        ReportPair(prompt, images[1], images[0], rubric, source=images[2]),
        ReportPair(prompt, images[1], images[0], rubric),
    ]
    ab = np.array([[2.0, -1.0, 4.0], [-2.0, -1.0, -0.5], [np.nan] * 3])
    ba = np.array([[-2.0, 3.0, 2.0], [2.0, 1.0, 0.5], [np.nan] * 3])
    verdicts = pair_verdicts(
        ab,
        ba,
        provenance=Provenance("model", "rev", (rubric.content_hash,), 1),
        criteria=[rubric.ids] * 3,
        errors=[None, None, f"images_b[2]: {prompt}"],
        **options,
    )
    section = ReportSection("Pairs", pairs, verdicts, [("Note", prompt)])
    return render_report([section], title=prompt)


class Checker(html.parser.HTMLParser):
    """Collects tags, attributes and text; complains about tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.urls: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.urls += [v or "" for k, v in attrs if k in ("src", "href")]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_only_text():
    checker = Checker()
    checker.feed(page(HOSTILE))
    assert checker.open == []
    assert "script" not in checker.tags
    # Title, heading, note, three prompts, three criteria (twice each), an error.
    assert checker.text.count(HOSTILE) >= 10


def test_nothing_is_loaded_from_outside():
    checker = Checker()
    content = page()
    checker.feed(content)
    assert len(checker.urls) == 7
    assert all(url.startswith("data:image/png;base64,") for url in checker.urls)
    assert not re.search(r"https?:|@import|url\(", content)
    assert 'name="viewport"' in content


def test_pictures_are_the_pictures():
    checker = Checker()
    checker.feed(page())
    data = base64.b64decode(checker.urls[0].split(",", 1)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), noise(0))


def test_large_pictures_are_reduced():
    url = data_url(to_image(np.zeros((900, 1400, 3), np.uint8), name="x"))
    assert url.startswith("data:image/jpeg")
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
    assert max(picture.size) == 640


def test_bars_and_numbers():
    content = page()
    bars = re.findall(r'class="bar ([a-z ]+)" style="width: ([\d.]+)%"', content)
    preference = [2.0, -2.0, 1.0, -2.0, -1.0, -0.5]
    full = max(1.0, np.quantile(np.abs(preference), 0.95))
    expected = [50 * min(1, abs(x) / full) for x in preference]
    assert [float(width) for _, width in bars[:6]] == pytest.approx(expected, abs=0.01)
    assert [side for side, _ in bars] == ["a", "b", "a unsure", "b", "b", "b"] + ["none"] * 3
    assert "preference <b>+2.00</b>" in content and "bias +1.00" in content
    assert "Tie: the orders disagree" in content
    assert "No verdict" in content and "B is better" in content
    assert "reward A -0.1, B +1.0" in content


def test_lengths_must_match():
    verdicts = pair_verdicts([[1.0]], provenance=Provenance("m", "r", (), 1))
    with pytest.raises(ValueError, match="pairs has 0 items, verdicts has 1"):
        render_report([ReportSection("x", [], verdicts)], title="x")


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_a_phone(tmp_path, width):
    """In a frame of this width nothing overflows sideways, and text stays readable."""
    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    assert_readable(tmp_path / "page.html", width)
