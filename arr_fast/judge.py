"""`Judge`: what users hold. Prompts, images and a rubric in; verdicts out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch

from arr_fast.aggregation import AggregationName, Mode, rule_of
from arr_fast.engine.config import EngineConfig
from arr_fast.engine.engine import Engine, LabelIds
from arr_fast.engine.model import load_model
from arr_fast.engine.planner import ImageTable
from arr_fast.engine.planner import Path as TokenPath
from arr_fast.engine.weights import WeightKeeper
from arr_fast.errors import ArrFastError
from arr_fast.judge_items import (
    Item,
    Orders,
    RubricLike,
    check_choice,
    check_reading,
    leaves_of,
    read_groups,
    read_items,
)
from arr_fast.judge_results import log_odds, pair_results, point_results
from arr_fast.prompts import (
    PAIR_LABELS,
    POINT_LABELS,
    TEMPLATE_VERSION,
    criterion_leaf,
    pair_parts,
    point_parts,
)
from arr_fast.provenance import Provenance
from arr_fast.trace import Order, VerdictTrace
from arr_fast.verdicts import (
    GroupVerdicts,
    PairVerdicts,
    PointVerdicts,
    group_verdicts,
)

Labels = Sequence[Sequence[str]]
# A leg is one conversation of an item: which images it shows, in which order.
Leg = tuple[Order, tuple[int, ...]]


class Judge:
    """A frozen vision-language model that judges images by explicit criteria.

    Make one with `Judge.from_pretrained`. All methods are safe to call from several threads; calls
    run one after the other.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pair_labels: Labels = PAIR_LABELS,
        point_labels: Labels = POINT_LABELS,
    ) -> None:
        self.engine = engine
        self._weights = WeightKeeper(engine)
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        probe = criterion_leaf("x")
        encode = engine.prompts.label_ids
        self._pair_labels = encode(pair_labels, parts=[*pair_parts("t2i", "x"), probe])
        self._point_labels = encode(point_labels, parts=[*point_parts("t2i", "x"), probe])
        for labels, name in ((self._pair_labels, "pair"), (self._point_labels, "point")):
            if len(labels) != 2:
                raise ValueError(f"{name}_labels must be two labels, got {len(labels)}")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        adapter: str | Path | None = None,
        quantization: Literal["int8", "fp8"] | None = None,
        pair_labels: Labels = PAIR_LABELS,
        point_labels: Labels = POINT_LABELS,
        **engine: Any,
    ) -> Judge:
        """Loads a judge.

        Args:
            model: "builtin:shapes", a directory or hub id in the transformers format, or
                "random:<family>-<size>" for benchmarks.
            device: "auto" (GPU if there is one) or a torch device.
            dtype: "auto" (float32 on a CPU, bfloat16 on a GPU) or a name.
            revision: Branch, tag or commit of a hub id.
            adapter: A PEFT adapter to merge into the weights.
            quantization: "int8" or "fp8" linear weights through torchao.
            pair_labels: Token variants of "the first image" and "the second image".
            point_labels: Token variants of "yes" and "no".
            **engine: Fields of `EngineConfig`: impl, compile, cache budgets, batch size.

        Raises:
            UnsupportedModelError: The family is not supported (lists what is), or a label is not
                one token.
            MissingDependencyError: An extra is needed and missing.
        """
        config = EngineConfig(**engine)
        loaded = load_model(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            adapter=adapter,
            quantization=quantization,
        )
        return cls(Engine(loaded, config), pair_labels=pair_labels, point_labels=point_labels)

    def compare(
        self,
        prompts: Sequence[str],
        images_a: Any,
        images_b: Any,
        rubric: RubricLike = None,
        *,
        sources: Any = None,
        orders: Orders = "both",
        mode: Mode = "criteria",
        label_mass: bool = False,
        label_mass_threshold: float = 0.5,
        aggregation: AggregationName | None = None,
        temperature: float | None = None,
        margin: float | None = None,
        inconsistent: Literal["tie", "keep"] = "tie",
        learned_weights: Any = None,
        progress: Callable[[int], None] | None = None,
    ) -> PairVerdicts:
        """Judges B pairs of images, every criterion and both orders in one forward per batch.

        Args:
            prompts: B captions, or instructions where `sources` is given.
            images_a: B images: PIL, path, bytes, tensors or arrays (see `images.to_image`), or one
                batched tensor.
            images_b: B images.
            rubric: One rubric, one per prompt, a file (str or Path), a bundled name, or None for
                the default.
            sources: B source images of an editing task.
            orders: "both" removes position bias; "AB" or "BA" costs one order.
            mode: Per-criterion verdicts, the whole rubric at once, or both in one forward.
            label_mass: Also read P(any label); needs the whole vocabulary.
            label_mass_threshold: Verdicts below it are flagged.
            aggregation: Rule from verdicts to a winner; by default log_odds_mean, or holistic in
                that mode.
            temperature: Of P(A > B); None takes the calibration of each pair's rubric, or 1.
            margin: |Z| up to this is a tie; None takes that calibration, or 0.
            inconsistent: What a pair is whose orders disagree.
            learned_weights: [K] or [B, K], for aggregation="learned".
            progress: Told how many pairs each finished batch held.

        Returns:
            Verdicts on B pairs; an item that could not be judged has status "error" and a message.

        Raises:
            ValueError: Lists of different lengths, an empty prompt, an unknown option.
            VerdictError: A rule whose input the mode does not read.
        """
        check_reading(orders, mode)
        rule = rule_of(aggregation, mode, learned_weights)
        columns = {"images_a": images_a, "images_b": images_b}
        items = read_items(prompts, columns, rubric, sources, "pair")
        legs = _pair_legs(orders, 0, 1)
        results, provenance = self._judge(items, [legs] * len(items), mode, label_mass, progress)
        return pair_results(
            items,
            results,
            provenance=provenance,
            orders=orders,
            mode=mode,
            label_mass=label_mass,
            label_mass_threshold=label_mass_threshold,
            aggregation=rule,
            temperature=temperature,
            margin=margin,
            inconsistent=inconsistent,
            learned_weights=learned_weights,
        )

    def score(
        self,
        prompts: Sequence[str],
        images: Any,
        rubric: RubricLike = None,
        *,
        sources: Any = None,
        label_mass: bool = False,
        label_mass_threshold: float = 0.5,
        progress: Callable[[int], None] | None = None,
    ) -> PointVerdicts:
        """Scores B single images: P(yes) for every criterion, in one forward per batch.

        Args:
            prompts: B captions, or instructions where `sources` is given.
            images: B images.
            rubric, sources, label_mass, label_mass_threshold, progress: See `compare`.

        Raises:
            ValueError: Lists of different lengths, an empty prompt.
        """
        items = read_items(prompts, {"images": images}, rubric, sources, "image")
        legs: list[Leg] = [("point", (0,))]
        results, provenance = self._judge(
            items, [legs] * len(items), "criteria", label_mass, progress
        )
        return point_results(
            items,
            results,
            provenance=provenance,
            label_mass=label_mass,
            label_mass_threshold=label_mass_threshold,
        )

    def rank(
        self,
        prompts: Sequence[str],
        groups: Sequence[Any],
        rubric: RubricLike = None,
        *,
        sources: Any = None,
        orders: Orders = "both",
        mode: Mode = "criteria",
        label_mass: bool = False,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> GroupVerdicts:
        """Ranks groups of candidates by all of their pairs.

        The pairs of a group share their text, and pairs with the same first image share that too.

        Args:
            prompts: One caption or instruction per group.
            groups: For each prompt at least two images; sizes may differ.
            rubric, sources, orders, mode, label_mass, progress: See `compare`.
            **options: aggregation, temperature, margin, inconsistent, label_mass_threshold and
                learned_weights of `compare`.

        Raises:
            ValueError: Lists of different lengths, an empty prompt, a group of one.
            VerdictError: A rule whose input the mode does not read.
        """
        check_reading(orders, mode)
        rule = rule_of(options.pop("aggregation", None), mode, options.get("learned_weights"))
        items = read_groups(prompts, groups, rubric, sources)
        sizes = [len(group) for group in groups]
        pairs = [list(combinations(range(size), 2)) for size in sizes]
        # Neighbours share their first image, so that a group may be cut between any two of those.
        legs = [
            sorted((leg for pair in each for leg in _pair_legs(orders, *pair)), key=itemgetter(1))
            for each in pairs
        ]
        results, provenance = self._judge(items, legs, mode, label_mass, progress)
        flat_items, flat_results, index = [], [], []
        for group, (item, result) in enumerate(zip(items, results, strict=True)):
            for i, j in pairs[group]:
                flat_items.append(item)
                if isinstance(result, list):
                    by_leg = dict(zip(legs[group], result, strict=True))
                    flat_results.append([by_leg[leg] for leg in _pair_legs(orders, i, j)])
                else:
                    flat_results.append(result)
                index.append((group, i, j))
        verdicts = pair_results(
            flat_items,
            flat_results,
            provenance=provenance,
            orders=orders,
            mode=mode,
            label_mass=label_mass,
            aggregation=rule,
            **options,
        )
        return group_verdicts(verdicts, index, sizes)

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs `compare`, `score` or `rank` in the background, to overlap with other work.

        Args:
            method: "compare", "score" or "rank"; the rest are its arguments.

        Returns:
            A future of the method's result. Calls run in the order they were submitted.
        """
        check_choice("method", method, ("compare", "score", "rank"))
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="arr-fast-judge")
            return self._executor.submit(getattr(self, method), *args, **kwargs)

    def trace(
        self,
        prompts: Sequence[str],
        images_a: Any,
        images_b: Any = None,
        rubric: RubricLike = None,
        *,
        sources: Any = None,
        orders: Orders = "both",
        mode: Mode = "criteria",
    ) -> list[VerdictTrace]:
        """The evidence behind every verdict of a call, so that anyone can replay it.

        Args:
            prompts, images_a, images_b, rubric, sources, orders, mode: As in `compare`; without
                `images_b`, as in `score`.

        Returns:
            One trace per verdict: token ids, positions, images, label ids and log-odds.

        Raises:
            ValueError: As in `compare`.
            ArrFastError: An item cannot be judged; traces have no error column.
        """
        check_reading(orders, mode)
        legs: list[Leg]
        if images_b is None:
            items = read_items(prompts, {"images": images_a}, rubric, sources, "image")
            legs = [("point", (0,))]
        else:
            columns = {"images_a": images_a, "images_b": images_b}
            items = read_items(prompts, columns, rubric, sources, "pair")
            legs = _pair_legs(orders, 0, 1)
        for item in items:
            if item.error is not None:
                raise item.error
        labels = self._labels(legs)
        with self.engine.lock:
            self._weights.check_awake()
            table, paths, features = self._paths(items, [legs] * len(items), mode)
            for item in items:
                if item.error is not None:
                    raise item.error
            results = self.engine.score(paths, labels, table, features)
        traces = []
        for number, (item, each, result) in enumerate(zip(items, paths, results, strict=True)):
            if isinstance(result, BaseException):
                raise ArrFastError(f"{item.name}: {result}") from result
            names = [*item.rubric.ids] if mode != "holistic" else []
            names += ["holistic"] if mode != "criteria" else []
            for place, (path, read) in enumerate(zip(each, result, strict=True)):
                traces.append(
                    VerdictTrace(
                        item=number,
                        criterion=names[place % len(names)],
                        order=legs[place // len(names)][0],
                        input_ids=path.sequence.ids,
                        position_ids=path.sequence.positions,
                        images=path.images,
                        label_ids=(labels[0], labels[1]),
                        log_odds=log_odds(read),
                    )
                )
        return traces

    def update_weights(self, source: str | Path | Mapping[str, torch.Tensor]) -> None:
        """Replaces the weights in place; everything computed from the old ones is forgotten.

        The revision then ends in "#update1", "#update2", ...: provenance tells the new weights from
        the old, and what was calibrated for the old ones is not applied to them.

        Args:
            source: A checkpoint directory of the same architecture, or a state dict.

        Raises:
            ValueError: Missing, unknown or misshapen tensors; nothing is changed then.
        """
        self._weights.update(source)

    def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Frees the device for someone else: caches are dropped and weights moved away.

        Args:
            level: 1 keeps the weights in host memory, 2 drops them and reads the checkpoint again
                on `wake`. A judge that sleeps may sink from 1 to 2; it never rises but by `wake`.
        """
        self._weights.sleep(level)

    def wake(self) -> None:
        """Makes a sleeping judge usable again; no effect on one that is awake."""
        self._weights.wake()

    def stats(self) -> dict[str, Any]:
        """Counters since the judge was made: forwards, tokens, seconds by stage, cache hits."""
        return {"asleep": self._weights.level > 0, **self.engine.stats()}

    def close(self) -> None:
        """Waits for submitted work and stops the background thread."""
        with self._lock:
            if self._executor is not None:
                self._executor.shutdown(wait=True)
                self._executor = None

    def _labels(self, legs: Sequence[Leg]) -> LabelIds:
        return self._point_labels if legs[0][0] == "point" else self._pair_labels

    def _judge(
        self,
        items: Sequence[Item],
        legs: Sequence[Sequence[Leg]],
        mode: Mode,
        label_mass: bool,
        progress: Callable[[int], None] | None,
    ) -> tuple[list[Any], Provenance]:
        """For each item a list over legs of lists over leaves, or the exception it raised."""
        with self.engine.lock:
            self._weights.check_awake()
            # Weights may be updated as soon as the lock is free.
            provenance = self._provenance(items)
            table, paths, features = self._paths(items, legs, mode)
            labels = self._labels(legs[0])
            scored = self.engine.score(paths, labels, table, features, label_mass, progress)
        results: list[Any] = []
        for item, each, result in zip(items, legs, scored, strict=True):
            if item.error is not None or isinstance(result, BaseException):
                results.append(item.error or result)
                continue
            width = len(result) // len(each)
            results.append([result[i * width : (i + 1) * width] for i in range(len(each))])
        return results, provenance

    def _paths(
        self, items: Sequence[Item], legs: Sequence[Sequence[Leg]], mode: Mode
    ) -> tuple[ImageTable, list[list[TokenPath]], dict[str, Any]]:
        """Encodes images and conversations; a failure is recorded on its item."""
        good = [item for item in items if item.error is None]
        images = [i for item in good for i in item.shown(*range(len(item.images)))]
        unencoded: dict[str, BaseException] = {}
        features = self.engine.image_features(images, unencoded)
        for item in good:
            for image in item.shown(*range(len(item.images))):
                if image.content_hash in unencoded:
                    cause = unencoded[image.content_hash]
                    item.error = ArrFastError(f"{item.name}: an image was not encoded: {cause}")
        table = ImageTable()
        paths: list[list[TokenPath]] = []
        for item, each in zip(items, legs, strict=True):
            found: list[TokenPath] = []
            try:
                if item.error is None:
                    leaves = leaves_of(item, mode)
                    for order, numbers in each:
                        build = point_parts if order == "point" else pair_parts
                        parts = build(item.task, item.prompt)
                        shown = item.shown(*numbers)
                        found += self.engine.paths(parts, leaves, shown, features, table, item.name)
            except ArrFastError as error:
                item.error, found = error, []
            paths.append(found)
        return table, paths, features

    def _provenance(self, items: Sequence[Item]) -> Provenance:
        loaded = self.engine.loaded
        rubrics = {id(item.rubric): item.rubric for item in items}.values()
        return Provenance(
            model=loaded.name,
            revision=loaded.revision,
            rubric_hashes=tuple(dict.fromkeys(rubric.content_hash for rubric in rubrics)),
            template_version=TEMPLATE_VERSION,
            settings={
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "device": str(loaded.device),
                "impl": self.engine.impl,
                "quantization": loaded.quantization or "none",
                "adapter": loaded.peft_adapter or "none",
                "weights_epoch": str(self.engine.epoch),
            },
        )


def _pair_legs(orders: Orders, i: int, j: int) -> list[Leg]:
    both: dict[str, Leg] = {"AB": ("AB", (i, j)), "BA": ("BA", (j, i))}
    return list(both.values()) if orders == "both" else [both[orders]]
