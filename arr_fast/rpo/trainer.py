"""The training loop: sample, judge, update, evaluate, keep.

An iteration is a function of the state that checkpoints hold. Every rank samples and judges its own
slice of each chunk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from arr_fast.errors import TrainingError
from arr_fast.rpo.advantages import (
    Advantages,
    advantages,
    mix_preferences,
    pair_squares,
    preference_units,
)
from arr_fast.rpo.building import (
    build_evaluation_schedule,
    build_sampling,
    build_schedule_of,
    build_specs,
)
from arr_fast.rpo.checkpoint import (
    Checkpoint,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from arr_fast.rpo.conditions_cache import ConditionsCache
from arr_fast.rpo.config import RunConfig
from arr_fast.rpo.evaluation import Evaluation, Evaluator
from arr_fast.rpo.judging import SubmitJudge
from arr_fast.rpo.metrics import (
    failure_share,
    verdict_rates,
    verdict_sums,
)
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.prompts import Prompt, PromptWalk, source_images
from arr_fast.rpo.ranks import Ranks, make_accelerator
from arr_fast.rpo.rollout import JudgedChunk, PromptBatch
from arr_fast.rpo.run_log import RunLog
from arr_fast.rpo.sampler import Sampler, hidden_share
from arr_fast.rpo.sharding import is_split, shard, whole
from arr_fast.rpo.step import graph_count
from arr_fast.rpo.stopping import StopRequest
from arr_fast.rpo.update import Updater

logger = logging.getLogger("arr_fast")


class Sleeper(Protocol):
    """A judge that can give its memory back while the policy trains."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of, beside its configuration.

    Attributes:
        policy: The generator, on its device.
        judges: The rewards by name.
        prompts: Training prompts.
        held_out: Prompts of the evaluation; empty: none.
        evaluator: See arr_fast.rpo.evaluation.
        sleepers: Judges to put to sleep while the policy trains.
        rubric_hash: Of the rewards' rubrics; kept in checkpoints and compared on resume.
    """

    policy: Policy
    judges: Mapping[str, SubmitJudge]
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt] = ()
    evaluator: Evaluator | None = None
    sleepers: Sequence[Sleeper] = ()
    rubric_hash: str = ""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        iterations: Rollouts done, over all parts of the run.
        updates: Optimizer steps done.
        skipped: Updates that were skipped, by reason.
        interrupted: Whether SIGTERM, Ctrl-C or max_minutes ended it early; a checkpoint was
            written.
        last: The last logged numbers.
    """

    iterations: int
    updates: int
    skipped: dict[str, int]
    interrupted: bool
    last: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a policy by RPO.

    Args:
        config: The resolved configuration.
        parts: See `Parts`.
        accelerator: By default one for the policy's device, with the configuration's trackers.

    Raises:
        ValueError: Pairs that the ranks cannot share evenly.
        MissingDependencyError: A tracker's package is missing.
    """

    def __init__(
        self, config: RunConfig, parts: Parts, accelerator: Accelerator | None = None
    ) -> None:
        self.config, self.parts, self.policy = config, parts, parts.policy
        self.accelerator = accelerator or make_accelerator(config, self.policy.device)
        self.ranks = Ranks(self.accelerator)
        self.log = RunLog(config, self.accelerator)
        share = config.rollout.chunks * self.ranks.count
        if config.rollout.pairs % share:
            raise ValueError(
                f"rollout.pairs {config.rollout.pairs} is not a multiple of rollout.chunks x "
                f"processes = {share}"
            )
        self.iteration = 0
        if config.shard:
            shard(self.policy, self.accelerator.device, compile=config.compile)
        self.updater = Updater(config, self.policy, self.ranks)
        self.walk = PromptWalk(
            parts.prompts,
            seed=config.seed,
            tied_limit=config.prompts.tied_limit,
            rest=config.prompts.rest,
        )
        self.cache = ConditionsCache(
            self.policy, config.prompts.cache, int(config.prompts.cache_gb * 1e9)
        )
        self.schedule = build_schedule_of(config, self.policy)
        self.sampler = Sampler(
            self.policy,
            self.schedule,
            build_sampling(config),
            parts.judges,
            compile=config.compiles_whole,
        )
        self.specs = build_specs(config)
        self.evaluation = None
        if config.evaluation.every is not None and parts.held_out:
            self.evaluation = Evaluation(
                prompts=parts.held_out,
                schedule=build_evaluation_schedule(config, self.policy),
                seed=config.evaluation.seed,
                evaluator=parts.evaluator,
                judges=parts.judges,
                alarm=config.evaluation.alarm,
                timeout=max(judge.timeout_s for judge in config.judges.values()),
            )
        self._drawn: list[Prompt] = []
        self._stopping = StopRequest()
        self._seconds = 0.0

    def train(self, *, progress: Callable[[int, dict[str, float]], None] | None = None) -> Outcome:
        """Runs the remaining iterations.

        Args:
            progress: Called after every iteration with its number and its numbers.

        Raises:
            TrainingError: A judge failed too often, or rollout and training disagree.
            CheckpointError: A checkpoint cannot be written.
        """
        config, numbers = self.config, {}
        saved: int | None = None
        self.log.start(self.iteration)
        try:
            with self._stopping.listening():
                if self.iteration == 0 and self.evaluation is not None:
                    self.log.numbers(self.iteration, self._evaluate())
                while self.iteration < config.iterations and not self._should_stop():
                    numbers = self.run_iteration()
                    self._seconds += numbers["seconds/iteration"]
                    is_looked_at = self._is_due(config.log_every)
                    if self.evaluation is not None and self._is_due(config.evaluation.every):
                        numbers |= self._evaluate()
                        is_looked_at = True
                    if is_looked_at:
                        self.log.numbers(self.iteration, numbers)
                    if progress is not None:
                        progress(self.iteration, numbers)
                    if self._is_due(config.checkpoint.every):
                        self.save()
                        saved = self.iteration
                stopped = self._should_stop() and self.iteration < config.iterations
                if stopped and saved != self.iteration:
                    self.save()
        finally:
            self.log.end()
        return Outcome(
            self.iteration, self.updater.version, dict(self.updater.skipped), stopped, numbers
        )

    def run_iteration(self) -> dict[str, float]:
        """Samples, judges and updates once.

        Returns:
            Numbers to log, added up over ranks.
        """
        began = time.perf_counter()
        self._awake(True)
        prompts = self._draw()
        upcoming = None
        if self.config.rollout.max_staleness > 0 and self.iteration + 1 < self.config.iterations:
            self._drawn = self.walk.take(self.config.rollout.pairs)
            upcoming = self._batches(self._drawn, self.iteration + 1)[0]
        chunks = self.sampler.iterate(
            self._batches(prompts, self.iteration), self.updater.version, upcoming=upcoming
        )
        self._check_failures(chunks)
        given = self._advantages(chunks)
        self._note_ties(prompts, given)
        self._awake(False)
        trained = time.perf_counter()
        numbers = self.updater.run(chunks, given)
        seconds = {"seconds/training": time.perf_counter() - trained}
        self.iteration += 1
        numbers |= verdict_rates(self.ranks.added(verdict_sums(chunks, given)))
        for name in ("sampling", "decoding", "judging", "waiting"):
            seconds[f"seconds/{name}"] = sum(c.seconds.get(name, 0.0) for c in chunks)
        numbers |= seconds
        numbers["seconds/iteration"] = time.perf_counter() - began
        numbers["hidden_share"] = hidden_share(chunks)
        numbers["prompts/set_aside"] = float(self.walk.set_aside)
        numbers["prompts/epoch"] = float(self.walk.epoch)
        numbers["updates"] = float(self.updater.version)
        numbers["skipped"] = float(sum(self.updater.skipped.values()))
        numbers["graphs"] = float(graph_count())
        if self.config.evaluation.grid and self._is_due(self.config.evaluation.every or 20):
            self.log.grid(self.iteration, self.policy, chunks[0], given[0])
        return numbers

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether a signal came."""
        return self._stopping.asked

    def save(self) -> Path | None:
        """Writes a checkpoint; on ranks other than 0 it only takes part."""
        states = self.ranks.gathered(rng_state())
        path, is_first = None, self.ranks.own == 0
        state = whole(self._state(), keep=is_first)
        weights = None
        if any(map(is_split, self.updater.parameters.values())):
            weights = whole(self.policy.networks()[0].state_dict(), keep=is_first)
        if is_first:
            path = save_checkpoint(
                self.config.output,
                self.iteration,
                {**state, "rng": states},
                config_yaml=self.config.to_yaml(),
                save_policy=lambda folder: self.policy.save(folder, weights),
                keep=self.config.checkpoint.keep,
            )
            logger.info("checkpoint %s", path)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint; what was in flight when it was written is sampled again.

        Raises:
            TrainingError: It belongs to other rewards or parameters.
        """
        state = checkpoint.state
        if state["rubric_hash"] != self.parts.rubric_hash:
            raise TrainingError(
                f"{checkpoint.path} was trained on rubrics {state['rubric_hash'][:12]}, the "
                f"configuration has {self.parts.rubric_hash[:12]}: a changed reward is another run"
            )
        if state["updater"]["parameters"] != list(self.updater.parameters):
            raise TrainingError(
                f"{checkpoint.path} holds other trained parameters than this policy"
            )
        self.policy.load(checkpoint.policy)
        self.updater.restore(state["updater"])
        self.walk.restore(state["walk"])
        self._seconds = state["seconds"]
        self._drawn = [self.walk.by_id[number] for number in state["drawn"]]
        self.iteration = checkpoint.iteration
        if self.evaluation is not None:
            self.evaluation.history = [tuple(pair) for pair in state["history"]]
        self.sampler.discard_ahead()
        states = state["rng"]
        restore_rng(states[min(self.ranks.own, len(states) - 1)])

    def _state(self) -> dict[str, Any]:
        return {
            "updater": self.updater.state(),
            "walk": self.walk.state(),
            "seconds": self._seconds,
            "drawn": [prompt.id for prompt in self._drawn],
            "history": [] if self.evaluation is None else self.evaluation.history,
            "rubric_hash": self.parts.rubric_hash,
        }

    def _draw(self) -> list[Prompt]:
        drawn, self._drawn = self._drawn, []
        return drawn or self.walk.take(self.config.rollout.pairs)

    def _batches(self, prompts: Sequence[Prompt], iteration: int) -> list[PromptBatch]:
        """This rank's slice of every chunk."""
        config = self.config.rollout
        per_chunk = config.pairs // config.chunks
        per_rank = per_chunk // self.ranks.count
        ids = _distinct_ids(prompts)
        batches = []
        for chunk in range(config.chunks):
            first = chunk * per_chunk + self.ranks.own * per_rank
            part = prompts[first : first + per_rank]
            sources = source_images(part)
            batches.append(
                PromptBatch(
                    ids=tuple(ids[first : first + per_rank]),
                    prompts=tuple(p.text for p in part),
                    conditions=self.cache.of(part),
                    sources=None if sources is None else tuple(sources),
                    metadata=tuple(p.metadata for p in part),
                    epoch=iteration,
                )
            )
        return batches

    def _advantages(self, chunks: Sequence[JudgedChunk]) -> list[Advantages]:
        """Of every chunk, in units of the whole iteration over all ranks."""
        config, how = self.config.loss, self.config.mixing
        units = None
        if how == "normalise_first":
            own = pair_squares([chunk.judgements for chunk in chunks])
            units = preference_units(self.ranks.added(own))
        mixed = [mix_preferences(c.judgements, self.specs, how=how, units=units) for c in chunks]
        return [
            advantages(matrix, lam=config.winner, gamma=config.loser, centred=config.centred)
            for matrix in mixed
        ]

    def _check_failures(self, chunks: Sequence[JudgedChunk]) -> None:
        for name, judge in self.config.judges.items():
            failed, total = failure_share(chunks, name)
            sums = self.ranks.added({"failed": float(failed), "total": float(total)})
            if sums["failed"] > judge.max_failure_share * sums["total"]:
                raise TrainingError(
                    f"judge {name} gave no verdict on {sums['failed']:.0f} of {sums['total']:.0f} "
                    f"pairs, more than {judge.max_failure_share:.0%} (max_failure_share): "
                    f"{_first_failure(chunks, name)}"
                )

    def _note_ties(self, prompts: Sequence[Prompt], given: Sequence[Advantages]) -> None:
        """Tells the curriculum about every rank's prompts; a failure says nothing about one."""
        undecided = torch.cat([a.weight.sum(1) == 0 for a in given])
        failed = torch.cat([a.failed for a in given])
        # 0 decided, 1 tied, 2 unknown.
        own = (undecided.long() + (undecided & failed).long()).to(self.policy.device)
        every = self.accelerator.gather(own[None]).cpu()
        chunks = self.config.rollout.chunks
        # [ranks, chunks, per rank] -> the order in which prompts were drawn.
        found = every.view(self.ranks.count, chunks, -1).transpose(0, 1).flatten().tolist()
        known = [(p, bool(n)) for p, n in zip(prompts, found, strict=True) if n != 2]
        self.walk.note([prompt for prompt, _ in known], [is_tied for _, is_tied in known])

    def _awake(self, sampling: bool) -> None:
        """Moves judges and frozen parts onto the device for sampling, and away for training."""
        for sleeper in self.parts.sleepers:
            if sampling:
                sleeper.wake()
            else:
                sleeper.sleep()
        if self.config.policy.offload:
            device = self.policy.device if sampling else torch.device("cpu")
            for part in self.policy.frozen_parts().values():
                part.to(device)

    def _evaluate(self) -> dict[str, float]:
        """Evaluates on rank 0; the others wait, or hold their share of the network ready."""
        assert self.evaluation is not None
        numbers: dict[str, float] = {}
        self._awake(True)
        if self.ranks.own == 0 or self.config.shard:
            averaged = None if self.updater.ema is None else self.updater.ema.applied
            found = self.evaluation.run(self.policy, averaged)
            numbers = {f"held_out/{name}": value for name, value in found.items()}
            if found.get("alarm") and self.ranks.own == 0:
                logger.warning(
                    "ALARM at iteration %d: over the last %d evaluations the reward rose while the "
                    "evaluator fell: the policy may be exploiting the judge",
                    self.iteration,
                    self.config.evaluation.alarm,
                )
        self.accelerator.wait_for_everyone()
        return numbers

    def _is_due(self, every: int | None) -> bool:
        if every is None:
            return False
        return self.iteration % every == 0 or self.iteration == self.config.iterations

    def _should_stop(self) -> bool:
        """Whether any rank was told to stop, or the run's time is up."""
        limit = self.config.max_minutes
        is_late = limit is not None and self._seconds >= 60 * limit
        return any(self.ranks.gathered(self._stopping.asked or is_late))


def _distinct_ids(prompts: Sequence[Prompt]) -> list[int]:
    """Prompt numbers; one that comes again in the same iteration gets another one, so that its
    noise is new."""
    seen: Counter[int] = Counter()
    ids = []
    for prompt in prompts:
        ids.append(prompt.id + (seen[prompt.id] << 40))
        seen[prompt.id] += 1
    return ids


def _first_failure(chunks: Sequence[JudgedChunk], name: str) -> str:
    for chunk in chunks:
        if name in chunk.failures:
            return chunk.failures[name]
        if chunk.judgements[name].errors:
            return chunk.judgements[name].errors[0]
    return "no reason given"
