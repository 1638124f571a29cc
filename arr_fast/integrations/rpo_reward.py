"""From a judge to a reward of the RPO trainer: what `arr-fast train` gives it as its judges.

A rubric comes with the prompt (metadata "rubric": a mapping, or a file) or is the same for all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Protocol

import torch

from arr_fast.errors import ConfigError
from arr_fast.rpo.evaluation import load_callable
from arr_fast.rpo.judge_config import JudgeConfig
from arr_fast.rpo.judging import Judgement, JudgeRequest, SubmitJudge
from arr_fast.rpo.prompts import Prompt
from arr_fast.rpo.section import did_you_mean
from arr_fast.rubric import Rubric

PairJson = Mapping[str, Any]


class RubricOf:
    """The rubric of a prompt: its own, or the common one.

    Args:
        common: A packaged rubric, a file, or None for the default of the task.
    """

    def __init__(self, common: str | None) -> None:
        self._common = None if common is None else read_rubric(common)
        self._read: dict[str, Rubric] = {}

    def __call__(self, metadata: Mapping[str, Any], *, edits: bool) -> Rubric:
        own = metadata.get("rubric")
        if own is None:
            return self._common or Rubric.default("edit" if edits else "t2i")
        key = own if isinstance(own, str) else json.dumps(own, sort_keys=True)
        if key not in self._read:
            self._read[key] = read_rubric(own) if isinstance(own, str) else Rubric(**own)
        return self._read[key]

    def hashes(self, prompts: Iterable[Prompt]) -> set[str]:
        """Content hashes of the rubrics that these prompts are judged by."""
        return {
            self(prompt.metadata, edits=prompt.source is not None).content_hash
            for prompt in prompts
        }


def read_rubric(name: str) -> Rubric:
    """A packaged rubric by name, or a file."""
    return Rubric.builtin(name) if name in Rubric.builtin_names() else Rubric.load(name)


class Comparer(Protocol):
    """Judges groups in the background; every group's pairs come back as `pair_json`s with a, b."""

    def submit(
        self, request: JudgeRequest, rubrics: Sequence[Rubric]
    ) -> Future[list[list[PairJson]]]: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class LocalComparer:
    """An in-process `Judge`."""

    def __init__(self, judge: Any, orders: str, options: Mapping[str, Any]) -> None:
        self._judge = judge
        self._options = {"orders": orders, **options}

    def submit(
        self, request: JudgeRequest, rubrics: Sequence[Rubric]
    ) -> Future[list[list[PairJson]]]:
        """Judges in the judge's own thread."""
        sources = None if request.sources is None else list(request.sources)
        options = {**self._options, "sources": sources}
        prompts, groups = list(request.prompts), [list(group) for group in request.images]
        if len(groups[0]) == 2:
            columns = [[group[k] for group in groups] for k in (0, 1)]
            future = self._judge.submit("compare", prompts, *columns, list(rubrics), **options)
            return _then(future, lambda v: [[_of_two(v.pair_json(i))] for i in range(len(v))])
        future = self._judge.submit("rank", prompts, groups, list(rubrics), **options)
        return _then(future, lambda v: [v.group_json(i)["pairs"] for i in range(len(v))])

    def sleep(self) -> None:
        """Gives the judge's memory back."""
        self._judge.sleep()

    def wake(self) -> None:
        """Makes it usable again."""
        self._judge.wake()


class RemoteComparer:
    """A judge server; requests of a chunk run in a thread of their own."""

    def __init__(self, client: Any, orders: str, options: Mapping[str, Any]) -> None:
        self._client = client
        self._options = {"orders": orders, **options}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="arr-fast-remote-judge")

    def submit(
        self, request: JudgeRequest, rubrics: Sequence[Rubric]
    ) -> Future[list[list[PairJson]]]:
        """Sends one request."""
        return self._threads.submit(self._ask, request, list(rubrics))

    def _ask(self, request: JudgeRequest, rubrics: list[Rubric]) -> list[list[PairJson]]:
        sources = None if request.sources is None else list(request.sources)
        options = {**self._options, "sources": sources}
        prompts, groups = list(request.prompts), [list(group) for group in request.images]
        if len(groups[0]) == 2:
            columns = [[group[k] for group in groups] for k in (0, 1)]
            answer = self._client.compare(prompts, *columns, rubrics, **options)
            return [[_of_two(pair)] for pair in answer["pairs"]]
        answer = self._client.rank(prompts, groups, rubrics, **options)
        return [group["pairs"] for group in answer["groups"]]

    def sleep(self) -> None:
        """Nothing to do: its memory is elsewhere."""

    def wake(self) -> None:
        """Nothing to do."""


class RubricReward:
    """A `SubmitJudge` on a comparer.

    Args:
        comparer: Who judges.
        rubric_of: By which criteria.
    """

    def __init__(self, comparer: Comparer, rubric_of: RubricOf) -> None:
        self._comparer, self.rubric_of = comparer, rubric_of

    def __call__(self, request: JudgeRequest) -> Future[Judgement]:
        """Judges one chunk."""
        edits = request.sources is not None
        rubrics = [self.rubric_of(row, edits=edits) for row in request.metadata]
        size = len(request.images[0])
        return _then(
            self._comparer.submit(request, rubrics), lambda groups: judgement_of(groups, size)
        )

    def sleep(self) -> None:
        """See `arr_fast.rpo.trainer.Sleeper`."""
        self._comparer.sleep()

    def wake(self) -> None:
        """See `arr_fast.rpo.trainer.Sleeper`."""
        self._comparer.wake()


def judgement_of(groups: Sequence[Sequence[PairJson]], size: int) -> Judgement:
    """Verdicts of P groups of G candidates as a judgement.

    Metrics: position bias, and per criterion the mean preference for whoever won the pair.

    Args:
        groups: Per group, its pairs as `PairVerdicts.pair_json` gives them, with a and b.
        size: G.
    """
    wins = torch.zeros(len(groups), size, size)
    errors: list[str] = []
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def add(name: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1

    for number, pairs in enumerate(groups):
        for pair in pairs:
            a, b = pair["a"], pair["b"]
            sign = {"A": 1.0, "B": -1.0, "tie": 0.0}.get(str(pair["winner"]), math.nan)
            if pair["status"] not in ("ok", "tie"):
                sign = math.nan
                errors.append(f"prompt {number}: {pair.get('error') or pair['status']}")
            wins[number, a, b], wins[number, b, a] = sign, -sign
            for criterion in pair["criteria"]:
                add("bias", criterion.get("position_bias"))
                preference = criterion.get("preference")
                if preference is not None and sign in (1.0, -1.0):
                    add(f"preference/{criterion['id']}", sign * preference)
    return Judgement(
        wins=wins, errors=tuple(errors), metrics=sums, counts=counts, details=list(groups)
    )


def check_engines(judges: Mapping[str, JudgeConfig]) -> None:
    """Checks the engine settings of in-process judges before anything is loaded.

    Raises:
        ConfigError: A name or value that `EngineConfig` does not know; says whose.
    """
    from arr_fast.engine.config import EngineConfig

    known = [field.name for field in fields(EngineConfig)]
    for name, section in judges.items():
        for key in section.engine:
            if key not in known:
                meant = did_you_mean(key, known)
                raise ConfigError(f"judges.{name}.engine: unknown key {key}{meant}")
        try:
            EngineConfig(**section.engine)
        except ValueError as error:
            raise ConfigError(f"judges.{name}.engine: {error}") from None


def build_rewards(
    judges: Mapping[str, JudgeConfig], prompts: Sequence[Prompt], *, device: str = "auto"
) -> tuple[dict[str, SubmitJudge], list[RubricReward], str]:
    """Loads or connects the judges of a run.

    Args:
        judges: By name.
        prompts: Of training; their rubrics go into the hash.
        device: Of in-process judges that are to find one themselves: the process's own.

    Returns:
        (judges, those that sleep while the policy trains, hash over all rubrics).

    Raises:
        ConfigError: A factory that returns nothing callable; see also `check_engines`.
        ArrFastError: A judge that cannot be loaded or reached.
    """
    check_engines(judges)
    found: dict[str, SubmitJudge] = {}
    sleepers: list[RubricReward] = []
    digest = hashlib.sha256()
    for name, section in judges.items():
        digest.update(name.encode())
        if section.call is not None:
            made = load_callable(section.call)()
            if not callable(made):
                raise ConfigError(f"judges.{name}.call: {section.call} returned no callable")
            found[name] = made
            digest.update(section.call.encode())
            continue
        reward = RubricReward(_comparer(section, device), RubricOf(section.rubric))
        for each in sorted(reward.rubric_of.hashes(prompts)):
            digest.update(each.encode())
        found[name] = reward
        if section.sleep:
            sleepers.append(reward)
    return found, sleepers, digest.hexdigest()


def _comparer(section: JudgeConfig, device: str) -> Comparer:
    if section.url is not None:
        from arr_fast.serve.client import JudgeClient

        client = JudgeClient(section.url, timeout_s=section.timeout_s)
        return RemoteComparer(client, section.orders, section.options.arguments())
    from arr_fast.judge import Judge

    judge = Judge.from_pretrained(**section.loading(device))
    return LocalComparer(judge, section.orders, section.options.arguments())


def _of_two(pair: PairJson) -> PairJson:
    return {"a": 0, "b": 1, **pair}


def _then(future: Future[Any], convert: Any) -> Future[Any]:
    """A future of convert(result); errors pass through, and cancellation in both directions."""
    after: Future[Any] = Future()

    def finish(done: Future[Any]) -> None:
        if done.cancelled():
            after.cancel()
        # False where nobody waits any more.
        if not after.set_running_or_notify_cancel():
            return
        try:
            after.set_result(convert(done.result()))
        except BaseException as error:
            after.set_exception(error)

    after.add_done_callback(lambda ended: future.cancel() if ended.cancelled() else None)
    future.add_done_callback(finish)
    return after
