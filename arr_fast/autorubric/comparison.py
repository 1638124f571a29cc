"""What a rubric is worth on pairs that nothing was fitted on, in the form of the paper's tables.

From one matrix of log-odds: the judge without a rubric, all verified criteria unweighted, random
subsets of them, and the selected rubric. Accuracy is that of a single order, averaged over both
(the paper's); differences are McNemar's, on the verdict that both orders give together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arr_fast.autorubric.select import forward_path, solve
from arr_fast.autorubric.verdict_log import ScoreMatrix
from arr_fast.evals.intervals import Estimate, estimates, resample_weights
from arr_fast.evals.metrics import Columns, pair_columns, paired_difference, summarise
from arr_fast.evals.tables import Cell, Table, cell

DIRECT, VERIFIED, RANDOM, SELECTED = "no rubric", "all verified", "random subset", "selected"
SIZES = (1, 5, 10, 20)
RANDOM_SUBSETS = 20
CLOSED = 0.4
LARGE_GAP, SMALL_GAP, GAP_FALL = 0.05, 0.03, 0.3
_MEASURES = ("mean", "debiased", "both", "preferred_first", "preferred_second", "preferred_gap")


@dataclass(frozen=True, slots=True, eq=False)
class Contestants:
    """What is compared.

    Attributes:
        matrix: The untouched pairs, with every criterion below among its columns.
        train: The pairs that selection saw, with the structured criteria.
        direct: The question without a rubric.
        verified: Texts of all verified criteria.
        selected: Texts of the selected rubric.
        weights: Their weights.
        oracle: Per untouched pair the credit of one who knows the preference; None if unknown.
    """

    matrix: ScoreMatrix
    train: ScoreMatrix
    direct: str
    verified: tuple[str, ...]
    selected: tuple[str, ...]
    weights: tuple[float, ...]
    oracle: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """A bar and whether it was passed."""

    name: str
    detail: str
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        return {"name": self.name, "detail": self.detail, "passed": self.passed}


@dataclass(slots=True, eq=False)
class Comparison:
    """Measures by contestant, paired differences, and bars.

    Attributes:
        pairs: How many.
        measures: Contestant -> measure -> estimate.
        differences: (contestant, other, accuracy difference with McNemar's interval).
        gap_change: |gap| of the selected rubric minus that without one, on the same pairs.
        oracle: Accuracy of one who knows the preference.
        closed: Share of the way from "all verified" to the oracle.
        ablation: (K, greedy K unweighted, K weighted, mean of random K): accuracies.
        gates: The bars.
    """

    pairs: int
    measures: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    differences: list[tuple[str, str, Estimate]] = field(default_factory=list)
    gap_change: Estimate = field(default_factory=lambda: Estimate(float("nan")))
    oracle: Estimate | None = None
    closed: Estimate | None = None
    ablation: list[tuple[int, Estimate, Estimate, Estimate]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every bar is passed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object."""
        return {
            "pairs": self.pairs,
            "measures": {
                name: {m: e.to_json() for m, e in found.items()}
                for name, found in self.measures.items()
            },
            "differences": [
                {"of": a, "over": b, **estimate.to_json()} for a, b, estimate in self.differences
            ],
            "gap_change": self.gap_change.to_json(),
            "oracle": None if self.oracle is None else self.oracle.to_json(),
            "gap_to_oracle_closed": None if self.closed is None else self.closed.to_json(),
            "ablation": [
                {
                    "k": k,
                    "greedy": greedy.to_json(),
                    "weighted": weighted.to_json(),
                    "random": random.to_json(),
                }
                for k, greedy, weighted, random in self.ablation
            ],
            "gates": [gate.to_json() for gate in self.gates],
            "passed": self.passed,
        }


def compare_rubrics(
    found: Contestants, *, resamples: int = 2000, seed: int = 0, limit: int = 10, folds: int = 5
) -> Comparison:
    """Measures every contestant on the untouched pairs.

    Args:
        found: What is compared.
        resamples: Bootstrap resamples over prompts.
        seed: Of resamples and random subsets.
        limit, folds: Of selection, for the ablation's weights.
    """
    matrix = found.matrix
    draws = resample_weights(matrix.clusters, resamples, seed)
    rng = np.random.default_rng([seed, 3])
    verified = matrix.columns(found.verified)
    size = min(len(found.selected), len(verified))
    subsets = [np.sort(rng.permutation(verified)[:size]) for _ in range(RANDOM_SUBSETS)]
    columns: dict[str, Columns] = {
        DIRECT: _columns(matrix, matrix.columns([found.direct])),
        VERIFIED: _columns(matrix, verified),
        RANDOM: _mean_columns([_columns(matrix, subset) for subset in subsets]),
        SELECTED: _columns(matrix, matrix.columns(found.selected), found.weights),
    }
    result = Comparison(len(matrix.label))
    for name, each in columns.items():
        result.measures[name] = {
            measure: estimate
            for measure, estimate in estimates(_summary(each), draws).items()
            if measure in _MEASURES
        }
    for other in (DIRECT, VERIFIED, RANDOM):
        gain = paired_difference(columns[SELECTED]["debiased"], columns[other]["debiased"])
        result.differences.append((SELECTED, other, Estimate(*gain)))
    result.gap_change = _gap_change(columns, draws)
    if found.oracle is not None:
        _against_oracle(result, found.oracle, columns, draws)
    _ablate(result, found, draws, rng, limit, folds, seed)
    _judge_gates(result)
    return result


def _columns(
    matrix: ScoreMatrix, chosen: np.ndarray, weights: Sequence[float] | None = None
) -> Columns:
    """Columns of a weighted mean of criteria, in each order."""
    share = np.ones(len(chosen)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / np.abs(share).sum()
    forward, reverse = matrix.ab[:, chosen] @ share, -matrix.ba[:, chosen] @ share
    return pair_columns(forward, reverse, matrix.label)


def _mean_columns(drawn: Sequence[Columns]) -> Columns:
    return {name: np.mean([each[name] for each in drawn], axis=0) for name in drawn[0]}


def _summary(columns: Columns) -> Any:
    return lambda weights: summarise(columns, weights)


def _gap_change(columns: dict[str, Columns], draws: np.ndarray) -> Estimate:
    def measure(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        gaps = [
            np.abs(summarise(columns[name], weights)["preferred_gap"])
            for name in (SELECTED, DIRECT)
        ]
        return {"change": gaps[0] - gaps[1]}

    return estimates(measure, draws)["change"]


def _against_oracle(
    result: Comparison, oracle: np.ndarray, columns: dict[str, Columns], draws: np.ndarray
) -> None:
    joint = {
        "oracle": oracle,
        "base": columns[VERIFIED]["debiased"],
        "own": columns[SELECTED]["debiased"],
    }

    def measure(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        means = summarise(joint, weights)
        room = means["oracle"] - means["base"]
        closed = (means["own"] - means["base"]) / np.where(room > 0.0, room, np.nan)
        return {"oracle": means["oracle"], "closed": closed}

    found = estimates(measure, draws)
    result.oracle, result.closed = found["oracle"], found["closed"]


def _ablate(
    result: Comparison,
    found: Contestants,
    draws: np.ndarray,
    rng: np.random.Generator,
    limit: int,
    folds: int,
    seed: int,
) -> None:
    """Accuracy against K: criteria by greedy selection on the training pairs, and at random."""
    train = found.train
    scale = np.sqrt((train.preference**2).mean(axis=0))
    path = forward_path(train.preference / np.where(scale > 0.0, scale, 1.0), train.label, 20)
    verified = found.matrix.columns(found.verified)

    def accuracy(columns: Columns) -> Estimate:
        return estimates(_summary({"mean": columns["mean"]}), draws)["mean"]

    for size in sorted({k for k in SIZES if k < len(path)} | {len(path)}):
        texts = [train.texts[k] for k in path[:size]]
        weights = solve(train, "grouped l1", limit=size, folds=folds, seed=seed).weights
        used = np.flatnonzero(weights)
        weighted = [train.texts[k] for k in used]
        count = min(size, len(verified))
        random = [
            _columns(found.matrix, rng.permutation(verified)[:count]) for _ in range(RANDOM_SUBSETS)
        ]
        columns = found.matrix.columns(weighted)
        # Where no criterion points to what people prefer, there is nothing to weigh.
        own = Estimate(float("nan"))
        if len(columns):
            own = accuracy(_columns(found.matrix, columns, weights[used].tolist()))
        greedy = accuracy(_columns(found.matrix, found.matrix.columns(texts)))
        result.ablation.append((size, greedy, own, accuracy(_mean_columns(random))))


def _judge_gates(result: Comparison) -> None:
    for _, other, gain in result.differences:
        detail = f"{100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        result.gates.append(Gate(f"better than {other}", detail, gain.low > 0.0))
    if result.closed is not None:
        share = result.closed.value
        name = f"closes {100 * CLOSED:.0f} % of the gap from {VERIFIED} to the oracle"
        result.gates.append(Gate(name, f"{100 * share:.0f} %", share >= CLOSED))
    before = abs(result.measures[DIRECT]["preferred_gap"].value)
    after = abs(result.measures[SELECTED]["preferred_gap"].value)
    detail = f"{100 * before:.1f} points without, {100 * after:.1f} with"
    if before >= LARGE_GAP:
        name, passed = "position gap falls by 30 %", after <= (1.0 - GAP_FALL) * before
    else:
        name, passed = "position gap stays under 3 points", after < SMALL_GAP
    result.gates.append(Gate(name, detail, passed))


def comparison_tables(result: Comparison, dataset: str) -> list[Table]:
    """The paper's three tables (accuracy, position bias, accuracy against K), and the differences.

    Args:
        result: What was measured.
        dataset: What the pairs are.
    """
    names = {
        DIRECT: "judge, no rubric",
        VERIFIED: "all verified criteria, unweighted",
        RANDOM: f"random subsets of equal size (mean of {RANDOM_SUBSETS})",
        SELECTED: "selected rubric",
    }
    accuracy: list[tuple[Cell, ...]] = [
        ((names[name], ""), cell(found["mean"], "percent"), cell(found["debiased"], "percent"))
        for name, found in result.measures.items()
    ]
    if result.oracle is not None:
        ceiling = cell(result.oracle, "percent")
        accuracy.append((("oracle that knows the preference", ""), ceiling, ceiling))
    bias = tuple(
        (
            (names[name], ""),
            *(cell(found[m], "percent") for m in ("preferred_first", "preferred_second", "mean")),
            cell(found["preferred_gap"], "points"),
        )
        for name, found in result.measures.items()
    )
    sizes = tuple(
        (
            (str(size), ""),
            *(cell(estimate, "percent") for estimate in (greedy, weighted, random)),
        )
        for size, greedy, weighted, random in result.ablation
    )
    gains: list[tuple[Cell, ...]] = [
        ((f"{names[a]} - {names[b]}", ""), cell(estimate, "points"))
        for a, b, estimate in result.differences
    ]
    gains.append((("position gap, selected - no rubric", ""), cell(result.gap_change, "points")))
    about = f"{result.pairs} untouched pairs; 95 % intervals"
    return [
        Table(
            "Evaluator accuracy",
            f"{about}, bootstrap over prompts.",
            ("", f"{dataset}, mean of both orders", "orders averaged"),
            tuple(accuracy),
        ),
        Table(
            "Differences on the same pairs",
            f"{about}: McNemar's of the accuracy with orders averaged; bootstrap of the size of "
            "the single-order gap.",
            ("", "points"),
            tuple(gains),
        ),
        Table(
            "Position bias",
            "Forward shows the preferred image first, reverse second.",
            ("", "forward", "reverse", "mean", "gap, points"),
            bias,
        ),
        Table(
            "Accuracy against the number of criteria K",
            "Mean of both orders.",
            ("K", "greedy", "greedy, weighted", "random"),
            sizes,
        ),
    ]


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown, intervals in brackets."""
    blocks = []
    for table in tables:
        lines = [f"**{table.title}.** {table.about}", ""]
        lines.append("| " + " | ".join(table.head) + " |")
        lines.append("|" + "---|" * len(table.head))
        for row in table.rows:
            cells = [f"{value} ({ends})" if ends else value for value, ends in row]
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
