"""Three plots as inline SVG: position bias, reliability, accuracy against the number of criteria.

Numbers only, no text from outside; colours come from the page's style, so they work in the dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from arr_fast.evals.calibration import Reliability

WIDTH, HEIGHT = 320.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 40.0
MAX_POINTS = 1000


@dataclass(slots=True)
class Plot:
    """A pair of axes that collects SVG elements.

    Attributes:
        x, y: (low, high) of the axes.
        labels: Names of the axes; fixed texts of this module.
        title: What a screen reader says.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    labels: tuple[str, str]
    title: str
    elements: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the place of a point, clipped to the axes."""
        across = (min(max(x, self.x[0]), self.x[1]) - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draws a polyline."""
        path = " ".join(f"{px},{py}" for px, py in (self.at(x, y) for x, y in points))
        self.elements.append(f'<polyline class="{style}" points="{path}"/>')

    def area(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Fills a polygon."""
        path = " ".join(f"{px},{py}" for px, py in (self.at(x, y) for x, y in points))
        self.elements.append(f'<polygon class="{style}" points="{path}"/>')

    def dot(self, x: float, y: float, radius: float, style: str) -> None:
        """Draws a dot; the radius is in units of the drawing."""
        px, py = self.at(x, y)
        self.elements.append(f'<circle class="{style}" cx="{px}" cy="{py}" r="{radius:.1f}"/>')

    def text(self, px: float, py: float, text: str, anchor: str = "middle", turn: str = "") -> None:
        """Writes text at a place of the drawing."""
        self.elements.append(
            f'<text x="{px}" y="{py}" text-anchor="{anchor}"{turn}>{Markup.escape(text)}</text>'
        )

    def ticks(self, x: Sequence[float], y: Sequence[float], form: str = "g") -> None:
        """Draws grid lines with their values."""
        for value in x:
            self.line([(value, self.y[0]), (value, self.y[1])], "grid")
            self.text(self.at(value, self.y[0])[0], HEIGHT - BOTTOM + 15, f"{value:{form}}")
        for value in y:
            self.line([(self.x[0], value), (self.x[1], value)], "grid")
            self.text(LEFT - 5, self.at(self.x[0], value)[1] + 4, f"{value:{form}}", "end")

    def svg(self) -> Markup:
        """Returns the drawing."""
        middle = (HEIGHT - BOTTOM + TOP) / 2
        self.text((WIDTH + LEFT - RIGHT) / 2, HEIGHT - 6, self.labels[0])
        self.text(12, middle, self.labels[1], turn=f' transform="rotate(-90 12 {middle})"')
        body = "".join(self.elements)
        return Markup(
            f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
            f'aria-label="{Markup.escape(self.title)}">{body}</svg>'
        )


def bias_plot(forward: np.ndarray, reverse: np.ndarray, label: np.ndarray) -> Markup:
    """Position bias against the preference for the image that people prefer, a dot per pair.

    Right of the middle the judge agrees with people; where |bias| exceeds |preference| (shaded) its
    two orders name different winners.

    Args:
        forward, reverse: [N], A's side.
        label: [N], 1 or -1.
    """
    preference, bias = 0.5 * (forward + reverse) * label, 0.5 * (forward - reverse)
    sizes = np.concatenate([np.abs(preference), np.abs(bias)])
    full = _round_up(float(np.quantile(sizes, 0.98))) if len(sizes) else 1.0
    plot = Plot(
        (-full, full),
        (-full, full),
        ("preference for the preferred image", "position bias"),
        "position bias against preference",
    )
    for sign in (1.0, -1.0):
        plot.area([(0, 0), (-full, sign * full), (full, sign * full)], "shade")
    plot.ticks([-full, 0.0, full], [-full, 0.0, full])
    for place in range(0, len(label), max(1, -(-len(label) // MAX_POINTS))):
        right = preference[place] > 0.0
        style = "point right" if right else "point wrong"
        plot.dot(float(preference[place]), float(bias[place]), 2.2, style)
    return plot.svg()


def reliability_plot(before: Reliability, after: Reliability) -> Markup:
    """Share right against confidence, without and with the fitted temperature."""
    plot = Plot((0.5, 1.0), (0.0, 1.0), ("confidence", "share right"), "reliability diagram")
    plot.ticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    plot.line([(0.5, 0.5), (1.0, 1.0)], "ideal")
    for found, style in ((before, "before"), (after, "after")):
        filled = found.count > 0
        points = list(
            zip(found.confidence[filled].tolist(), found.accuracy[filled].tolist(), strict=True)
        )
        plot.line(points, f"curve {style}")
        largest = float(found.count.max()) if len(points) else 1.0
        for (x, y), count in zip(points, found.count[filled].tolist(), strict=True):
            plot.dot(x, y, 2.0 + 5.0 * float(np.sqrt(count / largest)), f"bin {style}")
    return plot.svg()


def ablation_plot(
    counts: Sequence[int], first: Sequence[tuple[float, float, float]], random: Sequence[float]
) -> Markup:
    """Accuracy against the number of criteria.

    Args:
        counts: K.
        first: (value, low, high) of the first K.
        random: Mean over random K.
    """
    ends = [v for row in first for v in row if np.isfinite(v)] + list(random)
    low = float(np.floor((min(ends) - 0.005) * 20)) / 20
    high = max(min(1.0, float(np.ceil((max(ends) + 0.005) * 20)) / 20), low + 0.05)
    step = 0.05 if high - low < 0.31 else 0.1
    top = max(counts)
    plot = Plot(
        (0.0, max(top * 1.05, 1.5)),
        (low, high),
        ("criteria", "mean accuracy"),
        "accuracy against the number of criteria",
    )
    plot.ticks(list(counts), np.arange(low, high + 1e-9, step).round(2).tolist())
    if all(np.isfinite(row).all() for row in first):
        upper = [(k, row[2]) for k, row in zip(counts, first, strict=True)]
        lower = [(k, row[1]) for k, row in zip(counts, first, strict=True)]
        plot.area([*upper, *reversed(lower)], "shade")
    plot.line([(k, row[0]) for k, row in zip(counts, first, strict=True)], "curve after")
    plot.line(list(zip(counts, random, strict=True)), "curve before")
    for k, row, other in zip(counts, first, random, strict=True):
        plot.dot(k, row[0], 3.5, "bin after")
        plot.dot(k, other, 3.0, "bin before")
    return plot.svg()


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(power * step for step in (1, 2, 5, 10) if power * step >= value))
