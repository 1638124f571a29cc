"""The `Judger` of the ARR reference (OpenEnvision/AutoRubric-as-Reward at f8aa504), judged here.

Its trainers do `judger = await Judger(config_path).initialize()` and, per pair,
`await judger.get_reward_single(item, device)`, which returns a tensor with a reward per candidate:
1.0 for the winner, -0.1 for the loser. A tie or an abstention gives zeros, which its trainer turns
into a zero gradient (the reference would raise, or reward both). The YAML is the reference's own;
`model_name` names the checkpoint, `base_url` and `api_key` are not needed. Rubrics come from
`rubrics` or `rubrics_file`; generating them from `seed_dataset` is not done here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from arr_fast.errors import ArrFastError
from arr_fast.integrations.groups import candidate_rewards
from arr_fast.integrations.loading import judge_from
from arr_fast.rubric import Rubric, Task

_OUTPUTS = (
    *("edited_image", "edited_images", "target_image", "target_images", "output_image"),
    *("output_images", "result_image", "result_images", "image_paths", "response", "responses"),
    *("images", "image", "generated_image", "generated_images"),
)
_SOURCES = (
    *("source_image", "base_image", "original_image", "input_image", "reference_image"),
    "ref_image",
)


class Judger:
    """A drop-in for the reference's class.

    Args:
        config_path: Its YAML or JSON.
        seed_dataset: Refused by `initialize` where no rubrics are given.
        rubrics_file: A file of rubrics; wins over the configuration.
        base_url: Ignored: nothing is asked over the network.
        judge: A judge that exists already.
    """

    def __init__(
        self,
        config_path: str | Path,
        seed_dataset: str | None = None,
        rubrics_file: str | None = None,
        base_url: str | None = None,
        *,
        judge: Any = None,
    ) -> None:
        del base_url, seed_dataset
        self.config_path = Path(config_path)
        self.config: dict[str, Any] = yaml.safe_load(self.config_path.read_text("utf-8"))
        task = str(self.config.get("task_type") or self.config.get("task") or "")
        is_edit = (task or self.config_path.stem).lower().find("edit") >= 0 or task == "i2i"
        self.task: Task = "edit" if is_edit else "t2i"
        self.eval_mode = str(self.config.get("eval_mode") or "pairwise").lower()
        self._rubrics_file = rubrics_file or self.config.get("rubrics_file")
        self._judge = judge
        self._rubric: Rubric | None = None

    async def initialize(self) -> Judger:
        """Loads the judge and the rubrics.

        Raises:
            ArrFastError: The configuration has no rubrics.
        """
        text = self.config.get("rubrics")
        if self._rubrics_file not in (None, "", "none", "null", "None"):
            path = Path(str(self._rubrics_file)).expanduser()
            path = path if path.exists() else self.config_path.parent / path
            text = path.read_text("utf-8")
        if not text:
            raise ArrFastError(f"{self.config_path}: needs `rubrics` or `rubrics_file`")
        if isinstance(text, list):
            text = "\n".join(f"{number}. {line}" for number, line in enumerate(text, 1))
        self._rubric = Rubric.from_text(str(text), name="reference", task=self.task)
        if self._judge is None:
            options = {"model": self.config["model_name"]}
            self._judge = await asyncio.to_thread(judge_from, options)
        return self

    async def get_reward_single(self, item: dict[str, Any], device: Any) -> torch.Tensor:
        """Rewards of an item's candidates, float [G] (or [1] in pointwise mode)."""
        if self.eval_mode == "pointwise":
            (score,) = await self.get_reward([item])
            if score is None:
                raise ArrFastError("the judge has no verdict on this image")
            return torch.tensor([float(score)], device=device)
        verdicts = await asyncio.to_thread(self._rank, [item])
        rewards = candidate_rewards(verdicts, 0, "rpo", 1.0, 0.1)
        return torch.tensor([reward or 0.0 for reward in rewards], device=device)

    async def get_reward(
        self, data: Sequence[dict[str, Any]], concurrency_limit: int = 50
    ) -> list[Any]:
        """A rank (1 is best) or a score per item; None for an abstention, ties included."""
        del concurrency_limit
        if self.eval_mode == "pointwise":
            return await asyncio.to_thread(self._scores, data)
        verdicts = await asyncio.to_thread(self._rank, data)
        ranks: list[Any] = []
        for codes, ranking in zip(verdicts.winner_code, verdicts.ranking, strict=True):
            off_diagonal = codes[~np.eye(len(codes), dtype=bool)]
            decided = bool(np.isin(off_diagonal, (1, -1)).all())
            rank = [int(np.flatnonzero(ranking == i)[0]) + 1 for i in range(len(ranking))]
            ranks.append(rank if decided else None)
        return ranks

    async def evaluate(self, dataset_path: str, concurrency_limit: int = 50) -> float:
        """Share of items whose prediction equals label_rank (or label_score)."""
        text = Path(dataset_path).read_text("utf-8")
        lines = dataset_path.endswith(".jsonl")
        data = (
            [json.loads(x) for x in text.splitlines() if x.strip()]
            if lines
            else yaml.safe_load(text)
        )
        found = await self.get_reward(data, concurrency_limit)
        label = "label_score" if self.eval_mode == "pointwise" else "label_rank"
        right = [
            p is not None and p == item.get(label) for p, item in zip(found, data, strict=True)
        ]
        return sum(right) / len(right) if right else 0.0

    def _rank(self, data: Sequence[dict[str, Any]]) -> Any:
        prompts, groups, sources = self._columns(data)
        return self._ready().rank(prompts, groups, self._rubric, sources=sources)

    def _scores(self, data: Sequence[dict[str, Any]]) -> list[Any]:
        prompts, groups, sources = self._columns(data)
        low, high = int(self.config.get("min_score", 1)), int(self.config.get("max_score", 5))
        verdicts = self._ready().score(
            prompts, [g[0] for g in groups], self._rubric, sources=sources
        )
        return [
            round(low + float(s) * (high - low)) if status == "ok" else None
            for s, status in zip(verdicts.score, verdicts.status, strict=True)
        ]

    def _ready(self) -> Any:
        if self._rubric is None:
            raise ArrFastError("Judger is not initialised; call `await judger.initialize()` first")
        return self._judge

    def _columns(
        self, data: Sequence[dict[str, Any]]
    ) -> tuple[list[str], list[list[Any]], list[Any] | None]:
        """Prompts, candidates and sources of items in the reference's field names."""
        prompts, groups, sources = [], [], []
        for number, item in enumerate(data):
            prompts.append(item.get("query") or item.get("prompt") or item.get("instruction") or "")
            images = next((_listed(item[k]) for k in _OUTPUTS if item.get(k)), [])
            source = next((_listed(item[k])[0] for k in _SOURCES if item.get(k)), None)
            if self.task == "edit" and source is None:
                if len(images) < 2:
                    raise ArrFastError(f"item {number}: an edit needs its source image")
                source, images = images[0], images[1:]
            groups.append(images)
            sources.append(source)
        return prompts, groups, sources if self.task == "edit" else None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
