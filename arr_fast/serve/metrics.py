"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """Counters of a server; the judge's own are read when they are scraped.

    Args:
        stats: `Judge.stats`.
    """

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "arr_fast_http_requests", "Finished requests", ["route", "code"], registry=registry
        )
        self.seconds = Histogram(
            "arr_fast_stage_seconds",
            "Seconds by stage: read, decode, queue, engine, total",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queued = Gauge("arr_fast_queue_requests", "Waiting requests", registry=registry)
        self.queued_tokens = Gauge(
            "arr_fast_queue_tokens", "Estimated tokens that wait", registry=registry
        )
        self.batch_requests = Histogram(
            "arr_fast_batch_requests", "Requests per call", buckets=BATCH, registry=registry
        )
        self.batch_items = Histogram(
            "arr_fast_batch_items", "Items per call", buckets=BATCH, registry=registry
        )
        self.batch_tokens = Histogram(
            "arr_fast_batch_tokens", "Estimated tokens", buckets=TOKENS, registry=registry
        )
        self.refused = Counter(
            "arr_fast_refused", "Requests that got no verdict", ["reason"], registry=registry
        )
        self.verdicts = Counter(
            "arr_fast_verdicts", "Items by route and status", ["kind", "status"], registry=registry
        )
        registry.register(_JudgeStats(stats))

    def count_statuses(self, kind: str, statuses: Iterable[str]) -> None:
        """Counts the statuses of the items of one answer."""
        for status in statuses:
            self.verdicts.labels(kind, status).inc()

    def text(self) -> bytes:
        """The exposition format that Prometheus scrapes."""
        return generate_latest(self.registry)


class _JudgeStats(Collector):
    """The engine's counters as metrics."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, help_text in (
            ("forwards", "Decoder forwards"),
            ("rows", "Rows that went through the decoder"),
            ("path_tokens", "Tokens that independent prompts would have held"),
            ("verdicts", "Label reads"),
            ("splits", "Forests that were split for lack of memory"),
            ("image_encodes", "Images that went through the vision tower"),
            ("vision_seconds", "Seconds in the vision tower"),
            ("decoder_seconds", "Seconds in the decoder"),
            ("plan_seconds", "Seconds of planning"),
        ):
            yield CounterMetricFamily(f"arr_fast_engine_{name}", help_text, value=stats[name])
        for cache in ("image_features", "prefix_kv"):
            for key, value in stats[cache].items():
                if isinstance(value, int | float):
                    label = f"arr_fast_cache_{cache}_{key}"
                    yield GaugeMetricFamily(label, "Cache statistic of the engine", value=value)
        asleep = float(bool(stats["asleep"]))
        yield GaugeMetricFamily("arr_fast_judge_asleep", "1 while the judge sleeps", value=asleep)
