"""How the loops call their rewards, quoted from their sources at the commits that were read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One call of a training loop.

    Attributes:
        name: Which of our callables stands at its other end.
        repository: owner/name on GitHub.
        commit: The commit that was read.
        path: File and line.
        call: The call expression, joined to one line; keywords that the loop collects in a dict
            beforehand are written out.
    """

    name: str
    repository: str
    commit: str
    path: str
    call: str


_FLOW_GRPO = ("yifan123/flow_grpo", "ac4c86e8cae021841f1fde853d340e0db67690dd")
_FLOW_FACTORY = ("X-GenGroup/Flow-Factory", "a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c")
_VERL_OMNI = ("verl-project/verl-omni", "a1139bafffb5b9711f0a6b6edff8ecaa60bfff30")
_MIXGRPO = ("Tencent-Hunyuan/MixGRPO", "e5cdd6a427778d8c8b2e7a48ce16972141adbe7c")
_DANCEGRPO = ("XueZeyue/DanceGRPO", "15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344")
_TRL = ("huggingface/trl", "f2cd57710ae345ea6428ae95363267fcf38a3dc8")

CALLS = (
    UpstreamCall(
        "flow_grpo.multi_score",
        *_FLOW_GRPO,
        "scripts/train_sd3.py:474",
        "multi_score(accelerator.device, config.reward_fn)",
    ),
    # Through executor.submit, which passes the rest on.
    UpstreamCall(
        "flow_grpo.reward_fn",
        *_FLOW_GRPO,
        "scripts/train_sd3.py:663",
        "reward_fn(images, prompts, prompt_metadata, only_strict=True)",
    ),
    UpstreamCall(
        "flow_grpo.factory",
        *_FLOW_GRPO,
        "flow_grpo/rewards.py:374",
        "score_functions[score_name](device)",
    ),
    UpstreamCall(
        "flow_grpo.score",
        *_FLOW_GRPO,
        "flow_grpo/rewards.py:391",
        "score_fns[score_name](images, prompts, metadata)",
    ),
    # group_input holds the fields of the samples that __call__ names and that are not None.
    UpstreamCall(
        "flow_factory.model",
        *_FLOW_FACTORY,
        "src/flow_factory/rewards/reward_processor.py:184",
        "model(prompt=prompt, image=image, condition_images=condition_images)",
    ),
    UpstreamCall(
        "verl_omni.compute_score",
        *_VERL_OMNI,
        "verl_omni/reward_loop/reward_manager/visual.py:86",
        "compute_score(data_source=data_source, solution_image=response_visual, "
        "ground_truth=ground_truth, extra_info=extra_info, "
        "reward_router_address=address, reward_model_tokenizer=tokenizer, model_name=path)",
    ),
    UpstreamCall(
        "mixgrpo.model",
        *_MIXGRPO,
        "fastvideo/models/reward_model/utils.py:21",
        "reward_model(images, input_prompts)",
    ),
    UpstreamCall(
        "dancegrpo.reward",
        *_DANCEGRPO,
        "fastvideo/train_grpo_qwenimage.py:392",
        'reward_model.reward([f"./images/qwenimage_{rank}_{index}.png"], [batch_caption[0]])',
    ),
    UpstreamCall(
        "trl.sync",
        *_TRL,
        "trl/trainer/grpo_trainer.py:1659",
        "reward_func(prompts=prompts, completions=completions, "
        "completion_ids=completion_ids_list, trainer_state=state, log_extra=log_extra, "
        "log_metric=log_metric, image=image)",
    ),
    UpstreamCall(
        "trl.async",
        *_TRL,
        "trl/trainer/grpo_trainer.py:1671",
        "func(prompts=prompts, completions=completions, "
        "completion_ids=completion_ids_list, trainer_state=state, log_extra=log_extra, "
        "log_metric=log_metric, image=image)",
    ),
)
