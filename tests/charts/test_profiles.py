"""Every configuration that is supported renders to objects that an API server would accept, by their schemas."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
from typing import Any

import pytest

from nvila.capacity.rules import merged
from tests.charts import kube
from tests.charts.helm import CHART, PROFILES, Rendered, program, render

GPU = {"count": 1}
LONGEST = {"RayService": 47, "StatefulSet": 52, "PriorityClass": 253, "Secret": 253, "ConfigMap": 253}
"""Of names: KubeRay's own check; room in labels of pods; DNS, 63 elsewhere."""
UNUSUAL: dict[str, dict[str, Any]] = {
    "defaults": {},
    "long names": {"fullnameOverride": "a-name-that-is-much-longer-than-forty-characters-and-ends-in-a-number-7"},
    "everything external": {
        "redis": {"enabled": False, "external": {"host": "redis.example.com", "port": 6380, "database": 3},
                  "auth": {"existingSecret": "redis"}},
        "tracing": {"endpoint": "https://otlp.example.com"},
        "gateway": {"auth": {"existingSecret": "keys"},
                    "data": {"persistence": {"enabled": True, "existingClaim": "uploads"}}},
        "model": {"source": "existingClaim", "existingClaim": {"name": "weights"}},
    },
    "TLS everywhere": {
        "tls": {"enabled": True, "existingSecret": "internal"},
        "redis": {"tls": {"enabled": True, "existingSecret": "redis-tls"}},
        "tracing": {"endpoint": "https://otlp.example.com:4317"},
        "gateway": {"ingress": {"enabled": True, "grpcHost": "grpc.example.com", "tlsSecret": "tls"}},
    },
    "GPUs of three kinds": {
        "vision": {"gpu": {"count": 2, "resource": "nvidia.com/mig-1g.10gb"}, "autoscaling": {"kind": "hpa"}},
        "decode": {"gpu": {"count": 4, "resource": "nvidia.com/gpu"}, "autoscaling": {"kind": "keda"}},
    },
    "KubeRay of a fixed size": {"decode": {"mode": "rayservice", "replicas": 3, "gpu": GPU}},
    "KubeRay never upgraded": {"decode": {"mode": "rayservice", "rayservice": {"upgradeStrategy": "None"}}},
    "vision asleep": {"vision": {"autoscaling": {"kind": "keda", "scaleToZero": {"enabled": True}}}},
    "nothing optional": {
        "networkPolicy": {"enabled": False}, "tests": {"enabled": False}, "gateway": {"auth": {"mode": "none"},
        "podDisruptionBudget": {"enabled": False}}, "vision": {"podDisruptionBudget": {"enabled": False}},
        "decode": {"podDisruptionBudget": {"enabled": False}},
    },
    "a platform that chooses users": {
        "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}, "redis": {"runAsUser": None},
    },
    "own objects and annotations": {
        "commonLabels": {"team": "video"}, "podAnnotations": {"sidecar.istio.io/inject": "true"},
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-mine"}}
        ],
        "gateway": {"extraEnv": [{"name": "TZ", "value": "UTC"}], "service": {"type": "LoadBalancer"}},
    },
}  # fmt: skip

OFTEN_TOGETHER: dict[str, dict[str, dict[str, Any]]] = {
    "name": {
        "short": {},
        "over forty": {"fullnameOverride": "the-video-understanding-platform-of-a-large-enterprise-in-europe"},
        "another chart's": {"nameOverride": "questions-about-recordings-and-images-of-the-north"},
    },
    "services": {
        "own": {"tracing": {"collector": {"enabled": True}}},
        "external": UNUSUAL["everything external"],
        "external cluster": {
            "redis": {"enabled": False, "external": {"host": "redis", "cluster": True},
                      "auth": {"existingSecret": "redis"}},
            "tracing": {"endpoint": "http://collector.example.com:4317"},
            "model": {"source": "objectStore", "objectStore": {"path": ":s3:b/m", "existingSecret": "store"}},
        },
    },
    "TLS": {
        "none": {"gateway": {"ingress": {"enabled": True}}},
        "everywhere": {
            "tls": {"enabled": True, "existingSecret": "internal"},
            "redis": {"tls": {"enabled": True, "existingSecret": "redis-tls"}},
            "tracing": {"endpoint": "https://otlp.example.com", "protocol": "http/protobuf"},
            "gateway": {"ingress": {"enabled": True, "grpcHost": "grpc.example.com", "tlsSecret": "tls"}},
        },
    },
    "GPUs": {
        "none": {},
        "of two kinds": {"vision": {"gpu": {"count": 2, "resource": "nvidia.com/mig-1g.10gb"}},
                         "decode": {"gpu": {"count": 4}, "nodeSelector": {"gpu": "h100"}}},
        "shared and others'": {"vision": {"gpu": {"count": 1, "resource": "nvidia.com/gpu.shared"}},
                               "decode": {"gpu": {"count": 1, "resource": "amd.com/gpu"}}},
    },
    "pools": {
        "fixed": {},
        "keda": {"vision": {"autoscaling": {"kind": "keda"}}, "decode": {"autoscaling": {"kind": "keda"}}},
        "hpa": {"vision": {"autoscaling": {"kind": "hpa"}}, "decode": {"autoscaling": {"kind": "hpa"}},
                "gateway": {"autoscaling": {"enabled": True}}},
        "ray": {"vision": {"autoscaling": {"kind": "keda", "scaleToZero": {"enabled": True}}},
                "decode": {"mode": "rayservice", "autoscaling": {"kind": "ray"}}},
        "ray of a fixed size": {"decode": {"mode": "rayservice", "replicas": 2}},
    },
    "watched": {
        "no": {"networkPolicy": {"enabled": False}},
        "yes": {"monitoring": {"monitors": True, "rules": True, "dashboards": True},
                "priorityClasses": {"create": True}},
    },
}  # fmt: skip
"""Choices that customers combine freely."""


def every_pair() -> list[dict[str, str]]:
    """A few combinations in which each two choices of different rows meet at least once."""
    rows = {row: list(choices) for row, choices in OFTEN_TOGETHER.items()}
    everything = [dict(zip(rows, picks, strict=True)) for picks in itertools.product(*rows.values())]
    unmet = set().union(*map(_pairs, everything))
    chosen = []
    while unmet:
        best = max(everything, key=lambda combination: len(_pairs(combination) & unmet))
        unmet -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(combination: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}


@pytest.mark.parametrize("combination", every_pair(), ids=lambda combination: ", ".join(combination.values()))
def test_choices_can_be_combined(combination: dict[str, str]) -> None:
    values: dict[str, Any] = {}
    for row, choice in combination.items():
        values = merged(values, OFTEN_TOGETHER[row][choice])
    first, second = render(values, release="nvila"), render(values, release="the-second-release-in-this-namespace")
    for rendered in (first, second):
        assert_accepted(rendered, kube.VERSIONS[1])
        for one in rendered:
            assert len(one["metadata"]["name"]) <= LONGEST.get(one["kind"], 63), one["metadata"]["name"]
        for name, pod in rendered.pods():
            for volume in pod.get("volumes", []):
                config = volume.get("configMap", {}).get("name")
                assert config is None or any(one["metadata"]["name"] == config for one in rendered.all("ConfigMap"))
            for asked in pod["containers"]:
                mounted = {mount["name"] for mount in asked.get("volumeMounts", [])}
                assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}, name
    if "fullnameOverride" not in values:
        assert not _identities(first) & _identities(second)


@pytest.mark.parametrize("version", kube.VERSIONS)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_accepted_by_each_version(profile: str, version: str) -> None:
    assert_accepted(render(profile=profile), version)


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_values_are_accepted(case: str) -> None:
    assert_accepted(render(UNUSUAL[case]), kube.VERSIONS[1])


@pytest.mark.parametrize("profile", PROFILES)
def test_helm_finds_no_fault_in_each_profile(profile: str) -> None:
    done = subprocess.run(
        [program(), "lint", "--strict", str(CHART), "--values", str(PROFILES[profile])],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "component", "place", "mistake"),
    [
        ("Deployment", "vision", ("spec", "template", "spec"), {"shareProcessNamespaces": True}),
        ("Deployment", "vision", ("spec",), {"replicas": "one"}),
        ("ScaledObject", "vision", ("spec",), {"maxReplicas": 3}),
        ("PodMonitor", "vision", ("spec", "podMetricsEndpoints", 0), {"intervall": "5s"}),
        ("RayService", "decode", ("spec", "upgradeStrategy"), {"kind": "NewCluster"}),
        ("RayService", "decode", ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec"), {"containers": 1}),
        ("NetworkPolicy", "redis", ("spec", "ingress", 0, "from", 0), {"pods": {}}),
    ],
)
def test_the_check_refuses_what_a_server_would(kind: str, component: str, place: tuple[Any, ...], mistake: Any) -> None:
    found = copy.deepcopy(render(profile="two-pools").get(kind, component))
    target = found
    for step in place:
        target = target[step]
    target |= mistake
    assert kube.problems(found, kube.VERSIONS[1])


def test_routes_say_only_what_the_gateway_api_knows() -> None:
    rendered = render(profile="two-pools")
    for kind in ("HTTPRoute", "GRPCRoute"):
        spec = rendered.get(kind, "gateway")["spec"]
        assert set(spec) == {"parentRefs", "hostnames", "rules"}
        for rule in spec["rules"]:
            assert set(rule) <= {"matches", "timeouts", "backendRefs"}
            assert all(re.fullmatch(r"[0-9]{1,5}s", time) for time in rule.get("timeouts", {}).values())
            service = rendered.get("Service", "gateway")
            for backend in rule["backendRefs"]:
                assert backend["name"] == service["metadata"]["name"]
                assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}


def test_two_releases_in_one_namespace_share_no_object_and_no_pod() -> None:
    first, second = render(release="nvila"), render(release="nvila-two")
    assert not _identities(first) & _identities(second)
    for rendered, other in ((first, second), (second, first)):
        pods = [
            one["spec"]["template"]["metadata"]["labels"] for one in other.all("Deployment") + other.all("StatefulSet")
        ]
        for selector in _selectors(rendered):
            assert not any(selector.items() <= labels.items() for labels in pods), selector


def test_two_long_names_that_begin_alike_stay_apart() -> None:
    name = "a-release-whose-name-has-fifty-three-characters-in-it"
    first, second = (render({"fullnameOverride": f"{name}-{number}"}) for number in (1, 2))
    assert not _identities(first) & _identities(second)


@pytest.mark.parametrize("mode", ["deployment", "rayservice"])
def test_no_name_is_longer_than_its_kind_allows(mode: str) -> None:
    values = {"fullnameOverride": "x" * 90, "decode": {"mode": mode}, "tracing": {"collector": {"enabled": True}}}
    for one in render(values):
        assert len(one["metadata"]["name"]) <= LONGEST.get(one["kind"], 63)


def test_selectors_stay_when_the_chart_version_changes() -> None:
    for selector in _selectors(render(profile="two-pools")):
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(selector)


def test_every_object_is_labelled_and_in_the_release_namespace() -> None:
    for one in render(profile="two-pools"):
        labels = one["metadata"]["labels"]
        assert {"app.kubernetes.io/name", "app.kubernetes.io/instance", "helm.sh/chart"} <= set(labels), one["kind"]
        assert one["metadata"].get("namespace", "apps") == "apps"


def test_nothing_that_a_cluster_may_lack_is_on_by_default() -> None:
    built_in = {
        "Deployment", "StatefulSet", "Service", "ServiceAccount", "Secret", "ConfigMap", "NetworkPolicy",
        "PodDisruptionBudget", "Pod",
    }  # fmt: skip
    assert {one["kind"] for one in render()} <= built_in


def assert_accepted(rendered: Rendered, version: str) -> None:
    found = [problem for one in rendered for problem in kube.problems(one, version)]
    assert not found, "\n".join(found)


def _identities(rendered: Rendered) -> set[tuple[str, str]]:
    return {(one["kind"], one["metadata"]["name"]) for one in rendered}


def _selectors(rendered: Rendered) -> list[dict[str, str]]:
    found = [one["spec"]["selector"]["matchLabels"] for one in rendered.all("Deployment") + rendered.all("StatefulSet")]
    found += [one["spec"]["selector"] for one in rendered.all("Service")]
    found += [one["spec"]["selector"]["matchLabels"] for one in rendered.all("PodDisruptionBudget")]
    return found + [one["spec"]["podSelector"]["matchLabels"] for one in rendered.all("NetworkPolicy")]
