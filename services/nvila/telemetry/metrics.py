"""Prometheus metrics made from their declarations in `names`.

`Metrics` is one process's set, made once in its composition root and handed down; a metric comes into being when it is
first used, so a process exposes only what it does.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector

from nvila.telemetry.names import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """`metrics.add(names.VISION_TILES, 3)`, `metrics.observe(names.STAGE_SECONDS, 0.2, stage="video")`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `…_created` beside every series: names that `names` does not have
        self.registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        made = self._get(metric, labels)
        assert isinstance(made, Counter | Gauge), f"{metric.name} cannot be added to"
        made.inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        made = self._get(metric, labels)
        assert isinstance(made, Gauge), f"{metric.name} is not a gauge"
        made.set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        made = self._get(metric, labels)
        assert isinstance(made, Histogram), f"{metric.name} is not a histogram"
        made.observe(value)

    def render(self) -> bytes:
        """The text that a Prometheus server scrapes."""
        return generate_latest(self.registry)

    def _get(self, metric: Metric, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        assert set(labels) == set(metric.labels), f"{metric.name} takes {metric.labels}, got {tuple(labels)}"
        made = self._made.get(metric.name)
        if made is None:
            made = self._made[metric.name] = self._make(metric)
        return made.labels(**labels) if labels else made

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind == "counter":
            return Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        if metric.kind == "gauge":
            return Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)

    def collect_from(self, collector: Collector) -> None:
        """Also render what `collector` yields at each scrape."""
        self.registry.register(collector)
