"""What an iteration's verdicts say, as numbers that add up over ranks, and pictures of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from arr_fast.rpo.advantages import Advantages
from arr_fast.rpo.rollout import JudgedChunk

# Of a line of PIL's own font.
LINE_HEIGHT = 12
GAP = 6


def verdict_sums(chunks: Sequence[JudgedChunk], given: Sequence[Advantages]) -> dict[str, float]:
    """Sums over this rank's pairs; `verdict_rates` divides them once all ranks are added.

    Keys that end in "/n" count what the key before them sums.
    """
    sums: dict[str, float] = {
        "pairs/decided": float(sum(a.decided_pairs for a in given)),
        "pairs/tied": float(sum(a.tied_pairs for a in given)),
        "pairs/failed": float(sum(a.failed_pairs for a in given)),
        "reward": float(sum((a.value * a.weight).sum() for a in given)),
        "reward/n": float(sum(a.value.numel() for a in given)),
        "winner_margin": float(sum((a.value.abs() * a.weight).sum() for a in given)),
        "winner_margin/n": float(sum(a.weight.sum() for a in given)),
    }
    for chunk in chunks:
        for name, judgement in chunk.judgements.items():
            wins = judgement.wins
            if wins is not None:
                first = wins[:, 0, 1:]
                known = first[~torch.isnan(first)]
                _add(sums, f"{name}/win_rate_first", float((known + 1).sum()) / 2, len(known))
                _add(sums, f"{name}/error_rate", float(torch.isnan(first).sum()), first.numel())
                _add(sums, f"{name}/tie_rate", float((known == 0).sum()), len(known))
            for key, value in judgement.metrics.items():
                _add(sums, f"{name}/{key}", value, judgement.counts.get(key, 1))
    return sums


def _add(sums: dict[str, float], key: str, value: float, count: int) -> None:
    sums[key] = sums.get(key, 0.0) + value
    sums[f"{key}/n"] = sums.get(f"{key}/n", 0.0) + count


def verdict_rates(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of what `verdict_sums` summed, with tie and error rates over all pairs."""
    rates = {}
    for key, value in sums.items():
        if key.endswith("/n"):
            continue
        count = sums.get(f"{key}/n")
        if count is None:
            rates[key] = value
        elif count:
            rates[key] = value / count
    total = sums["pairs/decided"] + sums["pairs/tied"] + sums["pairs/failed"]
    if total:
        rates["tie_rate"] = sums["pairs/tied"] / total
        rates["error_rate"] = sums["pairs/failed"] / total
    return rates


def failure_share(chunks: Sequence[JudgedChunk], name: str) -> tuple[int, int]:
    """(pairs without a verdict of one judge, all pairs)."""
    failed = total = 0
    for chunk in chunks:
        judgement = chunk.judgements[name]
        prompts, candidates = judgement.group_shape
        pairs = prompts * candidates * (candidates - 1) // 2
        if judgement.wins is not None:
            failed += int(torch.isnan(judgement.wins).sum()) // 2
        else:
            assert judgement.scores is not None
            bad = (~judgement.scores.isfinite()).sum(1)
            failed += int((bad * (2 * candidates - bad - 1) // 2).sum())
        total += pairs
    return failed, total


def sample_grid(
    images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], marks: Sequence[Sequence[str]]
) -> Image.Image:
    """Candidates in columns, prompts in rows, each with its prompt and its verdict below.

    Args:
        images: P rows of G images.
        prompts: P texts, broken into at most three lines of the row's width.
        marks: P rows of G short verdicts, for example "+1.00 won".
    """
    width = max(image.width for row in images for image in row)
    height = max(image.height for row in images for image in row)
    columns = max(len(row) for row in images)
    full_width = max(columns * (width + GAP), 200)
    texts = [textwrap.wrap(p, full_width // 6, max_lines=3, placeholder=" ...") for p in prompts]
    caption_height = LINE_HEIGHT * (1 + max(len(lines) for lines in texts)) + 2
    cell = (width + GAP, height + caption_height + GAP)
    grid = Image.new("RGB", (full_width, len(images) * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    for r, (row, lines, verdicts) in enumerate(zip(images, texts, marks, strict=True)):
        top = r * cell[1]
        for c, (image, verdict) in enumerate(zip(row, verdicts, strict=True)):
            grid.paste(image, (c * cell[0], top))
            draw.text((c * cell[0], top + height), verdict, fill=(0, 0, 0))
        for n, line in enumerate(lines, start=1):
            draw.text((0, top + height + n * LINE_HEIGHT), line, fill=(90, 90, 90))
    return grid


def verdict_marks(given: Advantages) -> list[list[str]]:
    """Short verdicts of every candidate of a chunk."""
    rows = []
    for values, weights in zip(given.value.tolist(), given.weight.tolist(), strict=True):
        rows.append(
            [
                f"{value:+.2f} {'won' if value > 0 else 'lost'}" if weight else "tie or none"
                for value, weight in zip(values, weights, strict=True)
            ]
        )
    return rows


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """A nested configuration as the flat table that trackers take."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_config(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
