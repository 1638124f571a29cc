"""The acceptance run: its arms, its table, and that it can be given again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from arr_fast.bench import rpo_acceptance
from arr_fast.bench.rpo_acceptance import (
    ARMS,
    SAMPLES,
    Setting,
    ShuffledJudge,
    arm_config,
    markdown,
    paired,
    run,
    summarise,
)
from arr_fast.errors import ArrFastError
from arr_fast.rpo.config import preset_config, read_config
from arr_fast.rpo.judging import Judgement, JudgeRequest
from arr_fast.rpo.presets import demo_path
from arr_fast.rpo.prompts import load_prompts
from arr_fast.shapes.generator import SHIFT
from arr_fast.shapes.train_generator import SAMPLER_STEPS
from tests.rpo.small_generator import red_judge, save_small, small_code, small_generator
from tests.rpo.toy import done


def test_the_table_compares_pair_by_pair():
    seen = {"agreement": 0.95, "agreement_decided": 0.8, "best_of_two": 0.6, "diversity": 0.1}
    base = {"success": [0.0, 1.0] * 100, **seen}
    after = [1.0 if n % 4 == 0 else s for n, s in enumerate(base["success"])]
    rest = {**seen, "updates": 5, "minutes": 1.0}
    results = [
        {"arm": "recommended", "seed": 0, "success": after, **rest},
        {"arm": "supervised", "seed": 0, "success": base["success"], **rest},
        {"arm": "shuffled", "seed": 0, "success": base["success"], **rest},
    ]
    summary = summarise(base, results)
    assert summary["arms"]["recommended"]["gain"] == pytest.approx(0.25)
    assert summary["arms"]["recommended"]["low"] > 0.15
    assert summary["arms"]["supervised"]["low"] == summary["arms"]["supervised"]["high"] == 0
    assert all(summary["gates"].values())
    assert "| recommended | 1 | 5 | 75.0% (75.0%) | +25.0%" in markdown(summary)
    gain = paired(np.array(base["success"]), np.array(base["success"]))
    assert gain == {"gain": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("edit", [False, True])
def test_the_demo_samples_as_its_generator_is_measured(edit):
    recipe = read_config(demo_path(edit=edit))
    assert recipe.sampler.steps == recipe.evaluation.steps == SAMPLER_STEPS
    assert recipe.sampler.shift == SHIFT


@pytest.mark.parametrize("arm", ["recommended", "paper"])
def test_arms_share_the_recipes_sampler(tmp_path, arm):
    """Both presets are compared on the trajectories that the evaluation's steps are of."""
    recipe = read_config(demo_path())
    setting = Setting(tmp_path, tmp_path, recipe, minutes=3.0, prompts=(), steps=6)
    found = arm_config(arm, setting, 5)
    assert (found.seed, found.max_minutes, found.output) == (5, 3.0, tmp_path / f"{arm}-5")
    for name in ("steps", "shift", "trained", "window"):
        assert getattr(found.sampler, name) == getattr(recipe.sampler, name), name
    own = recipe if arm == "recommended" else preset_config("paper")
    assert (found.loss, found.optimiser, found.rollout) == (own.loss, own.optimiser, own.rollout)
    assert (found.sampler.kind, found.sampler.shift) == (own.sampler.kind, recipe.sampler.shift)


def test_a_shuffled_reward_keeps_the_number_of_verdicts_only():
    wins = Judgement.from_pairs([1.0, 1.0, 1.0, 1.0, 0.0, 0.0] * 4)
    image = Image.new("RGB", (4, 4))
    request = JudgeRequest(tuple(range(24)), ("p",) * 24, ((image,) * 2,) * 24, None, ({},) * 24)
    shuffled = ShuffledJudge(lambda request: done(wins), 0)(request).result().wins
    assert int((shuffled[:, 0, 1] != 0).sum()) == 16
    assert set(shuffled[:, 0, 1].tolist()) == {1.0, -1.0, 0.0}


def test_all_arms_run_are_kept_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rpo_acceptance, "resolve_compile", lambda *_: False)
    setting = Setting(
        out=tmp_path / "out",
        base=save_small(tmp_path / "base"),
        recipe=read_config(demo_path()).changed(rollout={"pairs": 4, "chunks": 2}),
        minutes=0.02,
        prompts=load_prompts("builtin:shapes-held-out", count=7),
        steps=3,
    )
    summary = run(setting, ARMS, [0], red_judge(), lambda _: None)
    assert set(summary["arms"]) == set(ARMS)
    for arm, row in summary["arms"].items():
        assert len(row["success"]) == 1
        assert (row["updates"][0] is None) == (arm == "supervised")
        with Image.open(setting.out / f"{arm}-0.png") as picture:
            # Seven prompts in columns of six, the base's image beside the arm's.
            assert picture.width == 2 * 200
    assert summary["base"]["diversity"] > 0

    def refuse(*_):
        raise AssertionError("an arm that is there was run again")

    with pytest.raises(ArrFastError, match=r"base\.json was made with another steps"):
        run(replace(setting, steps=4), ["paper"], [0], red_judge(), lambda _: None)
    with pytest.raises(ArrFastError, match=r"paper-0\.json was made with another minutes"):
        run(replace(setting, minutes=9.0), ["paper"], [0], red_judge(), lambda _: None)
    monkeypatch.setattr(rpo_acceptance, "run_arm", refuse)
    monkeypatch.setattr(rpo_acceptance, "_evaluated_base", refuse)
    assert run(setting, ARMS, [0], red_judge(), lambda _: None) == summary
    assert (setting.out / "summary.md").read_text() == markdown(summary)


def test_success_is_a_share_of_several_images_at_fixed_noise(tmp_path):
    directory = tmp_path / "base"
    # It returns the noise as it is, so images of two batch sizes agree to the bit.
    small_generator(moves=False).save(directory, small_code())
    prompts = load_prompts("builtin:shapes-held-out", count=3)
    setting = Setting(tmp_path, directory, read_config(demo_path()), 1.0, prompts, 3)
    policy = setting.base_policy()
    several, one = setting.images(policy, SAMPLES), setting.images(policy)
    assert len(several) == 3 * SAMPLES
    for number, image in enumerate(one):
        np.testing.assert_array_equal(image, several[number * SAMPLES])
    assert len({image.tobytes() for image in several}) == len(several)
    assert setting.successes(several, SAMPLES).shape == (3, SAMPLES)
