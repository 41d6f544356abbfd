"""`nvila cluster scale vision=4 decode=2..8`: whatever holds a pool's size is told the new one.

A ScaledObject or HorizontalPodAutoscaler gets the range (one number holds the pool there), a RayService the range of
its workers and of its Serve deployment together, a plain Deployment its replicas. The next `helm upgrade` sets the
values' numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nvila.cli.cluster_api import Cluster, Json
from nvila.cli.cluster_release import Pool, Release
from nvila.errors import InvalidRequest

SCALABLE = ("gateway", "recordings", "vision", "decode")
DEPLOYMENT = "Replica"
"""Name of the Serve deployment that generates (`nvila.decode.app`)."""


@dataclass(frozen=True)
class Wish:
    component: str
    least: int
    most: int

    @property
    def text(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


@dataclass(frozen=True, kw_only=True)
class Change:
    component: str
    object: str
    before: str
    after: str


def parse(texts: Sequence[str]) -> list[Wish]:
    wishes = []
    for text in texts:
        component, equals, size = text.partition("=")
        least, dots, most = size.partition("..")
        try:
            wish = Wish(component, int(least), int(most if dots else least))
        except ValueError:
            raise InvalidRequest(f"{text!r}: say vision=4, or vision=2..8 for an autoscaler's range") from None
        if not equals or component not in SCALABLE:
            raise InvalidRequest(f"{text!r}: {component or 'nothing'} cannot be scaled; {', '.join(SCALABLE)} can")
        if not 0 <= wish.least <= wish.most:
            raise InvalidRequest(f"{text!r}: the range must go up from 0 or more")
        wishes.append(wish)
    if len({wish.component for wish in wishes}) < len(wishes):
        raise InvalidRequest("each pool can be named once")
    return wishes


def check(release: Release, wishes: Sequence[Wish]) -> None:
    """Raises before anything is changed."""
    for wish in wishes:
        pool = release.pool(wish.component)
        if not pool.scaled_by and pool.kind != "RayService" and wish.least != wish.most:
            mend = "" if wish.component == "recordings" else f"; a range needs {wish.component}.autoscaling"
            raise InvalidRequest(
                f"{wish.component}={wish.text}: no autoscaler holds this pool, so it takes one number{mend}"
            )
        if wish.component == "decode" and wish.least == 0:
            raise InvalidRequest("decode=0: the gateway learns from a replica what is served; at least 1 is needed")
        if pool.scaled_by and wish.most == 0:
            raise InvalidRequest(f"{wish.component}={wish.text}: an autoscaler's most must be 1 or more")


def apply(cluster: Cluster, release: Release, wish: Wish) -> Change:
    pool = release.pool(wish.component)
    where = f"/namespaces/{cluster.namespace}"
    if pool.kind == "RayService":
        return _ray(cluster, pool, wish, f"/apis/ray.io/v1{where}/rayservices/{pool.name}")
    before = f"{pool.least}..{pool.most}" if pool.scaled_by else str(pool.desired)
    if pool.scaled_by == "keda":
        cluster.patch(
            f"/apis/keda.sh/v1alpha1{where}/scaledobjects/{pool.scaler}",
            {"spec": {"minReplicaCount": wish.least, "maxReplicaCount": wish.most}},
        )
        held = f"ScaledObject {pool.scaler}"
    elif pool.scaled_by == "hpa":
        cluster.patch(
            f"/apis/autoscaling/v2{where}/horizontalpodautoscalers/{pool.scaler}",
            {"spec": {"minReplicas": max(wish.least, 1), "maxReplicas": wish.most}},
        )
        held = f"HorizontalPodAutoscaler {pool.scaler}"
    else:
        cluster.patch(f"/apis/apps/v1{where}/deployments/{pool.name}/scale", {"spec": {"replicas": wish.least}})
        held = f"Deployment {pool.name}"
    return Change(component=wish.component, object=held, before=before, after=wish.text)


def _ray(cluster: Cluster, pool: Pool, wish: Wish, path: str) -> Change:
    """Workers and Serve's own numbers in one patch; KubeRay applies both in place, without a new cluster."""
    service = cluster.get(path)
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    replicas = min(max(int(group.get("replicas", 1)), wish.least), wish.most)
    base = "/spec/rayClusterConfig/workerGroupSpecs/0"
    operations: list[Json] = [
        {"op": "test", "path": f"{base}/groupName", "value": group["groupName"]},
        {"op": "add", "path": f"{base}/replicas", "value": replicas},
        {"op": "add", "path": f"{base}/minReplicas", "value": wish.least},
        {"op": "add", "path": f"{base}/maxReplicas", "value": wish.most},
        {"op": "replace", "path": "/spec/serveConfigV2", "value": serve_config(service["spec"]["serveConfigV2"], wish)},
    ]
    cluster.patch(path, operations)
    before = f"{group.get('minReplicas')}..{group.get('maxReplicas')}"
    return Change(component=wish.component, object=f"RayService {pool.name}", before=before, after=wish.text)


def serve_config(text: str, wish: Wish) -> str:
    """The same configuration with this range for the deployment that generates."""
    config: dict[str, Any] = yaml.safe_load(text)
    for application in config.get("applications", []):
        if not str(application.get("import_path", "")).endswith(":application"):
            continue
        deployments = application.setdefault("deployments", [])
        found = next((one for one in deployments if one.get("name") == DEPLOYMENT), None)
        if found is None:
            found = {"name": DEPLOYMENT}
            deployments.append(found)
        scaling = found.get("autoscaling_config")
        if wish.least == wish.most:
            found.pop("autoscaling_config", None)
            found["num_replicas"] = wish.most
        if wish.least != wish.most or scaling:
            found.pop("num_replicas", None)
            initial = min(max(int((scaling or {}).get("initial_replicas", wish.least)), wish.least), wish.most)
            found["autoscaling_config"] = (scaling or {}) | {
                "min_replicas": wish.least,
                "initial_replicas": initial,
                "max_replicas": wish.most,
            }
    dumped: str = yaml.safe_dump(config, sort_keys=False)
    return dumped
