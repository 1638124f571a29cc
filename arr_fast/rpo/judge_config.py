"""The rewards of a run's configuration: which judge, how it is loaded, what it is asked."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from arr_fast.aggregation import AggregationName, Mode, rule_of
from arr_fast.rpo.section import NonNegative, Positive, Section, Share


class JudgeOptions(Section):
    """Arguments of Judge.compare and Judge.rank; None leaves the judge's own default.

    Attributes:
        mode, label_mass, label_mass_threshold, aggregation, temperature, margin, inconsistent,
            learned_weights: See `Judge.compare`.
    """

    mode: Mode | None = None
    label_mass: bool | None = None
    label_mass_threshold: Share | None = None
    aggregation: AggregationName | None = None
    temperature: Positive | None = None
    margin: NonNegative | None = None
    inconsistent: Literal["tie", "keep"] | None = None
    learned_weights: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _is_rule(self) -> Self:
        rule_of(self.aggregation, self.mode or "criteria", self.learned_weights)
        return self

    def arguments(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(exclude_none=True)


class JudgeConfig(Section):
    """One reward.

    Attributes:
        model: "builtin:shapes", a directory or hub id for an in-process judge.
        url: A judge server instead, for example "http://10.0.0.5:8077".
        call: Or "package.module:factory"; factory() returns the callable of
            arr_fast.rpo.judging.SubmitJudge.
        device: Of an in-process judge; "auto", "cpu", "cuda:1".
        dtype: Of an in-process judge.
        revision, adapter, quantization: Of an in-process judge; see Judge.from_pretrained.
        engine: Of an in-process judge, fields of arr_fast.engine.config.EngineConfig, for example
            {compile: true, prefix_cache: "off"} (YAML reads off without quotes as false); see
            arr_fast.integrations.rpo_reward.check_engines.
        rubric: A packaged rubric or a file, for prompts that bring none; None takes the default of
            the task.
        orders: "both" removes position bias.
        options: More arguments of Judge.compare, for example {aggregation: veto}.
        sleep: Put an in-process judge to sleep while the policy trains, to give its memory back.
        weight, required, veto, threshold: Its part in a mixture; see
            arr_fast.rpo.advantages.RewardSpec.
        max_failure_share: The run stops when a larger share of an iteration's pairs failed.
        timeout_s: Seconds to wait for an answer once sampling has ended.
    """

    model: str = "builtin:shapes"
    url: str | None = None
    call: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    adapter: str | None = None
    quantization: Literal["int8", "fp8"] | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    rubric: str | None = "shapes"
    orders: Literal["both", "AB", "BA"] = "both"
    options: JudgeOptions = JudgeOptions()
    sleep: bool = False
    weight: Positive = 1.0
    required: bool = True
    veto: bool = False
    threshold: float = 0.5
    max_failure_share: Share = 0.25
    timeout_s: Positive = 600.0

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.url is not None and self.call is not None:
            raise ValueError("give url or call, not both")
        if self.url is not None or self.call is not None:
            for name in ("revision", "adapter", "quantization", "engine"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for a judge in this process, not for url or call")
        return self

    def loading(self, device: str) -> dict[str, Any]:
        """Arguments of Judge.from_pretrained.

        Args:
            device: Where the judge goes if `device` is "auto".
        """
        return {
            "model": self.model,
            "device": device if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "revision": self.revision,
            "adapter": self.adapter,
            "quantization": self.quantization,
            **self.engine,
        }
