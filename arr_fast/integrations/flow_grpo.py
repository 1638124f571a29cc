"""flow_grpo (yifan123/flow_grpo at ac4c86e; edit trainers at 54809b5), DiffusionNFT and Edit-R1.

flow_grpo knows its rewards by a table inside `multi_score`; the one way in without editing it is

    import flow_grpo.rewards
    from arr_fast.integrations.flow_grpo import multi_score_with
    flow_grpo.rewards.multi_score = multi_score_with(flow_grpo.rewards.multi_score)
    config.reward_fn = {"arr_fast": 1.0}

A reward is made by a plain function that takes `device` (flow_grpo looks for that name in the
function's code) and is called as `fn(images, prompts, metadata)` with images as a float tensor
[N, C, H, W] in [0, 1] or uint8 [N, H, W, C]; it returns `(scores, {})`, N numbers. flow_grpo
spreads the images of a prompt over its ranks: under torch.distributed they are gathered by prompt
(see distributed.py), and a group of one in the whole job is refused, never paired with another
prompt's. `pointwise=True` scores images alone, which is also what flow_grpo's evaluation needs: it
draws one image per prompt. An abstention gets the mean of its group, since a sentinel of -10 would
be trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arr_fast.integrations.distributed import GroupGather
from arr_fast.integrations.groups import fill_abstentions, group_keys, point_rewards
from arr_fast.integrations.loading import judge_from, load_rubric

Scores = tuple[list[float], dict[str, Any]]
NAME = "arr_fast"


def arr_fast_score(device: Any, **options: Any) -> Callable[..., Scores]:
    """A flow_grpo reward.

    Args:
        device: Where to load the judge.
        **options: `model` or `judge`, `rubric`, `reward` (see `group_rewards`), `pointwise`, and
            arguments of `Judge.from_pretrained`. All ranks must make their reward together: it
            opens a process group of its own.

    Returns:
        `fn(images, prompts, metadata, ref_images=None, only_strict=True) -> (scores, {})`.
    """
    rubric = load_rubric(options.pop("rubric", None))
    reward = options.pop("reward", "win_rate")
    pointwise = bool(options.pop("pointwise", False))
    gather = None if pointwise else GroupGather()
    judge = judge_from(options, device=str(device))

    def fn(
        images: Any,
        prompts: Sequence[str],
        metadata: Any = None,
        ref_images: Sequence[Any] | None = None,
        only_strict: bool = True,
    ) -> Scores:
        del metadata, only_strict
        if gather is not None:
            options = {"sources": ref_images, "rubric": rubric, "reward": reward}
            return gather.filled_rewards(judge, prompts, images, **options), {}
        scores = point_rewards(judge, prompts, images, sources=ref_images, rubric=rubric)
        return fill_abstentions(scores, group_keys(prompts, ref_images), neutral=0.0), {}

    return fn


def edit_r1_score(device: Any, **options: Any) -> Callable[..., Scores]:
    """Edit-R1's order of arguments: `fn(ref_images, images, prompts, metadatas)`."""
    inner = arr_fast_score(device, **options)

    def fn(
        ref_images: Sequence[Any], images: Any, prompts: Sequence[str], metadatas: Any = None
    ) -> Scores:
        return inner(images, prompts, metadatas, ref_images)

    return fn


def multi_score_with(
    original: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Callable[..., tuple[dict[str, Any], dict[str, Any]]]]:
    """A `multi_score` that also knows "arr_fast".

    Args:
        original: flow_grpo's own, for the other names; None where there are none.
        **options: Of `arr_fast_score`.

    Returns:
        `multi_score(device, score_dict) -> fn(images, prompts, metadata, ref_images=None,
        only_strict=True) -> (details, {})`, where details["avg"] is the weighted sum and every
        value has N numbers.
    """

    def multi_score(
        device: Any, score_dict: dict[str, float]
    ) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
        weight = score_dict.get(NAME)
        others = {name: w for name, w in score_dict.items() if name != NAME}
        if others and original is None:
            raise ValueError(f"unknown rewards {', '.join(others)}; only {NAME} is known here")
        mine = arr_fast_score(device, **options) if weight is not None else None
        rest = original(device, others) if others and original is not None else None

        def fn(
            images: Any,
            prompts: Sequence[str],
            metadata: Any,
            ref_images: Sequence[Any] | None = None,
            only_strict: bool = True,
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            details: dict[str, Any] = {}
            if rest is not None:
                extra = () if ref_images is None else (ref_images,)
                details = dict(rest(images, prompts, metadata, *extra, only_strict=only_strict)[0])
            if mine is not None and weight is not None:
                scores = mine(images, prompts, metadata, ref_images)[0]
                before = details.get("avg", [0.0] * len(scores))
                details[NAME] = scores
                details["avg"] = [
                    float(b) + weight * s for b, s in zip(before, scores, strict=True)
                ]
            return details, {}

        return fn

    return multi_score
