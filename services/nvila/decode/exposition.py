"""`/metrics` of the decode service: what its replicas report, as one page.

A scrape reaches one process, and which replica a request reaches is Serve's choice. So each replica reports its metrics
(ours and vLLM's) every second to one small deployment, which labels them with the replica and answers scrapes,
also while every replica is busy. Ray's own metrics are elsewhere, on its nodes' ports.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.metrics_core import METRIC_TYPES
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

REPORT_EVERY_S = 1.0
FORGET_AFTER_S = 10 * REPORT_EVERY_S
"""A replica that has not reported for so long is gone."""

_ENGINE_PREFIX = "vllm:"


class Reports:
    """The last page of each replica."""

    def __init__(self) -> None:
        self._pages: dict[str, tuple[float, str]] = {}

    def take(self, replica: str, page: str) -> None:
        self._pages[replica] = (time.monotonic(), page)

    def page(self) -> bytes | None:
        """All replicas' metrics, or None while there is no replica."""
        oldest = time.monotonic() - FORGET_AFTER_S
        self._pages = {replica: entry for replica, entry in self._pages.items() if entry[0] >= oldest}
        if not self._pages:
            return None
        return merge({replica: page for replica, (_, page) in self._pages.items()})


def merge(pages: Mapping[str, str]) -> bytes:
    """Pages in Prometheus' text format as one, every sample labelled `replica`."""
    merged: dict[str, Family] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            kind = family.type if family.type in METRIC_TYPES else "unknown"
            into = merged.setdefault(family.name, Family(family.name, family.documentation, kind))
            for sample in family.samples:
                into.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Fixed(merged.values()))
    return generate_latest(registry)


def engine_page() -> bytes:
    """vLLM's metrics of this process; it registers them in Prometheus' global registry."""
    registry = CollectorRegistry()
    registry.register(_Fixed(family for family in REGISTRY.collect() if family.name.startswith(_ENGINE_PREFIX)))
    return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Family]:
        yield from self._families
