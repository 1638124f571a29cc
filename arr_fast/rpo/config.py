"""The configuration of an RPO run: typed, validated, closed to unknown keys; YAML in and out.

Two presets fill in the mathematics, and a file overrides them key by key: `paper` (what the paper
and its reference code do) and `recommended` (DESIGN.md 3). Batch sizes count pairs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from arr_fast.errors import ConfigError
from arr_fast.ops.rpo_loss import KLForm
from arr_fast.ops.sde_step import StepKind
from arr_fast.rpo.judge_config import JudgeConfig
from arr_fast.rpo.presets import PRESETS
from arr_fast.rpo.section import Count, NonNegative, Positive, Section, did_you_mean

PolicyKind = Literal["shapes", "flux", "sd3", "qwen_edit"]
Preset = Literal["paper", "recommended"]


class LoraConfig(Section):
    """A LoRA adapter; the reference policy is the model with the adapter disabled.

    Attributes:
        rank, alpha: Of the adapter; its update is scaled by alpha / rank.
        targets: Names of the linear layers; None takes the policy's own list.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[str, ...] | None = None


class PolicyConfig(Section):
    """The generator.

    Attributes:
        kind: Which adapter of arr_fast.rpo.policies.
        model: "builtin:shapes", "builtin:shapes-edit", a diffusers directory, or a hub id.
        revision: Of a hub id.
        dtype: Of the frozen weights and the forward; trained weights and log_probs are float32.
        height, width: Of the sampled images, in pixels.
        guidance: Scale of guidance-distilled models (FLUX); None where there is none.
        true_cfg: Scale of classifier-free guidance, in rollout and loss; 1 runs no second branch.
        negative_prompt: What the unconditional branch reads.
        lora: The adapter; None fine-tunes everything against a frozen copy.
        gradient_checkpointing: Recompute activations in the backward.
        offload: Keep text encoder and VAE on the CPU while they are not needed.
    """

    kind: PolicyKind = "shapes"
    model: str = "builtin:shapes"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    height: Count = 64
    width: Count = 64
    guidance: NonNegative | None = None
    true_cfg: Annotated[float, Field(ge=1)] = 1.0
    negative_prompt: str = ""
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    offload: bool = False


class SamplerConfig(Section):
    """The trajectory: schedule, noise, and which of its steps are trained.

    Attributes:
        kind: dance_sde, sde or cps (ode has no log_prob).
        eta: Noise level: eta of dance_sde, a of sde and cps.
        steps: Denoising steps N; the last returns x0 and is never trained.
        shift: Of the schedule, or "dynamic" for diffusers' shift by the number of tokens.
        floor_timesteps: Feed the model floor(1000 sigma) / 1000, as the reference does.
        trained: How many steps of a trajectory are trained, drawn anew every iteration.
        window: They are drawn from the first `window` steps.
        shared_noise: Both candidates of a prompt start from the same noise.
    """

    kind: StepKind = "sde"
    eta: Positive = 0.7
    steps: Annotated[int, Field(ge=2)] = 8
    shift: Positive | Literal["dynamic"] = 3.0
    floor_timesteps: bool = False
    trained: Count = 4
    window: Count = 4
    shared_noise: bool = False

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.kind == "ode":
            raise ValueError("kind ode has no log_prob and cannot be trained")
        if self.window > self.steps - 1:
            raise ValueError(
                f"window is {self.window}, but {self.steps} steps have {self.steps - 1} that "
                "can be trained (the last never is)"
            )
        if self.trained > self.window:
            raise ValueError(f"trained is {self.trained}, window only {self.window}")
        return self


class LossConfig(Section):
    """The objective of eq. 12 and 13.

    Attributes:
        clip: Half-width of the clip on the ratio; give this or `clip_nats`.
        clip_nats: The same in nats per sample: clip = clip_nats / D with D latent elements. With
            guard, whose log-ratio is scaled by a step's S (0.45 to 0.75 over the trained steps of
            "recommended"), that clips at clip_nats / S nats.
        beta: Weight of the KL.
        kl: Its form; see arr_fast.ops.rpo_loss.
        guard: GRPO-Guard's ratio and weighting.
        winner, loser: lambda and gamma of eq. 11.
        centred: Advantages of +-(lambda + gamma) / 2 instead of +lambda and -gamma.
        impl: "auto", "torch" or "triton": who computes the ops.
    """

    clip: Positive | None = None
    clip_nats: Positive | None = 6.5
    beta: NonNegative = 0.03
    kl: KLForm = "latent_mean"
    guard: bool = True
    winner: NonNegative = 1.0
    loser: NonNegative = 0.1
    centred: bool = True
    impl: Literal["auto", "torch", "triton", "reference"] = "auto"

    @model_validator(mode="after")
    def _one_clip(self) -> Self:
        if (self.clip is None) == (self.clip_nats is None):
            raise ValueError("give exactly one of clip and clip_nats (set the other to null)")
        if self.winner + self.loser == 0:
            raise ValueError("winner and loser are both 0: no pair would have an advantage")
        return self

    def clip_range(self, elements: int) -> float:
        """The clip on the ratio, for latents of `elements` numbers."""
        if self.clip is not None:
            return self.clip
        assert self.clip_nats is not None
        return self.clip_nats / elements


class RolloutConfig(Section):
    """One iteration's sampling.

    Attributes:
        pairs: Prompts per iteration over all ranks.
        candidates: Images per prompt; with more than two, advantages are means over opponents.
        chunks: The iteration samples this many chunks and has each judged while the next one is
            sampled.
        max_staleness: How many updates old a trained rollout may be. 0 is on-policy; above it the
            next iteration's first chunk is sampled while the last judgement is awaited, and a
            resumed run repeats a straight one only closely.
        updates: Optimizer steps per rollout.
        recompute_log_probs: Take log_prob_old from a training forward instead of the rollout.
    """

    pairs: Count = 64
    candidates: Annotated[int, Field(ge=2)] = 2
    chunks: Count = 8
    max_staleness: Annotated[int, Field(ge=0)] = 0
    updates: Count = 1
    recompute_log_probs: bool = False

    @model_validator(mode="after")
    def _chunks_divide(self) -> Self:
        if self.pairs % self.chunks:
            raise ValueError(f"pairs {self.pairs} is not a multiple of chunks {self.chunks}")
        return self


class OptimiserConfig(Section):
    """AdamW.

    Attributes:
        lr: Peak learning rate.
        betas, eps, weight_decay: Of AdamW.
        grad_clip: Largest norm of the gradient over all trained parameters.
        warmup: Updates of linear warm-up.
        schedule: After it: constant, or cosine down to 0 at the last update.
    """

    lr: Positive = 1.5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 1.0
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"


class EmaConfig(Section):
    """An exponential moving average of the trained parameters only.

    Attributes:
        decay: Its limit; update t uses min(decay, (1 + t) / (10 + t)).
        every: Updates between two averagings.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    every: Count = 1


class PromptsConfig(Section):
    """Where prompts come from.

    Attributes:
        source: "builtin:shapes", "builtin:shapes-edit", a .txt file with one prompt per line, or
            .jsonl with prompt and, for editing, image.
        count: How many, from the start of a file; None is all of a file, 4096 of a builtin source.
        seed: Of a builtin source.
        cache: Keep prompt embeddings in host memory, of up to this many prompts.
        cache_gb: And up to so many GB per process.
        tied_limit: Set a prompt aside after it was tied this many times in a row; None never.
        rest: For how many epochs it is set aside.
    """

    source: str = "builtin:shapes"
    count: Count | None = None
    seed: int = 0
    cache: Annotated[int, Field(ge=0)] = 20_000
    cache_gb: NonNegative = 16.0
    tied_limit: Count | None = 3
    rest: Count = 2


class EvaluationConfig(Section):
    """Held-out evaluation at fixed seeds, by something other than the reward.

    Attributes:
        every: Iterations between two evaluations; None never evaluates.
        source: Prompts, as in PromptsConfig, disjoint from those of training.
        count: How many.
        seed: Of the noise.
        evaluator: "package.module:callable"; called with prompts, images and sources, it returns
            one number per image, higher is better. It never affects training.
        kind: Sampler of the evaluation; ode is deterministic.
        steps: Its steps.
        alarm: Alarm when, over this many evaluations, the reward rose and the evaluator fell.
        grid: Pairs of the sample grid.
    """

    every: Count | None = 20
    source: str = "builtin:shapes-held-out"
    count: Count = 100
    seed: int = 1234
    evaluator: str | None = "arr_fast.shapes.parser:success"
    kind: StepKind = "ode"
    steps: Annotated[int, Field(ge=2)] = 8
    alarm: Annotated[int, Field(ge=2)] = 3
    grid: Annotated[int, Field(ge=0)] = 8


class CheckpointConfig(Section):
    """Checkpoints.

    Attributes:
        every: Iterations between two of them; the end and SIGTERM write one too.
        keep: How many are kept.
    """

    every: Count = 20
    keep: Count = 2


class RunConfig(Section):
    """A whole run.

    Attributes:
        preset: Which preset filled in what the file left out.
        output: Directory of checkpoints, logs and grids.
        seed: Of everything random.
        iterations: Rollouts in all.
        max_minutes: The run ends, with a checkpoint, after so many minutes over all of its parts.
        micro_batch: Trained (sample, step) rows per forward; None fills the memory budget.
        memory_budget_gb: For activations of one micro-batch, in GB.
        compile: torch.compile for rollout, training and reference.
        shard: Split the networks over the processes of the run (FSDP2), for those that are too
            large for one GPU; needs micro_batch. Blocks are then compiled one by one.
        trackers: Names known to accelerate: tensorboard, wandb, trackio.
        log_every: Iterations between two logs.
        max_ratio_drift: Largest |ratio - 1| before the first update, as a share of the clip.
        judges: Rewards by name.
        mixing: How several are mixed; see arr_fast.rpo.advantages.mix_preferences.
    """

    preset: Preset = "recommended"
    output: Path = Path("rpo_run")
    seed: int = 0
    iterations: Count = 200
    max_minutes: Positive | None = None
    micro_batch: Count | None = None
    memory_budget_gb: Positive = 2.0
    compile: bool = True
    shard: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)
    log_every: Count = 1
    max_ratio_drift: Positive = 0.1
    policy: PolicyConfig = PolicyConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    rollout: RolloutConfig = RolloutConfig()
    judges: dict[str, JudgeConfig] = Field(default_factory=lambda: {"rubric": JudgeConfig()})
    mixing: Literal["sum", "normalise_first"] = "sum"
    optimiser: OptimiserConfig = OptimiserConfig()
    ema: EmaConfig | None = EmaConfig()
    prompts: PromptsConfig = PromptsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not self.judges or all(judge.veto for judge in self.judges.values()):
            raise ValueError("judges needs at least one that is not a veto")
        if self.loss.guard and self.rollout.recompute_log_probs:
            raise ValueError("loss.guard needs the rollout's own log_probs")
        if self.rollout.max_staleness > 0 and any(judge.sleep for judge in self.judges.values()):
            raise ValueError(
                "rollout.max_staleness above 0 has a chunk judged during training: no judge can "
                "sleep then"
            )
        if self.shard and self.micro_batch is None:
            raise ValueError("shard needs micro_batch: ranks could measure the budget differently")
        return self

    @property
    def compiles_whole(self) -> bool:
        """Whether a forward and what follows it are one graph: not where blocks are gathered."""
        return self.compile and not self.shard

    def to_yaml(self) -> str:
        """The resolved configuration: `read_config` of it gives an equal one."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
        return text

    def changed(self, **changes: Any) -> RunConfig:
        """With fields replaced; of sections given as mappings, single keys.

        Raises:
            pydantic.ValidationError: An unknown key, or a value out of its range.
        """
        return RunConfig.model_validate(_merged(self.model_dump(), changes))

    def save(self, path: Path) -> None:
        """Writes the resolved configuration."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")


def preset_config(preset: Preset = "recommended", **overrides: Any) -> RunConfig:
    """A preset, with sections or fields overridden.

    Args:
        preset: "paper" or "recommended".
        **overrides: Fields of RunConfig; sections as mappings, merged key by key.

    Raises:
        ConfigError: An unknown preset or key, or a value out of its range.
    """
    return _build({"preset": preset, **overrides}, "config")


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """Reads a YAML file over the preset that it names.

    Raises:
        ConfigError: The file is missing or not a mapping, has an unknown key, or a value out of its
            range; the message names each.
    """
    where = os.fspath(path)
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of sections")
    return _build(data, where)


def _build(data: dict[str, Any], where: str) -> RunConfig:
    name = data.get("preset", "recommended")
    if name not in get_args(Preset):
        raise ConfigError(
            f"{where}: preset must be one of {', '.join(get_args(Preset))}, got {name!r}"
        )
    try:
        return RunConfig.model_validate(_merged(PRESETS[name], data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return out


def _describe(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        place = ".".join(str(p) for p in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {place}{_suggestion(item['loc'])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = (
                f" (got {item['input']!r})" if isinstance(item["input"], int | float | str) else ""
            )
            parts.append(f"{place}: {message}{shown}")
    return "; ".join(parts)


def _suggestion(loc: tuple[int | str, ...]) -> str:
    section: Any = RunConfig
    for part in loc[:-1]:
        if section is None or str(part) not in section.model_fields:
            # A name within a mapping of sections, such as a judge's.
            continue
        found = section.model_fields[str(part)]
        options = [found.annotation, *get_args(found.annotation)]
        section = next((o for o in options if hasattr(o, "model_fields")), None)
    return did_you_mean(str(loc[-1]), [] if section is None else list(section.model_fields))
