"""Rewards of prompt groups, and what becomes of the candidates that the judge has no verdict on.

A pairwise judge rewards a candidate by its rivals for the same prompt. Candidates are grouped by a
key, so that images of different prompts are never compared; a group of one is refused, because a
loop that spreads a group over processes must gather first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from arr_fast.errors import VerdictError
from arr_fast.images import to_image

if TYPE_CHECKING:
    from arr_fast.judge import Judge
    from arr_fast.ranking import GroupVerdicts

RewardName = Literal["win_rate", "bradley_terry", "rpo"]
REWARDS: tuple[RewardName, ...] = ("win_rate", "bradley_terry", "rpo")


def places_by_key(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Places of each key, in order of first appearance."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def point_rewards(
    judge: Judge,
    prompts: Sequence[str],
    images: Sequence[Any],
    *,
    sources: Sequence[Any] | None = None,
    rubric: Any = None,
) -> list[float | None]:
    """P(yes) of each image alone, averaged over criteria; None for an abstention.

    Args:
        judge: The judge, or anything with its `score`.
        prompts, images, sources, rubric: See `Judge.score`.
    """
    verdicts = judge.score(prompts, images, rubric, sources=sources)
    return [
        float(score) if status == "ok" else None
        for score, status in zip(verdicts.score, verdicts.status, strict=True)
    ]


def group_rewards(
    judge: Judge,
    prompts: Sequence[str],
    images: Sequence[Any],
    *,
    keys: Sequence[Hashable] | None = None,
    sources: Sequence[Any] | None = None,
    rubric: Any = None,
    reward: RewardName = "win_rate",
    lam: float = 1.0,
    gamma: float = 0.1,
    **options: Any,
) -> list[float | None]:
    """One reward per image from the comparisons inside its group.

    Args:
        judge: The judge, or anything with its `rank`.
        prompts: N captions or instructions.
        images: N images.
        keys: N group ids; by default the prompts, and for edits their sources.
        sources: N source images of edits; equal within a group.
        rubric: One rubric for all; see `Judge.compare`.
        reward: "win_rate" in [0, 1]; "bradley_terry" in nats, mean 0; "rpo" is the mean over
            decided opponents of +lam (won) and -gamma (lost), eq. 11 for a group of two.
        lam, gamma: Of "rpo".
        **options: Further options of `Judge.rank`.

    Returns:
        Rewards in the order of the images; None where the judge abstained.

    Raises:
        VerdictError: A group has one image, or its prompts differ.
    """
    if reward not in REWARDS:
        raise VerdictError(f"reward must be one of {', '.join(REWARDS)}, got {reward!r}")
    if len(prompts) != len(images):
        raise VerdictError(f"images has {len(images)} items, prompts has {len(prompts)}")
    groups = places_by_key(group_keys(prompts, sources) if keys is None else keys)
    for key, places in groups.items():
        if len(places) < 2:
            raise VerdictError(
                f"group {str(key)[:80]!r} has 1 image; a pairwise judge needs the whole group of "
                "a prompt on one process: gather it, or sample groups contiguously"
            )
        if len({prompts[place] for place in places}) > 1:
            raise VerdictError(f"group {str(key)[:80]!r} holds different prompts")
    verdicts = judge.rank(
        [prompts[places[0]] for places in groups.values()],
        [[images[place] for place in places] for places in groups.values()],
        rubric,
        sources=None if sources is None else [sources[p[0]] for p in groups.values()],
        **options,
    )
    rewards: list[float | None] = [None] * len(images)
    for number, places in enumerate(groups.values()):
        values = candidate_rewards(verdicts, number, reward, lam, gamma)
        for place, value in zip(places, values, strict=True):
            rewards[place] = value
    return rewards


def group_keys(prompts: Sequence[str], sources: Sequence[Any] | None = None) -> list[Hashable]:
    """What makes a group: the prompt, and for edits the source image with it.

    One instruction may serve many sources; their results are no rivals.

    Args:
        prompts: N captions or instructions.
        sources: N source images of edits, or None.

    Raises:
        VerdictError: Lists of different lengths.
        BadImageError: A source cannot be read.
    """
    if sources is None:
        return list(prompts)
    if len(sources) != len(prompts):
        raise VerdictError(f"sources has {len(sources)} items, prompts has {len(prompts)}")
    hashes = [to_image(s, name=f"sources[{n}]").content_hash for n, s in enumerate(sources)]
    return list(zip(prompts, hashes, strict=True))


def candidate_rewards(
    verdicts: GroupVerdicts, group: int, reward: RewardName, lam: float, gamma: float
) -> list[float | None]:
    """Rewards of one group's candidates; see `group_rewards`."""
    if reward == "rpo":
        codes = verdicts.winner_code[group]
        values = np.full(len(codes), np.nan)
        for i, row in enumerate(codes):
            # -128 marks a failed pair and 0 a tie: neither is an opponent that decides.
            decided = [lam if code == 1 else -gamma for code in row if code in (1, -1)]
            judged = any(code in (1, 0, -1) for j, code in enumerate(row) if j != i)
            values[i] = np.mean(decided) if decided else (0.0 if judged else np.nan)
    else:
        name = "win_rate" if reward == "win_rate" else "bradley_terry"
        values = getattr(verdicts, name)[group]
    return [float(value) if np.isfinite(value) else None for value in values]


def fill_abstentions(
    rewards: Sequence[float | None], keys: Sequence[Hashable], neutral: float | None = None
) -> list[float]:
    """Numbers for loops that take nothing but numbers: the mean of the group's other rewards.

    That value has advantage 0 (before the other members move), where a fixed 0 or -10 would teach.
    A group without any verdict gets one constant, so that its advantages are 0 as well.

    Args:
        rewards: N rewards, None for an abstention.
        keys: N group ids.
        neutral: The constant; by default the mean of all decided rewards.

    Raises:
        VerdictError: Nothing was decided and no neutral value was given.
    """
    decided = [value for value in rewards if value is not None]
    if neutral is None and len(decided) < len(rewards):
        if not decided:
            raise VerdictError(f"the judge has no verdict on any of {len(rewards)} images")
        neutral = sum(decided) / len(decided)
    filled = [0.0 if value is None else float(value) for value in rewards]
    for places in places_by_key(list(keys)).values():
        known = [filled[p] for p in places if rewards[p] is not None]
        substitute = sum(known) / len(known) if known else neutral
        for place in places:
            if rewards[place] is None and substitute is not None:
                filled[place] = float(substitute)
    return filled
