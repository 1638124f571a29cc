"""What the judge says about criteria on pairs, on disk: no criterion is asked twice about a pair.

Verdicts do not depend on what else is in their forward (the engine's contract), so they are kept
per criterion: verification, the matrix of selection and an evaluation share them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast.autorubric.call_log import CallLog, Progress
from arr_fast.autorubric.labelled import LabelledPair, cluster_numbers, digest
from arr_fast.errors import VerdictError
from arr_fast.evals.judging import judge_identity
from arr_fast.rubric import Criterion, Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge

logger = logging.getLogger("arr_fast")

_UNKNOWN = (float("nan"), float("nan"))


@dataclass(slots=True)
class JudgingCost:
    """What judging cost in this process.

    Attributes:
        calls: Calls of `Judge.compare`.
        pairs: Pairs in them.
        verdicts: Criteria times orders read.
        seconds: Wall time.
    """

    calls: int = 0
    pairs: int = 0
    verdicts: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreMatrix:
    """N pairs x K criteria of log-odds.

    Attributes:
        texts: The criteria.
        ab, ba: float64 [N, K], log-odds that the image shown first is the better one.
        label: [N], 1 where A is preferred, -1 where B is.
        clusters: int [N]; pairs of one cluster belong to one fold.
    """

    texts: tuple[str, ...]
    ab: np.ndarray
    ba: np.ndarray
    label: np.ndarray
    clusters: np.ndarray

    @property
    def preference(self) -> np.ndarray:
        """float64 [N, K], positive where A is better."""
        return np.asarray(0.5 * (self.ab - self.ba))

    @property
    def bias(self) -> np.ndarray:
        """float64 [N, K], positive where the first place gains."""
        return np.asarray(0.5 * (self.ab + self.ba))

    def columns(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the numbers of some criteria."""
        places = {text: k for k, text in enumerate(self.texts)}
        return np.array([places[text] for text in texts], dtype=int)

    def only(self, texts: Sequence[str]) -> ScoreMatrix:
        """Returns some of the criteria."""
        chosen = self.columns(texts)
        return ScoreMatrix(
            tuple(texts), self.ab[:, chosen], self.ba[:, chosen], self.label, self.clusters
        )

    def take(self, rows: np.ndarray) -> ScoreMatrix:
        """Returns some of the pairs, by index or mask."""
        return ScoreMatrix(
            self.texts, self.ab[rows], self.ba[rows], self.label[rows], self.clusters[rows]
        )


class VerdictLog:
    """A judge behind a log of verdicts.

    Args:
        judge: The judge.
        log: Where verdicts are kept.
        batch_size: Pairs per call of the judge.

    Attributes:
        cost: Of this process.
        failures: Pair name -> why the judge could not judge it.
    """

    def __init__(self, judge: Judge, log: CallLog, batch_size: int = 16) -> None:
        self.judge = judge
        self.cost = JudgingCost()
        self.failures: dict[str, str] = {}
        self._log = log
        self._batch_size = batch_size

    def log_odds(
        self,
        pairs: Sequence[LabelledPair],
        texts: Sequence[Sequence[str]],
        progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """What the judge says, both orders; what the log lacks is judged, one forward per batch.

        Args:
            pairs: N pairs.
            texts: For each pair its criteria; "{caption}" stands for the pair's prompt.
            progress: Told how many of the pairs are judged.

        Returns:
            For each pair float64 [K, 2]: (z_AB, z_BA) per criterion; NaN where the judge failed
            (see `failures`).
        """
        identity = judge_identity(self.judge)
        identity["weights_epoch"] = self.judge.engine.epoch
        prefix = digest(["verdict", identity])
        contents = [pair.content_key for pair in pairs]
        wanted = [
            [digest([prefix, content, text]) for text in each]
            for content, each in zip(contents, texts, strict=True)
        ]
        # Equal criteria of equal pairs are asked once.
        asked: set[str] = set()
        work: list[tuple[LabelledPair, list[str], list[str]]] = []
        for pair, each, keys in zip(pairs, texts, wanted, strict=True):
            missing = {
                key: text
                for key, text in zip(keys, each, strict=True)
                if key not in asked and self._log.get(key) is None
            }
            asked |= missing.keys()
            if missing:
                work.append((pair, list(missing.values()), list(missing)))
        done = len(pairs) - len(work)
        if progress is not None:
            progress(done, len(pairs))
        for task in ("t2i", "edit"):
            part = [each for each in work if each[0].task == task]
            for start in range(0, len(part), self._batch_size):
                batch = part[start : start + self._batch_size]
                self._judge(batch)
                done += len(batch)
                if progress is not None:
                    progress(done, len(pairs))
        return [
            np.array([self._log.get(key) or _UNKNOWN for key in keys]).reshape(-1, 2)
            for keys in wanted
        ]

    def matrix(
        self,
        pairs: Sequence[LabelledPair],
        texts: Sequence[str],
        progress: Progress | None = None,
    ) -> ScoreMatrix:
        """Every criterion on every pair.

        Raises:
            VerdictError: Some pair could not be judged; names each.
        """
        odds = np.stack(self.log_odds(pairs, [texts] * len(pairs), progress))
        failed = [p.name for p, row in zip(pairs, odds, strict=True) if np.isnan(row).any()]
        if failed:
            reasons = [f"{name}: {self.failures.get(name, 'no verdict')}" for name in failed]
            raise VerdictError(f"{len(failed)} pairs could not be judged: {'; '.join(reasons)}")
        labels = np.array([pair.label for pair in pairs])
        return ScoreMatrix(
            tuple(texts), odds[:, :, 0], odds[:, :, 1], labels, cluster_numbers(pairs)
        )

    def _judge(self, batch: Sequence[tuple[LabelledPair, list[str], list[str]]]) -> None:
        started = time.perf_counter()
        pairs = [pair for pair, _, _ in batch]
        rubrics = [_rubric(pair, texts) for pair, texts, _ in batch]
        verdicts = self.judge.compare(
            [pair.prompt for pair in pairs],
            [pair.images[0] for pair in pairs],
            [pair.images[1] for pair in pairs],
            rubrics,
            sources=[pair.source for pair in pairs] if pairs[0].source is not None else None,
        )
        self.cost.calls += 1
        self.cost.pairs += len(batch)
        self.cost.verdicts += 2 * sum(len(texts) for _, texts, _ in batch)
        self.cost.seconds += time.perf_counter() - started
        assert verdicts.log_odds_ab is not None and verdicts.log_odds_ba is not None
        found: dict[str, list[float]] = {}
        for row, (pair, _, keys) in enumerate(batch):
            message = verdicts.errors[row]
            if message is not None:
                self.failures[pair.name] = message
                logger.warning("%s: %s", pair.name, message)
                continue
            for k, key in enumerate(keys):
                both = (verdicts.log_odds_ab[row, k], verdicts.log_odds_ba[row, k])
                found[key] = [float(z) for z in both]
        self._log.put_all(found)


def _rubric(pair: LabelledPair, texts: Sequence[str]) -> Rubric:
    criteria = tuple(Criterion(id=f"c{n}", text=text) for n, text in enumerate(texts))
    return Rubric(name="candidates", task=pair.task, criteria=criteria)
