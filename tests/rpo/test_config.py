"""Configuration: presets, YAML round trip, and errors that name what is wrong."""

from __future__ import annotations

from importlib import resources

import pytest

from arr_fast.errors import ConfigError
from arr_fast.rpo.config import PRESETS, RunConfig, preset_config, read_config
from arr_fast.rpo.schedule import shifted_sigmas
from arr_fast.rpo.sde import build_schedule


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_paper_is_the_table_of_the_paper():
    config = preset_config("paper")
    assert (config.sampler.kind, config.sampler.eta, config.sampler.steps) == ("dance_sde", 0.3, 8)
    assert (config.sampler.trained, config.sampler.window) == (7, 7)
    assert (config.loss.clip, config.loss.beta, config.loss.kl) == (0.2, 0.01, "log_prob_diff")
    assert (config.loss.winner, config.loss.loser, config.loss.centred) == (1.0, 0.1, False)
    assert (config.rollout.pairs, config.optimiser.lr) == (32, 5e-5)


def test_recommended_clips_in_nats():
    config = preset_config("recommended")
    assert config.loss.clip_range(3072) == pytest.approx(6.5 / 3072)
    assert preset_config("paper").loss.clip_range(3072) == 0.2


def test_recommended_trains_early_steps_and_weighs_them_alike():
    config = preset_config("recommended")
    assert (config.sampler.trained, config.sampler.window, config.loss.guard) == (4, 4, True)
    assert not preset_config("paper").loss.guard
    schedule = build_schedule(shifted_sigmas(config.sampler.steps, 3.0), "sde", config.sampler.eta)
    step = schedule.coefficients[:7]
    plain = step.v_scale.abs() / step.std
    assert float(plain[6] / plain[0]) == pytest.approx(12.3, abs=0.1)
    guarded = plain * step.std / -step.dt
    assert float(guarded.max() / guarded.min()) == pytest.approx(1.245, abs=0.01)


def test_a_file_overrides_its_preset_key_by_key(tmp_path):
    path = written(tmp_path, "preset: paper\nloss: {beta: 0.5}\nrollout: {pairs: 16}\n")
    config = read_config(path)
    assert (config.loss.beta, config.loss.clip, config.sampler.eta) == (0.5, 0.2, 0.3)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_config_reads_back_equal(tmp_path, preset):
    config = preset_config(preset, policy={"lora": {"rank": 4}}, seed=7)
    config.save(tmp_path / "run.yaml")
    assert read_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {betta: 1}", r"unknown key loss.betta \(did you mean beta\?\)"),
        ("optimizer: {lr: 1}", r"unknown key optimizer \(did you mean optimiser\?\)"),
        ("policy: {lora: {rnak: 3}}", r"unknown key policy.lora.rnak \(did you mean rank\?\)"),
        ("loss: {beta: -0.1}", r"loss.beta: .*greater than or equal to 0 \(got -0.1\)"),
        ("loss: {clip: 0.2}", "exactly one of clip and clip_nats"),
        ("sampler: {kind: ode}", "no log_prob"),
        ("sampler: {window: 8}", "8 steps have 7 that can be trained"),
        ("sampler: {trained: 7, window: 3}", "trained is 7, window only 3"),
        ("rollout: {pairs: 10, chunks: 4}", "pairs 10 is not a multiple of chunks 4"),
        ("rollout: {max_staleness: -1}", "rollout.max_staleness"),
        ("judges: {a: {url: 'http://x', call: 'a:b'}}", "url or call, not both"),
        ("judges: {a: {modle: x}}", r"unknown key judges.a.modle \(did you mean model\?\)"),
        (
            "judges: {a: {options: {agregation: veto}}}",
            r"unknown key judges.a.options.agregation \(did you mean aggregation\?\)",
        ),
        ("judges: {a: {options: {margin: -1}}}", r"judges.a.options.margin: .* \(got -1\)"),
        ("judges: {a: {options: {aggregation: holistic}}}", "needs the whole-rubric leaf"),
        ("judges: {a: {options: {aggregation: learned}}}", "needs learned_weights"),
        ("judges: {a: {options: {learned_weights: [1]}}}", 'for aggregation "learned" alone'),
        (
            "judges: {a: {options: {aggregation: learned, learned_weights: [.nan]}}}",
            r"judges.a.options.learned_weights.0: .*finite",
        ),
        ("judges: {a: {url: 'http://x', adapter: b}}", "adapter is for a judge in this process"),
        ("judges: {a: {call: 'a:b', engine: {compile: true}}}", "engine is for a judge in this"),
        ("judges: {a: {quantization: int3}}", "judges.a.quantization: .*'int8' or 'fp8'"),
        ("judges: {a: {veto: true}}", "at least one that is not a veto"),
        ("preset: papre", "preset must be one of paper, recommended, got 'papre'"),
        ("- a list", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_name_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot read"):
        read_config(tmp_path / "nothing.yaml")


def test_every_preset_is_valid_and_defaults_are_recommended():
    assert preset_config("recommended") == RunConfig()


@pytest.mark.parametrize(
    "name", [entry.name for entry in (resources.files("arr_fast") / "rpo" / "configs").iterdir()]
)
def test_packaged_configurations_are_valid(name):
    config = read_config(str(resources.files("arr_fast") / "rpo" / "configs" / name))
    assert config.shard == ("sharded" in name)


def test_a_judge_cannot_sleep_while_it_judges_ahead():
    with pytest.raises(ConfigError, match="no judge can sleep"):
        preset_config(rollout={"max_staleness": 1}, judges={"rubric": {"sleep": True}})
