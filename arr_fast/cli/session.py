"""Runs a command over its items: batches, progress, one flushed line per item, resuming.

The output file is a log. A line holds the item's identity: a hash over the command, the prompt, the
bytes of the images, the rubric and what was fitted for it, the model's revision and every setting
that can move a number. Run again, items whose identity has a line without an error are not judged
again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arr_fast.cli.options import JSON_ERRORS
from arr_fast.data.items import InputItem
from arr_fast.data.record import image_bytes
from arr_fast.errors import ArrFastError, BadImageError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.rubric import Rubric

LINE_SCHEMA = 1


@dataclass(slots=True)
class Prepared:
    """An item that is read and waits for its batch.

    Attributes:
        place: Place among all items of the run.
        item: The item.
        rubric: Its rubric.
        identity: See the module.
        images: Decoded images; empty where `error` is set.
        source: The decoded source image, or None.
        error: Why the item cannot be judged.
    """

    place: int
    item: InputItem
    rubric: Rubric
    identity: str
    images: list[CanonicalImage] = field(default_factory=list)
    source: CanonicalImage | None = None
    error: str | None = None


@dataclass(slots=True)
class Outcome:
    """What a run produced.

    Attributes:
        results: One object per judged or resumed item, in input order.
        skipped: How many were resumed from the output file.
        interrupted: Whether Ctrl-C ended the run early.
        seconds: Wall time.
    """

    results: list[dict[str, Any]]
    skipped: int
    interrupted: bool
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of results by status."""
        return dict(Counter(str(result["status"]) for result in self.results))

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 1 if any item failed, else 0."""
        if self.interrupted:
            return 130
        return 1 if self.counts.get("error") else 0


def run(
    items: Sequence[InputItem],
    judge_batch: Callable[[list[Prepared]], list[dict[str, Any]]],
    *,
    command: str,
    rubric_of: Callable[[InputItem], Rubric],
    settings: dict[str, Any],
    batch_size: int,
    out: Path | None,
    console: Console,
) -> Outcome:
    """Judges items in batches.

    Args:
        items: What to judge.
        judge_batch: Judges readable items of one task (all with a source or none); returns an
            object with a "status" for each.
        command: Name of the command; part of the identity.
        rubric_of: The rubric of an item.
        settings: Everything else that can move a number, "revision" among it; part of the identity.
        batch_size: Items per call of judge_batch.
        out: JSONL file to append to and to resume from, or None.
        console: Where progress goes.
    """
    start = time.perf_counter()
    finished = _read_finished(out) if out is not None else {}
    results: dict[int, dict[str, Any]] = {}
    skipped = 0
    interrupted = False
    handle = out.open("a", encoding="utf-8", errors=JSON_ERRORS) if out is not None else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(command, total=len(items))
            waiting: list[Prepared] = []
            for prepared in _prepare(items, command, rubric_of, settings, finished):
                if isinstance(prepared, tuple):
                    place, results[place] = prepared
                    skipped += 1
                    progress.advance(task)
                    continue
                waiting.append(prepared)
                if len(waiting) == batch_size:
                    _judge(waiting, judge_batch, results, handle)
                    progress.advance(task, len(waiting))
                    waiting = []
            _judge(waiting, judge_batch, results, handle)
            progress.advance(task, len(waiting))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if handle is not None:
            handle.close()
    ordered = [results[place] for place in sorted(results)]
    return Outcome(ordered, skipped, interrupted, time.perf_counter() - start)


def _prepare(
    items: Sequence[InputItem],
    command: str,
    rubric_of: Callable[[InputItem], Rubric],
    settings: dict[str, Any],
    finished: dict[str, list[dict[str, Any]]],
) -> Iterator[Prepared | tuple[int, dict[str, Any]]]:
    """Reads items one by one; a finished one comes back as (place, its line), undecoded."""
    for place, item in enumerate(items):
        rubric = rubric_of(item)
        names = [f"{item.name}: image {n}" for n in range(len(item.images))]
        paths = list(item.images)
        if item.source is not None:
            names.append(f"{item.name}: source image")
            paths.append(item.source)
        error = None
        blobs: list[bytes] = []
        for name, path in zip(names, paths, strict=True):
            try:
                blobs.append(image_bytes(path))
            except (OSError, ValueError) as problem:
                reason = getattr(problem, "strerror", None) or problem
                error = error or f"{name}: cannot read {path}: {reason}"
                blobs.append(b"")
        identity = _identity(command, item, rubric, settings, blobs)
        if finished.get(identity):
            yield place, finished[identity].pop(0)
            continue
        prepared = Prepared(place, item, rubric, identity, error=error)
        if error is None:
            try:
                decoded = [to_image(b, name=n) for n, b in zip(names, blobs, strict=True)]
                prepared.images = decoded[: len(item.images)]
                prepared.source = decoded[-1] if item.source is not None else None
            except BadImageError as problem:
                prepared.error = str(problem)
        yield prepared


def _identity(
    command: str,
    item: InputItem,
    rubric: Rubric,
    settings: dict[str, Any],
    blobs: Sequence[bytes],
) -> str:
    fits = rubric.calibration.get(settings["revision"], {})
    content = [
        command,
        item.prompt,
        [hashlib.sha256(blob).hexdigest() for blob in blobs],
        item.source is not None,
        rubric.content_hash,
        rubric.ids,
        {rule: [fit.temperature, fit.margin, fit.rubric_hash] for rule, fit in fits.items()},
        settings,
    ]
    line = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(line.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _judge(
    waiting: list[Prepared],
    judge_batch: Callable[[list[Prepared]], list[dict[str, Any]]],
    results: dict[int, dict[str, Any]],
    handle: IO[str] | None,
) -> None:
    """Judges a batch (edits and text-to-image apart) and writes its lines in input order."""
    verdicts: dict[int, dict[str, Any]] = {
        p.place: {"status": "error", "error": p.error} for p in waiting if p.error is not None
    }
    readable = [p for p in waiting if p.error is None]
    for has_source in (False, True):
        part = [p for p in readable if (p.source is not None) == has_source]
        if part:
            for prepared, verdict in zip(part, judge_batch(part), strict=True):
                verdicts[prepared.place] = verdict
    for prepared in waiting:
        item = prepared.item
        line: dict[str, Any] = {
            "schema": f"arr_fast.line/{LINE_SCHEMA}",
            "id": item.name,
            "identity": prepared.identity,
            "prompt": item.prompt,
            "images": [str(image) for image in item.images],
        }
        if item.source is not None:
            line["source"] = str(item.source)
        if item.label_rank is not None:
            line["label_rank"] = list(item.label_rank)
        line |= verdicts[prepared.place]
        results[prepared.place] = line
        if handle is not None:
            handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            handle.flush()


def _read_finished(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the lines of an earlier run by identity; a last line cut by a crash is cut off.

    Raises:
        ArrFastError: if the file holds something else, so that nothing of it is lost.
    """
    if not out.exists():
        return {}
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    tail = data[len(whole) :]
    finished: dict[str, list[dict[str, Any]]] = {}
    for number, raw in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(raw)
            known = str(line["schema"]).startswith("arr_fast.line/")
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ArrFastError(f"{out} line {number}: not written by arr-fast; name another file")
        if line["status"] != "error":
            finished.setdefault(line["identity"], []).append(line)
    if tail:
        marker = b'{"schema": "arr_fast.line/'
        if not (tail.startswith(marker) or marker.startswith(tail)):
            raise ArrFastError(f"{out}: its last line was not written by arr-fast; name another")
        with out.open("r+b") as handle:
            handle.truncate(len(whole))
    return finished
