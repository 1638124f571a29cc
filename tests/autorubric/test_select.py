"""Selection on matrices whose answer is known, and cross-validation that cannot be fooled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from arr_fast.autorubric.cross_validation import cross_validate
from arr_fast.autorubric.redundancy import groups_of, redundant_pairs
from arr_fast.autorubric.select import (
    METHODS,
    biased_criteria,
    forward_path,
    greedy_report,
    solve,
)
from arr_fast.autorubric.verdict_log import ScoreMatrix
from arr_fast.evals.metrics import credit


def matrix(preference, label, bias=0.0, texts=None) -> ScoreMatrix:
    preference = np.asarray(preference, dtype=float)
    texts = tuple(texts or (f"Criterion {k}." for k in range(preference.shape[1])))
    return ScoreMatrix(
        texts, preference + bias, bias - preference, np.asarray(label), np.arange(len(label))
    )


def planted(seed=0, pairs=300, weights=(3.0, 1.5, 0.0, 0.0, 0.0), noise=0.3) -> ScoreMatrix:
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1.0, 0.0, 1.0], (pairs, len(weights)))
    chance = 1 / (1 + np.exp(-truth @ np.array(weights)))
    label = np.where(rng.random(pairs) < chance, 1, -1)
    return matrix(4 * truth + noise * rng.standard_normal(truth.shape), label, bias=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_relevant_criteria_are_found_and_weighed(method) -> None:
    weights = solve(planted(), method, limit=3, folds=5, seed=0).weights
    assert weights[0] > 0 and (weights >= 0).all() and (weights > 0).sum() <= 3
    if method != "greedy":
        assert weights[0] == pytest.approx(2 * weights[1], rel=0.5)
        assert weights[0] * 4 == pytest.approx(3.0, rel=0.4)


@pytest.mark.parametrize("method", METHODS)
def test_exchange_of_the_images_changes_nothing(method) -> None:
    one = planted(3, 120)
    flip = np.where(np.arange(120) % 3 == 0, -1, 1)
    other = ScoreMatrix(
        one.texts,
        np.where(flip[:, None] > 0, one.ab, one.ba),
        np.where(flip[:, None] > 0, one.ba, one.ab),
        one.label * flip,
        one.clusters,
    )
    options = {"limit": 4, "folds": 4, "seed": 1}
    first, second = solve(one, method, **options), solve(other, method, **options)
    np.testing.assert_allclose(first.weights, second.weights, rtol=1e-4, atol=1e-6)


def test_greedy_is_the_best_addition_at_every_step() -> None:
    rng = np.random.default_rng(5)
    values, label = rng.standard_normal((40, 6)), rng.choice([-1, 1], 40)
    path = forward_path(values, label, 6)

    def right(columns) -> float:
        return float(credit(values[:, list(columns)].mean(axis=1) * label).mean())

    for size in range(1, 7):
        others = [k for k in range(6) if k not in path[: size - 1]]
        assert right(path[:size]) == max(right([*path[: size - 1], k]) for k in others)
    assert right(path[:1]) == max(right([k]) for k in range(6))
    best = max(right(c) for n in range(1, 7) for c in itertools.combinations(range(6), n))
    assert max(right(path[:n]) for n in range(1, 7)) <= best


def test_pure_noise_is_not_sold_as_knowledge() -> None:
    rng = np.random.default_rng(1)
    noise = matrix(rng.standard_normal((100, 60)), rng.choice([-1, 1], 100))
    steps = greedy_report(noise, limit=10, folds=5, seed=0)
    assert steps[-1].accuracy > 0.75  # on the pairs that chose it
    assert abs(np.mean([step.cross_validated for step in steps]) - 0.5) < 0.12


def test_a_criterion_that_knows_its_own_pairs_gains_nothing() -> None:
    """Each pair writes a text that names its winner and says nothing about others."""
    rng = np.random.default_rng(2)
    pairs = 60
    label = rng.choice([-1, 1], pairs)

    def score_texts(texts):
        values = 0.01 * np.random.default_rng(7).standard_normal((pairs, len(texts)))
        for k, text in enumerate(texts):
            row = int(text.split()[-1])
            values[row, k] = 50.0 * label[row]
        return matrix(values, label, texts=texts)

    found = cross_validate(
        label,
        np.arange(pairs),
        lambda rows: [f"leak of {row}" for row in rows],
        score_texts,
        limit=20,
        folds=5,
        seed=0,
    )
    for result in found.results.values():
        assert abs(result.accuracy - 0.5) < 0.2, found
    # The same texts, structured once from all pairs, would seem perfect.
    everything = score_texts([f"leak of {row}" for row in range(pairs)])
    assert credit(everything.preference.mean(axis=1) * label).mean() == 1.0


def test_clusters_are_held_out_together() -> None:
    seen: list[set[int]] = []
    clusters = np.repeat(np.arange(10), 4)
    label = np.tile([1, -1], 20)

    def structure_rows(rows):
        seen.append({int(clusters[row]) for row in rows})
        assert all(sum(clusters[r] == c for r in rows) == 4 for c in seen[-1])
        return ["A."]

    asked: list[list[str]] = []

    def score_texts(texts):
        asked.append(list(texts))
        return matrix(label[:, None] * 1.0, label, texts=texts)

    cross_validate(
        label, clusters, structure_rows, score_texts, limit=1, folds=5, seed=0
    )  # fmt: skip
    assert asked == [["A."]]
    assert len(seen) == 5 and all(len(each) == 8 for each in seen)
    with pytest.raises(ValueError, match="at least two prompts"):
        cross_validate(
            label, np.zeros(40, int), structure_rows, score_texts, limit=1, folds=5, seed=0
        )  # fmt: skip


def test_redundancy_and_position_bias_are_reported() -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((200, 1))
    values = np.concatenate([base, 2 * base, rng.standard_normal((200, 1))], axis=1)
    found = matrix(values, np.sign(base[:, 0]).astype(int), bias=np.array([0.0, 0.0, 5.0]))
    ((first, second, likeness),) = redundant_pairs(found.texts, found.preference)
    assert (first, second) == found.texts[:2] and likeness == pytest.approx(1.0)
    ((text, ratio, agree),) = biased_criteria(found)
    assert text == found.texts[2] and ratio > 5 and agree < 0.05


def test_a_biased_criterion_is_not_selected() -> None:
    one = planted()
    bias = np.where(np.arange(5) == 0, 9.0, 0.0)
    biased = ScoreMatrix(one.texts, one.ab + bias, one.ba + bias, one.label, one.clusters)
    for method in METHODS:
        assert solve(one, method, limit=5, folds=5, seed=0).weights[0] > 0.0
        assert solve(biased, method, limit=5, folds=5, seed=0).weights[0] == 0.0


@pytest.mark.parametrize("method", ["l1", "grouped l1"])
def test_biases_of_the_selected_criteria_do_not_add_up(method, monkeypatch) -> None:
    """Five criteria tell as much; the two that favour the second place balance the three others."""
    rng = np.random.default_rng(6)
    truth = rng.choice([-1.0, 1.0], (200, 5))
    label = np.where(rng.random(200) < 1 / (1 + np.exp(-1.5 * truth.sum(axis=1))), 1, -1)
    bias = np.array([0.5, 0.5, 0.5, -0.5, -0.5])
    one = matrix(2 * truth + 0.3 * rng.standard_normal((200, 5)), label, bias)
    options = {"limit": 5, "folds": 4, "seed": 0}
    weights = solve(one, method, **options).weights
    monkeypatch.setattr("arr_fast.autorubric.select.EVEN", 0.0)
    free = solve(one, method, **options).weights
    assert (weights > 0).all() and (free > 0).all()
    assert abs(weights @ bias) / weights.sum() < 0.5 * abs(free @ bias) / free.sum()
    right = [credit(one.preference @ w * label).mean() for w in (weights, free)]
    assert right[0] > right[1] - 0.03


def test_paraphrases_share_a_weight_and_seats_are_limited() -> None:
    rng = np.random.default_rng(4)
    truth = rng.choice([-1.0, 1.0], (300, 2))
    label = np.where(rng.random(300) < 1 / (1 + np.exp(-truth @ [2.0, 0.7])), 1, -1)
    values = 3 * np.repeat(truth, [4, 2], axis=1) + rng.standard_normal((300, 6))
    assert sorted(sorted(g.tolist()) for g in groups_of(values)) == [[0, 1, 2, 3], [4, 5]]
    full = solve(matrix(values, label), "grouped l1", limit=6, folds=5, seed=0).weights
    scale = np.sqrt((values**2).mean(axis=0))
    assert np.ptp((full * scale)[:4]) < 1e-9 and np.ptp((full * scale)[4:]) < 1e-9
    few = solve(matrix(values, label), "grouped l1", limit=3, folds=5, seed=0).weights
    assert (few[:4] > 0).sum() == 2 and (few[4:] > 0).sum() == 1
    assert (few * scale)[:4].sum() == pytest.approx((full * scale)[:4].sum())
