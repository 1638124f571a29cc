"""Refine (eq. 8): while verification fails, rewrite from the critique, at most T_max times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from arr_fast.autorubric.call_log import Progress
from arr_fast.autorubric.generate import PairCriteria, read_reply, request_of
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.templates import Exemplar, TemplateSet
from arr_fast.autorubric.verdict_log import VerdictLog
from arr_fast.autorubric.verify import Verification, verify
from arr_fast.autorubric.writer import Writer

PairStatus = Literal["verified", "failed", "discarded", "unanswered"]
OnRound = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PairOutcome:
    """Where the loop stands with one pair.

    Attributes:
        criteria: What was written last.
        verification: What the judge said about it.
        status: "verified", "discarded" after T_max refinements, "failed" before, or "unanswered".
        unusable: (round, problem, raw text) of answers that could not be used.
    """

    criteria: PairCriteria
    verification: Verification
    status: PairStatus
    unusable: tuple[tuple[int, str, str | None], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what a file keeps of a pair."""
        return {
            **self.criteria.to_json(),
            "status": self.status,
            **self.verification.to_json(),
            "unusable": [list(each) for each in self.unusable],
        }


def outcomes_of(
    states: Sequence[PairCriteria], checks: Sequence[Verification], last: int
) -> list[PairOutcome]:
    """Puts writing and verification together; pairs that failed in round `last` are discarded."""
    return [_outcome(s, c, last, ()) for s, c in zip(states, checks, strict=True)]


def refine(
    writer: Writer,
    templates: TemplateSet,
    verdicts: VerdictLog,
    outcomes: Sequence[PairOutcome],
    settings: AutoRubricSettings,
    exemplars: Sequence[Exemplar] = (),
    on_round: OnRound | None = None,
    progress: Progress | None = None,
) -> list[PairOutcome]:
    """Rewrites and verifies what failed, round by round.

    Args:
        writer: Who writes.
        templates: What it is asked.
        verdicts: The judge and its log.
        outcomes: After verification of the first round.
        settings: T_max among them.
        exemplars: A guide.
        on_round: Told the round and how many pairs are rewritten in it.
        progress: Told how many of a round's pairs have an answer.
    """
    current = list(outcomes)
    for number in range(1, settings.refinements + 1):
        places = [i for i, outcome in enumerate(current) if outcome.status == "failed"]
        if not places:
            break
        if on_round is not None:
            on_round(number, len(places))
        states = _rewrite(
            writer, templates, [current[i] for i in places], number, settings, exemplars, progress
        )
        checks = verify(verdicts, states, require_consistent=settings.require_consistent)
        for i, state, check in zip(places, states, checks, strict=True):
            current[i] = _outcome(state, check, settings.refinements, current[i].unusable)
    return current


def _rewrite(
    writer: Writer,
    templates: TemplateSet,
    failed: Sequence[PairOutcome],
    number: int,
    settings: AutoRubricSettings,
    exemplars: Sequence[Exemplar],
    progress: Progress | None,
) -> list[PairCriteria]:
    states = []
    requests = []
    for outcome in failed:
        state = outcome.criteria
        worse = outcome.verification.failed_texts(state.texts)
        rejected = tuple(dict.fromkeys([*state.rejected, *worse]))
        conversation = templates.for_pair(
            state.pair,
            settings.general,
            limit=settings.criteria,
            rejected=rejected,
            critique=outcome.verification.critique,
            problem=state.problem,
            exemplars=exemplars,
        )
        states.append(replace(state, round=number, rejected=rejected))
        requests.append(
            request_of(
                conversation,
                settings,
                *(state.pair.content_key, state.pair.preferred),
                attempt=number,
                banned=rejected,
            )
        )
    replies = writer.ask(requests, progress)
    return [
        read_reply(state, request, reply, settings)
        for state, request, reply in zip(states, requests, replies, strict=True)
    ]


def _outcome(
    state: PairCriteria,
    check: Verification,
    last: int,
    earlier: tuple[tuple[int, str, str | None], ...],
) -> PairOutcome:
    unusable = earlier
    if state.problem:
        unusable = (*earlier, (state.round, state.problem, state.raw))
    status: PairStatus = "verified"
    if not state.answered:
        status = "unanswered"
    elif not check.passed:
        status = "discarded" if state.round >= last else "failed"
    return PairOutcome(state, check, status, unusable)
