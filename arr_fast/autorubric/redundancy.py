"""Criteria that say the same about pairs, whatever their words; labels are never looked at."""

from __future__ import annotations

import numpy as np

from arr_fast.errors import MissingDependencyError

# Criteria whose preferences correlate (about zero) by this much, on average, share one weight.
TOGETHER = 0.5
REDUNDANT = 0.9


def scaled(preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Preferences [N, K] in units of their root mean square about zero, and the units [K]."""
    scale = np.sqrt((preference**2).mean(axis=0))
    scale = np.where(scale > 0.0, scale, 1.0)
    return preference / scale, scale


def likeness(preference: np.ndarray) -> np.ndarray:
    """Correlation about zero of every two criteria, float64 [K, K]."""
    values, _ = scaled(preference)
    return np.asarray(values.T @ values / max(len(values), 1))


def groups_of(preference: np.ndarray) -> list[np.ndarray]:
    """Groups of criteria that go together, by average linkage.

    Args:
        preference: float64 [N, K].

    Returns:
        The places of each group's members, the most typical first.
    """
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError:
        raise MissingDependencyError("scikit-learn", "autorubric") from None
    together = likeness(preference)
    if len(together) == 1:
        return [np.zeros(1, dtype=int)]
    gaps = np.clip(1.0 - together, 0.0, None)
    np.fill_diagonal(gaps, 0.0)
    model = AgglomerativeClustering(
        n_clusters=None,
        distance_threshold=1.0 - TOGETHER,
        metric="precomputed",
        linkage="average",
    )
    labels = model.fit_predict(gaps)
    groups = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        typical = together[np.ix_(members, members)].mean(axis=1)
        groups.append(members[np.argsort(-typical, kind="stable")])
    return groups


def redundant_pairs(
    texts: tuple[str, ...], preference: np.ndarray, threshold: float = REDUNDANT
) -> list[tuple[str, str, float]]:
    """Pairs of criteria whose preferences go together: (text, text, correlation about zero)."""
    together = likeness(preference)
    found = [
        (texts[i], texts[j], float(together[i, j]))
        for i in range(len(together))
        for j in range(i + 1, len(together))
        if abs(together[i, j]) >= threshold
    ]
    return sorted(found, key=lambda each: -abs(each[2]))
