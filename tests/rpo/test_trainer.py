"""The trainer on a toy policy: it learns, it counts what it skips, it stops where it must."""

from __future__ import annotations

import json
import math

import pytest
import torch

from arr_fast.errors import ArrFastError, ConfigError, MissingDependencyError, TrainingError
from arr_fast.rpo.conditions_cache import ConditionsCache
from arr_fast.rpo.judging import Judgement
from arr_fast.rpo.prompts import Prompt
from arr_fast.rpo.trainer import Trainer
from tests.rpo.toy import (
    PaintingPolicy,
    bright_judge,
    brightness,
    broken_judge,
    done,
    mean_brightness,
    tied_judge,
    toy_config,
    toy_parts,
)


def logged(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_what_the_judge_likes(tmp_path):
    config = toy_config(tmp_path, iterations=16, rollout={"pairs": 32}, evaluation={"every": 16})
    outcome = Trainer(config, toy_parts()).train()
    lines = logged(tmp_path)
    first, last = lines[0]["held_out/evaluator"], lines[-1]["held_out/evaluator"]
    assert outcome.updates == 16
    assert last > first + 3
    assert lines[-1]["held_out/reward"] > 0.7
    assert lines[-1]["held_out/ema_evaluator"] > first
    assert lines[0]["held_out/evaluator_base"] == first


def test_everything_that_the_field_asks_for_is_logged(tmp_path):
    Trainer(toy_config(tmp_path, rollout={"updates": 2}), toy_parts()).train()
    line = logged(tmp_path)[-1]
    names = (
        "rubric/win_rate_first rubric/tie_rate rubric/error_rate rubric/bias reward tie_rate "
        "error_rate ratio_min ratio_mean ratio_max clip_fraction clip clip_nats kl grad_norm "
        "seconds/sampling seconds/judging seconds/training hidden_share pairs/decided"
    )
    assert not [name for name in names.split() if name not in line]
    assert (tmp_path / "config.yaml").is_file()
    assert list((tmp_path / "grids").glob("*.png"))


def test_the_second_update_on_a_rollout_leaves_the_ratio_of_one(tmp_path):
    trainer = Trainer(toy_config(tmp_path, rollout={"updates": 2}), toy_parts())
    one = Trainer(toy_config(tmp_path), toy_parts())
    assert one.run_iteration()["ratio_max"] == pytest.approx(1, abs=1e-6)
    numbers = trainer.run_iteration()
    assert abs(numbers["ratio_max"] - 1) > 1e-6
    assert trainer.updater.version == 2


def test_the_clip_is_alive_with_two_updates(tmp_path):
    config = toy_config(tmp_path, rollout={"updates": 2}, loss={"clip": 1e-4, "clip_nats": None})
    trainer = Trainer(config, toy_parts())
    assert max(trainer.run_iteration()["clip_fraction"] for _ in range(3)) > 0


def test_ties_skip_the_step_and_are_counted(tmp_path):
    config = toy_config(tmp_path, iterations=2, evaluation={"every": None})
    parts = toy_parts(tied_judge)
    before = {k: v.clone() for k, v in parts.policy.trainable_parameters().items()}
    outcome = Trainer(config, parts).train()
    assert (outcome.updates, outcome.skipped) == (0, {"no decided pair": 2})
    assert all(torch.equal(before[k], v) for k, v in parts.policy.trainable_parameters().items())
    assert logged(tmp_path)[-1]["tie_rate"] == 1.0


def test_prompts_that_are_always_tied_are_set_aside(tmp_path):
    config = toy_config(
        tmp_path, iterations=4, prompts={"tied_limit": 1}, evaluation={"every": None}
    )
    trainer = Trainer(config, toy_parts(tied_judge, prompts=8))
    numbers = trainer.run_iteration()
    assert numbers["prompts/set_aside"] == 8


def test_a_judge_that_keeps_failing_stops_the_run(tmp_path):
    trainer = Trainer(toy_config(tmp_path, evaluation={"every": None}), toy_parts(broken_judge))
    with pytest.raises(TrainingError, match=r"no verdict on 8 of 8 pairs.*no route to judge"):
        trainer.train()


def test_a_few_failures_are_abstentions(tmp_path):
    def partly(request):
        judged = bright_judge(request).result()
        judged.wins[0, 0, 1] = judged.wins[0, 1, 0] = math.nan
        return done(judged)

    numbers = Trainer(toy_config(tmp_path), toy_parts(partly)).run_iteration()
    assert (numbers["pairs/failed"], numbers["pairs/decided"]) == (2, 6)
    assert numbers["error_rate"] == 0.25


def test_nan_in_the_policy_is_skipped_and_reported(tmp_path):
    class Sick(PaintingPolicy):
        sick = False

        def velocity(self, latents, sigma, conditions):
            found = super().velocity(latents, sigma, conditions)
            return found * math.nan if self.sick and torch.is_grad_enabled() else found

    parts = toy_parts()
    policy = Sick()
    trainer = Trainer(
        toy_config(tmp_path), type(parts)(policy, parts.judges, parts.prompts, rubric_hash="x")
    )
    trainer.run_iteration()
    before = {k: v.clone() for k, v in policy.trainable_parameters().items()}
    policy.sick = True
    numbers = trainer.run_iteration()
    assert numbers["skipped"] == 1
    assert "not finite" in next(iter(trainer.updater.skipped))
    assert all(torch.equal(before[k], v) for k, v in policy.trainable_parameters().items())


def test_a_rollout_that_training_does_not_reproduce_stops_the_run(tmp_path):
    class Dropout(PaintingPolicy):
        def velocity(self, latents, sigma, conditions):
            found = super().velocity(latents, sigma, conditions)
            return found * 3.0 if torch.is_grad_enabled() else found

    parts = toy_parts()
    trainer = Trainer(toy_config(tmp_path), type(parts)(Dropout(), parts.judges, parts.prompts))
    with pytest.raises(ArrFastError, match="ratio differs from 1"):
        trainer.run_iteration()


def test_the_alarm_sounds_when_the_evaluator_falls(tmp_path, caplog):
    config = toy_config(
        tmp_path, iterations=10, rollout={"pairs": 32}, evaluation={"every": 10, "alarm": 2}
    )

    def darkness(prompts, images, sources=None, metadata=None):
        return [-value for value in mean_brightness(prompts, images)]

    Trainer(config, toy_parts(evaluator=darkness)).train()
    assert any(line.get("held_out/alarm") for line in logged(tmp_path))
    assert "ALARM" in caplog.text


def test_a_judge_that_fails_in_an_evaluation_stops_nothing(tmp_path, caplog):
    calls = []

    def judge(request):
        calls.append(len(request.prompts))
        # Evaluations have 4 prompts, chunks too; the first call is an evaluation.
        if len(calls) == 1:
            raise ConnectionError("not yet")
        return bright_judge(request)

    outcome = Trainer(toy_config(tmp_path, iterations=1), toy_parts(judge)).train()
    assert outcome.updates == 1
    assert "gave no win rate: not yet" in caplog.text


def test_evaluation_does_not_touch_training(tmp_path):
    weights = []
    for every in (None, 1):
        parts = toy_parts()
        config = toy_config(tmp_path / str(every), evaluation={"every": every})
        Trainer(config, parts).train()
        weights.append(parts.policy.trainable_parameters())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_prompts_are_encoded_once(tmp_path):
    parts = toy_parts(prompts=8)
    trainer = Trainer(toy_config(tmp_path, evaluation={"every": None}), parts)
    trainer.train()
    assert parts.policy.encoded == 8


@pytest.mark.compile
def test_nothing_recompiles_after_the_first_iterations(tmp_path):
    decided = iter([8, 3, 8, 1, 5, 7, 2, 8, 4, 6, 8, 8])

    def judge(request):
        judged = bright_judge(request).result()
        judged.wins[next(decided) // 2 :] = 0.0
        return done(judged)

    config = toy_config(tmp_path, compile=True, evaluation={"every": None})
    trainer = Trainer(config, toy_parts(judge))
    graphs = [trainer.run_iteration()["graphs"] for _ in range(6)]
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[0]] * 5


def test_the_memory_budget_chooses_the_micro_batch(tmp_path):
    trainer = Trainer(toy_config(tmp_path, micro_batch=None), toy_parts())
    assert trainer.run_iteration()["rows"] == 8 * 2 * 2
    tight = toy_config(tmp_path, micro_batch=None, memory_budget_gb=1e-9)
    with pytest.raises(ArrFastError, match="one row needs"):
        Trainer(tight, toy_parts()).run_iteration()


def test_pairs_must_fit_the_ranks(tmp_path):
    config = toy_config(tmp_path)

    class Two:
        process_index, num_processes = 0, 3
        distributed_type = type("T", (), {"value": "MULTI_CPU"})
        is_main_process = True

    with pytest.raises(ValueError, match=r"pairs 8 is not a multiple of .* = 6"):
        Trainer(config, toy_parts(), Two())


def test_a_launch_that_shards_is_refused(tmp_path):
    class Sharded:
        process_index, num_processes = 0, 2
        distributed_type = type("T", (), {"value": "FSDP"})

    with pytest.raises(TrainingError, match=r"launched with FSDP.*shard: true"):
        Trainer(toy_config(tmp_path), toy_parts(), Sharded())


def test_splitting_needs_several_processes_and_a_micro_batch(tmp_path):
    with pytest.raises(TrainingError, match="one only: start several with accelerate launch"):
        Trainer(toy_config(tmp_path, shard=True), toy_parts())
    with pytest.raises(ConfigError, match="shard needs micro_batch"):
        toy_config(tmp_path, shard=True, micro_batch=None)


def test_an_absent_tracker_names_its_extra(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"arr-fast\[track\]"):
        Trainer(toy_config(tmp_path, trackers=["nothing"]), toy_parts())


def test_judges_sleep_while_the_policy_trains(tmp_path):
    seen = []

    class Sleepy:
        def sleep(self):
            seen.append("sleep")

        def wake(self):
            seen.append("wake")

    def judge(request):
        seen.append("judge")
        return bright_judge(request)

    Trainer(toy_config(tmp_path), toy_parts(judge, sleepers=[Sleepy()])).run_iteration()
    assert seen == ["wake", "judge", "judge", "sleep"]


def test_two_rewards_are_mixed(tmp_path):
    config = toy_config(tmp_path, judges={"bright": {}, "tied": {}})
    parts = toy_parts()
    both = type(parts)(parts.policy, {"bright": bright_judge, "tied": tied_judge}, parts.prompts)
    numbers = Trainer(config, both).run_iteration()
    assert numbers["pairs/decided"] == 8
    assert numbers["tied/tie_rate"] == 1.0


def test_a_judgement_of_other_groups_is_a_failure(tmp_path):
    def wrong(request):
        return done(Judgement.from_pairs([1.0]))

    with pytest.raises(TrainingError, match=r"judged \(1, 2\)"):
        Trainer(toy_config(tmp_path, evaluation={"every": None}), toy_parts(wrong)).train()


def test_units_of_rewards_are_those_of_the_whole_iteration(tmp_path):
    """How an iteration is cut into chunks says nothing about a reward's unit."""

    def scorer(request):
        scores = [[brightness(image) for image in group] for group in request.images]
        return done(Judgement(scores=torch.tensor(scores)))

    def given(chunks):
        config = toy_config(
            tmp_path,
            rollout={"pairs": 8, "chunks": chunks},
            judges={"bright": {}, "score": {}},
            mixing="normalise_first",
        )
        parts = toy_parts()
        judges = {"bright": bright_judge, "score": scorer}
        trainer = Trainer(config, type(parts)(parts.policy, judges, parts.prompts))
        judged = trainer.sampler.iterate(trainer._batches(trainer._draw(), 0))
        return torch.cat([each.value for each in trainer._advantages(judged)])

    whole, cut = given(1), given(4)
    assert len(whole.abs().unique()) > 3
    torch.testing.assert_close(cut, whole)


def test_a_failure_beside_it_leaves_the_streak_of_a_tied_prompt(tmp_path):
    def partly(request):
        judged = tied_judge(request).result()
        judged.wins[0, 0, 1] = judged.wins[0, 1, 0] = math.nan
        return done(judged)

    config = toy_config(tmp_path, prompts={"tied_limit": 1}, evaluation={"every": None})
    numbers = Trainer(config, toy_parts(partly, prompts=8)).run_iteration()
    # One of four pairs in each of two chunks has no verdict.
    assert numbers["prompts/set_aside"] == 6


def test_every_evaluation_is_logged(tmp_path):
    Trainer(
        toy_config(tmp_path, iterations=4, log_every=3, evaluation={"every": 2}), toy_parts()
    ).train()
    held_out = [line["iteration"] for line in logged(tmp_path) if "held_out/evaluator" in line]
    assert held_out == [0, 2, 4]


def test_the_cache_of_conditions_keeps_to_its_bytes():
    policy = PaintingPolicy()
    prompts = [Prompt(number, f"prompt {number}") for number in range(6)]
    one = sum(t[0].numel() * t.element_size() for t in policy.encode(["x"]).values())
    cache = ConditionsCache(policy, 100, max_bytes=3 * one)
    policy.encoded = 0
    found = cache.of(prompts)
    cache.of(prompts[3:])
    assert policy.encoded == 6
    cache.of(prompts[:3])
    assert policy.encoded == 9
    again = cache.of(prompts)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])
