"""What verdicts rest on: the words of evidence, what is wanted, and the words of cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from arr_fast.shapes.captions import NUMBERS, Edit
from arr_fast.shapes.claims import EDIT_KINDS, T2I_KINDS, Claim, Context
from arr_fast.shapes.evidence import CELL_WORDS, UNKNOWN, cell_words, evidence, wanted
from arr_fast.shapes.pairs import sample_edit_pair, sample_pair
from arr_fast.shapes.render import coverage, render
from arr_fast.shapes.scene import COLOURS, Scene, with_object
from arr_fast.shapes.tokenizer import domain_words
from tests.shapes.by_hand import CAPTION, SCENE

STATES = {"sharpness": "sharp", "noise": "clean", "occlusion": "free", "cut_off": "whole"}


def words_of_truth(claim: Claim, context: Context) -> set[str]:
    """The evidence that makes a claim true, read off claim, caption and instruction alone."""
    kind, edit = claim.kind, context.edit
    if kind in ("colour", "size", "position", "relation", "background"):
        return {claim.value}
    if kind == "count":
        return {NUMBERS[int(claim.value)]}
    if kind in ("presence", "absence"):
        return {NUMBERS[0]} if kind == "absence" else set(NUMBERS[1:])
    if kind in STATES:
        return {STATES[kind]}
    if kind == "caption_background":
        return {context.caption.background}
    if kind == "caption_count":
        return {NUMBERS[len(context.caption.kinds)]}
    if kind == "caption_relation":
        return {context.caption.relation[1]}
    if kind == "edit_done" and edit.kind == "add":
        before = sum(o.kind == edit.added.kind for o in context.source.objects)
        return set(NUMBERS[before + 1 :])
    if kind == "edit_done":
        return {NUMBERS[0] if edit.kind == "remove" else edit.value}
    return {"correct"}


def labelled(count: int = 80):
    rng = np.random.default_rng(4)
    for sampler in (sample_pair, sample_edit_pair):
        for _ in range(count):
            example = sampler(rng, "held_out", 16)
            for criterion in example.criteria:
                yield example, criterion


def test_evidence_decides_the_claim():
    """The evidence word and the claim alone give the truth that the scene gives."""
    seen = set()
    for example, criterion in labelled():
        right = words_of_truth(criterion.claim, example.context)
        for word, truth in zip(criterion.evidence, criterion.truths, strict=True):
            assert (word in right) == truth, (criterion, word)
        seen.add(criterion.kind)
    assert seen == {*T2I_KINDS, *EDIT_KINDS}


def test_what_is_wanted_makes_a_claim_true():
    """Where one word of evidence makes a claim true, that word is the first one wanted."""
    named = 0
    for example, criterion in labelled():
        right = words_of_truth(criterion.claim, example.context)
        if criterion.wanted and len(right) == 1 and right != {"correct"}:
            assert criterion.wanted[0] in right, criterion
            named += 1
        assert len(criterion.wanted) <= 2
    assert named > 300


def test_every_word_is_in_the_vocabulary():
    known = set(domain_words())
    for _, criterion in labelled(40):
        assert {*criterion.evidence, *filter(None, criterion.wanted)} <= known, criterion
    assert set(CELL_WORDS) <= known


def test_evidence_of_a_caption_names_what_is_amiss():
    context = Context(caption=CAPTION)

    def word(scene: Scene) -> str:
        return evidence(Claim("faithful"), scene, context)

    assert word(SCENE) == "correct"
    assert word(with_object(SCENE, 0, colour="green")) == "wrong"
    assert word(replace(SCENE, objects=SCENE.objects[:1])) == "one"
    assert word(replace(SCENE, background="black")) == "black"
    assert word(with_object(SCENE, 1, size="large", radius=0.2)) == "size"
    assert word(with_object(with_object(SCENE, 0, x=0.75), 1, x=0.25)) == "right"
    assert wanted(Claim("faithful"), context) == ("two", "white")


def by_cell(pixels: np.ndarray) -> np.ndarray:
    """[64, 64, ...] as [16, 256, ...]."""
    blocks = pixels.reshape(4, 16, 4, 16, -1).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(16, 256, -1)


def painted(scene: Scene) -> np.ndarray:
    return by_cell(np.asarray(render(scene), np.int16))


def crowded(scene: Scene) -> np.ndarray:
    """Bool [16]: cells in which more than one object shows."""
    return np.array([len(set(cell.ravel()) - {-1}) > 1 for cell in by_cell(coverage(scene))])


def test_cells_of_an_edit_agree_with_the_pixels():
    """Cells of clean edits look like the source exactly where they are called kept.

    A cell that shows two objects is left out, and so are changed outlines: a cell in the middle of
    an object looks the same in both. An object counts from 9 % of a cell on, less its soft edge.
    """
    rng, seen = np.random.default_rng(9), []
    for _ in range(150):
        context = sample_edit_pair(rng, "train", 4).context
        source, edit = context.source, context.edit
        goal = edit.apply(source)
        for scene in (goal, source, recoloured(goal)):
            if edit.kind in ("resize", "reshape"):
                continue
            changed = (np.abs(painted(scene) - painted(source)).max(-1) > 12).mean(-1)
            skipped = crowded(scene) | crowded(source)
            for cell, index in enumerate(cell_words(scene, context).tolist()):
                if index == UNKNOWN or skipped[cell]:
                    continue
                on_object = (by_cell(coverage(scene))[cell] >= 0).any()
                if edit.kind == "background" and on_object:
                    continue
                word = CELL_WORDS[index]
                seen.append(word)
                facts = (edit, cell, word, changed[cell])
                assert changed[cell] > 0.05 if word == "changed" else changed[cell] < 0.1, facts
    assert min(seen.count(word) for word in CELL_WORDS) > 100


def test_only_legible_edits_have_cells():
    recolour = Context(source=SCENE, edit=Edit("recolour", 0, "green"))
    assert (cell_words(SCENE, recolour) == CELL_WORDS.index("kept")).sum() > 8
    assert (cell_words(replace(SCENE, noise=1.0), recolour) == UNKNOWN).all()
    assert (cell_words(SCENE, Context(caption=CAPTION)) == UNKNOWN).all()


def recoloured(scene: Scene) -> Scene:
    """The scene with another colour on its last object."""
    if not scene.objects:
        return scene
    last = len(scene.objects) - 1
    other = next(c for c in COLOURS if c != scene.objects[last].colour)
    return with_object(scene, last, colour=other)


def test_edit_kinds_read_the_target():
    source = SCENE
    recolour = Edit("recolour", 0, "green")
    context = Context(source=source, edit=recolour)
    done = recolour.apply(source)
    assert evidence(Claim("edit_done"), done, context) == "green"
    assert evidence(Claim("edit_done"), source, context) == "red"
    assert evidence(Claim("edit_overall"), source, context) == "missing"
    assert wanted(Claim("edit_done"), context) == ("green",)
    spoiled = replace(done, background="black")
    assert evidence(Claim("edit_kept"), spoiled, context) == "black"
    assert evidence(Claim("edit_kept"), done, context) == "correct"
    remove = Context(source=source, edit=Edit("remove", 1))
    assert evidence(Claim("edit_done"), source, remove) == "one"
    assert wanted(Claim("edit_done"), remove) == ("zero",)
