"""Workloads: what is judged, in exact token counts, and real inputs made from it.

Counts are those of the prefix tree. The prefix is everything that the criteria of one leg share;
a leaf is what one criterion adds: its text, the end of the user turn and the generation prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import numpy as np
from PIL import Image

from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.random_tokenizer import WORDS
from arr_fast.images import CanonicalImage, to_image
from arr_fast.prompts import criterion_leaf, pair_parts

Leg = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Workload:
    """One benchmark point.

    Attributes:
        name: What rows and plots call it.
        n_pairs: Items per call.
        height, width: Pixels of every image.
        criteria: K, criteria per pair.
        leaf_tokens: Tokens of every leaf, exactly.
        prefix_tokens: Tokens of the shared prefix, exactly (the caption is cut to fit), or None
            for a caption of twelve words.
        orders: "AB", or "both".
        images: "warm": encoded before the clock starts; "cold": encoded inside.
        group: Candidates per item; above 2 every ordered pair of them is judged.
        seed: Seed of pixels and words.
    """

    name: str = "design9"
    n_pairs: int = 1
    height: int = 512
    width: int = 512
    criteria: int = 20
    leaf_tokens: int = 13
    prefix_tokens: int | None = 590
    orders: Literal["AB", "both"] = "AB"
    images: Literal["warm", "cold"] = "warm"
    group: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("n_pairs", "height", "width", "criteria", "leaf_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.group < 2:
            raise ValueError(f"group must be at least 2, got {self.group}")

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Ordered pairs of candidate indices that are judged, first-shown first."""
        if self.group > 2:
            return tuple(permutations(range(self.group), 2))
        return ((0, 1), (1, 0)) if self.orders == "both" else ((0, 1),)

    @property
    def verdicts(self) -> int:
        """Verdicts of one run."""
        return self.n_pairs * len(self.legs) * self.criteria


@dataclass(frozen=True, slots=True)
class Inputs:
    """Real inputs of a workload for one checkpoint.

    Attributes:
        workload: What they were made from.
        captions: One per item.
        images: Per item, its candidates.
        criteria: K texts, the same for all items.
        prefix_tokens: Tokens that the criteria of the first leg share.
        leaf_tokens: Tokens of each leaf.
    """

    workload: Workload
    captions: tuple[str, ...]
    images: tuple[tuple[CanonicalImage, ...], ...]
    criteria: tuple[str, ...]
    prefix_tokens: int
    leaf_tokens: int

    def sequences(self, prompts: PlainPrompts, item: int, leg: Leg) -> list[np.ndarray]:
        """The token ids of every criterion of one leg."""
        shown = [self.images[item][index] for index in leg]
        return prompts.pair_ids(self.captions[item], shown, self.criteria)


def named(name: str) -> Workload:
    """A workload by name.

    Names: `design9` (K=20, 13-token leaves, two 512 px images, prefix 590, warm images),
    `design9-2k` (992 px images, prefix 2,000), `design9-24` (24-token leaves, cold images),
    `group4` (12 ordered pairs of 4 candidates), `smoke` (64 px, for tests). A suffix `-K<n>` sets
    the number of criteria, `-cold` or `-warm` the images, `-both` the orders.

    Raises:
        ValueError: Unknown name.
    """
    bases = {
        "design9-2k": Workload("design9-2k", height=992, width=992, prefix_tokens=2000),
        "design9-24": Workload("design9-24", leaf_tokens=24, images="cold"),
        "design9": Workload("design9"),
        "group4": Workload("group4", group=4),
        "smoke": Workload(
            "smoke", height=64, width=96, criteria=3, leaf_tokens=13, prefix_tokens=None
        ),
    }
    for base, workload in bases.items():
        if name != base and not name.startswith(f"{base}-"):
            continue
        for option in name[len(base) :].split("-")[1:]:
            if option.startswith("K") and option[1:].isdigit():
                workload = replace(workload, criteria=int(option[1:]))
            elif option == "cold":
                workload = replace(workload, images="cold")
            elif option == "warm":
                workload = replace(workload, images="warm")
            elif option == "both":
                workload = replace(workload, orders="both")
            else:
                raise ValueError(f"unknown workload option {option!r} in {name!r}")
        return replace(workload, name=name)
    raise ValueError(f"unknown workload {name!r}; there are {', '.join(bases)}")


def build_inputs(workload: Workload, prompts: PlainPrompts) -> Inputs:
    """Makes captions, criteria and images with exact token counts under one tokenizer.

    Args:
        workload: What to make.
        prompts: The checkpoint's prompts.

    Raises:
        ValueError: A count cannot be met (a leaf shorter than its closing tokens, a prefix shorter
            than its images).
    """
    rng = np.random.default_rng(workload.seed)
    images = tuple(
        tuple(noise_image(rng, workload.height, workload.width) for _ in range(workload.group))
        for _ in range(workload.n_pairs)
    )
    shown = images[0][:2]
    prefix, closing = _frame(prompts, "a", shown)
    free = workload.leaf_tokens - closing
    if free < 1:
        raise ValueError(f"leaf_tokens={workload.leaf_tokens} leaves no room: {closing} close it")
    criteria: list[str] = []
    for number in range(workload.criteria):
        # Different first words keep the tree from sharing more than the stated prefix.
        first = _FIRST[number % len(_FIRST)]
        criteria.append(exact_text(prompts, free, rng, "\nCriterion:", first))
    captions = []
    for item in range(workload.n_pairs):
        words = 12
        if workload.prefix_tokens is not None:
            base = _frame(prompts, "a", images[item][:2])[0]
            words = workload.prefix_tokens - base + 1
            if words < 1:
                raise ValueError(
                    f"prefix_tokens={workload.prefix_tokens} is too short: images and task "
                    f"already take {base - 1}"
                )
        captions.append(exact_text(prompts, words, rng, "\nCaption:"))
    prefix = _frame(prompts, captions[0], shown)[0]
    inputs = Inputs(
        workload, tuple(captions), images, tuple(criteria), prefix, workload.leaf_tokens
    )
    check_counts(inputs, prompts)
    return inputs


def check_counts(inputs: Inputs, prompts: PlainPrompts) -> None:
    """Raises ValueError unless every sequence is exactly as long as the workload says."""
    workload = inputs.workload
    for item in range(workload.n_pairs):
        lengths = {len(ids) for ids in inputs.sequences(prompts, item, (0, 1))}
        if workload.prefix_tokens is not None:
            expected = workload.prefix_tokens + workload.leaf_tokens
            if lengths != {expected}:
                raise ValueError(f"item {item}: sequences of {lengths} tokens, not {expected}")
        elif len(lengths) != 1:
            raise ValueError(f"item {item}: sequences of different lengths {lengths}")


def exact_text(
    prompts: PlainPrompts,
    tokens: int,
    rng: np.random.Generator,
    after: str,
    first: str | None = None,
) -> str:
    """Words that take exactly `tokens` tokens when they follow `after` and a space.

    Raises:
        ValueError: This tokenizer cannot meet the count.
    """
    base = prompts.text_tokens(after)
    words = [] if first is None else [first]

    def count(extra: str = "") -> int:
        text = "".join(f" {word}" for word in [*words, extra] if word)
        return prompts.text_tokens(after + text) - base

    while (have := count()) < tokens:
        picks = [str(word) for word in rng.choice(WORDS, 8)]
        fitting = (word for word in [*picks, "a"] if have < count(word) <= tokens)
        word = next(fitting, None)
        if word is None:
            break
        words.append(word)
    if have != tokens:
        raise ValueError(f"cannot make a text of {tokens} tokens after {after!r}")
    return " ".join(words)


def noise_image(rng: np.random.Generator, height: int, width: int) -> CanonicalImage:
    """A random image with structure at two scales (blobs under fine noise).

    Args:
        rng: Source of randomness.
        height, width: Pixels.
    """
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    blobs = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-16, 17, (height, width, 3))
    pixels = np.clip(np.asarray(blobs, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    return to_image(pixels, name="noise image")


_FIRST = ("the", "a", "is", "of", "in", "on", "with", "and", "to", "by")


def _frame(
    prompts: PlainPrompts, caption: str, shown: tuple[CanonicalImage, ...]
) -> tuple[int, int]:
    """(tokens before the criterion's text, tokens that close the conversation after it)."""
    shared = pair_parts("t2i", caption)
    one, other = (prompts.ids([*shared, criterion_leaf(word)], shown) for word in ("a", "the"))
    prefix = int(np.flatnonzero(one != other)[0])
    return prefix, len(one) - prefix - 1
