"""`ours`: the judge of this package, and the judge used one ordered pair at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast.bench.engines import EngineOptions
from arr_fast.bench.workloads import Inputs
from arr_fast.rubric import Criterion, Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge


class OursEngine:
    """All criteria, orders and pairs of a call in packed forests.

    Prefix-KV reuse is off: every run computes its prefixes, as the other engines do.
    """

    gated = True

    def __init__(self, options: EngineOptions, compiled: bool = False) -> None:
        self.name = "ours-compiled" if compiled else "ours"
        self.note = "one packed forest per call, prefix-KV reuse off" + (
            ", layers compiled" if compiled else ""
        )
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "prefix_cache": "off"}
        if compiled:
            settings["compile"] = True
        self._settings = {**settings, **options.judge}
        self.judge: Judge | None = None

    def prepare(self, model_dir: str) -> None:
        """Loads the judge."""
        from arr_fast.judge import Judge

        self.judge = Judge.from_pretrained(model_dir, **self._settings)

    def reset(self, inputs: Inputs, *, warm: bool) -> None:
        """Clears the caches; with `warm`, fills the feature cache again."""
        judge = self._loaded()
        judge.engine.clear_caches()
        if warm:
            judge.engine.image_features([image for each in inputs.images for image in each])

    def run(self, inputs: Inputs) -> np.ndarray:
        """float64 [items, legs, K]."""
        judge, workload = self._loaded(), inputs.workload
        rubric = rubric_of(inputs)
        captions = list(inputs.captions)
        if workload.group > 2:
            ranked = judge.rank(captions, [list(each) for each in inputs.images], rubric)
            return _by_leg(ranked, inputs)
        firsts, seconds = zip(*inputs.images, strict=True)
        verdicts = judge.compare(
            captions, list(firsts), list(seconds), rubric, orders=workload.orders
        )
        sides = [verdicts.log_odds_ab, verdicts.log_odds_ba]
        return np.stack([side for side in sides if side is not None], axis=1)

    def close(self) -> None:
        """Stops the judge's background thread."""
        if self.judge is not None:
            self.judge.close()

    def _loaded(self) -> Judge:
        if self.judge is None:
            raise RuntimeError("prepare() was not called")
        return self.judge


class SeparateEngine(OursEngine):
    """The same judge, called once per ordered pair: what a group call is compared with.

    With cold images every call encodes its own two images, as separate calls without a shared
    cache do.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.name = "ours-separate"
        self.note = "one single-order compare per ordered pair; cold: caches cleared between calls"

    def run(self, inputs: Inputs) -> np.ndarray:
        """float64 [items, legs, K]."""
        judge, workload = self._loaded(), inputs.workload
        rubric = rubric_of(inputs)
        results = np.empty((workload.n_pairs, len(workload.legs), workload.criteria))
        for item in range(workload.n_pairs):
            for number, (first, second) in enumerate(workload.legs):
                if workload.images == "cold":
                    judge.engine.clear_caches()
                images = inputs.images[item]
                verdicts = judge.compare(
                    [inputs.captions[item]], [images[first]], [images[second]], rubric, orders="AB"
                )
                assert verdicts.log_odds_ab is not None
                results[item, number] = verdicts.log_odds_ab[0]
        return results


def rubric_of(inputs: Inputs) -> Rubric:
    """The workload's criteria as a rubric; texts are used as they are."""
    criteria = tuple(
        Criterion(id=f"c{number}", text=text) for number, text in enumerate(inputs.criteria)
    )
    return Rubric(name=inputs.workload.name, task="t2i", criteria=criteria)


def _by_leg(ranked: Any, inputs: Inputs) -> np.ndarray:
    workload = inputs.workload
    place = {leg: number for number, leg in enumerate(workload.legs)}
    results = np.full((workload.n_pairs, len(workload.legs), workload.criteria), np.nan)
    for row, (group, i, j) in enumerate(ranked.pair_index):
        results[group, place[i, j]] = ranked.pairs.log_odds_ab[row]
        results[group, place[j, i]] = ranked.pairs.log_odds_ba[row]
    return results
