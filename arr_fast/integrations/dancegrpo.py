"""DanceGRPO (XueZeyue/DanceGRPO at 15cc71d): the reward model of its `--use_hpsv3` branch.

In fastvideo/train_grpo_qwenimage.py, train_grpo_qwenimage_edit.py and train_grpo_flux_lora.py:

    from arr_fast.integrations.dancegrpo import RewardInferencer
    reward_model = RewardInferencer(judge, rubric, device=device)  # for HPSv3RewardInferencer(...)

The trainer calls `reward_model.reward([path], [caption])` for one image at a time, takes a tensor
[N] or [N, 1] on its device, and normalises the rewards of a prompt's images itself, so images are
scored alone. It has no way to leave a sample out: an abstention gets `neutral`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arr_fast.integrations.groups import point_rewards


class RewardInferencer:
    """A reward model of DanceGRPO.

    Args:
        judge: The judge.
        rubric: See `Judge.score`.
        device: Of the rewards.
        neutral: Reward of an abstention; scores lie in [0, 1].
    """

    def __init__(
        self, judge: Any, rubric: Any = None, *, device: Any = "cpu", neutral: float = 0.5
    ) -> None:
        self._judge = judge
        self._rubric = rubric
        self._device = device
        self._neutral = neutral

    def reward(self, image_paths: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """P(yes) of each image, averaged over criteria.

        Args:
            image_paths: N paths or PIL images.
            prompts: N captions.

        Returns:
            float32 [N].
        """
        found = point_rewards(self._judge, prompts, image_paths, rubric=self._rubric)
        values = [self._neutral if reward is None else reward for reward in found]
        return torch.tensor(values, dtype=torch.float32, device=self._device)
