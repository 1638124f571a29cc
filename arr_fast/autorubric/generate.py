"""Generate (eq. 6): a writer says, for each labelled pair, by which criteria the winner wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from arr_fast.autorubric.answers import AnswerError, parse_criteria
from arr_fast.autorubric.call_log import Progress
from arr_fast.autorubric.labelled import LabelledPair
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.templates import Conversation, Exemplar, TemplateSet
from arr_fast.autorubric.text_backend import TextReply, TextRequest
from arr_fast.autorubric.wording import sort_criteria
from arr_fast.autorubric.writer import Writer
from arr_fast.errors import ArrFastError
from arr_fast.images import CanonicalImage


@dataclass(frozen=True, slots=True)
class PairCriteria:
    """Criteria of one pair after some round of writing.

    Attributes:
        pair: The pair.
        round: 0 as first written, n after n refinements.
        texts: Criteria of the kind that was asked for.
        other: Criteria of the other kind, set aside.
        refused: (text, why) of what can be no criterion.
        problem: Why there are no texts, or "".
        raw: The text of an answer that could not be used.
        answered: False where no answer came at all.
        rejected: Texts of earlier rounds that failed verification.
    """

    pair: LabelledPair
    round: int = 0
    texts: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    raw: str | None = None
    answered: bool = True
    rejected: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what was written, for files."""
        return {
            "pair": self.pair.name,
            "prompt": self.pair.prompt,
            "round": self.round,
            "criteria": list(self.texts),
            "set_aside": list(self.other),
            "refused": [list(each) for each in self.refused],
            "problem": self.problem or None,
            "raw": self.raw,
        }


@dataclass(frozen=True, slots=True)
class PromptCriteria:
    """Criteria written from a prompt alone.

    Attributes:
        prompt: The caption or instruction.
        texts: Its criteria.
        problem: Why there are none, or "".
        raw: The text of an answer that could not be used.
        answered: False where the last request got no answer at all.
    """

    prompt: str
    texts: tuple[str, ...] = ()
    problem: str = ""
    raw: str | None = None
    answered: bool = True


def generate(
    writer: Writer,
    templates: TemplateSet,
    pairs: Sequence[LabelledPair],
    settings: AutoRubricSettings,
    exemplars: Sequence[Exemplar] = (),
    progress: Progress | None = None,
) -> list[PairCriteria]:
    """Writes criteria for every pair; an answer that fails is kept with its reason.

    Args:
        writer: Who writes.
        templates: What it is asked.
        pairs: Labelled pairs.
        settings: How many criteria, of which kind.
        exemplars: A guide of expert judgements.
        progress: Told how many of the pairs have an answer.

    Raises:
        ArrFastError: A guide was given and the templates do not use it.
    """
    check_guide(
        templates, "generate_general" if settings.general else "generate_specific", exemplars
    )
    requests = [
        request_of(
            templates.for_pair(
                pair, settings.general, limit=settings.criteria, exemplars=exemplars
            ),
            settings,
            pair.content_key,
            pair.preferred,
        )
        for pair in pairs
    ]
    replies = writer.ask(requests, progress)
    blank = [PairCriteria(pair) for pair in pairs]
    return [
        read_reply(state, request, reply, settings)
        for state, request, reply in zip(blank, requests, replies, strict=True)
    ]


def generate_from_prompts(
    writer: Writer,
    templates: TemplateSet,
    prompts: Sequence[tuple[str, CanonicalImage | None]],
    settings: AutoRubricSettings,
    exemplars: Sequence[Exemplar] = (),
    progress: Progress | None = None,
) -> list[PromptCriteria]:
    """Zero-shot: criteria from a caption (or an instruction and its source image) alone.

    An answer that cannot be used is asked for again, at most `settings.refinements` times. A prompt
    that got no answer is left as it is, for another run to ask for: the writer has nothing to
    mend. `progress` is told how many of a round's prompts have an answer.
    """
    check_guide(templates, "generate_caption", exemplars)
    found = [PromptCriteria(prompt, problem="not asked") for prompt, _ in prompts]
    for attempt in range(settings.refinements + 1):
        open_places = [n for n, each in enumerate(found) if each.answered and not each.texts]
        requests = []
        for place in open_places:
            prompt, source = prompts[place]
            problem = found[place].problem if attempt else ""
            conversation = templates.for_caption(
                prompt, source, limit=settings.criteria, problem=problem, exemplars=exemplars
            )
            requests.append(request_of(conversation, settings, prompt, attempt, attempt=attempt))
        replies = writer.ask(requests, progress)
        for place, request, reply in zip(open_places, requests, replies, strict=True):
            found[place] = _read_prompt_reply(prompts[place][0], request, reply)
    return found


def request_of(
    conversation: Conversation,
    settings: AutoRubricSettings,
    *identity: object,
    attempt: int = 0,
    banned: Sequence[str] = (),
) -> TextRequest:
    """A request for criteria; `identity` makes its seed its own."""
    return TextRequest(
        parts=conversation.parts,
        images=conversation.images,
        limit=settings.criteria,
        banned=tuple(banned),
        max_tokens=settings.max_tokens,
        temperature=settings.refine_temperature if attempt else settings.temperature,
        seed=settings.request_seed(attempt, *identity),
    )


def read_reply(
    state: PairCriteria, request: TextRequest, reply: Any, settings: AutoRubricSettings
) -> PairCriteria:
    """The state of a pair after an answer (or the failure to get one)."""
    blank = replace(state, texts=(), other=(), refused=(), problem="", raw=None, answered=True)
    if not isinstance(reply, TextReply):
        return replace(blank, problem=str(reply), answered=False)
    try:
        parsed = parse_criteria(reply, request.limit, request.banned)
    except AnswerError as error:
        return replace(blank, problem=str(error), raw=error.raw)
    kinds = sort_criteria(parsed.texts, state.pair.prompt)
    wanted, other = kinds.general, kinds.specific
    if not settings.general:
        wanted, other = kinds.specific, kinds.general
    problem = ""
    if not wanted:
        kind = "general" if settings.general else "prompt-specific"
        problem = f"none of the {len(parsed.texts)} criteria is {kind}"
    return replace(
        blank,
        texts=tuple(wanted),
        other=tuple(other),
        refused=tuple(kinds.refused),
        problem=problem,
        raw=None if wanted else reply.text,
    )


def check_guide(templates: TemplateSet, name: Any, exemplars: Sequence[Exemplar]) -> None:
    """Raises if exemplars were given to templates that would pass over them."""
    if exemplars and not templates.uses(name, "exemplars"):
        raise ArrFastError(f"a guide was given, but template {name} does not use `exemplars`")


def _read_prompt_reply(prompt: str, request: TextRequest, reply: Any) -> PromptCriteria:
    if not isinstance(reply, TextReply):
        problem = f"no answer, run again to ask for it anew: {reply}"
        return PromptCriteria(prompt, problem=problem, answered=False)
    try:
        parsed = parse_criteria(reply, request.limit)
    except AnswerError as error:
        return PromptCriteria(prompt, problem=str(error), raw=error.raw)
    kinds = sort_criteria(parsed.texts, prompt)
    refused = {text for text, _ in kinds.refused}
    kept = tuple(text for text in parsed.texts if text not in refused)
    if not kept:
        return PromptCriteria(prompt, problem=kinds.refused[0][1], raw=reply.text)
    return PromptCriteria(prompt, kept)
