"""Group rewards: candidates meet only their own prompt's rivals, and abstentions teach nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arr_fast.errors import VerdictError
from arr_fast.images import to_image
from arr_fast.integrations.groups import (
    fill_abstentions,
    group_keys,
    group_rewards,
    places_by_key,
)
from arr_fast.verdicts import GroupVerdicts
from tests.integrations.rankers import ranked


class Ranker:
    """Ranks numbers by size; None is an image that cannot be judged."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[list[Any]]]] = []

    def rank(self, prompts: Any, groups: Any, rubric: Any, **options: Any) -> GroupVerdicts:
        self.calls.append((prompts, groups))
        return ranked(groups, lambda value: None if value is None else float(value))


def test_groups_are_formed_by_prompt_and_rewards_return_in_order() -> None:
    ranker = Ranker()
    prompts = ["x", "y", "x", "y", "x"]
    rewards = group_rewards(ranker, prompts, [3, 1, 1, 2, 2])  # type: ignore[arg-type]
    assert ranker.calls == [(["x", "y"], [[3, 1, 2], [1, 2]])]
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.5]


def test_rpo_rewards_are_equation_11_for_a_pair_and_ties_are_zero() -> None:
    prompts = ["x", "x", "y", "y"]
    got = group_rewards(Ranker(), prompts, [2, 1, 5, 5], reward="rpo")  # type: ignore[arg-type]
    assert got == pytest.approx([1.0, -0.1, 0.0, 0.0])


def test_an_image_without_verdict_is_none_and_filled_with_its_group_mean() -> None:
    prompts = ["x"] * 3 + ["y"] * 2
    images = [1, None, 2, None, 4]
    got = group_rewards(Ranker(), prompts, images)  # type: ignore[arg-type]
    assert got == [0.0, None, 1.0, None, None]
    assert fill_abstentions(got, prompts) == [0.0, 0.5, 1.0, 0.5, 0.5]
    assert fill_abstentions(got, prompts, neutral=0.25)[3:] == [0.25, 0.25]
    with pytest.raises(VerdictError, match="no verdict on any of 2"):
        fill_abstentions([None, None], ["x", "x"])


@pytest.mark.parametrize(
    "prompts,images,keys,message",
    [
        (["x", "y"], [1, 2], None, "has 1 image"),
        (["x", "y"], [1, 2], ["k", "k"], "holds different prompts"),
        (["x"], [1, 2], None, "images has 2 items, prompts has 1"),
    ],
)
def test_wrong_groups_are_refused(
    prompts: list[str], images: list[int], keys: list[str] | None, message: str
) -> None:
    with pytest.raises(VerdictError, match=message):
        group_rewards(Ranker(), prompts, images, keys=keys)  # type: ignore[arg-type]


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(VerdictError, match="reward must be one of"):
        group_rewards(Ranker(), ["x"], [1], reward="best")  # type: ignore[arg-type]


def test_places_keep_the_order_of_first_appearance() -> None:
    assert places_by_key(["b", "a", "b"]) == {"b": [0, 2], "a": [1]}


def test_edits_are_keyed_by_prompt_and_source_pixels() -> None:
    grey = np.full((5, 6, 3), 7, np.uint8)
    sources = [grey, to_image(grey, name="x").to_pil(), grey + 1]
    first, same, other = group_keys(["x", "x", "x"], sources)
    assert first == same and first != other
    assert group_keys(["x", "y"]) == ["x", "y"]
    with pytest.raises(VerdictError, match="sources has 3 items, prompts has 1"):
        group_keys(["x"], sources)
