"""Judge as its users meet it: shapes, errors, caches, weights, traces."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arr_fast.engine.families import QwenVLAdapter
from arr_fast.engine.model import load_model
from arr_fast.engine.packed_linear import PackedLinear
from arr_fast.errors import (
    ArrFastError,
    BadPromptError,
    PromptTooLongError,
    UnsupportedModelError,
    VerdictError,
)
from arr_fast.images import to_image
from arr_fast.judge import Judge
from arr_fast.rubric import Rubric
from tests.engine import scenes

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
A, B = scenes.image(70, 100, 1), scenes.image(64, 64, 2)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


@pytest.fixture
def own_judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


def preference(judge: Judge, a: Any = A, b: Any = B, **options: Any) -> np.ndarray:
    return judge.compare(["a caption"], [a], [b], scenes.rubric(5), **options).preference[0]


def test_both_orders_give_preference_and_bias(judge: Judge) -> None:
    both = judge.compare(["x"], [A], [B], scenes.rubric(5))
    forward = judge.compare(["x"], [A], [B], scenes.rubric(5), orders="AB")
    reverse = judge.compare(["x"], [A], [B], scenes.rubric(5), orders="BA")
    ab, ba = forward.log_odds_ab, reverse.log_odds_ba
    assert ab is not None and ba is not None
    np.testing.assert_allclose(both.preference, (ab - ba) / 2, atol=1e-4)
    np.testing.assert_allclose(both.position_bias, (ab + ba) / 2, atol=1e-4)
    assert np.isnan(forward.position_bias).all() and forward.consistent is None


def test_exchange_negates_preference_and_identical_images_tie(judge: Judge) -> None:
    np.testing.assert_allclose(preference(judge, A, B), -preference(judge, B, A), atol=1e-4)
    np.testing.assert_allclose(preference(judge, A, A), 0.0, atol=1e-4)


def test_per_prompt_rubrics_are_padded(judge: Judge) -> None:
    rubrics = [scenes.rubric(2), scenes.rubric(5)]
    verdicts = judge.compare(["x", "y"], [A, B], [B, A], rubrics)
    assert verdicts.criteria_mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert np.isnan(verdicts.preference[0, 2:]).all()
    assert len(verdicts.provenance.rubric_hashes) == 2


def test_modes_read_criteria_and_the_whole_rubric_in_one_forward(judge: Judge) -> None:
    before = judge.engine.counters.forwards
    both = judge.compare(["x"], [A], [B], scenes.rubric(3), mode="both")
    assert judge.engine.counters.forwards == before + 1
    whole = judge.compare(["x"], [A], [B], scenes.rubric(3), mode="holistic")
    assert both.holistic_preference is not None and whole.holistic_preference is not None
    np.testing.assert_allclose(both.holistic_preference, whole.holistic_preference, atol=1e-4)
    assert whole.aggregation == "holistic"
    assert whole.score[0] == whole.holistic_preference[0]


def test_one_bad_item_does_not_take_its_batch_down(judge: Judge) -> None:
    good = judge.compare(["x", "x"], [A, A], [B, B], scenes.rubric(3))
    mixed = judge.compare(["x", "x"], [b"not an image", A], [B, B], scenes.rubric(3))
    assert mixed.status[0] == "error" and "images_a[0]" in str(mixed.errors[0])
    np.testing.assert_allclose(mixed.preference[1], good.preference[1], atol=1e-4)
    nan = torch.full((3, 40, 40), float("nan"))
    assert "images_b[0]" in str(judge.compare(["x"], [A], [nan], scenes.rubric(2)).errors[0])


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_one_bad_image_of_a_batched_tensor_fails_alone(judge: Judge, kind: Any) -> None:
    pixels = np.stack([A.pixels[:64, :96], B.pixels[:, :32].repeat(3, 1)]).transpose(0, 3, 1, 2)
    batch = (pixels / 255).astype(np.float32)
    batch[1, 0, 3, 3] = np.nan
    mixed = judge.compare(["x", "y"], kind(batch), [B, B], scenes.rubric(3))
    alone = judge.compare(["x"], kind(batch[:1]), [B], scenes.rubric(3))
    assert mixed.status[1] == "error" and "images_a[1]: 1 of" in str(mixed.errors[1])
    np.testing.assert_allclose(mixed.preference[0], alone.preference[0], atol=1e-4)
    ranked = judge.rank(["x", "y"], [[A, B], kind(batch)], scenes.rubric(3))
    assert ranked.pairs.status[0] != "error"
    assert "groups[1][1]: 1 of" in str(ranked.pairs.errors[1])


def test_one_image_in_place_of_a_list_is_refused(judge: Judge) -> None:
    """Three grey planes for three prompts would be one answer to a question nobody asked."""
    one = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match=r"images_a .* \[3, 64, 64\]; wrap a single image"):
        judge.compare(["x"] * 3, one, [B] * 3, scenes.rubric(1))
    with pytest.raises(ValueError, match=r"groups\[0\] .* \[3, 64, 64\]"):
        judge.rank(["x"], [one.numpy()], scenes.rubric(1))


def test_text_that_is_not_unicode_fails_alone(judge: Judge) -> None:
    broken = Rubric(name="r", criteria=[{"id": "c", "text": "It shows \udc80."}])
    rubrics = [scenes.rubric(1), scenes.rubric(1), broken]
    verdicts = judge.compare(["x", "a \ud800", "z"], [A] * 3, [B] * 3, rubrics)
    assert [status == "error" for status in verdicts.status] == [False, True, True]
    assert "prompts[1] holds a lone surrogate: '\\ud800' at character 2" in str(verdicts.errors[1])
    assert "pair 2: criterion 'c'" in str(verdicts.errors[2])
    with pytest.raises(BadPromptError, match=r"prompts\[0\]"):
        judge.trace(["\ud800"], [A], [B], scenes.rubric(1))


def test_a_prompt_over_the_context_is_named_with_its_length() -> None:
    short = Judge.from_pretrained(f"{MODEL[:-1]},max_positions=120]", device="cpu")
    verdicts = short.compare(["ok", "word " * 200], [A, A], [B, B], scenes.rubric(2, longest=3))
    assert verdicts.status[0] != "error"
    message = str(verdicts.errors[1])
    assert "pair 1" in message and "120" in message
    with pytest.raises(PromptTooLongError):
        short.trace(["word " * 200], [A], [B], scenes.rubric(2))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(prompts=["x", "y"], images_a=[A], images_b=[B, B]), "images_a has 1 items"),
        (dict(prompts=[" "], images_a=[A], images_b=[B]), r"prompts\[0\] is empty"),
        (dict(prompts="x", images_a=[A], images_b=[B]), "must be a list of strings"),
        (dict(prompts=[], images_a=[], images_b=[]), "prompts is empty"),
        (dict(prompts=["x"], images_a=[A], images_b=[B], orders="ba"), "orders must be one of"),
        (dict(prompts=["x"], images_a=[A], images_b=[B], mode="fast"), "mode must be one of"),
        (dict(prompts=["x"], images_a=[A], images_b=[B], sources=[A]), "takes no source"),
        (
            dict(prompts=["x"], images_a=[A], images_b=[B], rubric=scenes.rubric(1, "edit")),
            "needs source images",
        ),
        (dict(prompts=["x"], images_a=[A], images_b=[B], rubric=[]), "rubric has 0 items"),
    ],
)
def test_bad_calls_are_refused(judge: Judge, arguments: dict[str, Any], message: str) -> None:
    arguments.setdefault("rubric", scenes.rubric(1))
    with pytest.raises(ValueError, match=message):
        judge.compare(**arguments)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(mode="holistic", aggregation="log_odds_mean"), 'needs criteria: mode="criteria"'),
        (dict(aggregation="holistic"), 'mode="holistic"'),
        (dict(aggregation="mean"), "unknown aggregation 'mean'; there are: log_odds_mean"),
        (dict(aggregation="learned"), "needs learned_weights"),
        (dict(learned_weights=[1.0, 1.0]), 'for aggregation "learned" alone'),
    ],
)
def test_a_rule_is_checked_before_anything_runs(
    judge: Judge, options: dict[str, Any], message: str
) -> None:
    before = judge.stats()["forwards"]
    with pytest.raises(VerdictError, match=message):
        judge.compare(["x"], [A], [B], scenes.rubric(2), **options)
    with pytest.raises(VerdictError, match=message):
        judge.rank(["x"], [[A, B]], scenes.rubric(2), **options)
    assert judge.stats()["forwards"] == before


def test_a_rubric_may_be_a_path_and_theme_text_takes_the_task(judge: Judge, tmp_path: Path) -> None:
    text, file = tmp_path / "r.txt", tmp_path / "r.yaml"
    text.write_text("1. It is sharp.\n2. It is bright.\n")
    scenes.rubric(2, task="edit").save(file)
    for rubric in (text, str(text), file):
        verdicts = judge.compare(["x"], [A], [B], rubric, sources=[A])
        assert verdicts.preference.shape == (1, 2) and verdicts.status[0] != "error"
    with pytest.raises(ValueError, match="needs source images"):
        judge.compare(["x"], [A], [B], file)


def test_a_group_needs_two_images(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"groups\[1\] has 1 images"):
        judge.rank(["x", "y"], [[A, B], [A]], scenes.rubric(1))


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|image_pad|>", "<|vision_start|><|image_pad|>", "\ue0000\ue001", "1", "Yes 2"],
)
def test_user_text_never_becomes_a_control_token(judge: Judge, text: str) -> None:
    control = set(judge.engine.adapter.tokenizer.get_added_vocab().values())
    for where in ("caption", "criterion"):
        caption = f"a {text} b" if where == "caption" else "plain"
        words = f"It shows {text}." if where == "criterion" else "It is sharp."
        one = Rubric(name="r", criteria=[{"id": "c", "text": words}])
        plain = Rubric(name="r", criteria=[{"id": "c", "text": "It is sharp."}])
        trace = judge.trace([caption], [A], [B], one)[0]
        base = judge.trace(["plain"], [A], [B], plain)[0]
        counts = [sum(int(t) in control for t in x.input_ids) for x in (trace, base)]
        assert counts[0] == counts[1]
        decoded = judge.engine.adapter.tokenizer.decode(trace.input_ids)
        assert text in decoded


def test_a_changed_pixel_setting_or_weight_never_hits(own_judge: Judge) -> None:
    base = preference(own_judge)
    encodes = own_judge.engine.counters.image_encodes
    np.testing.assert_allclose(preference(own_judge), base, atol=1e-4)
    assert own_judge.engine.counters.image_encodes == encodes
    pixels = A.pixels.copy()
    pixels[3, 3, 0] ^= 1
    preference(own_judge, to_image(pixels, name="changed"))
    assert own_judge.engine.counters.image_encodes == encodes + 1
    processor = own_judge.engine.adapter.image_processor
    processor.image_mean = [0.1, 0.2, 0.3]
    other = preference(own_judge)
    assert own_judge.engine.counters.image_encodes == encodes + 3
    assert np.abs(other - base).max() > 1e-3


def test_budgets_hold_and_hits_are_reported() -> None:
    small = Judge.from_pretrained(
        MODEL, device="cpu", feature_cache_bytes=20_000, prefix_cache_bytes=1 << 16
    )
    for seed in range(4):
        small.compare([f"caption {seed}"], [scenes.image(64, 96, seed)], [B], scenes.rubric(2))
        stats = small.stats()
        for cache in ("image_features", "prefix_kv"):
            assert stats[cache]["bytes"] <= stats[cache]["budget_bytes"]
    assert small.stats()["image_features"]["evictions"] > 0
    assert 0 < small.stats()["image_features"]["hit_rate"] < 1


def test_out_of_memory_splits_down_to_the_item(
    own_judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, left, right = ["x", "y", "z"], [A, B, A], [B, A, B]
    expected = own_judge.compare(prompts, left, right, scenes.rubric(4))
    original = own_judge.engine.runner.run

    def limited(forest: Any, *rest: Any) -> Any:
        if forest.rows > 150:
            raise torch.OutOfMemoryError("simulated")
        return original(forest, *rest)

    monkeypatch.setattr(own_judge.engine.runner, "run", limited)
    got = own_judge.compare(prompts, left, right, scenes.rubric(4))
    assert own_judge.engine.counters.splits > 0
    np.testing.assert_allclose(got.preference, expected.preference, atol=1e-4)
    monkeypatch.setattr(own_judge.engine.runner, "run", _fails_for_long_rows)
    failed = own_judge.compare(prompts, left, right, scenes.rubric(2))
    assert set(failed.status) == {"error"} and "pair 0" in str(failed.errors[0])


def test_an_image_that_never_fits_fails_its_own_items(
    own_judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, encode = scenes.image(112, 168, 3), own_judge.engine.adapter.encode_images
    expected = preference(own_judge)
    own_judge.engine.clear_caches()

    def limited(images: Any) -> Any:
        if any(image == large for image in images):
            raise torch.OutOfMemoryError("simulated")
        return encode(images)

    monkeypatch.setattr(own_judge.engine.adapter, "encode_images", limited)
    prompts = ["p", "a caption", "q"]
    verdicts = own_judge.compare(prompts, [large, A, B], [B, B, large], scenes.rubric(5))
    assert [status == "error" for status in verdicts.status] == [True, False, True]
    assert "pair 0" in str(verdicts.errors[0]) and "simulated" in str(verdicts.errors[2])
    np.testing.assert_allclose(verdicts.preference[1], expected, atol=1e-4)
    with pytest.raises(ArrFastError, match="pair 0"):
        own_judge.trace(["p"], [large], [B], scenes.rubric(1))
    with pytest.raises(torch.OutOfMemoryError):
        own_judge.engine.image_features([large])


def _fails_for_long_rows(*_: Any) -> Any:
    raise torch.OutOfMemoryError("simulated")


def test_submit_runs_in_order_and_matches(judge: Judge) -> None:
    expected = preference(judge)
    futures = [judge.submit("compare", ["a caption"], [A], [B], scenes.rubric(5)) for _ in range(3)]
    for future in futures:
        np.testing.assert_allclose(future.result().preference[0], expected, atol=1e-4)
    with pytest.raises(ValueError, match="method must be one of"):
        judge.submit("close")
    judge.close()


def test_threads_do_not_disturb_each_other(judge: Judge) -> None:
    expected = [preference(judge, A, B), preference(judge, B, A)]
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        pair = (A, B) if number % 2 == 0 else (B, A)
        results[number] = preference(judge, *pair)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, got in results.items():
        np.testing.assert_allclose(got, expected[number % 2], atol=1e-4)


def test_traces_hold_the_evidence(judge: Judge) -> None:
    traces = judge.trace(["x"], [A], [B], scenes.rubric(2), mode="both")
    assert [(t.order, t.criterion) for t in traces] == [
        (order, name) for order in ("AB", "BA") for name in ("c0", "c1", "holistic")
    ]
    for trace in traces:
        shown = [A, B] if trace.order == "AB" else [B, A]
        assert [i.content_hash for i in trace.images] == [i.content_hash for i in shown]
        assert trace.position_ids.shape == (3, len(trace.input_ids))
        tokens = judge.engine.adapter.tokenizer.decode([ids[0] for ids in trace.label_ids])
        assert tokens == "12"


@pytest.mark.parametrize("option", ["orders", "mode"])
def test_a_trace_of_an_unknown_kind_is_refused(judge: Judge, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of"):
        judge.trace(["x"], [A], [B], scenes.rubric(1), **{option: "all"})


def test_provenance_names_model_rubric_and_settings(judge: Judge) -> None:
    rubric = scenes.rubric(2)
    provenance = judge.compare(["x"], [A], [B], rubric).provenance
    assert provenance.model == MODEL
    assert provenance.revision == judge.engine.loaded.revision
    assert provenance.rubric_hashes == (rubric.content_hash,)
    assert provenance.settings["dtype"] == "float32"
    assert provenance.settings["adapter"] == "none"


def test_a_fitted_calibration_is_applied(judge: Judge) -> None:
    rubric = scenes.rubric(2)
    base = judge.compare(["x"], [A], [B], rubric)
    revision = judge.engine.loaded.revision
    fitted = rubric.with_calibration(revision, "log_odds_mean", temperature=3.0, margin=1e6)
    verdicts = judge.compare(["x"], [A], [B], fitted)
    assert (verdicts.temperature[0], verdicts.winner[0]) == (3.0, "tie")
    np.testing.assert_allclose(verdicts.probability, 1 / (1 + np.exp(-base.score / 3)), atol=1e-5)


@pytest.mark.parametrize("rule", ["log_odds_mean", "weighted_sum", "veto"])
def test_each_pair_takes_the_calibration_of_its_own_rubric(judge: Judge, rule: Any) -> None:
    revision, plain = judge.engine.loaded.revision, scenes.rubric(2)
    rubrics = [
        plain,
        plain.with_calibration(revision, rule, temperature=3.0, margin=1e6),
        plain.with_calibration(revision, rule, temperature=0.5, margin=0.0),
    ]
    options: Any = {"aggregation": rule, "inconsistent": "keep"}
    together = judge.compare(["x"] * 3, [A] * 3, [B] * 3, rubrics, **options)
    for number, rubric in enumerate(rubrics):
        alone = judge.compare(["x"], [A], [B], rubric, **options)
        np.testing.assert_allclose(together.probability[number], alone.probability[0], atol=1e-5)
        assert together.winner[number] == alone.winner[0]
        assert together.temperature[number] == alone.temperature[0]
    assert together.winner[1] == "tie" and together.winner[0] != "tie"
    assert together.to_json()["temperature"] is None
    assert [pair["temperature"] for pair in together.to_json()["pairs"]] == [1.0, 3.0, 0.5]


def test_label_mass_is_the_share_of_the_vocabulary(judge: Judge) -> None:
    from arr_fast.replay import Replayer

    verdicts = judge.compare(["x"], [A], [B], scenes.rubric(3), orders="AB", label_mass=True)
    replayer = Replayer.from_pretrained(judge.engine.loaded.path)
    traces = judge.trace(["x"], [A], [B], scenes.rubric(3), orders="AB")
    assert verdicts.label_mass is not None
    expected = [replayer.label_mass(trace) for trace in traces]
    np.testing.assert_allclose(verdicts.label_mass[0], expected, rtol=1e-3)


def test_labels_of_two_tokens_and_shared_labels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must be one token"):
        Judge.from_pretrained(MODEL, pair_labels=(("first image",), ("2",)))
    with pytest.raises(UnsupportedModelError, match="share token"):
        Judge.from_pretrained(MODEL, pair_labels=(("1",), ("1",)))


def test_label_variants_are_combined_by_log_sum_exp(judge: Judge) -> None:
    more = Judge.from_pretrained(MODEL, device="cpu", pair_labels=(("1", "A"), ("2",)))
    trace = more.trace(["x"], [A], [B], scenes.rubric(1), orders="AB")[0]
    assert len(trace.label_ids[0]) == 2
    single = judge.trace(["x"], [A], [B], scenes.rubric(1), orders="AB")[0]
    assert trace.log_odds > single.log_odds


def test_unknown_checkpoints_list_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match=r"bert.*supported: .*qwen3_vl"):
        load_model(tmp_path)


def test_sliding_window_layers_are_refused(judge: Judge) -> None:
    config = judge.engine.adapter.text_config
    config.layer_types = ["full_attention", "sliding_attention"]
    try:
        with pytest.raises(UnsupportedModelError, match="sliding_attention"):
            QwenVLAdapter(
                judge.engine.loaded.model,
                judge.engine.adapter.tokenizer,
                judge.engine.adapter.image_processor,
            )
    finally:
        del config.layer_types


@pytest.mark.parametrize("option", ["impl", "compile", "prefix_cache", "prepack", "max_batch_rows"])
def test_bad_engine_options_are_refused(option: str) -> None:
    bad: Any = 0 if option == "max_batch_rows" else "nonsense"
    with pytest.raises(ValueError, match=option):
        Judge.from_pretrained(MODEL, device="cpu", **{option: bad})


def test_prepacked_weights_change_nothing(judge: Judge) -> None:
    plain = Judge.from_pretrained(MODEL, device="cpu", prepack=False)
    packed = [
        sum(isinstance(module, PackedLinear) for module in each.engine.adapter.layers.modules())
        for each in (judge, plain)
    ]
    assert packed == [7 * 2, 0]
    np.testing.assert_allclose(preference(plain), preference(judge), atol=1e-4)
