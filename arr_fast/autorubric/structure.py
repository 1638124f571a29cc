"""Structure (eq. 9, 10): verified criteria of many pairs become one hierarchical rubric.

A writer merges and orders them. Where there is none, or its answer cannot be used, texts are
clustered by likeness (TF-IDF, average linkage): deterministic, and said in the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from arr_fast.autorubric.answers import AnswerError, normal_form, parse_themes_answer
from arr_fast.autorubric.refine import PairOutcome
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.templates import TemplateSet
from arr_fast.autorubric.text_backend import TextReply, TextRequest
from arr_fast.autorubric.wording import compares, is_checkable, is_general
from arr_fast.autorubric.writer import Writer
from arr_fast.errors import ArrFastError, MissingDependencyError
from arr_fast.prompts import Task
from arr_fast.rubric import Criterion, Level, Rubric
from arr_fast.rubric_text import slugs

# Cosine distances: nearer texts are one criterion, nearer criteria share a theme.
SAME, THEME = 0.2, 0.85
_ORDER: tuple[Level, ...] = ("coarse", "mid", "fine")
_LEVEL_WORDS: dict[Level, str] = {
    "coarse": "caption instruction prompt overall whole everything main subject faithful follows "
    "matches described shows says style setting asked requested carried",
    "mid": "object objects count number composition layout position positions placed arranged "
    "arrangement relation spatial background extra missing framing perspective unchanged kept rest",
    "fine": "sharp sharpness edges blur blurry noise grain clean detail texture artifacts cut off "
    "frame covered hidden bar anatomy hands fingers colour color colours colors lighting shadow",
}
# Words that say nothing about which criterion it is.
_FILLER = (
    "the a an is are of in to no not there that which it its as by on at be been has have does do "
    "image picture scene photo all every any"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A verified criterion.

    Attributes:
        text: As first written.
        pairs: Numbers of the pairs whose verified criteria hold it.
    """

    text: str
    pairs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StructuredCriterion:
    """A criterion of the structured rubric.

    Attributes:
        text: What the judge reads.
        theme: Its heading.
        level: Its place in the hierarchy.
        sources: Texts that it stands for.
        support: Number of pairs behind them.
    """

    text: str
    theme: str
    level: Level
    sources: tuple[str, ...]
    support: int


@dataclass(frozen=True, slots=True)
class Structured:
    """A structured rubric before selection.

    Attributes:
        criteria: In order: coarse to fine, then by support.
        method: "writer" or "clusters".
        notes: What did not go as planned.
    """

    criteria: tuple[StructuredCriterion, ...]
    method: str
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The criteria's texts."""
        return tuple(criterion.text for criterion in self.criteria)


def candidates_of(outcomes: Sequence[PairOutcome], rows: Sequence[int]) -> list[Candidate]:
    """Distinct verified criteria of some pairs, the most frequent first.

    Args:
        outcomes: Of all pairs.
        rows: Which pairs may contribute.
    """
    texts: dict[str, str] = {}
    pairs: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if outcomes[row].status == "verified":
            for text in outcomes[row].criteria.texts:
                form = normal_form(text)
                texts.setdefault(form, text)
                pairs[form].append(row)
    found = [Candidate(texts[form], tuple(dict.fromkeys(pairs[form]))) for form in texts]
    return sorted(found, key=lambda each: (-len(each.pairs), len(each.text), each.text))


def structure(
    candidates: Sequence[Candidate],
    outcomes: Sequence[PairOutcome],
    task: Task,
    settings: AutoRubricSettings,
    writer: Writer | None = None,
    templates: TemplateSet | None = None,
) -> Structured:
    """Merges and orders criteria.

    Args:
        candidates: See `candidates_of`.
        outcomes: Of all pairs: a merged text may name nothing of its pairs' captions.
        task: Of the rubric.
        settings: How many criteria at most.
        writer, templates: A language model that merges; without, texts are clustered.

    Raises:
        ArrFastError: There are no candidates.
    """
    if not candidates:
        raise ArrFastError("no verified criteria to structure")
    notes: tuple[str, ...] = ()
    if writer is not None and templates is not None and templates.has("structure"):
        try:
            return _by_writer(candidates, outcomes, task, settings, writer, templates)
        except ArrFastError as error:
            notes = (f"the writer's structure could not be used ({error}); texts were clustered",)
    return replace(_by_clusters(candidates, settings), notes=notes)


def _supported(found: list[StructuredCriterion], least: int) -> list[StructuredCriterion]:
    """Without the criteria that too few pairs stand behind, such as slips of a rewrite.

    Comes before any limit of their number, or they would keep others from a place.
    """
    return [criterion for criterion in found if criterion.support >= least] or found


def to_rubric(
    criteria: Sequence[StructuredCriterion],
    *,
    name: str,
    task: Task,
    weights: Sequence[float] | None = None,
) -> Rubric:
    """The typed rubric; its `to_text` is the reference's numbered Theme/Tip text."""
    ids = slugs([criterion.text for criterion in criteria])
    values = [1.0] * len(criteria) if weights is None else weights
    return Rubric(
        name=name,
        task=task,
        criteria=tuple(
            Criterion(
                id=number,
                text=criterion.text,
                theme=criterion.theme,
                level=criterion.level,
                weight=float(weight),
                provenance=f"written for {criterion.support} pairs",
            )
            for number, criterion, weight in zip(ids, criteria, values, strict=True)
        ),
    )


def _by_writer(
    candidates: Sequence[Candidate],
    outcomes: Sequence[PairOutcome],
    task: Task,
    settings: AutoRubricSettings,
    writer: Writer,
    templates: TemplateSet,
) -> Structured:
    listed = [(candidate.text, len(candidate.pairs)) for candidate in candidates]
    conversation = templates.for_structure(task, listed, limit=settings.structured)
    request = TextRequest(
        parts=conversation.parts,
        answer="themes",
        limit=settings.structured,
        max_tokens=max(settings.max_tokens, 120 * settings.structured),
        temperature=settings.temperature,
        seed=settings.request_seed("structure"),
    )
    reply = writer.ask([request])[0]
    if not isinstance(reply, TextReply):
        raise reply
    answer = parse_themes_answer(reply, len(candidates))
    heads: dict[str, tuple[str, str, Level]] = {}
    behind: dict[str, dict[str, Candidate]] = defaultdict(dict)
    notes: list[str] = []
    for theme in answer.themes:
        for merged in theme.criteria:
            sources = [candidates[n - 1] for n in dict.fromkeys(merged.sources)]
            text = _acceptable(merged.text, sources, outcomes, settings.general)
            if text != merged.text:
                notes.append(f"{merged.text!r} became {text!r}: merged texts stay general")
            # A text that comes again adds its sources to the first.
            heads.setdefault(normal_form(text), (text, theme.theme, merged.level))
            behind[normal_form(text)] |= {source.text: source for source in sources}
    found = [_merged(*head, list(behind[form].values())) for form, head in heads.items()]
    if not found:
        raise AnswerError("no criterion in the structure", reply.text)
    # A stable sort keeps the writer's order of themes within a level.
    found.sort(key=lambda criterion: _ORDER.index(criterion.level))
    kept = _supported(found, settings.min_support)[: settings.structured]
    return Structured(tuple(kept), "writer", tuple(notes))


def _acceptable(
    text: str, sources: Sequence[Candidate], outcomes: Sequence[PairOutcome], general: bool
) -> str:
    """A merged text, or its best supported source where the text broke the rules of criteria."""
    captions = {outcomes[row].criteria.pair.prompt for each in sources for row in each.pairs}
    fits = is_checkable(text) and not compares(text)
    if general:
        fits = fits and all(is_general(text, caption) for caption in captions)
    return text if fits else max(sources, key=lambda each: len(each.pairs)).text


def _merged(
    text: str, theme: str, level: Level, sources: Sequence[Candidate]
) -> StructuredCriterion:
    support = len({row for source in sources for row in source.pairs})
    return StructuredCriterion(text, theme, level, tuple(s.text for s in sources), support)


def _by_clusters(candidates: Sequence[Candidate], settings: AutoRubricSettings) -> Structured:
    features, words = _text_features([candidate.text for candidate in candidates])
    same, themes = _clusters(features, SAME), _clusters(features, THEME)
    groups: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(same):
        groups[label].append(place)
    found = []
    for places in groups.values():
        # Candidates come by support: the first is the best supported wording.
        best = candidates[places[0]]
        members = np.flatnonzero(themes == themes[places[0]])
        theme = _theme_of(features[members], words, best.text)
        sources = [candidates[place] for place in places]
        found.append(_merged(best.text, theme, level_of(best.text), sources))
    found.sort(key=lambda each: (_ORDER.index(each.level), -each.support, each.text))
    found = _supported(found, settings.min_support)
    if len(found) > settings.structured:
        kept = sorted(found, key=lambda each: (-each.support, each.text))[: settings.structured]
        found = [criterion for criterion in found if criterion in kept]
    return Structured(tuple(found), "clusters")


def level_of(text: str) -> Level:
    """Coarse, mid or fine, by which level's words a criterion uses most; mid where none leads."""
    words = set(normal_form(text).replace(",", " ").split())
    hits = {level: len(words & set(_LEVEL_WORDS[level].split())) for level in _ORDER}
    best = max(hits.values())
    leading = [level for level in _ORDER if hits[level] == best]
    return leading[0] if best and len(leading) == 1 else "mid"


def _text_features(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """TF-IDF rows of unit length (zero for a text of filler alone), and the words."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingDependencyError("scikit-learn", "autorubric") from None
    vectorizer = TfidfVectorizer(
        token_pattern=r"(?u)\{?\b\w+\b\}?", stop_words=_FILLER.split(), sublinear_tf=True
    )
    try:
        rows = vectorizer.fit_transform(texts).toarray()
    except ValueError:
        # Nothing but filler: every text is a cluster of its own.
        return np.eye(len(texts)), np.array([""] * len(texts))
    return rows, vectorizer.get_feature_names_out()


def _clusters(features: np.ndarray, distance: float) -> np.ndarray:
    if len(features) == 1:
        return np.zeros(1, dtype=int)
    from sklearn.cluster import AgglomerativeClustering

    gaps = 1.0 - features @ features.T
    np.fill_diagonal(gaps, 0.0)
    model = AgglomerativeClustering(
        n_clusters=None, distance_threshold=distance, metric="precomputed", linkage="average"
    )
    labels: np.ndarray = model.fit_predict(np.clip(gaps, 0.0, None))
    return labels


def _theme_of(features: np.ndarray, words: np.ndarray, fallback: str) -> str:
    """The word that weighs most in a theme, capitalised."""
    word = str(words[int(features.sum(axis=0).argmax())])
    return word.strip("{}").capitalize() or fallback
