"""Our callables take the calls that the loops make, argument by argument."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arr_fast.integrations import flow_grpo, trl, verl_omni
from arr_fast.integrations.dancegrpo import RewardInferencer
from arr_fast.integrations.flow_factory import ArrFastReward
from arr_fast.integrations.mixgrpo import UnifiedRewardModel
from tests.integrations.rankers import BrightnessRanker
from tests.integrations.upstream_calls import CALLS, UpstreamCall

ROOT = Path(__file__).parents[2]


def callables() -> dict[str, Callable[..., Any]]:
    judge = BrightnessRanker()
    multi_score = flow_grpo.multi_score_with(judge=judge)
    return {
        "flow_grpo.multi_score": multi_score,
        "flow_grpo.reward_fn": multi_score("cpu", {"arr_fast": 1.0}),
        "flow_grpo.factory": flow_grpo.arr_fast_score,
        "flow_grpo.score": flow_grpo.arr_fast_score("cpu", judge=judge),
        "flow_factory.model": functools.partial(ArrFastReward.__call__, None),
        # The loop binds the keys of its configuration beforehand.
        "verl_omni.compute_score": functools.partial(verl_omni.compute_score, group_size=2),
        "mixgrpo.model": UnifiedRewardModel(judge),
        "dancegrpo.reward": RewardInferencer(judge).reward,
        "trl.sync": trl.sync_reward(judge, lambda text, row: None),
        "trl.async": trl.async_reward(judge, lambda text, row: None),
    }


@pytest.mark.parametrize("upstream", CALLS, ids=lambda call: call.name)
def test_the_call_binds(upstream: UpstreamCall) -> None:
    call = ast.parse(upstream.call, mode="eval").body
    assert isinstance(call, ast.Call)
    given = [ast.unparse(argument) for argument in call.args]
    named = {str(word.arg): ast.unparse(word.value) for word in call.keywords}
    bound = inspect.signature(callables()[upstream.name]).bind(*given, **named)
    # A name that both sides use must reach the parameter of that name.
    for name, value in bound.arguments.items():
        if isinstance(value, str) and value in bound.signature.parameters:
            assert name == value, f"{value} arrives as {name}"


@pytest.mark.parametrize("upstream", CALLS, ids=lambda call: call.name)
def test_the_adapter_names_the_commit(upstream: UpstreamCall) -> None:
    module = upstream.name.partition(".")[0]
    text = (ROOT / "arr_fast" / "integrations" / f"{module}.py").read_text("utf-8")
    assert f"{upstream.repository} at {upstream.commit[:7]}" in text


def test_every_adapter_of_a_loop_is_held_to_a_call() -> None:
    held = {call.name.partition(".")[0] for call in CALLS}
    assert held == {"flow_grpo", "flow_factory", "verl_omni", "mixgrpo", "dancegrpo", "trl"}
    assert set(callables()) == {call.name for call in CALLS}
