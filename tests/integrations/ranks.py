"""One rank of the data-parallel tests: run as a script, prints its answers as one JSON line.

usage: python -m tests.integrations.ranks RANK WORLD PORT
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from arr_fast.errors import VerdictError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.integrations.distributed import GroupGather
from tests.integrations.rankers import BrightnessRanker


def grey(value: int, side: int = 8) -> CanonicalImage:
    return to_image(np.full((side, side, 3), value, np.uint8), name="grey")


# What each rank holds: prompts, brightness of the images, brightness of the sources.
CASES: dict[str, list[tuple[list[str], list[int | None], list[int] | None]]] = {
    "spread": [
        (["x", "y", "z", "z"], [10, 40, 1, 2], None),
        (["y", "x", "x", "z"], [30, 20, 5, 3], None),
    ],
    "edits": [(["x", "x", "x"], [10, 20, 30], [1, 2, 1]), (["x"], [15], [2])],
    "unreadable": [(["x", "y"], [10, 40], None), (["x", "y", "y"], [None, 50, 60], None)],
    "abstains": [(["x", "y"], [10, 1], None), (["x", "x", "y"], [255, 30, 2], None)],
    "alone": [(["x", "y"], [10, 40], None), (["x"], [20], None)],
    "uneven": [(["x"], [10], None), (["x"] * 5, [20, 30, 40, 50, 60], None)],
    "nothing here": [([], [], None), (["x", "x"], [20, 30], None)],
    "mixed tasks": [(["x"], [10], [1]), (["x"], [20], None)],
    "one fails": [(["x", "y"], [10, 40], None), (["x", "y"], [20, 77], None)],
}


def main(rank: int, world: int, port: str) -> dict[str, Any]:
    """Runs every case under accelerate's state, as a training job would."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == world
    gather = GroupGather(timeout_s=60.0)
    answers = {case: answer(gather, state, *ranks[rank]) for case, ranks in CASES.items()}
    state.destroy_process_group()
    return answers


def answer(
    gather: GroupGather,
    state: Any,
    prompts: list[str],
    values: list[int | None],
    sources: list[int] | None,
) -> dict[str, Any]:
    """This rank's rewards in one case, or the error."""
    images = [b"broken" if value is None else grey(value) for value in values]
    judge = BrightnessRanker(fails_at=77)
    options = {"sources": None if sources is None else [grey(value) for value in sources]}
    try:
        rewards = gather.rewards(judge, prompts, images, **options)
    except VerdictError as error:
        return {"error": str(error)}
    seen = list(judge.seen)
    # As flow_grpo does it: several rewards in flight in a thread pool, and the trainer's own
    # collectives in between.
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(gather.filled_rewards, judge, prompts, images, neutral=-7.0, **options)
            for _ in range(3)
        ]
        state.wait_for_everyone()
        filled = [future.result() for future in futures]
    assert all(one == filled[0] for one in filled)
    return {"rewards": rewards, "filled": filled[0], "seen": seen}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
