"""Advantages against eq. 11 and the group formulas, written out; vetoes and mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arr_fast.rpo.advantages import RewardSpec, advantages, mix_preferences, preferences
from arr_fast.rpo.judging import Judgement

NAN = math.nan


def test_pairs_raw_are_eq_11() -> None:
    judgement = Judgement.from_pairs([1, -1, 0, NAN])
    result = advantages(preferences(judgement), lam=1.0, gamma=0.1, centred=False)
    assert torch.equal(result.value, torch.tensor([[1, -0.1], [-0.1, 1], [0, 0], [0, 0]]))
    assert torch.equal(result.weight, torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0]]).float())
    assert (result.decided_pairs, result.tied_pairs, result.failed_pairs) == (2, 1, 1)


def test_pairs_centred() -> None:
    result = advantages(preferences(Judgement.from_pairs([1])), lam=1.0, gamma=0.1)
    assert result.value.tolist()[0] == pytest.approx([0.55, -0.55])


def test_groups_average_over_decided_opponents() -> None:
    wins = torch.tensor([[[0, 1, NAN, 1], [-1, 0, 0, 1], [NAN, 0, 0, 1], [-1, -1, -1, 0.0]]])
    result = advantages(wins, lam=1.0, gamma=0.2, centred=False)
    # 0: two wins of two; 1: a loss and a win; 2: one win of one; 3: three losses.
    assert result.value.tolist()[0] == pytest.approx([1.0, 0.4, 1.0, -0.2])
    assert (result.decided_pairs, result.tied_pairs, result.failed_pairs) == (4, 1, 1)


def test_scores_are_group_relative() -> None:
    """The mean over j of s_i - s_j is G / (G - 1) (s_i - mean)."""
    scores = torch.tensor([[3.0, 1.0, 2.5, 7.0]])
    result = advantages(preferences(Judgement(scores=scores)), lam=1.0, gamma=1.0, limit=100)
    expected = (scores - scores.mean()) * 4 / 3
    assert torch.allclose(result.value, expected)
    scaled = advantages(
        preferences(Judgement(scores=scores)), lam=1.0, gamma=1.0, scale="group", limit=100
    )
    z = (scores - scores.mean()) / scores.std(correction=0)
    assert torch.allclose(scaled.value, z, atol=1e-3)


def test_equal_or_missing_scores_decide_nothing() -> None:
    result = advantages(preferences(Judgement(scores=torch.tensor([[2.0, 2.0], [NAN, 1.0]]))))
    assert result.decided_pairs == 0 and float(result.weight.sum()) == 0
    assert (result.tied_pairs, result.failed_pairs) == (1, 1)


def test_mixture_sums_weighted_rewards() -> None:
    a, b = Judgement.from_pairs([1, 1, 1]), Judgement.from_pairs([-1, 0, NAN])
    specs = {"a": RewardSpec(0.5), "b": RewardSpec(2.0)}
    mixed = mix_preferences({"a": a, "b": b}, specs)
    assert mixed[:2, 0, 1].tolist() == [-1.5, 0.5]
    assert mixed[2, 0, 1].isnan()
    optional = {"a": RewardSpec(0.5), "b": RewardSpec(2.0, required=False)}
    assert float(mix_preferences({"a": a, "b": b}, optional)[2, 0, 1]) == 0.5


def test_normalising_first_takes_units_away() -> None:
    scores = torch.tensor([[3.0, 1.0], [5.0, 0.0], [2.0, 2.0]])
    small = {"s": Judgement(scores=scores), "t": Judgement(scores=-scores * 0.3)}
    large = {"s": Judgement(scores=scores), "t": Judgement(scores=-scores * 3000)}
    mixed = mix_preferences(small, how="normalise_first")
    assert torch.allclose(mixed, mix_preferences(large, how="normalise_first"), atol=1e-5)
    assert torch.allclose(mixed, torch.zeros_like(mixed), atol=1e-5)
    assert not torch.allclose(mix_preferences(small), mix_preferences(large))


def test_vetoes() -> None:
    quality = Judgement.from_pairs([1, 1, 1, 1])
    safe = Judgement(scores=torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.2], [0.8, 0.9]]))
    mixed = mix_preferences({"q": quality, "v": safe}, {"v": RewardSpec(veto=True)})
    assert mixed[:, 0, 1].tolist() == [-1.0, 1.0, 0.0, 1.0]
    by_pairs = Judgement.from_pairs([-1, 1, 0, NAN])
    mixed = mix_preferences({"q": quality, "v": by_pairs}, {"v": RewardSpec(veto=True)})
    assert mixed[:3, 0, 1].tolist() == [-1.0, 1.0, 1.0]
    assert mixed[3, 0, 1].isnan()


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, NAN]), min_size=6, max_size=6),
    st.permutations(range(4)),
    st.booleans(),
)
def test_relabelling_candidates_relabels_advantages(
    upper: list[float], order: list[int], centred: bool
) -> None:
    wins = torch.zeros(1, 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    wins[0, rows, columns] = torch.tensor(upper)
    wins[0, columns, rows] = -torch.tensor(upper)
    result = advantages(wins, centred=centred)
    moved = advantages(wins[:, order][:, :, order], centred=centred)
    assert torch.allclose(moved.value, result.value[:, order])
    assert (
        moved.decided_pairs,
        moved.tied_pairs,
        moved.failed_pairs,
    ) == (result.decided_pairs, result.tied_pairs, result.failed_pairs)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="antisymmetric"):
        Judgement(wins=torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="either wins or scores"):
        Judgement()
    with pytest.raises(ValueError, match="not both 0"):
        advantages(torch.zeros(1, 2, 2), lam=0, gamma=0)
    with pytest.raises(ValueError, match="G >= 2"):
        advantages(torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="same groups"):
        mix_preferences({"a": Judgement.from_pairs([1]), "b": Judgement.from_pairs([1, 1])})
    with pytest.raises(ValueError, match="no judgement for: b"):
        mix_preferences({"a": Judgement.from_pairs([1])}, {"b": RewardSpec()})
    with pytest.raises(ValueError, match="not be a veto"):
        mix_preferences({"a": Judgement.from_pairs([1])}, {"a": RewardSpec(veto=True)})
    with pytest.raises(ValueError, match="weight"):
        RewardSpec(weight=0)
