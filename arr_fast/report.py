"""A self-contained HTML page of judged pairs: pictures, a bar per criterion, verdicts, rewards.

No script, no external asset, everything escaped; readable on a phone and in the dark.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from arr_fast.images import CanonicalImage
from arr_fast.pairwise import PairVerdicts
from arr_fast.rubric import Rubric

# Larger pictures are shown at this size, so that a page of a hundred pairs can still be mailed.
MAX_SIDE = 640
# Under this size PNG is small and keeps pixel art exact.
PNG_SIDE = 160


@dataclass(frozen=True, slots=True)
class ReportPair:
    """What a page shows of one pair beside its verdicts.

    Attributes:
        prompt: Caption or edit instruction.
        image_a, image_b: The two images.
        source: The image that was edited, or None.
        rubric: Its rubric, for the texts of the criteria.
        note: A line below the verdict, for example what people prefer.
    """

    prompt: str
    image_a: CanonicalImage
    image_b: CanonicalImage
    rubric: Rubric
    source: CanonicalImage | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReportSection:
    """Pairs that were judged together.

    Attributes:
        heading: What they are.
        pairs: What was judged.
        verdicts: The verdicts, in the same order.
        facts: (name, value) lines under the heading; provenance is added to them.
    """

    heading: str
    pairs: Sequence[ReportPair]
    verdicts: PairVerdicts
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    text: str
    preference: str
    bias: str
    side: str
    width: float
    verdict: str


@dataclass(frozen=True, slots=True)
class _Card:
    prompt: str
    images: tuple[tuple[str, str, bool], ...]
    headline: str
    detail: str
    rows: tuple[_Row, ...]
    error: str
    note: str


def render_report(sections: Sequence[ReportSection], *, title: str, lead: Markup | str = "") -> str:
    """Returns the page.

    Args:
        sections: What was judged, with the verdicts on it.
        title: Heading of the page.
        lead: What comes before the pairs; HTML if it is Markup, else text.

    Raises:
        ValueError: if a section has another number of pairs than of verdicts.
    """
    template = (resources.files("arr_fast") / "templates" / "report.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=title, lead=lead, sections=[_section(section) for section in sections]
    )


def _section(section: ReportSection) -> dict[str, Any]:
    pairs, verdicts = section.pairs, section.verdicts
    if len(pairs) != len(verdicts):
        raise ValueError(f"pairs has {len(pairs)} items, verdicts has {len(verdicts)}")
    known = np.abs(verdicts.preference[np.isfinite(verdicts.preference)])
    # A full bar is the 95th percentile: one extreme verdict must not flatten all others.
    full = max(1.0, float(np.quantile(known, 0.95))) if known.size else 1.0
    source = verdicts.provenance
    temperatures = ", ".join(f"{t:g}" for t in np.unique(verdicts.temperature))
    facts = [
        *section.facts,
        ("Judge", f"{source.model} ({source.revision})"),
        ("Rubric", ", ".join(digest[:12] for digest in source.rubric_hashes)),
        ("Versions", f"arr_fast {source.arr_fast_version}, template {source.template_version}"),
        ("Rule", f"{verdicts.aggregation}, temperature {temperatures}"),
    ]
    return {
        "heading": section.heading,
        "facts": facts,
        "full": f"{full:.1f}",
        "cards": [_card(pair, verdicts, index, full) for index, pair in enumerate(pairs)],
    }


def _card(pair: ReportPair, verdicts: PairVerdicts, index: int, full: float) -> _Card:
    winner = verdicts.winner[index]
    status = verdicts.status[index]
    headline = {"A": "A is better", "B": "B is better", "tie": "Tie", None: "No verdict"}[winner]
    if winner == "tie" and verdicts.order_consistent is not None:
        headline += "" if verdicts.order_consistent[index] else ": the orders disagree"
    if status == "low_label_mass":
        headline += " (low label mass)"
    reward, weight = verdicts.reward()
    detail = ""
    if winner is not None:
        first, second = reward[index]
        detail = f"P(A) = {verdicts.probability[index]:.3f}, Z = {verdicts.score[index]:+.2f}; "
        detail += f"reward A {first:+.1f}, B {second:+.1f}" if weight[index] else "no reward"
    shown = [("source", pair.source)] if pair.source is not None else []
    shown += [("A", pair.image_a), ("B", pair.image_b)]
    count = verdicts.preference.shape[1]
    return _Card(
        prompt=pair.prompt,
        images=tuple((name, data_url(image), winner == name) for name, image in shown),
        headline=headline,
        detail=detail,
        rows=tuple(
            _row(criterion.id, criterion.render(pair.prompt), verdicts, index, k, full)
            for k, criterion in enumerate(pair.rubric.criteria[:count])
        ),
        error=verdicts.errors[index] or "",
        note=pair.note,
    )


def _row(name: str, text: str, verdicts: PairVerdicts, index: int, k: int, full: float) -> _Row:
    preference = float(verdicts.preference[index, k])
    bias = float(verdicts.position_bias[index, k])
    if not np.isfinite(preference):
        return _Row(name, text, "-", "-", "none", 0.0, "no verdict")
    side = "a" if preference > 0 else "b"
    verdict = "A" if preference > 0 else "B" if preference < 0 else "tie"
    if verdicts.consistent is not None and not verdicts.consistent[index, k]:
        verdict += ", orders disagree"
        side += " unsure"
    return _Row(
        id=name,
        text=text,
        preference=f"{preference:+.2f}",
        bias=f"{bias:+.2f}" if np.isfinite(bias) else "-",
        side=side,
        # Half of the track belongs to each image.
        width=round(50.0 * min(1.0, abs(preference) / full), 2),
        verdict=verdict,
    )


def data_url(image: CanonicalImage) -> str:
    """Returns the picture as a data URL: small ones as PNG, others as JPEG of at most MAX_SIDE."""
    picture = image.to_pil()
    buffer = io.BytesIO()
    if max(picture.size) <= PNG_SIDE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
