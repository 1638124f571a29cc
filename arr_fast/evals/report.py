"""The page of an evaluation: tables, plots, criteria, and the pairs worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from arr_fast.data.record import Record, image_bytes
from arr_fast.evals.charts import ablation_plot, bias_plot, reliability_plot
from arr_fast.evals.judging import LogOdds
from arr_fast.evals.measure import Evaluation, Measured
from arr_fast.evals.tables import Table, tables, written
from arr_fast.images import CanonicalImage, to_image
from arr_fast.provenance import Provenance
from arr_fast.report import ReportPair, ReportSection, render_report
from arr_fast.rubric import Rubric
from arr_fast.verdicts import AggregationName, PairVerdicts, pair_verdicts

SHOWN = 24
_PEOPLE = {1: "People prefer A", -1: "People prefer B", 0: "People call it a tie"}


@dataclass(frozen=True, slots=True)
class Shown:
    """Which pairs a page shows, as places among all judged pairs, by heading."""

    heading: str
    places: tuple[int, ...]


def render_evaluation(
    result: Evaluation,
    pairs: Sequence[Record],
    odds: LogOdds,
    rubric_of: Callable[[Record], Rubric],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    aggregation: AggregationName,
    shown: int = SHOWN,
    seed: int = 0,
    before: Sequence[Table] = (),
) -> str:
    """Returns the page, self-contained.

    Args:
        result: What was measured.
        pairs: The judged pairs, as in `odds`.
        odds: What the judge said about them.
        rubric_of: The rubric of a pair.
        title: Heading.
        facts: (name, value) lines under it.
        aggregation: The rule behind the verdicts on the cards.
        shown: How many pairs to show.
        seed: Of the choice among pairs that are right.
        before: Tables that come before those of the evaluation.
    """
    form = result.forms[-1] if result.forms else None
    labels = [pair.preference or 0 for pair in pairs]
    sections = []
    for part in choose_pairs(form, labels, shown, seed):
        places = np.array(part.places, dtype=int)
        verdicts = _verdicts(odds.take(places), form, aggregation)
        cards = [_card(pairs[i], rubric_of(pairs[i])) for i in part.places]
        sections.append(ReportSection(part.heading, cards, verdicts))
    lead = _lead(result, facts, _texts(pairs, rubric_of), before)
    return render_report(sections, title=title, lead=lead)


def choose_pairs(
    form: Measured | None, labels: Sequence[int], shown: int, seed: int
) -> list[Shown]:
    """Picks the pairs to look at: sure mistakes, orders that disagree, and some that are right.

    Args:
        form: Whose verdicts count.
        labels: Per judged pair, 1, -1 or 0.
        shown: How many in all; half of them mistakes.
        seed: Of the choice among the right ones.
    """
    if form is None or shown < 1:
        return []
    places = np.flatnonzero(np.asarray(labels))
    signed = form.scores.score * np.asarray(labels)[places]
    agree = form.scores.forward * form.scores.reverse > 0.0
    wrong = [i for i in np.argsort(signed, kind="stable") if signed[i] < 0.0 and agree[i]]
    bias = np.abs(form.scores.forward - form.scores.reverse)
    unsure = [i for i in np.argsort(-bias, kind="stable") if not agree[i]]
    right = np.flatnonzero((signed > 0.0) & agree)
    right = np.random.default_rng(seed).permutation(right)
    wrong, unsure = wrong[: -(-shown // 2)], unsure[: -(-shown // 4)]
    right = np.sort(right[: max(0, shown - len(wrong) - len(unsure))])
    found = (
        ("Mistakes, the surest first", wrong),
        ("The two orders disagree, the widest first", unsure),
        ("Right, a random choice", right),
    )
    return [
        Shown(heading, tuple(int(places[i]) for i in chosen))
        for heading, chosen in found
        if len(chosen)
    ]


def _verdicts(odds: LogOdds, form: Measured | None, aggregation: AggregationName) -> PairVerdicts:
    with_criteria = odds.ab.shape[1] > 0
    whole = odds.holistic if odds.holistic is not None else odds.direct
    # Pairs of one page come from one judge; rubrics may differ.
    origins = [Provenance(**{**p, "rubric_hashes": ()}) for p in odds.provenance]
    hashes = dict.fromkeys(h for p in odds.provenance for h in p["rubric_hashes"])
    first = origins[0].to_json() | {"rubric_hashes": tuple(hashes)}
    return pair_verdicts(
        odds.ab if with_criteria else None,
        odds.ba if with_criteria else None,
        provenance=Provenance(**first),
        criteria=odds.ids if with_criteria else None,
        weights=odds.weights if with_criteria else None,
        essential=odds.essential if with_criteria else None,
        holistic_ab=None if whole is None else whole[:, 0],
        holistic_ba=None if whole is None else whole[:, 1],
        aggregation=aggregation if with_criteria else "holistic",
        temperature=form.temperature if form is not None and form.temperature else 1.0,
    )


def _card(pair: Record, rubric: Rubric) -> ReportPair:
    def picture(ref: Any, name: str) -> CanonicalImage:
        return to_image(image_bytes(ref), name=f"{pair.name}: {name}")

    return ReportPair(
        pair.prompt,
        picture(pair.images[0], "A"),
        picture(pair.images[1], "B"),
        rubric,
        None if pair.source is None else picture(pair.source, "source"),
        note=f"{_PEOPLE[pair.preference or 0]} ({pair.name})",
    )


def _texts(pairs: Sequence[Record], rubric_of: Callable[[Record], Rubric]) -> dict[str, str]:
    """The text of each criterion, with {caption} left standing."""
    rubrics = {id(rubric): rubric for rubric in map(rubric_of, pairs)}.values()
    return {c.id: c.text for rubric in reversed(list(rubrics)) for c in rubric.criteria}


def _lead(
    result: Evaluation,
    facts: Sequence[tuple[str, str]],
    texts: dict[str, str],
    before: Sequence[Table],
) -> Markup:
    source = (resources.files("arr_fast") / "templates" / "eval.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(
        facts=facts,
        tables=[*before, *tables(result)],
        plots=_plots(result),
        criteria=[_row(found, texts.get(found.name, "")) for found in result.criteria],
    )
    return Markup(page)


def _plots(result: Evaluation) -> list[dict[str, Any]]:
    plots = []
    for form in result.forms:
        plots.append(
            {
                "title": f"Position bias, {form.name}",
                "svg": bias_plot(form.scores.forward, form.scores.reverse, result.label),
                "about": "A dot is a pair, in log-odds. Right of the middle the judge agrees with "
                "people; in the shade its two orders name different winners.",
            }
        )
        if form.before is not None and form.after is not None:
            plots.append(
                {
                    "title": f"Reliability, {form.name}",
                    "svg": reliability_plot(form.before, form.after),
                    "about": Markup(
                        '<span class="key-b">As judged</span> and <span class="key-a">with the '
                        "fitted temperature</span>, which a pair never had a part in. On the "
                        "dashed line confidence is what it says; the size of a dot is its share "
                        "of the pairs."
                    ),
                }
            )
    if len(result.ablation) > 1:
        counts = [count for count, _, _ in result.ablation]
        mean = [first["mean"] for _, first, _ in result.ablation]
        plots.append(
            {
                "title": "Number of criteria",
                "svg": ablation_plot(
                    counts,
                    [(m.value, m.low, m.high) for m in mean],
                    [random["mean"] for _, _, random in result.ablation],
                ),
                "about": Markup(
                    '<span class="key-a">The first K</span> of the rubric with its interval, and '
                    '<span class="key-b">random K</span> on average.'
                ),
            }
        )
    return plots


def _row(found: Measured, text: str) -> dict[str, Any]:
    accuracy = found.measures["debiased"]
    low, high = accuracy.low, accuracy.high
    if not np.isfinite(low):
        low = high = accuracy.value
    return {
        "id": found.name,
        "text": text,
        "accuracy": written(accuracy.value, "percent"),
        "width": round(100 * accuracy.value, 2),
        "low": round(100 * low, 2),
        "span": round(100 * (high - low), 2),
        "forward": written(found.measures["forward"].value, "percent"),
        "reverse": written(found.measures["reverse"].value, "percent"),
        "consistent": written(found.measures["consistent"].value, "percent"),
        "bias": written(found.measures["position_bias"].value, "number"),
    }
