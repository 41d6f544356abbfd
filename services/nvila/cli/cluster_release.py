"""A release in the cluster as it is now: its pools, their pods, and why what is not ready is not ready."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvila.cli.cluster_api import Cluster, Json
from nvila.errors import NotFound

COMPONENTS = ("gateway", "recordings", "vision", "redis", "decode", "collector")
"""In the order of the data path; the chart's `app.kubernetes.io/component`."""
_COMPONENT = "app.kubernetes.io/component"
_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass
class Pool:
    """One component. `kind`, `name`: of the object that makes its pods."""

    component: str
    kind: str
    name: str
    desired: int
    least: int | None = None
    most: int | None = None
    scaled_by: str = ""
    scaler: str = ""
    """Name of the ScaledObject or HorizontalPodAutoscaler."""
    version: str = ""
    pods: list[Json] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def ready(self) -> int:
        return sum(is_ready(pod) for pod in self.pods)

    @property
    def is_ready(self) -> bool:
        return self.ready >= self.desired and not any("upgrade" in reason for reason in self.reasons)


@dataclass
class Release:
    name: str
    namespace: str
    chart: str
    pools: list[Pool]
    other_pods: list[Json] = field(default_factory=list)

    def pool(self, component: str) -> Pool:
        for pool in self.pools:
            if pool.component == component:
                return pool
        known = ", ".join(pool.component for pool in self.pools)
        raise NotFound(f"release {self.name} has no {component}; it has {known}")

    @property
    def is_ready(self) -> bool:
        return all(pool.is_ready for pool in self.pools)


def selector(release: str) -> str:
    return f"app.kubernetes.io/instance={release},app.kubernetes.io/part-of=nvila"


def read(cluster: Cluster, release: str) -> Release:
    """Raises `NotFound` when nothing of the release is there."""
    where, chosen = f"/namespaces/{cluster.namespace}", selector(release)
    pods = cluster.objects(f"/api/v1{where}/pods", chosen)
    pools = []
    for kind in ("deployments", "statefulsets"):
        pools += [_workload(kind, one) for one in cluster.objects(f"/apis/apps/v1{where}/{kind}", chosen)]
    if "rayservices" in cluster.resources("ray.io"):
        pools += [_ray_service(one) for one in cluster.objects(f"/apis/ray.io/v1{where}/rayservices", chosen)]
    pools = sorted((pool for pool in pools if pool.component in COMPONENTS), key=_place)
    if not pools:
        raise NotFound(
            f"no release {release} of nvila in namespace {cluster.namespace}: "
            f"install it with `helm install {release} charts/nvila -n {cluster.namespace}`, or name it with --release"
        )
    _add_scalers(cluster, chosen, pools)
    others: list[Json] = []
    for pod in pods:
        pool = next((one for one in pools if _makes(one, pod)), None)
        (pool.pods if pool else others).append(pod)
    for pool in pools:
        pool.reasons += sorted({reason for pod in pool.pods if (reason := why_not_ready(pod))})
        pool.version = pool.version or next((image for pod in pool.pods for image in images(pod)), "")
    return Release(release, cluster.namespace, _chart(cluster, where, chosen), pools, others)


def _place(pool: Pool) -> int:
    return COMPONENTS.index(pool.component)


def _workload(kind: str, one: Json) -> Pool:
    spec, status = one.get("spec", {}), one.get("status", {})
    pool = Pool(
        component=label(one, _COMPONENT),
        kind=kind.removesuffix("s").capitalize().replace("set", "Set"),
        name=one["metadata"]["name"],
        desired=int(spec.get("replicas", 1)),
        version=next((image for image in images(spec.get("template", {}))), ""),
    )
    for condition in status.get("conditions") or []:
        if condition.get("status") == "False" and condition.get("reason") in ("ProgressDeadlineExceeded",):
            pool.reasons.append(condition.get("message", condition["reason"]))
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            pool.reasons.append(condition.get("message", "pods cannot be made"))
    return pool


def _ray_service(one: Json) -> Pool:
    groups = one.get("spec", {}).get("rayClusterConfig", {}).get("workerGroupSpecs") or [{}]
    group = groups[0]
    pool = Pool(
        component=label(one, _COMPONENT),
        kind="RayService",
        name=one["metadata"]["name"],
        desired=int(group.get("replicas", 1)),
        least=group.get("minReplicas"),
        most=group.get("maxReplicas"),
        scaled_by="ray" if group.get("minReplicas") != group.get("maxReplicas") else "",
        version=next((image for image in images(group.get("template", {}))), ""),
    )
    if pool.scaled_by:
        pool.desired = max(int(pool.least or 0), 1)
    status = one.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "UpgradeInProgress" and condition.get("status") == "True":
            pool.reasons.append("upgrade in progress: traffic moves to the new cluster when it is ready")
        if condition.get("type") == "Ready" and condition.get("status") == "False":
            pool.reasons.append(f"RayService: {condition.get('message') or condition.get('reason')}")
    for name, app in ((status.get("activeServiceStatus") or {}).get("applicationStatuses") or {}).items():
        if app.get("status") not in ("RUNNING", None):
            pool.reasons.append(f"Serve application {name} is {app['status']}: {app.get('message', '')}".rstrip(": "))
    if not status:
        pool.reasons.append("KubeRay has not looked at the RayService yet: does its operator run?")
    return pool


def _add_scalers(cluster: Cluster, chosen: str, pools: Sequence[Pool]) -> None:
    where = f"/namespaces/{cluster.namespace}"
    found = []
    if "scaledobjects" in cluster.resources("keda.sh"):
        found += [("keda", one) for one in cluster.objects(f"/apis/keda.sh/v1alpha1{where}/scaledobjects", chosen)]
    found += [("hpa", one) for one in cluster.objects(f"/apis/autoscaling/v2{where}/horizontalpodautoscalers", chosen)]
    for kind, one in found:
        spec = one.get("spec", {})
        for pool in pools:
            is_target = pool.name == (spec.get("scaleTargetRef") or {}).get("name") and pool.kind != "RayService"
            if is_target and not pool.scaled_by:  # KEDA makes an HPA of its own, which is not ours to look at
                pool.scaled_by, pool.scaler = kind, one["metadata"]["name"]
                pool.least = spec.get("minReplicas" if kind == "hpa" else "minReplicaCount")
                pool.most = spec.get("maxReplicas" if kind == "hpa" else "maxReplicaCount")
                pool.reasons += _scaler_reasons(kind, one)


def _scaler_reasons(kind: str, one: Json) -> list[str]:
    conditions = {c.get("type"): c for c in (one.get("status") or {}).get("conditions") or []}
    reasons = []
    if (conditions.get("Fallback") or {}).get("status") == "True":
        reasons.append("the autoscaler's metrics are missing: it holds the fallback")
    if kind == "keda" and (conditions.get("Ready") or {}).get("status") == "False":
        reasons.append(f"ScaledObject: {conditions['Ready'].get('message', 'not ready')}")
    if kind == "hpa" and (conditions.get("ScalingActive") or {}).get("status") == "False":
        reasons.append(f"HPA: {conditions['ScalingActive'].get('message', 'no metrics')}")
    return reasons


def _makes(pool: Pool, pod: Json) -> bool:
    if label(pod, _COMPONENT) != pool.component or (pod.get("status") or {}).get("phase") == "Succeeded":
        return False
    return pool.kind != "RayService" or label(pod, "ray.io/node-type") == "worker"


def _chart(cluster: Cluster, where: str, chosen: str) -> str:
    services = cluster.objects(f"/api/v1{where}/services", chosen)
    return next((label(one, "helm.sh/chart") for one in services if label(one, "helm.sh/chart")), "")


# -- pods -------------------------------------------------------------------------------------------------------------


def label(one: Json, name: str) -> str:
    return str(((one.get("metadata") or {}).get("labels") or {}).get(name, ""))


def images(template: Json) -> list[str]:
    return [container.get("image", "") for container in (template.get("spec") or {}).get("containers") or []]


def is_ready(pod: Json) -> bool:
    if (pod.get("metadata") or {}).get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def containers(pod: Json) -> list[Json]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def why_not_ready(pod: Json) -> str:
    """In one line; empty for a pod that is ready or on its ordinary way."""
    if is_ready(pod):
        return ""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"cannot be placed: {condition.get('message') or condition.get('reason')}"
    for container in containers(pod):
        if reason := _container_reason(container):
            return reason
    if status.get("phase") == "Failed":
        return f"failed: {status.get('message') or status.get('reason') or 'its containers ended'}"
    return ""


def _container_reason(container: Json) -> str:
    waiting = (container.get("state") or {}).get("waiting") or {}
    ended = (container.get("lastState") or {}).get("terminated") or {}
    name = container.get("name", "container")
    reason = waiting.get("reason", "")
    if reason in _PULL:
        return f"{name}: image {container.get('image')} cannot be pulled: {waiting.get('message', reason)}"
    if reason.startswith("CreateContainer") or reason == "RunContainerError":
        return f"{name}: {reason}: {waiting.get('message', '')}".rstrip(": ")
    if reason == "CrashLoopBackOff" or (ended and not container.get("ready")):
        cause = ended.get("reason") or "Error"
        code = ended.get("exitCode")
        return f"{name} ended {container.get('restartCount', 0)} times, last with {cause}" + (
            f" ({code})" if code is not None else ""
        )
    return ""


def pull_failures(pods: Iterable[Json]) -> list[tuple[str, str]]:
    """(image, what the node says)."""
    found = {}
    for pod in pods:
        for container in containers(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _PULL:
                found[str(container.get("image"))] = str(waiting.get("message") or waiting["reason"])
    return sorted(found.items())


def gpus_wanted(pods: Iterable[Json]) -> dict[str, int]:
    """GPUs that pods ask for, by resource name."""
    wanted: dict[str, int] = {}
    for pod in pods:
        for container in (pod.get("spec") or {}).get("containers") or []:
            for name, count in ((container.get("resources") or {}).get("limits") or {}).items():
                if is_gpu(name):
                    wanted[name] = wanted.get(name, 0) + int(count)
    return wanted


def is_gpu(resource: str) -> bool:
    return resource.startswith(("nvidia.com/gpu", "nvidia.com/mig-"))


def quantity(text: Any) -> float:
    """A Kubernetes quantity such as 500m, 4, 64Gi."""
    value = str(text).strip()
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
    decimal = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    for suffix, factor in (*binary.items(), *decimal.items()):
        if value.endswith(suffix):
            return float(value.removesuffix(suffix)) * factor
    return float(value or 0)
