"""A cluster with nvila in it: the chart as the real Helm renders it, and the pods that controllers would make."""

from __future__ import annotations

import base64
import copy
import gzip
import json
from typing import Any

from tests.charts.helm import render
from tests.cluster.kube_server import Json, State

NAMESPACE = "apps"
WITHOUT_RAY: Json = {"decode": {"mode": "deployment", "autoscaling": {"kind": "keda"}}}


def empty() -> State:
    """A cluster that nvila can be installed into."""
    state = State()
    state.add(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": {}}},
        storage_class("standard", is_default=True),
        node("gpu-1", {"nvidia.com/gpu": "8"}),
        node("gpu-2", {"nvidia.com/mig-3g.40gb": "2"}),
        node("cpu-1", {}),
    )
    return state


def installed(profile: str = "two-pools", values: Json | None = None, *, ready: bool = True) -> State:
    """The release `nvila` of this profile, every pool at its least, all pods ready or none."""
    state = empty()
    for one in render(values, profile=profile, namespace=NAMESPACE):
        if one["kind"] in ("PriorityClass", "Secret") or "helm.sh/hook" in (one["metadata"].get("annotations") or {}):
            continue
        one = copy.deepcopy(one)
        one["metadata"].setdefault("namespace", NAMESPACE)
        if one["kind"] == "RayService":
            one["status"] = {
                "conditions": [{"type": "Ready", "status": str(ready)}],
                "activeServiceStatus": {"applicationStatuses": {"decode": {"status": "RUNNING"}}},
            }
        state.put(one)
        for pod in _pods_of(one, ready):
            state.put(pod)
    return state


def _pods_of(one: Json, ready: bool) -> list[Json]:
    name = one["metadata"]["name"]
    if one["kind"] in ("Deployment", "StatefulSet"):
        return [
            pod(f"{name}-{place}", one["spec"]["template"], ready) for place in range(one["spec"].get("replicas", 1))
        ]
    if one["kind"] != "RayService":
        return []
    cluster = one["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    head = pod(f"{name}-head", cluster["headGroupSpec"]["template"], ready, {"ray.io/node-type": "head"})
    labels = {"ray.io/node-type": "worker", "ray.io/cluster": f"{name}-a"}
    return [
        head,
        *(pod(f"{name}-worker-{place}", group["template"], ready, labels) for place in range(group["replicas"])),
    ]


def pod(name: str, template: Json, ready: bool, labels: dict[str, str] | None = None) -> Json:
    containers = template["spec"]["containers"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": template["metadata"]["labels"] | (labels or {}),
            "annotations": dict(template["metadata"].get("annotations") or {}),
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": copy.deepcopy(template["spec"]),
        "status": {
            "phase": "Running" if ready else "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": str(ready)},
            ],
            "containerStatuses": [
                {
                    "name": one["name"],
                    "image": one["image"],
                    "ready": ready,
                    "restartCount": 0,
                    "state": {"running": {}},
                }
                for one in containers
            ],
        },
    }


def of_component(state: State, component: str) -> Json:
    pods = state.objects[f"/api/v1/namespaces/{NAMESPACE}/pods"].values()
    return next(one for one in pods if one["metadata"]["labels"]["app.kubernetes.io/component"] == component)


def make_ready(state: State, one: Json, *, ready: bool = True) -> None:
    changed = copy.deepcopy(one)
    changed["status"]["conditions"][-1]["status"] = str(ready)
    for container in changed["status"]["containerStatuses"]:
        container |= {"ready": ready, "state": {"running": {}}}
    state.put(changed)


def break_pod(state: State, component: str, *, waiting: Json | None = None, last: Json | None = None) -> Json:
    """Its first container waits, or ended before, for this reason."""
    one = copy.deepcopy(of_component(state, component))
    one["status"]["conditions"][-1]["status"] = "False"
    status = one["status"]["containerStatuses"][0]
    status |= {"ready": False, "state": {"waiting": waiting or {"reason": "CrashLoopBackOff"}}}
    if last:
        status |= {"lastState": {"terminated": last}, "restartCount": 4}
    state.put(one)
    return one


def unschedulable(state: State, component: str, message: str) -> None:
    one = copy.deepcopy(of_component(state, component))
    one["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}],
    }
    state.put(one)


def node(name: str, gpus: dict[str, str], labels: dict[str, str] | None = None, **spec: Any) -> Json:
    has = (
        {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/cuda.driver-version.major": "570"}
        if gpus
        else {}
    )
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": has | (labels or {})},
        "spec": spec,
        "status": {"allocatable": {"cpu": "64", "memory": "512Gi"} | gpus, "nodeInfo": {"kubeletVersion": "v1.31.4"}},
    }


def storage_class(name: str, *, is_default: bool = False) -> Json:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"} if is_default else {}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": annotations},
    }


def helm_record(values: Json) -> Json:
    """The secret in which Helm keeps a release."""
    record = {
        "version": 3,
        "info": {"status": "deployed"},
        "chart": {"metadata": {"version": "0.1.0", "appVersion": "0.1.0"}},
        "config": values,
        "manifest": "kind: Secret\nstringData: {password: manifest-password-1}",
    }
    packed = base64.b64encode(base64.b64encode(gzip.compress(json.dumps(record).encode()))).decode()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "sh.helm.release.v1.nvila.v3",
            "namespace": NAMESPACE,
            "labels": {"owner": "helm", "name": "nvila", "version": "3"},
        },
        "data": {"release": packed},
    }


VISION_PAGE = """\
# HELP nvila_vision_backlog_seconds Waiting tiles over the tower's recent tiles per second.
# TYPE nvila_vision_backlog_seconds gauge
nvila_vision_backlog_seconds 1.5
# HELP nvila_vision_pending_tiles Tiles waiting for the tower.
# TYPE nvila_vision_pending_tiles gauge
nvila_vision_pending_tiles 640
# HELP nvila_cache_bytes_total Token bytes moved.
# TYPE nvila_cache_bytes_total counter
nvila_cache_bytes_total{direction="written"} 2.5e9
nvila_cache_bytes_total{direction="read"} 1e6
"""
DECODE_PAGE = """\
# HELP nvila_decode_backlog_seconds Waiting prompt positions over the engine's recent positions per second.
# TYPE nvila_decode_backlog_seconds gauge
nvila_decode_backlog_seconds{replica="a"} 0.25
nvila_decode_backlog_seconds{replica="b"} 0.5
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{replica="a"} 12
vllm:num_requests_running{replica="b"} 5
"""
