"""`nvila cluster wait`: follow a release until every pool is ready, and say meanwhile why it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator

from nvila.cli import cluster_release
from nvila.cli.cluster_api import Cluster, Gone
from nvila.cli.cluster_release import Release
from nvila.errors import DeadlineExceeded, NotFound

LOOK_S = 10.0
"""A watch that says nothing for so long is not trusted: everything is read again."""
SETTLE_S = 0.3
"""Events come in bursts; after the first, so long is waited before all is read again."""


def follow(cluster: Cluster, release: str, timeout_s: float) -> Iterator[Release]:
    """States as they change; the last one is ready. Raises `DeadlineExceeded` that names what is missing.

    A release that does not exist yet is waited for, too.
    """
    deadline_s = time.monotonic() + timeout_s
    pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
    chosen = cluster_release.selector(release)
    missing = f"nothing of release {release} is in namespace {cluster.namespace}"
    while True:
        _, version = cluster.objects_and_version(pods, chosen)
        try:
            state = cluster_release.read(cluster, release)
        except NotFound:
            pass
        else:
            yield state
            if state.is_ready:
                return
            missing = explain(state)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"not ready after {timeout_s:.0f} s: {missing}")
        _until_something_happens(cluster, pods, chosen, version, min(LOOK_S, left_s))


def _until_something_happens(cluster: Cluster, path: str, chosen: str, version: str, timeout_s: float) -> None:
    began_s = time.monotonic()
    try:
        for _ in cluster.watch(path, chosen, version, timeout_s):
            time.sleep(min(SETTLE_S, timeout_s))
            return
    except Gone:
        return
    if time.monotonic() - began_s < 1:  # a server that ends watches at once must not be asked in a circle
        time.sleep(min(1.0, timeout_s))


def explain(state: Release) -> str:
    parts = []
    for pool in state.pools:
        if not pool.is_ready:
            reasons = "; ".join(pool.reasons) or "starting"
            parts.append(f"{pool.component} {pool.ready} of {pool.desired} ({reasons})")
    return ", ".join(parts)
