"""Updates of the policy: packed rows in, one optimizer step out, or a counted reason why not.

Data parallel: every rank accumulates its own rows, and gradients are averaged once per update in
one flat reduction, so compiled graphs stay whole (the mathematics of DDP that synchronises on the
last micro-batch only).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arr_fast.rpo.advantages import Advantages
from arr_fast.rpo.budget import rows_for_budget
from arr_fast.rpo.building import build_objective
from arr_fast.rpo.config import RunConfig
from arr_fast.rpo.ema import ParameterEma
from arr_fast.rpo.packing import PackedRows, count_rows
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.ranks import Ranks
from arr_fast.rpo.rollout import JudgedChunk, Trajectories
from arr_fast.rpo.sharding import is_split, split_like
from arr_fast.rpo.step import StepReport, TrainStep, check_on_policy

logger = logging.getLogger("arr_fast")


class Updater:
    """Holds everything that an update changes.

    Args:
        config: The resolved configuration.
        policy: The generator.
        ranks: The processes of the run; all start from rank 0's weights.

    Attributes:
        parameters: What is trained, by name.
        version: Optimizer steps done.
        skipped: Updates that were skipped, by reason.

    Raises:
        ValueError: The policy has no trainable parameters.
    """

    def __init__(self, config: RunConfig, policy: Policy, ranks: Ranks) -> None:
        self._config, self.policy, self._ranks = config, policy, ranks
        self.parameters = policy.trainable_parameters()
        if not self.parameters:
            raise ValueError("the policy has no trainable parameters")
        ranks.broadcast(self.parameters.values())
        section = config.optimiser
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._lr_factor)
        self.ema = self._make_ema()
        self.elements = math.prod(policy.latent_shape)
        self.objective = build_objective(config, self.elements)
        self._step = TrainStep(policy, self.objective, compile=config.compiles_whole)
        self.version = 0
        self.skipped: Counter[str] = Counter()
        self._rows: int | None = config.micro_batch
        self._checked = False

    def run(self, chunks: Sequence[JudgedChunk], given: Sequence[Advantages]) -> dict[str, float]:
        """Trains on an iteration's chunks, once or as often as the configuration says.

        Returns:
            Numbers to log, over all ranks.

        Raises:
            ArrFastError: Rollout and training disagree about the ratio before the first update.
        """
        trajectories = [chunk.trajectories for chunk in chunks]
        rows_per_batch = self._rows_per_batch(trajectories[0])
        own = count_rows(trajectories, given)
        counts = self._ranks.gathered(own)
        batches = max(math.ceil(count / rows_per_batch) for count in counts)
        packed = PackedRows(trajectories, given, rows_per_batch, min_batches=batches)
        numbers: dict[str, float] = {}
        if self._config.rollout.recompute_log_probs and sum(counts):
            numbers["log_prob_difference"] = self._step.recompute_log_probs(packed)
        for update in range(self._config.rollout.updates):
            numbers |= self._update(packed, sum(counts), is_first=update == 0)
        return numbers

    def _update(self, packed: PackedRows, total_rows: int, *, is_first: bool) -> dict[str, float]:
        """One optimizer step, or a counted reason why there was none."""
        self.optimiser.zero_grad(set_to_none=True)
        if total_rows == 0:
            return self._skip("no decided pair")
        report = self._step.accumulate(
            packed,
            total_rows=total_rows / self._ranks.count,
            keep_reference=self._config.rollout.updates > 1,
        )
        if not self._checked and is_first and report.skipped is None and report.stats.rows:
            drift = check_on_policy(report, self.objective, self._config.max_ratio_drift)
            logger.info("before the first update the largest |ratio - 1| is %.3g", drift)
            self._checked = True
        reasons = [r for r in self._ranks.gathered(report.skipped) if r is not None]
        # A rank whose pairs were all tied adds zeros; anything else is a reason for all to skip.
        reasons = [r for r in reasons if r != "no decided pair"]
        if reasons:
            return self._skip(reasons[0])
        self._ranks.average_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self._config.optimiser.grad_clip
        )
        norm = norm.full_tensor() if is_split(norm) else norm
        if not bool(torch.isfinite(norm)):
            return self._skip("a gradient is not finite")
        rate = float(self.optimiser.param_groups[0]["lr"])
        self.optimiser.step()
        self.scheduler.step()
        self.version += 1
        if self.ema is not None:
            self.ema.update()
        return self._summary(report) | {"grad_norm": float(norm), "lr": rate}

    def _skip(self, reason: str) -> dict[str, float]:
        self.skipped[reason] += 1
        self.optimiser.zero_grad(set_to_none=True)
        logger.warning("update skipped: %s", reason)
        return {}

    def _summary(self, report: StepReport) -> dict[str, float]:
        """The report's numbers over all ranks."""
        own = report.stats.summary(self.objective, self.elements)
        rows = report.stats.rows
        every: list[tuple[int, dict[str, float]]] = self._ranks.gathered((rows, own))
        used = [(n, values) for n, values in every if n]
        total = sum(n for n, _ in used)
        merged: dict[str, float] = {"rows": float(total)}
        for key in own:
            values = [(n, each[key]) for n, each in used if key in each]
            if key.endswith("_min"):
                merged[key] = min(v for _, v in values)
            elif key.endswith("_max") or key == "log_prob_drift":
                merged[key] = max(v for _, v in values)
            elif key == "loss":
                merged[key] = sum(v for _, v in values) / self._ranks.count
            else:
                merged[key] = sum(n * v for n, v in values) / total
        return merged

    def _rows_per_batch(self, chunk: Trajectories) -> int:
        """Rows of a training forward: as configured, or as many as the memory budget holds.

        At most an eighth of what an iteration can have: the last micro-batch is filled up with rows
        that do not count, and how many pairs are decided is not known beforehand.
        """
        if self._rows is None:
            pairs = self._config.rollout.pairs // self._ranks.count
            most = pairs * chunk.candidates * chunk.trained.shape[1]
            own = rows_for_budget(
                self.policy,
                self.objective,
                chunk.batch.conditions,
                self._config.memory_budget_gb * 1e9,
                limit=max(8, -(-most // 8)),
            )
            self._rows = min(self._ranks.gathered(own))
        return self._rows

    def _lr_factor(self, update: int) -> float:
        section = self._config.optimiser
        if update < section.warmup:
            return (update + 1) / section.warmup
        if section.schedule == "constant":
            return 1.0
        total = max(1, self._config.iterations * self._config.rollout.updates - section.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - section.warmup) / total)))

    def state(self) -> dict[str, Any]:
        """What `restore` needs; weights are kept by the policy."""
        return {
            "version": self.version,
            "parameters": list(self.parameters),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state(),
            "skipped": dict(self.skipped),
            "rows": self._rows,
            "rows_of": self._rows_of(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state; what the configuration says of optimizer and rows holds."""
        self.optimiser.load_state_dict(self._split_moments(state["optimiser"]))
        self.scheduler.load_state_dict(state["scheduler"])
        section = self._config.optimiser
        rate = section.lr * self._lr_factor(self.scheduler.last_epoch)
        self.scheduler.base_lrs = [section.lr] * len(self.optimiser.param_groups)
        for group in self.optimiser.param_groups:
            group |= {"lr": rate, "initial_lr": section.lr, "betas": section.betas}
            group |= {"eps": section.eps, "weight_decay": section.weight_decay}
        # Where the checkpoint has no averages, they start from its weights.
        self.ema = self._make_ema()
        if self.ema is not None and state["ema"] is not None:
            self.ema.restore(state["ema"])
        self.version, self.skipped = state["version"], Counter(state["skipped"])
        # The budget may have been read on another machine; the shapes decide the last bits.
        if state.get("rows_of") == self._rows_of():
            self._rows = state["rows"]

    def _make_ema(self) -> ParameterEma | None:
        section = self._config.ema
        if section is None:
            return None
        return ParameterEma(self.parameters, section.decay, section.every)

    def _rows_of(self) -> list[float | None]:
        """What the number of rows follows from."""
        return [self._config.micro_batch, self._config.memory_budget_gb]

    def _split_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state with each moment split as its parameter is."""
        moments = {
            number: {
                name: split_like(value, parameter) if torch.is_tensor(value) else value
                for name, value in state["state"][number].items()
            }
            for number, parameter in enumerate(self.parameters.values())
            if number in state["state"]
        }
        return {**state, "state": moments}
