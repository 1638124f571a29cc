"""What a call of `Judge` asks for, item by item, checked at the edge.

Arguments that make no sense as a whole (lists of different lengths, an empty prompt) raise. What is
wrong with one item alone (an unreadable image, text that is not Unicode) becomes that item's error
and leaves the others be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from arr_fast.aggregation import Mode
from arr_fast.errors import ArrFastError, BadPromptError, RubricError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.prompts import Task, check_text, criterion_leaf, holistic_leaf
from arr_fast.rubric import Rubric

Orders = Literal["both", "AB", "BA"]
RubricLike = Rubric | Sequence[Rubric] | str | Path | None


@dataclass
class Item:
    """One prompt with its images and rubric.

    Attributes:
        name: What to call it in an error, for example "pair 3".
        prompt: Caption or edit instruction.
        images: The judged images (two of a pair, one, or a group of G).
        source: The source image of an edit.
        rubric: Its criteria.
        error: Why it cannot be judged, if so.
    """

    name: str
    prompt: str
    images: list[CanonicalImage]
    source: CanonicalImage | None
    rubric: Rubric
    error: BaseException | None = None

    @property
    def task(self) -> Task:
        """Text-to-image, or editing where there is a source."""
        return "t2i" if self.source is None else "edit"

    def shown(self, *order: int) -> list[CanonicalImage]:
        """The images of one conversation: the source, if any, then images by number."""
        chosen = [self.images[number] for number in order]
        return chosen if self.source is None else [self.source, *chosen]


def leaves_of(item: Item, mode: Mode) -> list[str]:
    """The leaves of one conversation: one per criterion, then the whole rubric if asked.

    Raises:
        BadPromptError: A criterion is not Unicode text.
    """
    texts = [criterion.render(item.prompt) for criterion in item.rubric.criteria]
    for criterion, text in zip(item.rubric.criteria, texts, strict=True):
        check_text(text, f"{item.name}: criterion {criterion.id!r}")
    leaves = [criterion_leaf(text) for text in texts] if mode != "holistic" else []
    return leaves + ([holistic_leaf(texts)] if mode != "criteria" else [])


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError that lists the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_reading(orders: str, mode: str) -> None:
    """Raises a ValueError for unknown orders, or an unknown mode."""
    check_choice("orders", orders, get_args(Orders))
    check_choice("mode", mode, get_args(Mode))


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises unless `prompts` is a non-empty list of non-empty strings."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string")
    if not len(prompts):
        raise ValueError("prompts is empty")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{number}] must be a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"prompts[{number}] is empty")


def read_images(
    sources: Any, count: int, name: str
) -> tuple[list[CanonicalImage | None], dict[int, BaseException]]:
    """Reads one image per prompt; a bad one is an error of its item.

    Args:
        sources: A list of image-like values, or a batched tensor.
        count: How many are expected.
        name: The argument's name.

    Raises:
        ValueError: Another number of images than of prompts, or one image in place of a list.
    """
    if isinstance(sources, str | bytes) or not hasattr(sources, "__len__"):
        raise ValueError(f"{name} must be a list of images, got {type(sources).__name__}")
    if getattr(sources, "ndim", 1) not in (1, 4):
        raise ValueError(
            f"{name} must be a list of images or a 4-D batch, got an array of shape "
            f"{list(sources.shape)}; wrap a single image in a list"
        )
    if len(sources) != count:
        raise ValueError(f"{name} has {len(sources)} items, prompts has {count}")
    images: list[CanonicalImage | None] = []
    errors: dict[int, BaseException] = {}
    for number, source in enumerate(sources):
        try:
            images.append(to_image(source, name=f"{name}[{number}]"))
        except (ArrFastError, OSError) as error:
            images.append(None)
            errors[number] = error
    return images, errors


def read_prompt(prompt: str, number: int) -> BadPromptError | None:
    """Why no tokenizer can read a prompt, or None."""
    try:
        check_text(prompt, f"prompts[{number}]")
    except BadPromptError as error:
        return error
    return None


def read_rubrics(rubric: RubricLike, count: int, has_source: bool) -> list[Rubric]:
    """One rubric per prompt.

    Args:
        rubric: One for all, one per prompt, a file, the name of a bundled one, or None for the
            default of the task.
        count: Number of prompts.
        has_source: Whether source images were given.

    Raises:
        ValueError: Another number of rubrics than of prompts, or a rubric of the other task.
    """
    task: Task = "edit" if has_source else "t2i"
    if rubric is None:
        rubric = Rubric.default(task)
    elif isinstance(rubric, str) and rubric in Rubric.builtin_names():
        rubric = Rubric.builtin(rubric)
    elif isinstance(rubric, str | Path):
        # Theme text cannot say its task.
        is_text = Path(rubric).suffix.lower() in (".txt", ".md")
        rubric = Rubric.load(rubric, task=task if is_text else None)
    rubrics = [rubric] * count if isinstance(rubric, Rubric) else list(rubric)
    if len(rubrics) != count:
        raise ValueError(f"rubric has {len(rubrics)} items, prompts has {count}")
    for number, each in enumerate(rubrics):
        if not isinstance(each, Rubric):
            raise RubricError(f"rubric[{number}] must be a Rubric, got {type(each).__name__}")
        if each.task != task:
            needed = "needs source images" if each.task == "edit" else "takes no source images"
            raise ValueError(f"rubric {each.name!r} is for task {each.task!r}, which {needed}")
    return rubrics


def read_items(
    prompts: Sequence[str],
    columns: dict[str, Any],
    rubric: RubricLike,
    sources: Any,
    kind: str,
) -> list[Item]:
    """Items with one image per column, in the order of the columns.

    Args:
        prompts: B captions or instructions.
        columns: Argument name -> B images.
        rubric: See `read_rubrics`.
        sources: B source images, or None.
        kind: What an item is called in errors: "pair", "image" or "group".
    """
    check_prompts(prompts)
    count = len(prompts)
    rubrics = read_rubrics(rubric, count, sources is not None)
    read = {name: read_images(value, count, name) for name, value in columns.items()}
    if sources is not None:
        read["sources"] = read_images(sources, count, "sources")
    items = []
    for number, prompt in enumerate(prompts):
        errors = [errors[number] for _, errors in read.values() if number in errors]
        images = [image for name in columns if (image := read[name][0][number]) is not None]
        source = read["sources"][0][number] if sources is not None else None
        error = read_prompt(prompt, number) or next(iter(errors), None)
        items.append(Item(f"{kind} {number}", prompt, images, source, rubrics[number], error))
    return items


def read_groups(
    prompts: Sequence[str],
    groups: Sequence[Any],
    rubric: RubricLike,
    sources: Any,
) -> list[Item]:
    """Items that hold a group of candidates each.

    Raises:
        ValueError: Another number of groups than of prompts, or a group of fewer than two.
    """
    check_prompts(prompts)
    if len(groups) != len(prompts):
        raise ValueError(f"groups has {len(groups)} items, prompts has {len(prompts)}")
    rubrics = read_rubrics(rubric, len(prompts), sources is not None)
    shared, shared_errors = (
        read_images(sources, len(prompts), "sources") if sources is not None else ([], {})
    )
    items = []
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        if len(group) < 2:
            raise ValueError(f"groups[{number}] has {len(group)} images, expected at least 2")
        images, errors = read_images(group, len(group), f"groups[{number}]")
        error = read_prompt(prompt, number) or next(
            iter(errors.values()), shared_errors.get(number)
        )
        kept = [image for image in images if image is not None]
        source = shared[number] if shared else None
        items.append(Item(f"group {number}", prompt, kept, source, rubrics[number], error))
    return items
