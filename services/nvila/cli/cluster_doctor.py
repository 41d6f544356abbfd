"""`nvila cluster doctor`: what the cluster lacks for nvila, before and after its installation, and what mends it.

Each check is a function that yields findings. A check that may not look says which right it lacks; the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from nvila.cli import cluster_release
from nvila.cli.cluster_api import Access, Cluster, Forbidden, Json
from nvila.cli.cluster_release import is_gpu, quantity
from nvila.errors import DeadlineExceeded, NotFound, NvilaError, Unauthenticated, Unavailable

LEAST_VERSION = (1, 29)
"""`kubeVersion` of charts/nvila/Chart.yaml."""
LEAST_DRIVER = 535
"""Major version of NVIDIA's driver. The images bring CUDA 12, which data-centre GPUs run from this branch on."""


WATCH_S = 5.0
"""A watch that is to last one second and says nothing for so long is slow."""


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`mend`: the command, or the chart's value, that helps. Empty where nothing is wrong."""

    check: str
    level: Level
    what: str
    mend: str = ""


Check = Callable[[Cluster, "Intent"], Iterator[Finding]]


@dataclass(frozen=True)
class Intent:
    """What is to be installed, or is: whether pods are to have GPUs, and under which release."""

    release: str
    wants_gpus: bool = True


def examine(cluster: Cluster, intent: Intent) -> list[Finding]:
    """All findings in the order of the checks. One that no check can do without ends them: a server that is down or
    refuses the credentials."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            findings += check(cluster, intent)
        except Forbidden as error:
            findings.append(Finding(check=name, level=Level.UNKNOWN, what=error.message, mend=_grant(error)))
        except (Unauthenticated, Unavailable, DeadlineExceeded) as error:
            what, _, mend = error.message.partition(": ")
            findings.append(Finding(check=name, level=Level.FAIL, what=error.message, mend=mend or what))
            if name == "server":
                return findings
        except NvilaError as error:
            findings.append(Finding(check=name, level=Level.UNKNOWN, what=error.message))
    return findings


def _grant(error: Forbidden) -> str:
    found = re.search(r'apiGroups: \["(.*?)"\], resources: \["(.*?)"\], verbs: \["(.*?)"\]', error.rule)
    where = re.search(r"in namespace (\S+);", error.message)
    assert found, "a rule names group, resource and verb"
    access = Access(found[3], found[1], found[2], where[1] if where else "")
    return access.mend


# -- the checks -------------------------------------------------------------------------------------------------------


def _server(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    version = cluster.version()
    found = tuple(int(re.sub(r"\D.*", "", str(version.get(key, "0"))) or 0) for key in ("major", "minor"))
    text = f"Kubernetes {version.get('gitVersion', '?')} at {cluster.server}"
    if found < LEAST_VERSION:
        wanted = ".".join(map(str, LEAST_VERSION))
        yield Finding(
            check="server", level=Level.FAIL, what=f"{text}; {wanted} or newer is needed", mend="upgrade the cluster"
        )
    else:
        yield Finding(check="server", level=Level.OK, what=text)


def _namespace(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    found = cluster.find(f"/api/v1/namespaces/{cluster.namespace}")
    if found is None:
        yield Finding(
            check="namespace",
            level=Level.FAIL,
            what=f"there is no namespace {cluster.namespace}",
            mend=f"kubectl create namespace {cluster.namespace}",
        )
        return
    level = cluster_release.label(found, "pod-security.kubernetes.io/enforce") or "none"
    yield Finding(
        check="namespace",
        level=Level.OK,
        what=f"{cluster.namespace}; pod security: {level} (the chart's pods meet `restricted`)",
    )


_NEEDED = (
    ("create", "apps", "deployments"),
    ("create", "apps", "statefulsets"),
    ("create", "", "services"),
    ("create", "", "secrets"),
    ("create", "", "configmaps"),
    ("create", "", "serviceaccounts"),
    ("create", "networking.k8s.io", "networkpolicies"),
    ("create", "policy", "poddisruptionbudgets"),
)
"""What `helm install` must be allowed to do with the chart's defaults."""


def _rights(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    lacking = []
    for verb, group, resource in _NEEDED:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {
                "resourceAttributes": {
                    "namespace": cluster.namespace,
                    "verb": verb,
                    "group": group,
                    "resource": resource,
                }
            },
        }
        answer = cluster.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        if not (answer.get("status") or {}).get("allowed"):
            lacking.append(f"{resource}.{group}" if group else resource)
    if lacking:
        yield Finding(
            check="rights",
            level=Level.WARN,
            what=f"these credentials may not create {', '.join(lacking)} in {cluster.namespace}: helm will fail",
            mend=f"kubectl create rolebinding nvila-installer --clusterrole=admin --user=<you> -n {cluster.namespace}",
        )
    else:
        yield Finding(check="rights", level=Level.OK, what=f"helm may install into {cluster.namespace}")


@dataclass(frozen=True)
class _Crd:
    group: str
    resource: str
    what: str
    without: str
    mend: str


_CRDS = (
    _Crd(
        "ray.io",
        "rayservices",
        "KubeRay",
        "decode.mode=rayservice",
        "helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm"
        " -n kuberay --create-namespace",
    ),
    _Crd(
        "keda.sh",
        "scaledobjects",
        "KEDA",
        "autoscaling.kind=keda",
        "helm install keda keda --repo https://kedacore.github.io/charts -n keda --create-namespace",
    ),
    *(
        _Crd(
            "monitoring.coreos.com",
            resource,
            "Prometheus operator",
            f"monitoring.{switch}=true",
            "helm install monitoring kube-prometheus-stack --repo https://prometheus-community.github.io/helm-charts"
            " -n monitoring --create-namespace",
        )
        for resource, switch in (
            ("servicemonitors", "monitors"),
            ("podmonitors", "monitors"),
            ("prometheusrules", "rules"),
        )
    ),
    _Crd(
        "gateway.networking.k8s.io",
        "httproutes",
        "Gateway API",
        "gateway.route.enabled=true",
        "kubectl apply -f https://github.com/kubernetes-sigs/gateway-api/releases/download/v1.2.1/standard-install.yaml",
    ),
)


def _crds(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    for crd in _CRDS:
        if crd.resource in cluster.resources(crd.group):
            yield Finding(check="crds", level=Level.OK, what=f"{crd.resource}.{crd.group} ({crd.what})")
        else:
            yield Finding(
                check="crds",
                level=Level.WARN,
                what=f"no {crd.resource}.{crd.group}: {crd.what} is not installed, so {crd.without} cannot be used",
                mend=crd.mend,
            )


def _metrics(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    if "pods" in cluster.resources("metrics.k8s.io"):
        yield Finding(check="metrics", level=Level.OK, what="metrics.k8s.io answers (gateway.autoscaling)")
    else:
        yield Finding(
            check="metrics",
            level=Level.WARN,
            what="no metrics API: gateway.autoscaling (by processor use) does nothing",
            mend="kubectl apply -f https://github.com/kubernetes-sigs/metrics-server/releases/latest/download/components.yaml",
        )


def _gpus(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    nodes = [node for node in cluster.objects("/api/v1/nodes") if not (node.get("spec") or {}).get("unschedulable")]
    with_gpus = {node["metadata"]["name"]: found for node in nodes if (found := _gpus_of(node))}
    if not with_gpus:
        yield _no_gpus(nodes, intent)
        return
    totals: dict[str, int] = {}
    for found in with_gpus.values():
        for resource, count in found.items():
            totals[resource] = totals.get(resource, 0) + count
    products = {cluster_release.label(node, "nvidia.com/gpu.product") for node in nodes} - {""}
    offered = ", ".join(f"{count} × {resource}" for resource, count in sorted(totals.items()))
    yield Finding(
        check="gpus",
        level=Level.OK,
        what=f"{len(with_gpus)} of {len(nodes)} nodes offer {offered}"
        + (f" ({', '.join(sorted(products))})" if products else ""),
    )
    yield from _drivers([node for node in nodes if node["metadata"]["name"] in with_gpus])
    yield from _taints([node for node in nodes if node["metadata"]["name"] in with_gpus])


def _gpus_of(node: Json) -> dict[str, int]:
    allocatable = (node.get("status") or {}).get("allocatable") or {}
    return {name: int(quantity(count)) for name, count in allocatable.items() if is_gpu(name) and quantity(count) > 0}


def _no_gpus(nodes: list[Json], intent: Intent) -> Finding:
    has_cards = [node for node in nodes if cluster_release.label(node, "feature.node.kubernetes.io/pci-10de.present")]
    if not intent.wants_gpus:
        return Finding(
            check="gpus", level=Level.OK, what=f"none of {len(nodes)} nodes offers a GPU, and none is wanted"
        )
    if has_cards:
        return Finding(
            check="gpus",
            level=Level.FAIL,
            what=f"{len(has_cards)} nodes have NVIDIA cards, none offers nvidia.com/gpu: no driver or device plugin",
            mend="helm install gpu-operator gpu-operator --repo https://helm.ngc.nvidia.com/nvidia -n gpu-operator"
            " --create-namespace",
        )
    return Finding(
        check="gpus",
        level=Level.FAIL,
        what=f"none of {len(nodes)} nodes offers a GPU (nvidia.com/gpu or nvidia.com/mig-…)",
        mend="add GPU nodes and the GPU operator; or install on processors: helm install … -f charts/nvila/ci/"
        "laptop-values.yaml (then: nvila cluster doctor --cpu)",
    )


def _drivers(nodes: list[Json]) -> Iterator[Finding]:
    for node in nodes:
        label = cluster_release.label
        version = label(node, "nvidia.com/cuda.driver-version.major") or label(node, "nvidia.com/cuda.driver.major")
        if not version.isdigit():
            yield Finding(
                check="drivers",
                level=Level.UNKNOWN,
                what=f"{node['metadata']['name']} does not tell its driver's version",
                mend="GPU feature discovery tells it: it comes with the GPU operator (--set gfd.enabled=true)",
            )
        elif int(version) < LEAST_DRIVER:
            yield Finding(
                check="drivers",
                level=Level.FAIL,
                what=f"{node['metadata']['name']} has driver {version}; {LEAST_DRIVER} or newer is needed",
                mend="upgrade the driver: helm upgrade gpu-operator … --set driver.version=<570 or newer>",
            )


def _taints(nodes: list[Json]) -> Iterator[Finding]:
    taints = {
        (taint.get("key", ""), taint.get("value", ""), taint.get("effect", ""))
        for node in nodes
        for taint in (node.get("spec") or {}).get("taints") or []
        if taint.get("effect") in ("NoSchedule", "NoExecute")
    }
    for key, value, effect in sorted(taints):
        operator = f"operator: Equal, value: {value}" if value else "operator: Exists"
        yield Finding(
            check="taints",
            level=Level.NOTE,
            what=f"GPU nodes are tainted {key}{'=' + value if value else ''}:{effect}",
            mend=f"vision.tolerations and decode.tolerations: [{{key: {key}, {operator}, effect: {effect}}}]",
        )


def _storage(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    classes = cluster.objects("/apis/storage.k8s.io/v1/storageclasses")
    names = [one["metadata"]["name"] for one in classes]
    key = "storageclass.kubernetes.io/is-default-class"
    defaults = [
        one["metadata"]["name"] for one in classes if (one["metadata"].get("annotations") or {}).get(key) == "true"
    ]
    if not classes:
        yield Finding(
            check="storage",
            level=Level.WARN,
            what="no storage class: model.volume.kind=claim and gateway.data.persistence cannot be used",
            mend="install a provisioner; or keep the defaults, which need none",
        )
    elif not defaults:
        yield Finding(
            check="storage",
            level=Level.WARN,
            what=f"no default among storage classes {', '.join(names)}",
            mend=f"kubectl annotate storageclass {names[0]} {key}=true; or set storageClass in the values",
        )
    else:
        yield Finding(check="storage", level=Level.OK, what=f"{', '.join(names)}; default {defaults[0]}")


def _quotas(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    quotas = cluster.objects(f"/api/v1/namespaces/{cluster.namespace}/resourcequotas")
    is_tight = False
    for quota in quotas:
        status = quota.get("status") or {}
        for resource, hard in (status.get("hard") or {}).items():
            used = (status.get("used") or {}).get(resource, "0")
            left = quantity(hard) - quantity(used)
            is_short = left <= 0.1 * quantity(hard)
            if is_short and ("gpu" not in resource or intent.wants_gpus):
                is_tight = True
                yield Finding(
                    check="quotas",
                    level=Level.FAIL if left <= 0 else Level.WARN,
                    what=f"quota {quota['metadata']['name']}: {used} of {hard} {resource} are used",
                    mend=f"kubectl edit resourcequota {quota['metadata']['name']} -n {cluster.namespace}",
                )
    if not is_tight:
        what = f"{len(quotas)} quotas, with room" if quotas else "no quota in this namespace"
        yield Finding(check="quotas", level=Level.OK, what=what)


def _policies(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    policies = cluster.objects(f"/apis/networking.k8s.io/v1/namespaces/{cluster.namespace}/networkpolicies")
    denies = [one for one in policies if _denies_all(one)]
    own = any(cluster_release.label(one, "app.kubernetes.io/instance") == intent.release for one in policies)
    for one in denies:
        directions = " and ".join((one.get("spec") or {}).get("policyTypes") or ["Ingress"])
        yield Finding(
            check="policies",
            level=Level.OK if own else Level.WARN,
            what=f"{one['metadata']['name']} denies all {directions.lower()} by default"
            + ("; the chart's own policies open what is needed" if own else ""),
            mend=""
            if own
            else "keep networkPolicy.enabled=true: the chart's policies open what its parts need, DNS too",
        )
    if not denies:
        yield Finding(check="policies", level=Level.OK, what="no policy denies everything by default")


def _watches(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
    _, version = cluster.objects_and_version(pods)
    if cluster.watch_answers(pods, version, WATCH_S):
        yield Finding(check="watches", level=Level.OK, what="watches answer (nvila cluster wait, operators)")
        return
    yield Finding(
        check="watches",
        level=Level.WARN,
        what=f"a watch of pods says nothing for {WATCH_S:.0f} s: something on the way to {cluster.server} holds "
        "streams back, or the server is overloaded; `nvila cluster wait` reads everything again every few seconds "
        "instead",
        mend=f"kubectl get pods -n {cluster.namespace} --watch -v=6 shows the same? Go around the proxy (NO_PROXY), or "
        "let it pass streams unbuffered; else look at the load of the API server",
    )


def _denies_all(policy: Json) -> bool:
    spec = policy.get("spec") or {}
    selector = spec.get("podSelector") or {}
    return not any(selector.values()) and not spec.get("ingress") and not spec.get("egress")


def _release(cluster: Cluster, intent: Intent) -> Iterator[Finding]:
    try:
        release = cluster_release.read(cluster, intent.release)
    except NotFound:
        yield Finding(
            check="release",
            level=Level.NOTE,
            what=f"{intent.release} is not installed in {cluster.namespace} yet",
            mend=f"helm install {intent.release} charts/nvila -n {cluster.namespace}",
        )
        return
    pods = [pod for pool in release.pools for pod in pool.pods]
    for image, said in cluster_release.pull_failures(pods):
        yield Finding(
            check="images", level=Level.FAIL, what=f"{image} cannot be pulled: {said}", mend=_pull_mend(image, said)
        )
    for pool in release.pools:
        text = f"{pool.component}: {pool.ready} of {pool.desired} ready"
        others = [reason for reason in pool.reasons if "cannot be pulled" not in reason]
        if pool.is_ready and not others:
            yield Finding(check="release", level=Level.OK, what=text)
        for reason in others:
            level = Level.WARN if pool.is_ready else Level.FAIL
            yield Finding(check="release", level=level, what=f"{text}: {reason}", mend=_pod_mend(cluster, pool, reason))
        if not pool.is_ready and not pool.reasons:
            yield Finding(check="release", level=Level.WARN, what=f"{text}: starting", mend="nvila cluster wait")


def _pull_mend(image: str, said: str) -> str:
    lowered = said.lower()
    if any(word in lowered for word in ("unauthorized", "denied", "authentication", "forbidden", "credential")):
        return "kubectl create secret docker-registry nvila-pull …, then images.pullSecrets: [nvila-pull]"
    if "not found" in lowered or "manifest unknown" in lowered:
        return f"push {image.rpartition('/')[2]} to that registry, or correct the tag or digest in the values"
    return "is the registry reachable from the nodes? An air-gapped cluster sets images.registry to its mirror"


_MEMORY = {"redis": "redis.maxMemoryMiB", "collector": "tracing.collector.resources.limits.memory"}
"""The value that a pod's memory follows from, where it is not `<component>.resources.limits.memory`."""


def _pod_mend(cluster: Cluster, pool: cluster_release.Pool, reason: str) -> str:
    where = f"-n {cluster.namespace}"
    logs = f"kubectl logs {where} -l app.kubernetes.io/component={pool.component} --all-containers --previous --tail=50"
    if "Insufficient" in reason:
        found = re.search(r"Insufficient ([\w./-]+)", reason)
        resource = found[1] if found else "resources"
        return f"free or add nodes with {resource}; or lower {pool.component}.resources, .gpu.count or the replicas"
    if "taint" in reason:
        return f"{pool.component}.tolerations (see taints above)"
    if "node selector" in reason or "affinity" in reason:
        return f"correct {pool.component}.nodeSelector: kubectl get nodes --show-labels"
    if "PersistentVolumeClaim" in reason:
        return f"kubectl describe pvc {where}"
    if "CreateContainerConfigError" in reason:
        return f"kubectl get secret,configmap {where}: the one named must exist"
    if "OOMKilled" in reason:
        return f"raise {_MEMORY.get(pool.component, f'{pool.component}.resources.limits.memory')}"
    if "metrics are missing" in reason or "ScaledObject" in reason or "HPA" in reason:
        return (
            "is monitoring.prometheusUrl right, and monitoring.monitors on? kubectl describe scaledobject,hpa " + where
        )
    if "KubeRay" in reason:
        return "kubectl get pods -A -l app.kubernetes.io/name=kuberay-operator"
    return logs


CHECKS: dict[str, Check] = {
    "server": _server,
    "namespace": _namespace,
    "rights": _rights,
    "crds": _crds,
    "metrics": _metrics,
    "gpus": _gpus,
    "storage": _storage,
    "quotas": _quotas,
    "policies": _policies,
    "watches": _watches,
    "release": _release,
}
