"""verl-omni's rendezvous: what happens between the first sample of a uid and the last."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from arr_fast.errors import VerdictError
from arr_fast.integrations import verl_omni
from tests.integrations.rankers import BrightnessRanker
from tests.ray.environment import BUSY_MACHINE


def call(uid: str | None, value: int, judge: Any, prompt: str = "p", **options: Any) -> Any:
    options = {"group_size": 3, "timeout_s": 5.0, "judge": judge, **options}
    image = np.full((3, 8, 9), value, np.uint8)
    return verl_omni.compute_score(
        data_source="x",
        solution_image=image,
        ground_truth=prompt,
        extra_info={"uid": uid},
        **options,
    )


class Slow(BrightnessRanker):
    """A judge that takes its time."""

    def rank(self, *args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return super().rank(*args, **options)


def test_a_slow_judge_does_not_count_as_a_missing_sample():
    async def main() -> list[dict[str, float]]:
        return await asyncio.gather(*(call("u", v, Slow(), timeout_s=0.2) for v in (1, 3, 2)))

    assert [found["score"] for found in asyncio.run(main())] == [0.0, 1.0, 0.5]


def test_all_that_wait_abstain_together_and_a_latecomer_on_its_own():
    async def main() -> list[dict[str, float]]:
        early = [
            asyncio.create_task(call("u", v, BrightnessRanker(), timeout_s=0.2)) for v in (1, 2)
        ]
        begun = time.monotonic()
        found = await asyncio.gather(*early)
        assert time.monotonic() - begun < 2.0
        return [*found, await call("u", 3, BrightnessRanker(), timeout_s=0.1)]

    abstained = {"score": 0.5, "abstained": 1.0}
    assert asyncio.run(main()) == [abstained] * 3
    assert not verl_omni._meetings


def test_a_cancelled_caller_does_not_take_the_group_with_it():
    async def main() -> list[Any]:
        tasks = [asyncio.create_task(call("u", v, Slow())) for v in (1, 3, 2)]
        await asyncio.sleep(0.1)
        # The last to come started the judging.
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, cancelled = asyncio.run(main())
    assert (first["score"], second["score"]) == (0.0, 1.0)
    assert isinstance(cancelled, asyncio.CancelledError)


def test_a_judge_that_fails_fails_for_all():
    async def main() -> list[Any]:
        tasks = [call("u", v, BrightnessRanker(fails_at=2)) for v in (1, 2, 3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(error) for error in asyncio.run(main())] == ["out of memory"] * 3


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (lambda: [call(None, 1, BrightnessRanker())], "uid"),
        (lambda: [call("u", 1, BrightnessRanker(), group_size=1)], "group_size"),
        (
            lambda: [
                call("u", 1, BrightnessRanker(), timeout_s=0.1),
                call("u", 2, BrightnessRanker(), prompt="q"),
            ],
            "different prompts",
        ),
    ],
    ids=["no-uid", "alone", "two-prompts"],
)
def test_what_makes_no_group_is_refused(calls, words):
    async def main() -> list[Any]:
        return await asyncio.gather(*calls(), return_exceptions=True)

    *_, error = asyncio.run(main())
    assert isinstance(error, VerdictError) and words in str(error)


@pytest.fixture(scope="module")
def ray_cluster():
    ray = pytest.importorskip("ray")
    os.environ.update(BUSY_MACHINE)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, namespace="test")
    yield ray
    ray.shutdown()


def worker(samples: list[tuple[str, int]], options: dict[str, Any]) -> list[dict[str, float]]:
    """One reward worker: its samples, all at once, in an event loop of its own process."""
    from arr_fast.integrations import verl_omni_ray

    async def main() -> list[dict[str, float]]:
        calls = [
            verl_omni_ray.compute_score(
                data_source="x",
                solution_image=np.full((3, 8, 9), value, np.uint8),
                ground_truth="p",
                extra_info={"uid": uid},
                reward_router_address=None,
                **options,
            )
            for uid, value in samples
        ]
        return await asyncio.gather(*calls)

    return asyncio.run(main())


@pytest.mark.ray
def test_samples_of_two_workers_meet_in_the_actor_and_strangers_do_not(ray_cluster):
    options = {"group_size": 2, "timeout_s": 60.0, "judge": BrightnessRanker(), "actor": "meeting"}
    remote = ray_cluster.remote(num_cpus=1)(worker)
    first = remote.remote([("u", 10), ("v", 50), ("w", 7), ("w", 8)], options)
    second = remote.remote([("v", 40), ("u", 20)], options)
    assert [found["score"] for found in ray_cluster.get(first)] == [0.0, 1.0, 0.0, 1.0]
    assert [found["score"] for found in ray_cluster.get(second)] == [0.0, 1.0]
    lonely = ray_cluster.get(remote.remote([("z", 1)], {**options, "timeout_s": 0.2}))
    assert lonely == [{"score": 0.5, "abstained": 1.0}]


@pytest.mark.ray
def test_an_actor_that_dies_or_hangs_makes_its_callers_abstain(ray_cluster):
    options = {"group_size": 2, "timeout_s": 60.0, "judge": BrightnessRanker(), "actor": "mortal"}
    remote = ray_cluster.remote(num_cpus=1)(worker)
    assert ray_cluster.get(remote.remote([("a", 1), ("a", 2)], options))[1]["score"] == 1.0
    waiting = remote.remote([("b", 1)], options)
    actor = ray_cluster.get_actor("mortal", namespace="arr-fast")
    time.sleep(2.0)
    os.kill(ray_cluster.get(actor.process_id.remote()), signal.SIGKILL)
    abstained = {"score": 0.5, "abstained": 1.0}
    assert ray_cluster.get(waiting) == [abstained]
    hanging = remote.remote([("c", 1)], {**options, "answer_timeout_s": 0.5})
    assert ray_cluster.get(hanging) == [abstained]
    # Ray starts the actor again for those that follow.
    deadline = time.monotonic() + 60.0
    while ray_cluster.get(remote.remote([("d", 1), ("d", 2)], options))[1]["score"] != 1.0:
        assert time.monotonic() < deadline
