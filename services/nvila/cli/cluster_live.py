"""What the pools of a release do now: their metrics, read from each pod through the API server's proxy.

Vision and decode answer without a key; the gateways' metrics need one, which the API server does not pass on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from nvila.cli.cluster_api import Cluster, Forbidden, Json
from nvila.cli.cluster_release import Pool, Release, is_ready, label
from nvila.errors import NvilaError, Unauthenticated
from nvila.telemetry import names
from nvila.telemetry.names import Metric

PORTS = {"gateway": 8080, "vision": 8002, "decode": 8100}
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_SHARE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True, kw_only=True)
class Live:
    """Sums over a pool's pods; None where no pod told. `untold`: pods that did not answer, and why."""

    backlog_s: float | None = None
    queue: float | None = None
    running: float | None = None
    done: float | None = None
    cache_written_bytes: float | None = None
    cache_used_bytes: float | None = None
    in_flight: float | None = None
    untold: tuple[str, ...] = ()


def look(cluster: Cluster, release: Release) -> dict[str, Live]:
    """By component. Whatever cannot be read is told in `untold`, never raised, but for a lacking right."""
    return {pool.component: _of_pool(cluster, pool) for pool in release.pools if pool.component in PORTS}


def _of_pool(cluster: Cluster, pool: Pool) -> Live:
    pages, untold = [], []
    for pod in _to_ask(pool):
        name = pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}:{PORTS[pool.component]}/proxy/metrics"
        try:
            pages.append(dict(_sums(cluster.text(path))))
        except Forbidden:
            raise
        except NvilaError as error:
            reason = "its metrics need a key" if isinstance(error, Unauthenticated) else error.message
            untold.append(f"{name}: {reason}")

    def total(metric: Metric | str) -> float | None:
        name = metric if isinstance(metric, str) else metric.name
        found = [page[name] for page in pages if name in page]
        return sum(found) if found else None

    if pool.component == "vision":
        return Live(
            backlog_s=total(names.VISION_BACKLOG_SECONDS),
            queue=total(names.VISION_PENDING_TILES),
            done=total(names.VISION_TILES),
            cache_written_bytes=total(names.CACHE_BYTES),
            untold=tuple(untold),
        )
    if pool.component == "decode":
        return Live(
            backlog_s=total(names.DECODE_BACKLOG_SECONDS),
            queue=total(names.DECODE_PENDING_TOKENS),
            running=total(RUNNING),
            done=total(names.DECODE_REQUESTS),
            untold=tuple(untold),
        )
    used = [page[names.CACHE_USED_BYTES.name] for page in pages if names.CACHE_USED_BYTES.name in page]
    return Live(
        in_flight=total(names.REQUESTS_IN_FLIGHT),
        done=total(names.REQUESTS),
        cache_used_bytes=max(used, default=None),
        untold=tuple(untold),
    )


def _to_ask(pool: Pool) -> list[Json]:
    """Every ready pod; of a Ray cluster one, since each proxy shows the page of all replicas."""
    ready = [pod for pod in pool.pods if is_ready(pod)]
    if pool.kind != "RayService":
        return ready
    by_cluster = {label(pod, "ray.io/cluster"): pod for pod in ready}
    return list(by_cluster.values())


def _sums(page: str) -> Iterator[tuple[str, float]]:
    """Each sample name with the sum over its labels; buckets are left out, and bytes that were only read."""
    for family in text_string_to_metric_families(page):
        sums: dict[str, float] = {}
        for sample in family.samples:
            if "le" not in sample.labels and sample.labels.get("direction") != "read":
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        yield from sums.items()
