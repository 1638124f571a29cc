"""MixGRPO (Tencent-Hunyuan/MixGRPO at e5cdd6a) and DanceGRPO (XueZeyue/DanceGRPO at 15cc71d).

MixGRPO's reward models are callables `model(images, prompts)`; the UnifiedReward kind returns
`(rewards, successes)`, where a success of 0 takes the sample out. DanceGRPO calls its reward
inline, one image or path and one caption at a time; `score_one` is that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arr_fast.integrations.groups import RewardName, group_rewards


class ArrFastRewardModel:
    """A reward model of these loops.

    Args:
        judge: The judge.
        rubric: See `Judge.compare`.
        reward: See `group_rewards`.
    """

    def __init__(self, judge: Any, rubric: Any = None, reward: RewardName = "win_rate") -> None:
        self._judge = judge
        self._rubric = rubric
        self._reward: RewardName = reward

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str] | str
    ) -> tuple[list[float], list[int]]:
        """Rewards and successes, N each; an abstention has reward 0 and success 0."""
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        rewards = group_rewards(
            self._judge, texts, images, rubric=self._rubric, reward=self._reward
        )
        return [r or 0.0 for r in rewards], [int(r is not None) for r in rewards]

    def score_one(self, image: Any, caption: str) -> float | None:
        """P(yes) of one image (PIL or a path), averaged over criteria; None for an abstention."""
        verdicts = self._judge.score([caption], [image], self._rubric)
        return float(verdicts.score[0]) if verdicts.status[0] == "ok" else None
