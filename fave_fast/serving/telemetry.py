"""What the server says of itself: Prometheus metrics, and log lines as JSON."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fave_fast.batching import Engine, Statistics
from fave_fast.catalogue import History, ItemId
from fave_fast.engine import Recommendation

# Seconds; from a GPU's tens of microseconds to a queue's seconds.
_SECONDS = tuple(unit / scale for scale in (10**5, 10**4, 1000, 100, 10, 1) for unit in (1, 2, 5))
_SIZES = tuple(1 << bits for bits in range(11))


@dataclass
class Totals:
    """Sums over all batchers that a server had; they never go back when a model is replaced."""

    outcomes: Counts[str] = field(default_factory=Counts)
    waits_us: Counts[int] = field(default_factory=Counts)
    wait_us: float = 0.0
    batches: Counts[str] = field(default_factory=Counts)

    def with_one(self, statistics: Statistics, batches: Mapping[str, int]) -> Totals:
        """These and one batcher's, with its recommender's counts of batches by reason."""
        outcomes = {name: getattr(statistics, name) for name in ("answered", "failed", "cancelled", "refused")}
        return Totals(
            self.outcomes + Counts(outcomes),
            self.waits_us + Counts(statistics.waits_us),
            self.wait_us + statistics.total_wait_us,
            self.batches + Counts(batches),
        )


@dataclass(frozen=True)
class Snapshot:
    """The state of the served model at one moment."""

    model: str
    checkpoint: str
    version: int
    items: int
    waiting: int
    fallback_share: float
    totals: Totals


class Telemetry:
    """Metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("http_requests", "HTTP requests by route and status", "route", "status")
        self.request_seconds = self._histogram(
            "http_request_seconds", "From a request's head to the end of its answer", _SECONDS, "route"
        )
        self.in_flight = Gauge(
            "fave_fast_http_requests_in_flight", "HTTP requests being answered", registry=self.registry
        )
        self.engine_seconds = self._histogram("engine_seconds", "One call of the engine, ids to lists", _SECONDS)
        self.encoder_seconds = self._histogram("encoder_seconds", "Encoding of a batch; on a CPU only", _SECONDS)
        self.topk_seconds = self._histogram("topk_seconds", "Top-K of a batch; on a CPU only", _SECONDS)
        self.batch_size = self._histogram("batch_histories", "Histories in one call of the engine", _SIZES)
        self.popular = self._counter("popular_fallbacks", "Histories without a known item, answered by popularity")
        self.unknown = self._counter("unknown_items", "Ids in histories that the catalogue does not hold")
        self.reloads = self._counter("reloads", "Reloads of the checkpoint by result", "result")
        for result in ("done", "failed"):
            self.reloads.labels(result)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fave_fast_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"fave_fast_{name}", text, labels, buckets=buckets, registry=self.registry)

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Report the served model, its queue and its batches, too; asked for at each scrape."""
        self.registry.register(_Watched(snapshot))

    def step(self, encoder: float, topk: float) -> None:
        """Take note of one step's seconds."""
        self.encoder_seconds.observe(encoder)
        self.topk_seconds.observe(topk)


@dataclass(frozen=True)
class ObservedEngine:
    """An engine whose calls are measured."""

    engine: Engine
    telemetry: Telemetry

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
    ) -> list[Recommendation]:
        """As `Recommender.recommend`."""
        started = time.perf_counter()
        answers = self.engine.recommend(histories, k, exclude_history, deny)
        telemetry = self.telemetry
        telemetry.engine_seconds.observe(time.perf_counter() - started)
        telemetry.batch_size.observe(len(histories))
        telemetry.popular.inc(sum(answer.popular for answer in answers))
        telemetry.unknown.inc(sum(answer.unknown for answer in answers))
        return answers


@dataclass(frozen=True)
class _Watched(Collector):
    snapshot: Callable[[], Snapshot]

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry that asks at registration gets no answer before there is a model."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics of the served model."""
        now = self.snapshot()
        yield InfoMetricFamily(
            "fave_fast_model", "The served checkpoint", {"sha256": now.model, "checkpoint": now.checkpoint}
        )
        yield GaugeMetricFamily("fave_fast_catalogue_version", "Changes of the catalogue so far", now.version)
        yield GaugeMetricFamily("fave_fast_catalogue_items", "Items of the catalogue", now.items)
        yield GaugeMetricFamily("fave_fast_queue_histories", "Histories that wait", now.waiting)
        text = "Lists by the table in bytes that took the whole table's scan after all, of all"
        yield GaugeMetricFamily("fave_fast_topk_fallback_share", text, now.fallback_share)
        yield _by_label("fave_fast_histories", "Histories by outcome", "outcome", now.totals.outcomes)
        yield _by_label(
            "fave_fast_gpu_batches", "Batches captured in a CUDA graph, or why not", "reason", now.totals.batches
        )
        yield _queue(now.totals)


@dataclass(frozen=True)
class Labelled(Collector):
    """A registry all of whose samples carry the same further labels."""

    registry: CollectorRegistry
    labels: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        """The registry's metrics."""
        for metric in self.registry.collect():
            metric.samples = [one._replace(labels={**self.labels, **one.labels}) for one in metric.samples]
            yield metric


def _by_label(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count)
    return family


def _queue(totals: Totals) -> HistogramMetricFamily:
    """Waits as a histogram; the batcher counts them between powers of two of microseconds."""
    buckets, below = [], 0
    for bits in range(25):  # to 17 seconds
        below += totals.waits_us[1 << bits]
        buckets.append((str((1 << bits) / 1e6), float(below)))
    buckets.append(("+Inf", float(totals.waits_us.total())))
    text = "From a history's arrival in the queue to its turn"
    return HistogramMetricFamily("fave_fast_queue_seconds", text, buckets, totals.wait_us / 1e6)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and what a record carries as `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
