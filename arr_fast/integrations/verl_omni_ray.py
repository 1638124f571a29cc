"""verl-omni with several reward workers: samples of one uid meet in a Ray actor.

The call is that of verl_omni.py. Each worker hands its sample to one named actor of the cluster,
which holds the judge and waits there for the rest of the group:

    +reward.reward_functions.arr.path=pkg://arr_fast.integrations.verl_omni_ray
    +reward.reward_functions.arr.name=compute_score
    +reward.reward_functions.arr.group_size=8
    +reward.reward_functions.arr.model=Qwen/Qwen3-VL-8B-Instruct
    +reward.reward_functions.arr.actor_gpus=1

A group that does not come together in time abstains, and so does a sample whose actor died or did
not answer; Ray starts the actor again for those that follow.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import numpy as np

from arr_fast.errors import MissingDependencyError
from arr_fast.integrations import verl_omni

logger = logging.getLogger("arr_fast.integrations")

NAMESPACE = "arr-fast"
WAITING = 4096


class MeetingPlace:
    """The actor: verl_omni.py's rendezvous, in the actor's own event loop."""

    async def process_id(self) -> int:
        """The actor's process, for operators."""
        return os.getpid()

    async def score(
        self, image: np.ndarray, prompt: str, uid: str, options: dict[str, Any]
    ) -> dict[str, float]:
        """The reward of one sample, once its group is there; see `verl_omni.compute_score`."""
        return await verl_omni.compute_score("", image, prompt, {"uid": uid}, **options)


async def compute_score(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    group_size: int,
    timeout_s: float = 60.0,
    answer_timeout_s: float = 600.0,
    neutral: float = 0.5,
    actor: str = "arr-fast-meeting-place",
    actor_gpus: float = 0.0,
    actor_cpus: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """The reward of one sample inside its group, wherever the group's other samples are.

    Args:
        data_source, solution_image, ground_truth, extra_info, group_size, timeout_s, neutral: See
            `verl_omni.compute_score`.
        answer_timeout_s: How long this sample waits in all: for its group, and for the judge.
        actor: Name of the actor; rewards of another configuration need another name.
        actor_gpus, actor_cpus: What Ray reserves for the actor.
        **options: `model`, `rubric`, `reward` and more of `verl_omni.compute_score`.

    Raises:
        VerdictError: As `verl_omni.compute_score`.
        MissingDependencyError: The extra `ray` is not installed.
    """
    del data_source
    try:
        import ray
        from ray.exceptions import RayActorError
    except ImportError as error:
        raise MissingDependencyError("ray", "ray") from error
    uid = extra_info.get("uid")
    place: Any = (
        ray.remote(MeetingPlace)
        .options(
            name=actor,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_concurrency=WAITING,
            max_restarts=-1,
            num_gpus=actor_gpus,
            num_cpus=actor_cpus,
        )
        .remote()
    )
    plain = {name: value for name, value in options.items() if name in verl_omni.FORWARDED}
    plain |= {"group_size": group_size, "timeout_s": timeout_s, "neutral": neutral}
    reference = place.score.remote(np.asarray(solution_image), ground_truth, uid, plain)
    try:
        found: dict[str, float] = await asyncio.wait_for(reference, answer_timeout_s)
    except TimeoutError:
        logger.warning("uid %s: no answer within %g s", uid, answer_timeout_s)
        return verl_omni.abstention(neutral)
    except RayActorError as error:
        logger.warning("uid %s: the judge's actor is gone: %s", uid, error)
        return verl_omni.abstention(neutral)
    return found
