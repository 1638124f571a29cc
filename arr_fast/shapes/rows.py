"""From examples to packed rows: the training mix of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from arr_fast import prompts
from arr_fast.prompts import PromptEncoder
from arr_fast.shapes import easy_vqa, writing
from arr_fast.shapes.captions import NUMBERS, PLURALS
from arr_fast.shapes.claims import Claim, Context, matching
from arr_fast.shapes.evidence import cell_words
from arr_fast.shapes.forward import patchify
from arr_fast.shapes.model import SIDE
from arr_fast.shapes.packing import (
    Fact,
    PackedBatch,
    Path,
    RowPacker,
    Tree,
    Verdict,
    encode_path,
    shared_prefix,
)
from arr_fast.shapes.pairs import (
    KIND_WEIGHTS,
    Example,
    choose_criteria,
    sample_edit_pair,
    sample_faulty_pair,
    sample_pair,
    sample_picture,
    single_picture,
)
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import COLOURS, SHAPES, Scene, Split

HOLISTIC_SHARE = 0.4
REJECTED_SHARE = 0.3
WRITTEN_ABOUT = {"edit": 0.3, "pair": 0.3, "faulty": 0.4}
# The two truths of a fact that a word is not asked for.
UNASKED = (float("nan"), float("nan"))
THIRDS = ("top", "middle", "bottom"), ("left", "center", "right")
ROW_TOKENS = 352
READING_TOKENS = 120
CAPTION_TOKENS = 130
READING_CRITERIA = 6
LARGE_SIDES = (96, 128, 256)

# Kind, criterion, truth, evidence, wanted.
Asked = tuple[str, str, bool, tuple[str, ...], tuple[str, ...]]


def make_encoder(tokenizer: Any) -> PromptEncoder:
    """The prompt encoder of the bundled judge's tokenizer."""
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return PromptEncoder(
        tokenizer, image_token="<|image_pad|>", expand_image=lambda n: [([pad] * n, True)]
    )


def shows(scene: Scene, kind: tuple[str, str], count: int, context: Context) -> bool | None:
    """Whether a picture shows an object at least so many times; None where nobody can say."""
    truth = Claim("presence", kind).truth(scene, context)
    return len(matching(scene, kind)) >= count if truth else truth


def _last_place(ids: np.ndarray, wanted: Sequence[int]) -> int:
    """Where a sequence begins for the last time."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(wanted))
    return int(np.flatnonzero((windows == np.asarray(wanted)).all(1))[-1])


def describe_picture(scene: Scene) -> str:
    """A dense caption: every object with its place from top to bottom, then the picture's state."""
    if scene.is_static:
        return " noise"
    parts = [f" {NUMBERS[len(scene.objects)]}"]
    for obj in scene.in_reading_order():
        row, column = THIRDS[0][min(int(obj.y * 3), 2)], THIRDS[1][min(int(obj.x * 3), 2)]
        parts.append(f" {obj.size} {obj.colour} {obj.shape} {row} {column}")
    state = f" {scene.background} background"
    state += " blurry" if scene.blur else " sharp"
    state += " noisy" if scene.noise else " clean"
    state += " covered" if scene.hidden is not None else " free"
    state += " cut" if any(o.is_cut for o in scene.objects) else " whole"
    return ",".join([*parts, state])


@dataclass(slots=True)
class BatchMaker:
    """Builds packed batches of the training mix.

    Attributes:
        tokenizer: The judge's tokenizer.
        length: Tokens per row.
        answers: Whether pairs carry caption branches.
        contrasts: Share of training pairs in which a single thing is amiss.
    """

    tokenizer: Any
    length: int = ROW_TOKENS
    answers: bool = True
    contrasts: float = 0.0
    encoder: PromptEncoder = field(init=False)
    _encode: Any = field(init=False)
    _words: dict[int, str] = field(init=False)
    _nouns: dict[int, tuple[str, bool]] = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = make_encoder(self.tokenizer)
        token = self.tokenizer.convert_tokens_to_ids
        self._words = {token("Ġ" + word): word for word in (*COLOURS, *NUMBERS)}
        self._nouns = {token("Ġ" + shape): (shape, False) for shape in SHAPES}
        self._nouns |= {token("Ġ" + PLURALS[shape]): (shape, True) for shape in SHAPES}
        plain = prompts.plain_backend(self.tokenizer)
        end = [self.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        self._encode = lru_cache(maxsize=20000)(
            lambda text: plain.encode(text, add_special_tokens=False).ids + end
        )

    def pair_tree(self, example: Example, first_picture: int, together: Sequence[int] = ()) -> Tree:
        """A pair with its criteria and, before them, two caption branches.

        Args:
            example: The pair.
            first_picture: Index of its first picture within the batch.
            together: Indices of criteria that are also asked as one rubric; who meets more wins.
        """
        task = example.task
        parts = prompts.pair_parts(task, example.caption)
        count = 2 if task == "t2i" else 3
        paths: list[Path] = []
        verdicts: list[Verdict | None] = []
        answers: list[int] = []
        if self.answers:
            for number, scene in enumerate(example.scenes, 1):
                answer = self._encode(describe_picture(scene))
                asked = [*parts, f"\nDescribe Image {number}."]
                paths.append(encode_path(self.encoder, asked, count, answer))
                verdicts.append(None)
                answers.append(len(answer))
        for criterion in example.criteria:
            asked = [*parts, prompts.criterion_leaf(criterion.text)]
            paths.append(encode_path(self.encoder, asked, count))
            a, b = (float(t) for t in criterion.truths)
            verdicts.append(
                Verdict(
                    criterion.kind,
                    0.5 + 0.5 * (a - b),
                    (a, b),
                    criterion.evidence,
                    criterion.wanted,
                )
            )
            answers.append(0)
        if together:
            asked = [*parts, prompts.holistic_leaf([example.criteria[i].text for i in together])]
            met = np.array([example.criteria[i].truths for i in together]).sum(0)
            paths.insert(2, encode_path(self.encoder, asked, count))
            verdicts.insert(2, Verdict("holistic", 0.5 + 0.5 * float(np.sign(met[0] - met[1]))))
            answers.insert(2, 0)
        pictures = tuple(range(first_picture, first_picture + count))
        prefix = shared_prefix(paths)
        return Tree(
            tuple(paths),
            prefix,
            tuple(verdicts),
            tuple(answers),
            pictures,
            True,
            tuple(cell_words(scene, example.context) for scene in example.scenes),
            self._named(paths[0].ids[:prefix], example.scenes, example.context),
        )

    def writing_tree(
        self, rng: np.random.Generator, example: Example, first_picture: int
    ) -> Tree | None:
        """A pair under which general and specific criteria are written for either preference; None
        where no criterion holds on either picture."""
        task = example.task
        count = 2 if task == "t2i" else 3
        paths: list[Path] = []
        answers: list[int] = []
        facts: list[list[Fact]] = []
        look = self._encode(writing.aspects_line(task))[:-1]
        for general in (True, False):
            for preferred in rng.permutation(2).tolist():
                written, failing = writing.pair_criteria(rng, example, preferred, general)
                if not written:
                    continue
                rejected = failing if rng.random() < REJECTED_SHARE else ()
                asked = writing.pair_prompt(
                    task, example.caption, preferred + 1, general=general, rejected=rejected
                )
                ids = self._encode(writing.answer(written))
                paths.append(encode_path(self.encoder, asked, count, ids))
                answers.append(len(ids))
                facts.append([])
                if general:
                    # A word and a comma each, after "Check".
                    start = _last_place(paths[-1].ids[: -len(ids)], look) + 1
                    truths = writing.aspect_truths(example, preferred).tolist()
                    facts[-1] += [
                        (start + 2 * row, (*UNASKED, *known)) for row, known in enumerate(truths)
                    ]
        if not paths:
            return None
        order = rng.permutation(len(paths)).tolist()
        paths, answers = [paths[i] for i in order], [answers[i] for i in order]
        facts = [facts[i] for i in order]
        pictures = tuple(range(first_picture, first_picture + count))
        prefix = shared_prefix(paths) if len(paths) > 1 else len(paths[0].ids) - answers[0] - 1
        return Tree(
            tuple(paths),
            prefix,
            (None,) * len(paths),
            tuple(answers),
            pictures,
            True,
            facts=(
                *self._named(paths[0].ids[:prefix], example.scenes, example.context),
                *(fact for fact in facts[0] if fact[0] < prefix),
            ),
            branch_facts=tuple(tuple(f for f in each if f[0] >= prefix) for each in facts),
        )

    def _named(
        self, ids: np.ndarray, scenes: Sequence[Scene], context: Context
    ) -> tuple[Fact, ...]:
        """Where a prompt's caption names an object, and whether each of one or two pictures shows
        it, as often as it is named."""
        if context.caption is None:
            return ()
        found = []
        for place in np.flatnonzero([int(token) in self._nouns for token in ids]).tolist():
            before = [self._words.get(int(token), "") for token in ids[place - 3 : place]]
            if before[2] not in COLOURS:
                continue
            shape, is_plural = self._nouns[int(ids[place])]
            number = next((NUMBERS.index(w) for w in before[1::-1] if w in NUMBERS), 1)
            count = number if is_plural else 1
            truths = [shows(scene, (before[2], shape), count, context) for scene in scenes]
            known = [float("nan") if truth is None else float(truth) for truth in truths]
            second = known[1] if len(known) > 1 else float("nan")
            found.append((place, (known[0], second, *UNASKED)))
        return tuple(found)

    def caption_tree(self, example: Example) -> Tree:
        """A caption alone, and the criteria that follow from it."""
        assert example.context.caption is not None, "criteria are written for captions"
        ids = self._encode(writing.answer(writing.caption_criteria(example.context.caption)))
        path = encode_path(self.encoder, writing.caption_prompt(example.caption), 0, ids)
        return Tree((path,), len(path.ids) - len(ids) - 1, (None,), (len(ids),), (), True)

    def point_tree(
        self,
        task: prompts.Task,
        caption: str,
        asked: Sequence[Asked],
        first_picture: int,
        cells: tuple[np.ndarray, ...] = (),
        shown: Example | None = None,
    ) -> Tree:
        """One picture and what is asked about it; `shown` tells what there is to see."""
        parts = prompts.point_parts(task, caption)
        count = 1 if task == "t2i" else 2
        leaves = [[*parts, prompts.criterion_leaf(text)] for _, text, *_ in asked]
        paths = tuple(encode_path(self.encoder, leaf, count) for leaf in leaves)
        nan = float("nan")
        verdicts = tuple(
            Verdict(kind, float(t), (float(t), nan), shown, wanted)
            for kind, _, t, shown, wanted in asked
        )
        pictures = tuple(range(first_picture, first_picture + count))
        prefix = shared_prefix(paths) if len(paths) > 1 else len(paths[0].ids) - 1
        facts: tuple[Fact, ...] = ()
        if shown is not None:
            facts = self._named(paths[0].ids[:prefix], shown.scenes, shown.context)
        return Tree(paths, prefix, verdicts, (0,) * len(paths), pictures, False, cells, facts)

    def batch(
        self, rng: np.random.Generator, rows: int, split: Split, mix: dict[str, float]
    ) -> tuple[PackedBatch, Tensor]:
        """Rows drawn from the mix, and the patches of their pictures.

        Args:
            rng: Source of chance.
            rows: How many rows.
            split: Of scenes and phrasings.
            mix: Relative frequency of "pair", "edit", "point", "point_edit", "vqa", "write" and
                "write_caption" rows.
        """
        packer = RowPacker(self.length)
        images: list[Image.Image] = []
        names, shares = list(mix), np.array(list(mix.values()))
        for _ in range(rows):
            packer.new_row()
            kind = names[int(rng.choice(len(names), p=shares / shares.sum()))]
            self._fill(rng, kind, packer, images, split)
        # A tower needs something to look at, even where every row is text.
        return packer.finish(), patchify(images or [Image.new("RGB", (SIDE, SIDE))])

    def reading_batch(self, rng: np.random.Generator, rows: int) -> tuple[PackedBatch, Tensor]:
        """Rows of single training pictures under a short prompt: a caption and a few criteria.

        Args:
            rng: Source of chance.
            rows: How many rows.
        """
        packer = RowPacker(self.length)
        images: list[Image.Image] = []
        for _ in range(rows):
            packer.new_row()
            while packer.free > READING_TOKENS:
                scene = sample_picture(rng, "train")
                packer.add(self._reading_tree(rng, scene, len(images)))
                side = 64 if rng.random() < 0.85 else int(rng.choice(LARGE_SIDES))
                images.append(render(scene, side))
        return packer.finish(), patchify(images)

    def _reading_tree(self, rng: np.random.Generator, scene: Scene, number: int) -> Tree:
        parts: list[prompts.Part] = ["Image: ", prompts.ImageSlot(0)]
        answer = self._encode(describe_picture(scene))
        paths = [encode_path(self.encoder, [*parts, "\nDescribe Image."], 1, answer)]
        verdicts: list[Verdict | None] = [None]
        chosen = choose_criteria(rng, (scene,), Context(), "train", READING_CRITERIA, KIND_WEIGHTS)
        for criterion in chosen:
            leaf = prompts.criterion_leaf(criterion.text)
            paths.append(encode_path(self.encoder, [*parts, leaf], 1))
            truth = float(criterion.truths[0])
            both = (truth, float("nan"))
            verdicts.append(
                Verdict(criterion.kind, truth, both, criterion.evidence, criterion.wanted)
            )
        answers = (len(answer), *[0] * len(chosen))
        prefix = shared_prefix(paths) if chosen else len(paths[0].ids) - len(answer) - 1
        return Tree(tuple(paths), prefix, tuple(verdicts), answers, (number,), False)

    def _fill(
        self,
        rng: np.random.Generator,
        kind: str,
        packer: RowPacker,
        images: list[Image.Image],
        split: Split,
    ) -> None:
        if kind == "vqa":
            while packer.free > 130:
                pool = easy_vqa.pictures("train")
                picture = pool[int(rng.integers(len(pool)))]
                asked: list[Asked] = [
                    ("easy_vqa", q.text, q.answer, (), ()) for q in picture.questions
                ]
                caption = easy_vqa.NEUTRAL_CAPTION
                packer.add(self.point_tree("t2i", caption, asked, len(images)))
                images.append(picture.load("train"))
            return
        if kind == "write":
            self._fill_writing(rng, packer, images, split)
            return
        if kind == "write_caption":
            self._fill_captions(rng, packer, split)
            return
        while True:
            if kind in ("edit", "point_edit"):
                example = sample_edit_pair(rng, split, 16, KIND_WEIGHTS)
            else:
                contrasts = self.contrasts if split == "train" else 0.0
                example = sample_pair(rng, split, 16, KIND_WEIGHTS, contrasts)
            if len(example.criteria) >= 4:
                break
        side = 64 if rng.random() < 0.85 else int(rng.choice(LARGE_SIDES))
        source = [] if example.source is None else [render(example.source, side)]
        if kind in ("pair", "edit"):
            together: list[int] = []
            if self.answers and rng.random() < HOLISTIC_SHARE:
                size = int(rng.integers(2, 5))
                together = rng.permutation(len(example.criteria))[:size].tolist()
            packer.add(self.pair_tree(example, len(images), together))
            images += [*source, *(render(s, side) for s in example.scenes)]
            return
        task: prompts.Task = "edit" if source else "t2i"
        for which in (0, 1):
            single = single_picture(example, which)
            half: list[Asked] = [
                (c.kind, c.text, c.truths[0], c.evidence, c.wanted)
                for c in single.criteria[which::2]
            ]
            cells = (cell_words(single.scenes[0], single.context),)
            packer.add(self.point_tree(task, single.caption, half, len(images), cells, single))
            images += [*source, render(single.scenes[0], side)]

    def _fill_writing(
        self, rng: np.random.Generator, packer: RowPacker, images: list[Image.Image], split: Split
    ) -> None:
        tree = None
        kind = rng.choice(list(WRITTEN_ABOUT), p=list(WRITTEN_ABOUT.values()))
        while tree is None:
            if kind == "edit":
                example = sample_edit_pair(rng, split, 0)
            elif kind == "faulty":
                example = sample_faulty_pair(rng, split)
            else:
                example = sample_pair(rng, split, 0)
            tree = self.writing_tree(rng, example, len(images))
        packer.add(tree)
        source = [] if example.source is None else [render(example.source)]
        images += [*source, *(render(s) for s in example.scenes)]
        self._fill_captions(rng, packer, split)

    def _fill_captions(self, rng: np.random.Generator, packer: RowPacker, split: Split) -> None:
        while packer.free > CAPTION_TOKENS:
            packer.add(self.caption_tree(sample_pair(rng, split, 0)))
