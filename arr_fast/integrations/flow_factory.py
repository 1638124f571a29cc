"""Flow-Factory (X-GenGroup/Flow-Factory at a0b2bc5): a group-wise reward model.

The trainer's YAML:

    rewards:
      - name: arr
        reward_model: arr_fast.integrations.flow_factory.ArrFastReward
        weight: 1.0
        model: Qwen/Qwen3-VL-8B-Instruct    # any further key reaches config.extra_kwargs
        rubric: rubric.yaml
        reward: win_rate

Flow-Factory calls it once per group: lists of prompts, PIL images and, for edits, condition images,
in the order of the group; it wants `RewardModelOutput(rewards, extra_info)`. Every abstention gets
the group's mean, so that its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arr_fast.errors import VerdictError
from arr_fast.integrations.groups import fill_abstentions, group_keys, group_rewards
from arr_fast.integrations.loading import judge_from, load_rubric


@dataclass(frozen=True)
class RewardOutput:
    """Stands in for Flow-Factory's RewardModelOutput where that package is not installed."""

    rewards: list[float]
    extra_info: dict[str, Any] | None = None


class ArrFastReward:
    """A GroupwiseRewardModel by its surface; Flow-Factory builds it from its YAML.

    Args:
        config: RewardArguments; reads `extra_kwargs` (model, rubric, reward and judge options).
        accelerator: accelerate's Accelerator; its device is the judge's.
    """

    required_fields = ("image", "prompt")
    use_tensor_inputs = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        options = dict(config.extra_kwargs)
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.model = None
        self._rubric = load_rubric(options.pop("rubric", None))
        self._reward = options.pop("reward", "win_rate")
        self._judge = judge_from(options, device=str(self.device))

    def to(self, device: Any) -> ArrFastReward:
        """Flow-Factory may call this; the judge stays where it was loaded."""
        del device
        return self

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        condition_images: Sequence[Sequence[Any]] | None = None,
        **ignored: Any,
    ) -> Any:
        """Rewards of one group.

        Args:
            prompt: The group's prompt, G times.
            image: G images.
            condition_images: For edits, one source image for each.
            **ignored: Further fields of the samples; video is refused.

        Raises:
            VerdictError: No images, or more than one condition image.
        """
        if image is None or ignored.get("video") is not None:
            raise VerdictError("ArrFastReward judges images; image is missing or video was given")
        sources = None
        if condition_images is not None:
            if any(len(images) != 1 for images in condition_images):
                raise VerdictError("condition_images must hold one image per sample")
            sources = [images[0] for images in condition_images]
        rewards = group_rewards(
            self._judge, prompt, image, sources=sources, rubric=self._rubric, reward=self._reward
        )
        return _output(
            fill_abstentions(rewards, group_keys(prompt, sources), neutral=0.0),
            {"abstentions": sum(reward is None for reward in rewards)},
        )


def _output(rewards: list[float], info: dict[str, Any]) -> Any:
    try:
        from flow_factory.rewards.abc import RewardModelOutput
    except ImportError:
        return RewardOutput(rewards, info)
    return RewardModelOutput(rewards=rewards, extra_info=info)
