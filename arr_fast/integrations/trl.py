"""TRL's GRPOTrainer (huggingface/trl at f2cd577): reward functions, sync and async.

TRL calls `f(prompts=..., completions=..., completion_ids=..., **columns)` with a flat batch in
group order and takes a list of float or None; None is left out of the loss, so an abstention
stays None. TRL trains language models: the images that a completion stands for come from
`image_of`, which maps (completion, columns of its row) to an image. TRL recognises an async
reward by its being a real `async def`, which is what `async_reward` returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from arr_fast.integrations.distributed import GroupGather
from arr_fast.integrations.groups import RewardName, group_rewards

ImageOf = Callable[[Any, dict[str, Any]], Any]


def sync_reward(
    judge: Any,
    image_of: ImageOf,
    *,
    rubric: Any = None,
    reward: RewardName = "win_rate",
    group_column: str | None = None,
    gather: bool = False,
) -> Callable[..., list[float | None]]:
    """A reward function for `reward_funcs`.

    Args:
        judge: The judge.
        image_of: Turns a completion and its row into an image.
        rubric: See `Judge.compare`.
        reward: See `group_rewards`.
        group_column: Dataset column that tells groups apart; by default the prompt does.
        gather: True where a group may straddle ranks, because the batch of a device is no multiple
            of num_generations; then every rank must call the reward (AsyncGRPO's workers do not).
    """
    gathers: list[GroupGather] = []

    def arr_fast_reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        texts = [prompt_text(prompt) for prompt in prompts]
        rows = [
            {n: v[i] for n, v in columns.items() if isinstance(v, list) and len(v) == len(texts)}
            for i in range(len(texts))
        ]
        images = [image_of(c, row) for c, row in zip(completions, rows, strict=True)]
        keys = texts if group_column is None else [row[group_column] for row in rows]
        options: dict[str, Any] = {"keys": keys, "rubric": rubric, "reward": reward}
        if not gather:
            return group_rewards(judge, texts, images, **options)
        if not gathers:
            # Rewards are often made before the trainer has joined its process group.
            gathers.append(GroupGather())
        return gathers[0].rewards(judge, texts, images, **options)

    return arr_fast_reward


def async_reward(
    judge: Any, image_of: ImageOf, **options: Any
) -> Callable[..., Awaitable[list[float | None]]]:
    """The same as a true `async def`; the judge runs in a thread beside the event loop."""
    inner = sync_reward(judge, image_of, **options)

    async def arr_fast_reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return await asyncio.to_thread(inner, prompts, completions, **columns)

    return arr_fast_reward


def prompt_text(prompt: Any) -> str:
    """A prompt as text: itself, or the last user message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    content = next(m["content"] for m in reversed(prompt) if m["role"] == "user")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
