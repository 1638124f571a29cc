"""Measures of a judge on labelled pairs, as means of per-pair columns.

Shapes: N pairs, R resamples. Everything is written from A's side: `forward` is the log-odds that A
is better with A shown first (z_AB), `reverse` the same with B shown first (-z_BA), `score` the
verdict on both, and `label` is 1 where people prefer A, -1 where they prefer B.

    forward, reverse   accuracy of one order alone; no preference counts half
    mean               their mean: the paper's and MMRB2's accuracy
    both               right in both orders
    debiased           accuracy of the score that both orders give together
    gap                Delta = forward - reverse, in the order of the file
    preferred_gap      accuracy with the preferred image shown first minus shown second: the gap
                       that position makes, whatever the order of the file
    consistent         both orders name one winner
    consistent_right   accuracy where they do
    bias_ratio         mean |position bias| / mean |preference|
    tie                inconsistent, or |score| up to the margin: what a judge would not decide
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Columns = dict[str, np.ndarray]


def credit(signed: np.ndarray) -> np.ndarray:
    """1 where a signed margin is right (> 0), 0 where it is wrong, 1/2 where there is none."""
    return np.asarray(0.5 * (np.sign(signed) + 1.0))


def pair_columns(
    forward: np.ndarray,
    reverse: np.ndarray,
    label: np.ndarray,
    score: np.ndarray | None = None,
    margin: float = 0.0,
) -> Columns:
    """Returns the columns that every measure is a mean, or a ratio of means, of.

    Args:
        forward, reverse: float64 [N], see the module.
        label: [N], 1 or -1.
        score: float64 [N]; the mean of the two orders if None.
        margin: |score| up to this is a tie.

    Raises:
        ValueError: other labels, different lengths, or a value that is not finite.
    """
    score = 0.5 * (forward + reverse) if score is None else score
    if not len(forward) == len(reverse) == len(label) == len(score):
        raise ValueError(
            f"forward has {len(forward)} items, reverse {len(reverse)}, label {len(label)}, "
            f"score {len(score)}"
        )
    if not np.isin(label, (-1, 1)).all():
        raise ValueError("label must be 1 or -1; leave out the pairs that people call a tie")
    for name, values in (("forward", forward), ("reverse", reverse), ("score", score)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")
    right_first, right_second = credit(forward * label), credit(reverse * label)
    agree = forward * reverse > 0.0
    debiased = credit(score * label)
    shown_first = np.where(label > 0, right_first, right_second)
    shown_second = np.where(label > 0, right_second, right_first)
    return {
        "forward": right_first,
        "reverse": right_second,
        "mean": 0.5 * (right_first + right_second),
        "both": ((right_first == 1.0) & (right_second == 1.0)).astype(np.float64),
        "debiased": debiased,
        "gap": right_first - right_second,
        "preferred_first": shown_first,
        "preferred_second": shown_second,
        "preferred_gap": shown_first - shown_second,
        "consistent": agree.astype(np.float64),
        "_consistent_right": agree * debiased,
        "position_bias": 0.5 * (forward - reverse),
        "_abs_bias": 0.5 * np.abs(forward - reverse),
        "_abs_preference": 0.5 * np.abs(forward + reverse),
        "tie": (~agree | (np.abs(score) <= margin)).astype(np.float64),
    }


RATIOS = {
    "consistent_right": ("_consistent_right", "consistent"),
    "bias_ratio": ("_abs_bias", "_abs_preference"),
}


def summarise(columns: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> Columns:
    """Returns every measure, [R] (or [1] without weights).

    Args:
        columns: From `pair_columns`, perhaps with more; names with an underscore feed ratios only.
        weights: float64 [R, N], how often each resample holds each pair.
    """
    count = len(next(iter(columns.values())))
    weights = np.ones((1, count)) if weights is None else weights
    table = weights @ np.stack(list(columns.values()), axis=1) / weights.sum(axis=1)[:, None]
    means = dict(zip(columns, table.T, strict=True))
    measures = {name: mean for name, mean in means.items() if not name.startswith("_")}
    for name, (above, below) in RATIOS.items():
        if above in means and below in means:
            positive = means[below] > 0.0
            ratio = means[above] / np.where(positive, means[below], 1.0)
            measures[name] = np.where(positive, ratio, np.nan)
    return measures


def tie_calibrated_accuracy(score: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Accuracy over three answers with the best tie threshold (acc*, arXiv 2305.14324).

    Args:
        score: float64 [N], signed preference.
        label: [N], 1, 0 (people call it a tie) or -1.

    Returns:
        (accuracy, epsilon): |score| <= epsilon is answered with a tie.
    """
    order = np.argsort(-np.abs(score), kind="stable")
    size, right = np.abs(score)[order], (np.sign(score) == label)[order] & (score[order] != 0.0)
    tie = (label == 0)[order]
    # The first m pairs are decided and the rest are ties, for m = 0 .. N.
    decided = np.concatenate([[0], np.cumsum(right)])
    undecided = tie.sum() - np.concatenate([[0], np.cumsum(tie)])
    epsilon = np.concatenate([size, [0.0]])
    # A threshold cannot part equal scores, and a score of zero is never decided.
    possible = np.concatenate([[True], size[:-1] > size[1:], [True]]) if len(size) else [True]
    nonzero = int((size > 0.0).sum())
    accuracy = np.where(possible, decided + undecided, -1)[: nonzero + 1]
    best = int(np.argmax(accuracy[::-1]))
    best = len(accuracy) - 1 - best
    return float(accuracy[best] / max(len(score), 1)), float(epsilon[best])


def group_accuracy(right: np.ndarray, groups: list[str | None]) -> tuple[float, int] | None:
    """Share of groups with every pair right (EditReward-Bench's 3- and 4-candidate items).

    Args:
        right: [N], 1 where a pair is right.
        groups: Per pair the group it belongs to, or None.

    Returns:
        (share, number of groups), or None where there are none.
    """
    worst: dict[str, bool] = {}
    for name, value in zip(groups, right, strict=True):
        if name is not None:
            worst[name] = worst.get(name, True) and bool(value == 1.0)
    return (sum(worst.values()) / len(worst), len(worst)) if worst else None


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Difference of two accuracies on the same pairs with McNemar's 95 % interval.

    Args:
        first, second: [N], 1 where right, 0 where wrong.

    Returns:
        (first - second, low, high), from the discordant pairs (Wald).
    """
    difference = first - second
    mean = float(difference.mean())
    variance = float((difference**2).mean() - mean**2) / len(difference)
    half = 1.959963984540054 * variance**0.5
    return mean, mean - half, mean + half
