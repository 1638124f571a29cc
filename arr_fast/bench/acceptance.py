"""The engine rows of the design's table of numbers, computed from one run's benchmark rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arr_fast.bench.rows import Row

POINTS = (
    ("ours", "design9"),
    ("ours", "design9-K1"),
    ("ours", "design9-2k"),
    ("ours", "design9-2k-K1"),
    ("ours", "design9-cold"),
    ("ours", "design9-cold-both"),
    ("ours", "group4-cold"),
    ("ours", "group4-warm"),
    ("ours-separate", "group4-cold"),
    ("ours-separate", "group4-warm"),
    ("transformers", "design9"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """One number to reach.

    Attributes:
        what: In words.
        value: Measured, or None where its rows are missing.
        bound: The number to reach.
        at_least: Whether the bound is a lower one.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool | None:
        """Whether the number is reached; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:.3f}"
        word = {True: "holds", False: "MISSED", None: "-"}[self.holds]
        sign = ">=" if self.at_least else "<="
        return f"{self.what}: {found} (to reach: {sign} {self.bound:g}) {word}"


def targets(rows: Sequence[Row], ours: str = "ours") -> list[Target]:
    """The table of numbers from the rows of one run.

    Args:
        rows: Rows of `run_points`; missing ones leave a target unmeasured.
        ours: Which of our engines to speak of ("ours" or "ours-compiled").
    """
    at = {(row.engine, row.workload): row for row in rows}

    def seconds(engine: str, workload: str) -> float | None:
        row = at.get((engine, workload))
        return row.seconds if row else None

    def quotient(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    first = seconds(ours, "design9-cold")
    both = seconds(ours, "design9-cold-both")
    second = both - first if first is not None and both is not None else None
    main, single = at.get((ours, "design9")), at.get((ours, "design9-K1"))
    memory = None
    if main and single and main.peak_bytes and single.peak_bytes:
        tokens = quotient(main.packed_tokens, single.packed_tokens)
        memory = quotient(main.peak_bytes / single.peak_bytes, tokens)
    k20, k1 = seconds(ours, "design9"), seconds(ours, "design9-K1")
    long20, long1 = seconds(ours, "design9-2k"), seconds(ours, "design9-2k-K1")
    return [
        Target(
            "20 criteria against 20 plain transformers forwards, warm images (times)",
            quotient(seconds("transformers", "design9"), k20),
            12.0,
            True,
        ),
        Target("cost of 20 criteria over 1, prefix 590", quotient(k20, k1), 1.45, False),
        Target("cost of 20 criteria over 1, prefix 2,000", quotient(long20, long1), 1.2, False),
        Target("vLLM over ours, K=20, warm", quotient(seconds("vllm", "design9"), k20), 2.0, True),
        Target("share of the sgemm rate", main.gemm_share if main else None, 0.8, True),
        Target("peak memory K=20 / K=1 over the ratio of packed tokens", memory, 1.1, False),
        Target("second order over first, cold images", quotient(second, first), 0.65, False),
        Target(
            "group of 4, 12 ordered pairs, over 12 compares, cold",
            quotient(seconds(ours, "group4-cold"), seconds("ours-separate", "group4-cold")),
            0.6,
            False,
        ),
        Target(
            "group of 4, 12 ordered pairs, over 12 compares, warm",
            quotient(seconds(ours, "group4-warm"), seconds("ours-separate", "group4-warm")),
            0.8,
            False,
        ),
    ]
