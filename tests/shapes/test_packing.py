"""Packed branches against plain transformers forwards, path by path."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from arr_fast.shapes.branch_attention import Group
from arr_fast.shapes.evidence import UNKNOWN, cell_words
from arr_fast.shapes.forward import VisionForward, decode, patchify
from arr_fast.shapes.judge_training import JudgeLoss, TruthProbes
from arr_fast.shapes.model import (
    IMAGE_TOKENS,
    build_model,
    image_processor,
    picture_space,
    turn_pictures,
)
from arr_fast.shapes.packing import RowPacker
from arr_fast.shapes.pairs import sample_edit_pair, sample_pair
from arr_fast.shapes.render import render
from arr_fast.shapes.rows import BatchMaker
from arr_fast.shapes.tokenizer import build_tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def setting():
    """A model with live deepstack, and one packed row of a pair, an edit and single pictures."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=1).eval()
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.normal_(merger.linear_fc2.weight, std=0.05)
    maker = BatchMaker(tokenizer)
    rng = np.random.default_rng(6)
    packer = RowPacker(1000)
    packer.new_row()
    images, trees = [], []
    for sampler in (sample_pair, sample_edit_pair):
        example = sampler(rng, "train", 8)
        trees.append(maker.pair_tree(example, len(images)))
        sources = [render(example.source)] if example.source else []
        images += [*sources, *(render(s) for s in example.scenes)]
    asked = [("colour", c.text, c.truths[0], c.evidence[:1], c.wanted) for c in example.criteria]
    cells = (cell_words(example.scenes[0], example.context),)
    trees.append(maker.point_tree("t2i", "a ring", asked, len(images), cells))
    images.append(render(example.scenes[0]))
    for tree in trees:
        assert packer.add(tree) == len(tree.paths)
    return model, images, trees, packer.finish()


def plain_ends(model, images, trees) -> list[torch.Tensor]:
    """Last hidden state of every verdict path, each read alone by transformers."""
    model.config.text_config._attn_implementation = "sdpa"
    ends = []
    for tree in trees:
        pictures = [images[i] for i in tree.pictures]
        inputs = image_processor()(images=pictures, return_tensors="pt")
        for path, verdict in zip(tree.paths, tree.verdicts, strict=True):
            if verdict is None:
                continue
            ids = torch.from_numpy(path.ids)[None]
            with torch.no_grad():
                out = model.model(
                    input_ids=ids,
                    pixel_values=inputs["pixel_values"],
                    image_grid_thw=inputs["image_grid_thw"],
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                )
            ends.append(out.last_hidden_state[0, -1])
    return ends


def packed_ends(model, images, batch, groups) -> list[torch.Tensor]:
    with torch.no_grad():
        features = VisionForward(model)(patchify(images))
        states = decode(model, batch.ids, batch.positions, groups, batch.feature, features, (1, 2))
    return [states.final[row, at] for row, at in batch.verdict_at.tolist()]


def test_packed_branches_equal_plain_forwards(setting):
    model, images, trees, batch = setting
    plain = plain_ends(model, images, trees)
    packed = packed_ends(model, images, batch, batch.groups)
    assert len(plain) == len(packed) >= 15
    for one, other in zip(plain, packed, strict=True):
        assert (one - other).abs().max() < TOLERANCE


def test_a_mask_that_hides_one_prefix_token_is_seen(setting):
    model, images, trees, batch = setting
    verdicts = batch.groups[1]
    mask = verdicts.mask.clone()
    mask[..., 40] = -1e9
    wrong = (batch.groups[0], Group(verdicts.queries, verdicts.keys, mask, verdicts.shape))
    plain = plain_ends(model, images, trees)
    packed = packed_ends(model, images, batch, (*wrong, *batch.groups[2:]))
    assert max((a - b).abs().max() for a, b in zip(plain, packed, strict=True)) > 100 * TOLERANCE


def test_vision_as_a_dense_batch_equals_the_tower(setting):
    model, images, _, _ = setting
    sized = [*images, images[0].resize((256, 256)), images[0].resize((96, 96))]
    inputs = image_processor()(images=sized, return_tensors="pt")
    patches = patchify(sized)
    assert (patches.flatten(0, 1) - inputs["pixel_values"]).abs().max() < 1e-6
    with torch.no_grad():
        dense = VisionForward(model)(patches)
        plain = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert (torch.cat(list(plain.pooler_output)) - dense.merged.flatten(0, 1)).abs().max() < 1e-5
    for level, features in zip(plain.deepstack_features, dense.deepstack, strict=True):
        assert (torch.cat(list(level)) - features.flatten(0, 1)).abs().max() < 1e-4


def test_gradients_reach_words_tower_and_deepstack(setting):
    model, images, _, batch = setting
    features = VisionForward(model)(patchify(images))
    states = decode(
        model, batch.ids, batch.positions, batch.groups, batch.feature, features, (1, 2)
    )
    row, at = batch.verdict_at.T
    states.final[row, at].square().sum().backward()
    visual = model.model.visual
    for weight in (
        model.get_input_embeddings().weight,
        visual.patch_embed.proj.weight,
        visual.deepstack_merger_list[0].linear_fc2.weight,
        model.model.language_model.layers[0].self_attn.k_proj.weight,
    ):
        assert weight.grad is not None and weight.grad.abs().max() > 0
    model.zero_grad()


def test_a_branch_that_does_not_fit_is_left_out(setting):
    _, _, trees, _ = setting
    packer = RowPacker(trees[0].prefix + 40)
    packer.new_row()
    fitted = packer.add(trees[0])
    assert 0 < fitted < len(trees[0].paths)
    with pytest.raises(ValueError, match="exceeds"):
        packer.add(trees[0])


def test_image_tokens_of_pairs_know_their_owner(setting):
    """The pair's pictures are Image 1 and 2, the edit's are the source and Image 1 and 2."""
    batch = setting[3]
    owner, feature = batch.owner[0], batch.feature[0]
    picture = feature[feature >= 0] // IMAGE_TOKENS
    assert (owner[feature < 0] == -1).all()
    expected = torch.tensor([1, 2, 0, 1, 2, -1])
    assert torch.equal(owner[feature >= 0], expected[picture])


def test_image_tokens_of_judged_pictures_hold_their_cells(setting):
    """Every judged picture's 16 cells in order; the source of an edit has none."""
    _, _, trees, batch = setting
    feature, cell = batch.feature[0], batch.cell[0]
    assert (cell[feature < 0] == UNKNOWN).all()
    picture = feature[feature >= 0] // IMAGE_TOKENS
    words = cell[feature >= 0]
    assert (words[picture <= 2] == UNKNOWN).all()
    for tree in trees:
        for number, expected in zip(tree.pictures[-len(tree.cells) :], tree.cells, strict=True):
            assert words[picture == number].tolist() == expected.tolist()
    assert (words != UNKNOWN).sum() > 20


@torch.no_grad()
def best_attention(model, pictures, path) -> torch.Tensor:
    """What transformers' eager attention of layer 3 gives from every edited token to its twin: the
    most of any head, [16 * edited pictures], the pictures in order."""
    model.config.text_config._attn_implementation = "eager"
    inputs = image_processor()(images=pictures, return_tensors="pt")
    ids = torch.from_numpy(path.ids)[None]
    out = model.model(
        input_ids=ids,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        output_attentions=True,
    )
    attention = out.attentions[2][0]
    source = np.flatnonzero(path.picture == 0)
    edited = np.concatenate([np.flatnonzero(path.picture == n) for n in range(1, len(pictures))])
    twins = np.tile(source, len(pictures) - 1)
    return attention[:, torch.from_numpy(edited), torch.from_numpy(twins)].amax(0)


def test_the_twin_loss_is_the_attention_of_edited_cells_to_their_source(setting):
    """A pair of edits and a single edit, in one row behind a pair that has no source."""
    model = setting[0]
    maker = BatchMaker(build_tokenizer())
    rng = np.random.default_rng(8)
    pair, edit = sample_pair(rng, "train", 4), sample_edit_pair(rng, "train", 4)
    asked = [("edit_done", "Is it done?", True, ("correct",), ())]
    cells = tuple(cell_words(scene, edit.context) for scene in edit.scenes)
    trees = [
        maker.pair_tree(pair, 0),
        maker.pair_tree(edit, 2),
        maker.point_tree("edit", edit.caption, asked, 5, cells[:1]),
    ]
    images = [render(s) for s in (*pair.scenes, edit.source, *edit.scenes, edit.source)]
    images.append(render(edit.scenes[0]))
    packer = RowPacker(900)
    packer.new_row()
    for tree in trees:
        packer.add(tree)
    packer.new_row()
    packer.add(trees[1])
    batch = packer.finish()
    loss = JudgeLoss(model, VisionForward(model), TruthProbes(192), maker, whole=True)
    with torch.no_grad():
        found = loss.losses(batch, patchify(images))["twin"]
    edits = (trees[1], trees[2], trees[1])
    shares = [best_attention(model, [images[i] for i in t.pictures], t.paths[0]) for t in edits]
    assert len(torch.cat(shares)) == 80
    torch.testing.assert_close(found, -torch.cat(shares).log().mean(), rtol=1e-4, atol=0)


def test_pictures_are_turned_into_their_own_space(setting):
    model = copy.deepcopy(setting[0])
    torch.nn.init.normal_(model.model.visual.merger.linear_fc2.bias)
    patches = patchify(setting[1][:2])
    plain = VisionForward(model)(patches).merged
    turn_pictures(model, seed=1)
    turned = VisionForward(model)(patches).merged
    assert not torch.allclose(turned, plain, atol=0.01)
    assert torch.allclose(turned @ picture_space(plain.shape[-1], 1), plain, atol=1e-5)


def test_a_batch_of_captions_alone_needs_no_picture(setting):
    """Each row is text: criteria that follow from captions, and nothing to judge."""
    model = setting[0]
    maker = BatchMaker(build_tokenizer())
    batch, patches = maker.batch(np.random.default_rng(3), 2, "train", {"write_caption": 1.0})
    assert (batch.feature == -1).all() and not batch.verdicts
    read = maker.tokenizer.decode(batch.ids[0])
    assert read.count("Write criteria for this caption.") >= 2 and '{"criteria": ["' in read
    losses = JudgeLoss(model, VisionForward(model), TruthProbes(192), maker).losses(batch, patches)
    assert losses["caption"] > 1 and losses["verdict"] == 0
    losses["loss"].backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
    model.zero_grad()
