"""The verdict types in one place: pairs, single images, groups.

Log-odds become a preference and a position bias per criterion (pairwise.py), one signed number per
pair (aggregation.py), a status and a reward; pairs of a group become scores (ranking.py).
"""

from __future__ import annotations

from arr_fast.aggregation import AGGREGATIONS, AggregationName
from arr_fast.pairwise import OnError, PairVerdicts, Rewards, pair_verdicts
from arr_fast.pointwise import PointVerdicts, point_verdicts
from arr_fast.ranking import GroupVerdicts, bradley_terry, group_verdicts
from arr_fast.verdict_arrays import NO_WINNER, Status

__all__ = [
    "AGGREGATIONS",
    "NO_WINNER",
    "AggregationName",
    "GroupVerdicts",
    "OnError",
    "PairVerdicts",
    "PointVerdicts",
    "Rewards",
    "Status",
    "bradley_terry",
    "group_verdicts",
    "pair_verdicts",
    "point_verdicts",
]
