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

The rendezvous is inside one process and one event loop: a group that is spread over reward workers
times out and abstains.
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


@dataclass(eq=False)
class _Meeting:
    """The samples of one uid that have come so far."""

    prompt: str
    images: list[Any] = field(default_factory=list)
    result: asyncio.Future[list[float | None]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


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
        timeout_s: How long the first sample waits for the last.
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
    loop = asyncio.get_running_loop()
    key = (loop, str(uid))
    meeting = _meetings.setdefault(key, _Meeting(ground_truth))
    if meeting.prompt != ground_truth:
        raise VerdictError(f"uid {uid!r} holds different prompts")
    place = len(meeting.images)
    meeting.images.append(solution_image)
    if len(meeting.images) == group_size:
        del _meetings[key]
        judge = judge_from(
            {n: v for n, v in judge_options.items() if n in ("judge", "model", "device", "dtype")}
        )
        try:
            rewards = await asyncio.to_thread(
                group_rewards,
                judge,
                [ground_truth] * group_size,
                meeting.images,
                rubric=load_rubric(rubric),
                reward=reward,
            )
        except Exception as error:
            meeting.result.set_exception(error)
        else:
            meeting.result.set_result(rewards)
    try:
        rewards = await asyncio.wait_for(asyncio.shield(meeting.result), timeout_s)
    except TimeoutError:
        # A latecomer of this uid starts a meeting of its own, and times out alone.
        if _meetings.get(key) is meeting:
            del _meetings[key]
        logger.warning("uid %s: %d of %d came in time", uid, len(meeting.images), group_size)
        return {"score": neutral, "abstained": 1.0}
    filled = fill_abstentions(rewards, [uid] * len(rewards), neutral=neutral)
    return {"score": filled[place], "abstained": float(rewards[place] is None)}
