"""MixGRPO (Tencent-Hunyuan/MixGRPO at e5cdd6a): a reward model for its `compute_reward`.

`compute_reward` (fastvideo/models/reward_model/utils.py) tells reward models apart by the name of
their class, so this one bears the name whose contract it keeps: `UnifiedRewardModel` is called as
`model(images, prompts)` and returns `(rewards, successes)`; a success of 0 takes the sample out. In
fastvideo/train_grpo_flux.py:

    from arr_fast.integrations.mixgrpo import UnifiedRewardModel
    reward_models.append(UnifiedRewardModel(judge, rubric))   # in place of UnifiedRewardModel(...)

The trainer passes one image with its prompt, as soon as that image is there. Nothing can be
compared then, so images are scored alone; `reward` is for callers that pass whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arr_fast.integrations.groups import RewardName, group_rewards, point_rewards


class UnifiedRewardModel:
    """A reward model of MixGRPO.

    Args:
        judge: The judge.
        rubric: See `Judge.score` and `Judge.compare`.
        reward: None scores each image alone: P(yes), averaged over criteria. A name (see
            `group_rewards`) compares the images of each prompt.
    """

    def __init__(self, judge: Any, rubric: Any = None, reward: RewardName | None = None) -> None:
        self._judge = judge
        self._rubric = rubric
        self._reward = reward

    def __call__(
        self,
        images: Sequence[Any],
        prompts: Sequence[str] | str,
        question_type: str | None = None,
    ) -> tuple[list[float], list[int]]:
        """Rewards and successes, N each; an abstention has reward 0 and success 0.

        Args:
            images: N images, PIL or paths.
            prompts: N prompts, or one for all.
            question_type: Ignored; the rubric says what is asked.
        """
        del question_type
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if self._reward is None:
            rewards = point_rewards(self._judge, texts, images, rubric=self._rubric)
        else:
            rewards = group_rewards(
                self._judge, texts, images, rubric=self._rubric, reward=self._reward
            )
        return [r or 0.0 for r in rewards], [int(r is not None) for r in rewards]
