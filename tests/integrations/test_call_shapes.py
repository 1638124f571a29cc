"""Each loop's call, with the arguments that its trainer at the pinned commit passes."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arr_fast.errors import ArrFastError, VerdictError
from arr_fast.integrations import verl_omni
from arr_fast.integrations.arr_reference import Judger
from arr_fast.integrations.dancegrpo import RewardInferencer
from arr_fast.integrations.flow_factory import ArrFastReward
from arr_fast.integrations.flow_grpo import arr_fast_score, edit_r1_score, multi_score_with
from arr_fast.integrations.groups import fill_abstentions, group_rewards
from arr_fast.integrations.mixgrpo import UnifiedRewardModel
from arr_fast.integrations.openjudge import ArrFastPairwiseJudge
from arr_fast.integrations.trl import async_reward, sync_reward
from arr_fast.judge import Judge
from tests.engine import scenes
from tests.integrations.rankers import BrightnessRanker
from tests.integrations.ranks import grey

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
RUBRIC = scenes.rubric(2)
EDIT = scenes.rubric(2, task="edit")
PROMPTS = ["a", "b", "a", "b"]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


def batch(count: int = 4) -> torch.Tensor:
    """NCHW floats in [0, 1], as flow_grpo's pipelines return them."""
    pixels = np.stack([np.asarray(scenes.image(56, 56, n).pixels) for n in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def pil(count: int = 4, seed: int = 0) -> list:
    return [scenes.image(56, 56, seed + n).to_pil() for n in range(count)]


@pytest.fixture(scope="module")
def expected(judge) -> list[float]:
    """Rewards straight from pairwise comparisons, prompt by prompt."""
    images, rewards = pil(), [0.0] * 4
    for i, j in ((0, 2), (1, 3)):
        (winner,) = judge.compare([PROMPTS[i]], [images[i]], [images[j]], RUBRIC).winner
        rewards[i] = {"A": 1.0, "B": 0.0, "tie": 0.5}[winner]
        rewards[j] = 1.0 - rewards[i]
    return rewards


def test_flow_grpo(judge, expected):
    assert "device" in arr_fast_score.__code__.co_varnames
    fn = arr_fast_score("cpu", judge=judge, rubric=RUBRIC)
    scores, info = fn(batch(), PROMPTS, [{}] * 4, only_strict=True)
    assert scores == expected and info == {}
    nhwc = (batch().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    assert fn(nhwc, tuple(PROMPTS), [{}] * 4)[0] == expected
    with pytest.raises(VerdictError, match="1 image on all 1 ranks"):
        fn(batch(3), ["a", "b", "a"], [{}] * 3)
    point = arr_fast_score("cpu", judge=judge, rubric=RUBRIC, pointwise=True)
    np.testing.assert_allclose(
        point(batch(3), ["a", "b", "a"], {})[0],
        judge.score(["a", "b", "a"], pil(3), RUBRIC).score,
        atol=1e-4,
    )


def test_flow_grpo_multi_score_joins_the_table(judge, expected):
    def original(device, score_dict):
        assert score_dict == {"ocr": 2.0}

        def fn(images, prompts, metadata, only_strict=True):
            return {"ocr": [1.0] * 4, "avg": [2.0] * 4}, {}

        return fn

    made = multi_score_with(original, judge=judge, rubric=RUBRIC)
    details, _ = made("cpu", {"ocr": 2.0, "arr_fast": 3.0})(batch(), PROMPTS, {}, only_strict=True)
    assert details["arr_fast"] == expected
    assert details["avg"] == [2.0 + 3.0 * r for r in expected]
    for value in details.values():
        assert torch.as_tensor(value).float().shape == (4,)
    with pytest.raises(ValueError, match="ocr"):
        multi_score_with(None)("cpu", {"ocr": 1.0})


def test_edits_are_grouped_by_source_and_edit_r1_has_its_own_order(judge):
    sources = [*pil(1, 60), *pil(1, 61), *pil(1, 60), *pil(1, 61)]
    fn = arr_fast_score("cpu", judge=judge, rubric=EDIT)
    scores = fn(batch(), ["red"] * 4, {}, sources, only_strict=False)[0]
    for i, j in ((0, 2), (1, 3)):
        images = pil()
        found = judge.compare(["red"], [images[i]], [images[j]], EDIT, sources=[sources[i]])
        assert scores[i] == {"A": 1.0, "B": 0.0, "tie": 0.5}[found.winner[0]]
    other = edit_r1_score("cpu", judge=judge, rubric=EDIT)
    assert other(sources, batch(), ["red"] * 4, [{"requirement": ""}] * 4)[0] == scores


def test_flow_factory(judge):
    extra = {"judge": judge, "rubric": RUBRIC}
    config = SimpleNamespace(extra_kwargs=extra, device="cpu", dtype=torch.float32)
    model = ArrFastReward(config, SimpleNamespace(device=torch.device("cpu")))
    images = pil(3)
    output = model(prompt=["a"] * 3, image=images, video=None, condition_images=None)
    assert output.rewards == [float(r) for r in judge.rank(["a"], [images], RUBRIC).win_rate[0]]
    assert output.extra_info == {"abstentions": 0}
    with pytest.raises(VerdictError, match="image"):
        model(prompt=["a"] * 3, video=[images])


@pytest.mark.parametrize("loop", ["flow_grpo", "flow_factory"])
def test_an_edit_without_verdict_gets_the_mean_of_its_own_source(loop):
    # One instruction, two sources: the second source's group is the one with an abstention.
    judge, values, sources = BrightnessRanker(), [10, 20, 255, 40, 30, 50], [1, 1, 2, 2, 2, 2]
    images, sources = [grey(v) for v in values], [grey(v) for v in sources]
    if loop == "flow_grpo":
        rewards = arr_fast_score("cpu", judge=judge)(images, ["red"] * 6, {}, sources)[0]
    else:
        config = SimpleNamespace(extra_kwargs={"judge": judge})
        model = ArrFastReward(config, SimpleNamespace(device="cpu"))
        rewards = model(prompt=["red"] * 6, image=images, condition_images=[[s] for s in sources])
        assert rewards.extra_info == {"abstentions": 1}
        rewards = rewards.rewards
    assert rewards == [0.0, 1.0, 0.5, 0.5, 0.0, 1.0]


def test_trl_sync_and_async(judge, expected):
    images = pil()
    calls = {
        "prompts": PROMPTS,
        "completions": ["0", "1", "2", "3"],
        "completion_ids": [[1]] * 4,
        "trainer_state": None,
    }
    sync = sync_reward(judge, lambda text, row: images[int(text)], rubric=RUBRIC)
    assert sync(**calls) == expected
    gathered = sync_reward(judge, lambda text, row: images[int(text)], rubric=RUBRIC, gather=True)
    assert [gathered(**calls), gathered(**calls)] == [expected] * 2
    future = async_reward(judge, lambda text, row: images[int(text)], rubric=RUBRIC)
    assert inspect.iscoroutinefunction(future)
    assert asyncio.run(future(**calls)) == expected


def test_an_abstention_stays_none_in_trl_and_is_the_group_mean_elsewhere(judge):
    broken = [*pil(2), b"not an image", *pil(1, 9)]
    rewards = group_rewards(judge, ["a", "b", "a", "b"], broken, rubric=RUBRIC)
    assert rewards[0] is None and rewards[2] is None
    assert None not in (rewards[1], rewards[3])
    assert fill_abstentions([1.0, None, 0.0, None], ["x", "x", "x", "y"]) == [1.0, 0.5, 0.0, 0.5]
    with pytest.raises(VerdictError, match="no verdict"):
        fill_abstentions([None, None], ["x", "x"])


def test_groups_never_cross_prompts(judge):
    with pytest.raises(VerdictError, match="different prompts"):
        group_rewards(judge, ["a", "b"], pil(2), keys=["same", "same"], rubric=RUBRIC)


def test_mixgrpo(judge, expected):
    model = UnifiedRewardModel(judge, RUBRIC)
    # Its compute_reward raises on class names that it does not know.
    assert type(model).__name__ == "UnifiedRewardModel"
    scores = judge.score(PROMPTS, pil(), RUBRIC).score
    for image, prompt, score in zip(pil(), PROMPTS, scores, strict=True):
        rewards, successes = model([image], [prompt])
        assert rewards == [pytest.approx(score, abs=1e-4)] and successes == [1]
    assert model([b"not an image"], ["a"]) == ([0.0], [0])
    assert UnifiedRewardModel(judge, RUBRIC, "win_rate")(pil(), PROMPTS) == (expected, [1] * 4)


def test_dancegrpo(judge, tmp_path):
    (image,) = pil(1)
    image.save(tmp_path / "qwenimage_0_0.png")
    model = RewardInferencer(judge, RUBRIC, device=torch.device("cpu"), neutral=0.25)
    rewards = [
        model.reward([str(tmp_path / name)], ["a"]) for name in ("qwenimage_0_0.png", "lost.png")
    ]
    joined = torch.cat(rewards)
    score = judge.score(["a"], [image], RUBRIC).score[0]
    torch.testing.assert_close(joined, torch.tensor([score, 0.25]).float(), atol=1e-4, rtol=0.0)


def test_openjudge(judge):
    images = pil()
    pairs = [[images[0], images[2]], [images[2], images[0]], [images[1], images[1]]]
    found = ArrFastPairwiseJudge(judge, RUBRIC).judge(["a"] * 3, pairs, shuffle_order=True)
    winners = judge.compare(["a"] * 3, *zip(*pairs, strict=True), RUBRIC).winner
    assert found == [{"A": 0, "B": 1, "tie": -1}[w] for w in winners]
    assert found[2] == -1
    assert sorted(found[:2]) in ([0, 1], [-1, -1])


def verl(judge, uid: str, image, prompt: str, **more):
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return verl_omni.compute_score(
        data_source="x",
        solution_image=tensor,
        ground_truth=prompt,
        extra_info={"uid": uid, "num_turns": 1},
        group_size=2,
        judge=judge,
        rubric=RUBRIC,
        reward_router_address=None,
        **more,
    )


def test_verl_omni_meets_by_uid_and_abstains_when_nobody_comes(judge, expected):
    images = pil()

    async def main():
        calls = [verl(judge, f"u{p}", i, p) for i, p in zip(images, PROMPTS, strict=True)]
        return await asyncio.gather(*calls, verl(judge, "lonely", images[0], "a", timeout_s=0.2))

    *found, lonely = asyncio.run(main())
    assert [f["score"] for f in found] == expected
    assert lonely == {"score": 0.5, "abstained": 1.0}
    assert not verl_omni._meetings


def test_arr_reference_judger(judge, tmp_path):
    (tmp_path / "t2i.yaml").write_text(
        'grader_name: "x"\ntask_type: "t2i"\neval_mode: "pairwise"\nmodel_name: "m"\n'
        'base_url: "http://localhost:8000/v1"\nrubrics: |\n  1. Sharp edges.\n  2. A dog.\n'
    )
    for n, image in enumerate(pil(2)):
        image.save(tmp_path / f"{n}.png")
    paths = [str(tmp_path / f"{n}.png") for n in range(2)]

    async def main():
        judger = await Judger(str(tmp_path / "t2i.yaml"), judge=judge).initialize()
        item = {"query": "a dog", "response": paths}
        return await judger.get_reward_single(item, "cpu"), await judger.get_reward([item])

    reward, (rank,) = asyncio.run(main())
    if rank is None:
        assert reward.tolist() == [0.0, 0.0]
    else:
        assert sorted(rank) == [1, 2]
        torch.testing.assert_close(reward, torch.tensor([1.0 if r == 1 else -0.1 for r in rank]))
    (tmp_path / "bare.yaml").write_text('model_name: "m"\n')
    with pytest.raises(ArrFastError, match="rubrics"):
        asyncio.run(Judger(tmp_path / "bare.yaml", judge=judge).initialize())
