"""The renderer: the same picture every time, and pixels that agree with the scene's data."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from arr_fast.shapes.pairs import sample_picture
from arr_fast.shapes.render import coverage, render
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject, sample_scene

CLEAN = [sample_scene(np.random.default_rng([1, i]), "train") for i in range(60)]


def pixels_of(scene: Scene, side: int = 64) -> np.ndarray:
    return np.asarray(render(scene, side)).astype(int)


def near(pixels: np.ndarray, colour: tuple[int, int, int], reach: int = 12) -> np.ndarray:
    return np.abs(pixels - np.array(colour)).max(-1) <= reach


def test_a_picture_is_a_function_of_the_scene():
    for number in range(20):
        one = sample_picture(np.random.default_rng([2, number]), "held_out")
        two = sample_picture(np.random.default_rng([2, number]), "held_out")
        assert one == two
        assert render(one).tobytes() == render(two).tobytes()
    noisy = replace(CLEAN[0], noise=0.12)
    assert render(noisy).tobytes() != render(replace(noisy, seed=noisy.seed + 1)).tobytes()


@pytest.mark.parametrize("side", [64, 128, 256])
def test_every_object_shows_its_colour_where_it_stands(side: int):
    for scene in CLEAN:
        pixels, shown = pixels_of(scene, side), coverage(scene, side)
        for number, obj in enumerate(scene.objects):
            inner = shown == number
            share = near(pixels[inner], COLOURS[obj.colour]).mean()
            assert share > 0.5, (obj, share)  # the rest are anti-aliased edges


def test_pixels_count_the_colours_of_a_scene():
    """An independent reading: a colour is in the picture where enough pixels have it."""
    for scene in CLEAN:
        pixels = pixels_of(scene)
        for colour, rgb in COLOURS.items():
            seen = near(pixels, rgb).sum() > 20
            assert seen == any(o.colour == colour for o in scene.objects), (scene, colour)


def test_centroids_stand_where_the_data_says():
    for scene in CLEAN:
        if len(scene.kinds()) < len(scene.objects):
            continue
        pixels = pixels_of(scene, 128)
        for obj in scene.objects:
            if sum(o.colour == obj.colour for o in scene.objects) > 1:
                continue
            ys, xs = np.nonzero(near(pixels, COLOURS[obj.colour]))
            assert abs(xs.mean() / 128 - obj.x) < 0.03
            assert abs(ys.mean() / 128 - obj.y) < 0.05


def test_corners_show_the_background():
    for scene in CLEAN:
        corner = pixels_of(scene)[0, 0]
        free = coverage(scene)[0, 0] == -1
        assert not free or near(corner[None], BACKGROUNDS[scene.background]).all()


def test_shapes_differ():
    """Any two shapes of one size disagree on at least a tenth of the smaller one's pixels."""
    masks = {}
    for shape in SHAPES:
        obj = SceneObject(shape, "red", "large", 0.5, 0.5, 0.19)
        masks[shape] = coverage(Scene((obj,), "white"), 256) == 0
    for first, second in itertools.combinations(SHAPES, 2):
        a, b = masks[first], masks[second]
        assert (a ^ b).sum() > 0.1 * min(a.sum(), b.sum()), (first, second)


def test_degradations_do_what_they_are_named_after():
    scene = Scene((SceneObject("square", "red", "large", 0.5, 0.5, 0.19),), "white", seed=3)
    sharp, blurred = pixels_of(scene), pixels_of(replace(scene, blur=0.02))
    edge = np.abs(np.diff(sharp, axis=1)).max(), np.abs(np.diff(blurred, axis=1)).max()
    assert edge[1] < 0.6 * edge[0]
    flat = pixels_of(replace(scene, noise=0.12))[:8, :8].std()
    assert pixels_of(scene)[:8, :8].std() < 1 < 10 < flat
    hidden = coverage(replace(scene, hidden=0))
    lost = (coverage(scene) == 0) & (hidden == -2)
    assert 0.15 < lost.sum() / (coverage(scene) == 0).sum() < 0.6


def test_noise_survives_scaling_down():
    scene = replace(CLEAN[0], noise=0.14, objects=())
    small = np.asarray(render(scene, 256).resize((64, 64))).astype(float)
    assert small.std(axis=(0, 1)).mean() > 12
