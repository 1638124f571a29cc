"""Prompt texts of the writer: Jinja templates from the package, each replaceable by a user's file.

A template writes text; where it writes an image variable, the image goes. Values can hold any
characters: an image is marked by a hash over all values, which no value can contain.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    meta,
)

from arr_fast.autorubric.labelled import LabelledPair
from arr_fast.errors import ArrFastError
from arr_fast.images import CanonicalImage
from arr_fast.prompts import ImageSlot, Part, Task, pair_parts

TemplateName = Literal["generate_general", "generate_specific", "generate_caption", "structure"]
_ROOT = Path(str(resources.files("arr_fast"))) / "autorubric" / "templates"


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A judgement of an expert, shown to the writer ("with guide").

    Attributes:
        prompt: Caption or instruction.
        preferred, dispreferred: The two images.
        rationale: Why.
        source: The image that was edited, or None.
    """

    prompt: str
    preferred: CanonicalImage
    dispreferred: CanonicalImage
    rationale: str
    source: CanonicalImage | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered template: texts and image slots, and the images."""

    parts: tuple[Part, ...]
    images: tuple[CanonicalImage, ...]


class TemplateSet:
    """The templates of one writer.

    Args:
        name: A packaged set: "default" for general models, "shapes" for the bundled judge.
        folder: A user's folder; its files take the place of the packaged ones of the same name.

    Raises:
        ArrFastError: No such set or folder.
    """

    def __init__(self, name: str = "default", folder: Path | None = None) -> None:
        names = sorted(entry.name for entry in _ROOT.iterdir() if entry.is_dir())
        if name not in names:
            raise ArrFastError(f"no template set {name!r}; there are: {', '.join(names)}")
        if folder is not None and not folder.is_dir():
            raise ArrFastError(f"{folder}: no such folder of templates")
        folders = [_ROOT / name] if folder is None else [folder, _ROOT / name]
        self._environment = Environment(
            loader=ChoiceLoader([FileSystemLoader(each) for each in folders]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            keep_trailing_newline=True,
        )

    def has(self, name: TemplateName) -> bool:
        """Whether the set has a template."""
        return f"{name}.jinja" in self._environment.list_templates()

    def uses(self, name: TemplateName, variable: str) -> bool:
        """Whether a template, or one that it includes, reads a variable."""
        pending, seen = [f"{name}.jinja"], set()
        while pending:
            file = pending.pop()
            seen.add(file)
            assert self._environment.loader is not None
            source = self._environment.loader.get_source(self._environment, file)[0]
            tree = self._environment.parse(source)
            if variable in meta.find_undeclared_variables(tree):
                return True
            named = meta.find_referenced_templates(tree)
            pending += [each for each in named if each is not None and each not in seen]
        return False

    def for_pair(
        self,
        pair: LabelledPair,
        general: bool,
        *,
        limit: int,
        rejected: Sequence[str] = (),
        critique: str = "",
        problem: str = "",
        exemplars: Sequence[Exemplar] = (),
    ) -> Conversation:
        """Asks for criteria from a labelled pair.

        Args:
            pair: The pair; images are numbered in order of appearance.
            general: General or prompt-specific criteria.
            limit: Most criteria.
            rejected: Criteria that failed verification.
            critique: Table of what the judge said about the last ones.
            problem: Why the last answer could not be used.
            exemplars: A guide.
        """
        images = list(pair.shown)
        first = len(images) - 2
        values = {
            "task": pair.task,
            "caption": pair.prompt,
            "preferred": pair.preferred,
            "limit": limit,
            "rejected": list(rejected),
            "critique": critique,
            "problem": problem,
            "image_1": ImageSlot(first),
            "image_2": ImageSlot(first + 1),
            "source": ImageSlot(0) if first else None,
            "pair": pair_parts(pair.task, pair.prompt),
            "exemplars": _number(exemplars, images),
        }
        name: TemplateName = "generate_general" if general else "generate_specific"
        return self._render(name, values, images)

    def for_caption(
        self,
        caption: str,
        source: CanonicalImage | None,
        *,
        limit: int,
        problem: str = "",
        exemplars: Sequence[Exemplar] = (),
    ) -> Conversation:
        """Asks for criteria from a caption (or an instruction and its source image) alone."""
        images = [] if source is None else [source]
        task: Task = "t2i" if source is None else "edit"
        values = {
            "task": task,
            "caption": caption,
            "limit": limit,
            "problem": problem,
            "source": None if source is None else ImageSlot(0),
            "exemplars": _number(exemplars, images),
        }
        return self._render("generate_caption", values, images)

    def for_structure(
        self, task: Task, candidates: Sequence[tuple[str, int]], *, limit: int
    ) -> Conversation:
        """Asks to merge and order criteria, given as (text, number of pairs)."""
        listed = [{"text": text, "support": support} for text, support in candidates]
        return self._render("structure", {"task": task, "candidates": listed, "limit": limit}, [])

    def _render(
        self, name: TemplateName, values: Mapping[str, Any], images: Sequence[CanonicalImage]
    ) -> Conversation:
        described = json.dumps(values, sort_keys=True, default=str)
        nonce = hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            template = self._environment.get_template(f"{name}.jinja")
            text = template.render({key: _marked(value, nonce) for key, value in values.items()})
        except TemplateNotFound as error:
            raise ArrFastError(f"the template set has no {error.name}") from None
        except TemplateError as error:
            raise ArrFastError(f"template {name}: {error}") from error
        pieces = re.split(f"<{nonce}:([0-9]+)>", text.removesuffix("\n"))
        parts: list[Part] = [
            ImageSlot(int(piece)) if place % 2 else piece
            for place, piece in enumerate(pieces)
            if place % 2 or piece
        ]
        shown = {part.index for part in parts if isinstance(part, ImageSlot)}
        if not shown:
            return Conversation(tuple(parts), ())
        return Conversation(tuple(parts), tuple(images))


def _number(exemplars: Sequence[Exemplar], images: list[CanonicalImage]) -> list[dict[str, Any]]:
    """Exemplars with slots in place of images, which join the list."""

    def slot(image: CanonicalImage | None) -> ImageSlot | None:
        if image is None:
            return None
        images.append(image)
        return ImageSlot(len(images) - 1)

    return [
        {
            "prompt": exemplar.prompt,
            "source": slot(exemplar.source),
            "preferred": slot(exemplar.preferred),
            "dispreferred": slot(exemplar.dispreferred),
            "rationale": exemplar.rationale,
        }
        for exemplar in exemplars
    ]


def _marked(value: Any, nonce: str) -> Any:
    """The value with image slots as marks; a list of parts becomes one string."""
    if isinstance(value, ImageSlot):
        return f"<{nonce}:{value.index}>"
    if isinstance(value, Mapping):
        return {key: _marked(item, nonce) for key, item in value.items()}
    if isinstance(value, list):
        marked = [_marked(item, nonce) for item in value]
        is_parts = any(isinstance(item, ImageSlot) for item in value)
        return "".join(marked) if is_parts else marked
    return value
