"""verl-omni (verl-project/verl-omni at a1139ba): an async scorer that meets its group by uid.

verl-omni calls `await compute_score(data_source=, solution_image=, ground_truth=, extra_info=,
**config)` by keyword, one sample at a time (uint8 [C, H, W]), many at once under one event loop. A
pairwise judge needs the group, so calls with the same `extra_info["uid"]` wait for one another
until `group_size` have come; then one of them judges for all. If some do not come in time, all
that wait abstain: verl-omni takes nothing but numbers, so they get `neutral`, and `abstained` = 1
as a metric.

    +reward.reward_functions.arr.path=pkg://arr_fast.integrations.verl_omni
    +reward.reward_functions.arr.name=compute_score
    +reward.reward_functions.arr.group_size=8
    +reward.reward_functions.arr.model=Qwen/Qwen3-VL-8B-Instruct

The rendezvous is inside one process and one event loop. A group that is spread over reward workers
meets in a Ray actor instead: arr_fast.integrations.verl_omni_ray, with the same arguments.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from arr_fast.errors import VerdictError
from arr_fast.integrations.groups import fill_abstentions, group_rewards
from arr_fast.integrations.loading import judge_from, load_rubric

logger = logging.getLogger("arr_fast.integrations")

# verl-omni passes keys of its own as well (reward_router_address, model_name, ...).
_JUDGE = ("judge", "model", "device", "dtype", "revision", "adapter", "impl", "quantization")
FORWARDED = (*_JUDGE, "rubric", "reward")


@dataclass(eq=False)
class _Meeting:
    """The samples of one uid that have come so far.

    Attributes:
        prompt: What all of them were made for.
        images: Their images, in order of arrival.
        over: Set when nobody else is waited for.
        rewards: The judging of a full group, a task of its own: a caller that is cancelled must
            not take the others with it. None where the group did not come together.
    """

    prompt: str
    images: list[Any] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    rewards: asyncio.Task[list[float | None]] | None = None


_meetings: dict[tuple[asyncio.AbstractEventLoop, str], _Meeting] = {}


async def compute_score(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    group_size: int,
    timeout_s: float = 60.0,
    neutral: float = 0.5,
    rubric: Any = None,
    reward: Any = "win_rate",
    **judge_options: Any,
) -> dict[str, float]:
    """The reward of one sample inside its group.

    Args:
        data_source: Ignored.
        solution_image: uint8 [C, H, W].
        ground_truth: The prompt.
        extra_info: Holds `uid`, the group's id.
        group_size: Samples of a group, at least 2.
        timeout_s: How long the first sample waits for the last; judging is not counted.
        neutral: Score of an abstention in a group without any verdict.
        rubric, reward: See `group_rewards`.
        **judge_options: `model` or `judge`, and arguments of `Judge.from_pretrained`; keys that
            verl-omni itself adds (reward_router_address, model_name, ...) are ignored.

    Raises:
        VerdictError: No uid, a group of one, or two prompts under one uid.
    """
    del data_source
    uid = extra_info.get("uid")
    if uid is None or group_size < 2:
        raise VerdictError("extra_info needs a uid and group_size must be 2 or more")
    key = (asyncio.get_running_loop(), str(uid))
    meeting = _meetings.setdefault(key, _Meeting(ground_truth))
    if meeting.prompt != ground_truth:
        raise VerdictError(f"uid {uid!r} holds different prompts")
    place = len(meeting.images)
    meeting.images.append(solution_image)
    if len(meeting.images) == group_size:
        meeting.rewards = asyncio.create_task(_judged(meeting, rubric, reward, judge_options))
        _end(key, meeting)
    try:
        await asyncio.wait_for(meeting.over.wait(), timeout_s)
    except TimeoutError:
        logger.warning("uid %s: %d of %d came in time", uid, len(meeting.images), group_size)
        # All that wait abstain now; a latecomer of this uid starts a meeting of its own.
        _end(key, meeting)
    if meeting.rewards is None:
        return abstention(neutral)
    rewards = await asyncio.shield(meeting.rewards)
    filled = fill_abstentions(rewards, [uid] * len(rewards), neutral=neutral)
    return {"score": filled[place], "abstained": float(rewards[place] is None)}


def abstention(neutral: float) -> dict[str, float]:
    """What verl-omni gets for a sample without a verdict: it takes nothing but numbers."""
    return {"score": neutral, "abstained": 1.0}


def _end(key: tuple[asyncio.AbstractEventLoop, str], meeting: _Meeting) -> None:
    if _meetings.get(key) is meeting:
        del _meetings[key]
    meeting.over.set()


async def _judged(
    meeting: _Meeting, rubric: Any, reward: Any, options: dict[str, Any]
) -> list[float | None]:
    """Rewards of a full group; the judge works in a thread beside the event loop."""
    judge = await asyncio.to_thread(judge_from, {n: options[n] for n in _JUDGE if n in options})
    return await asyncio.to_thread(
        group_rewards,
        judge,
        [meeting.prompt] * len(meeting.images),
        meeting.images,
        rubric=load_rubric(rubric),
        reward=reward,
    )
