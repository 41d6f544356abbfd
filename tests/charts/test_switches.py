"""Defaults, and every switch on and off."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from tests.cache.test_cluster import RULES as CLUSTER_RULES
from tests.charts.helm import CHART, Rendered, container, environment, pod_of, render, run

ROUTE = {"enabled": True, "parentRefs": [{"name": "g"}]}
EXTERNAL_REDIS = {"enabled": False, "external": {"host": "h"}, "auth": {"existingSecret": "s"}}
NO_BUDGET = {"podDisruptionBudget": {"enabled": False}}
KEDA = {"autoscaling": {"kind": "keda"}}
RAY = {"mode": "rayservice", "autoscaling": {"kind": "ray"}}
INCREMENTAL = {"upgradeStrategy": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "istio"}}


@pytest.mark.parametrize(
    ("values", "kind", "component"),
    [
        ({"gateway": {"autoscaling": {"enabled": True}}}, "HorizontalPodAutoscaler", "gateway"),
        ({"gateway": {"ingress": {"enabled": True}}}, "Ingress", "gateway"),
        ({"gateway": {"ingress": {"enabled": True, "grpcHost": "g"}}}, "Ingress", "gateway-grpc"),
        ({"gateway": {"route": ROUTE}}, "HTTPRoute", "gateway"),
        ({"gateway": {"route": ROUTE | {"grpcHostnames": ["h"]}}}, "GRPCRoute", "gateway"),
        ({"gateway": {"data": {"persistence": {"enabled": True}}}}, "PersistentVolumeClaim", "gateway"),
        ({"vision": {"autoscaling": {"kind": "hpa"}}}, "HorizontalPodAutoscaler", "vision"),
        ({"vision": KEDA}, "ScaledObject", "vision"),
        ({"decode": {"autoscaling": {"kind": "hpa"}}}, "HorizontalPodAutoscaler", "decode"),
        ({"decode": KEDA}, "ScaledObject", "decode"),
        ({"decode": RAY}, "RayService", "decode"),
        ({"model": {"volume": {"kind": "claim"}}}, "PersistentVolumeClaim", "model"),
        ({"tracing": {"collector": {"enabled": True}}}, "Deployment", "collector"),
        ({"monitoring": {"monitors": True}}, "ServiceMonitor", "gateway"),
        ({"monitoring": {"monitors": True}}, "PodMonitor", "vision"),
        ({"monitoring": {"monitors": True}}, "PodMonitor", "decode"),
        ({"monitoring": {"rules": True}}, "PrometheusRule", "alerts"),
        ({"monitoring": {"dashboards": True}}, "ConfigMap", "dashboards"),
        ({"priorityClasses": {"create": True}}, "PriorityClass", "front"),
    ],
)  # fmt: skip
def test_a_switch_adds_its_object_which_is_not_there_without(values: dict[str, Any], kind: str, component: str) -> None:
    assert render().find(kind, component) is None
    assert render(values).find(kind, component) is not None


@pytest.mark.parametrize(
    ("values", "kind", "component"),
    [
        ({"decode": RAY}, "Deployment", "decode"),
        ({"gateway": {"auth": {"existingSecret": "mine"}}}, "Secret", "gateway-keys"),
        ({"gateway": {"auth": {"mode": "none"}}}, "Secret", "gateway-keys"),
        ({"redis": {"auth": {"existingSecret": "mine"}}}, "Secret", "redis"),
        ({"redis": EXTERNAL_REDIS}, "StatefulSet", "redis"),
        ({"networkPolicy": {"enabled": False}}, "NetworkPolicy", "vision"),
        ({"tests": {"enabled": False}}, "Pod", "test"),
        ({"gateway": NO_BUDGET}, "PodDisruptionBudget", "gateway"),
        ({"vision": NO_BUDGET}, "PodDisruptionBudget", "vision"),
        ({"decode": NO_BUDGET}, "PodDisruptionBudget", "decode"),
    ],
)  # fmt: skip
def test_a_switch_takes_away_what_is_there_by_default(values: dict[str, Any], kind: str, component: str) -> None:
    assert render().find(kind, component) is not None
    assert render(values).find(kind, component) is None


# -- one timeout


def test_every_timeout_follows_from_one_value() -> None:
    values: dict[str, Any] = {
        "requestTimeoutSeconds": 1000,
        "gateway": {
            "ingress": {"enabled": True, "grpcHost": "g"},
            "route": {"enabled": True, "parentRefs": [{"name": "g"}]},
        },
    }
    rendered = render(values)
    pod = pod_of(rendered, "gateway")
    told = environment(container(pod))
    for field in ("REQUEST_TIMEOUT_S", "MAX_REQUEST_TIMEOUT_S", "UPLOAD_TIMEOUT_S", "DRAIN_S"):
        assert told[f"NVILA_GATEWAY_{field}"] == "1000"
    assert pod["terminationGracePeriodSeconds"] > 1000
    for ingress in rendered.all("Ingress"):
        annotations = ingress["metadata"]["annotations"]
        assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "1030"
    (rule,) = rendered.get("HTTPRoute", "gateway")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "1030s", "backendRequest": "1030s"}
    decode = pod_of(rendered, "decode")
    assert environment(container(decode))["NVILA_DECODE_DRAIN_S"] == "1000"
    assert decode["terminationGracePeriodSeconds"] > 1000
    ray = render(values | {"decode": RAY}).get("RayService", "decode")
    assert ray["spec"]["rayClusterDeletionDelaySeconds"] == 1000


def test_other_ingress_classes_get_no_annotations_of_nginx() -> None:
    ingress = render({"gateway": {"ingress": {"enabled": True, "className": "traefik"}}}).get("Ingress", "gateway")
    assert not ingress["metadata"].get("annotations")


# -- images


def test_tags_default_to_the_version_of_the_programs() -> None:
    images = {container(pod_of(render(), part))["image"] for part in ("gateway", "vision", "decode")}
    assert images == {f"docker.io/nvila/{part}:{version('nvila')}" for part in ("gateway", "vision", "decode")}


def test_one_registry_replaces_all_and_digests_pin_all() -> None:
    for name, pod in render(profile="air-gapped").pods():
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            assert one["image"].startswith("registry.internal.example:5000/mirror/"), name
            assert "@sha256:" in one["image"], name
        assert pod["imagePullSecrets"] == [{"name": "registry-login"}], name


# -- pools


@pytest.mark.parametrize("part", ["vision", "decode"])
def test_no_gpu_is_asked_for_by_default(part: str) -> None:
    assert not [name for name in container(pod_of(render(), part))["resources"]["limits"] if "/" in name]


@pytest.mark.parametrize("part", ["vision", "decode"])
@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "nvidia.com/gpu.shared"])
def test_gpus_of_any_kind_are_limits_beside_the_others(part: str, resource: str) -> None:
    limits = container(pod_of(render({part: {"gpu": {"count": 2, "resource": resource}}}), part))["resources"]["limits"]
    assert limits[resource] == 2
    assert "memory" in limits


def test_each_pool_goes_to_its_own_nodes() -> None:
    rendered = render(profile="two-pools")
    assert pod_of(rendered, "vision")["nodeSelector"] == {"pool": "vision"}
    cluster = rendered.get("RayService", "decode")["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["nodeSelector"] == {"pool": "decode"}
    assert worker["tolerations"]
    assert "nodeSelector" not in cluster["headGroupSpec"]["template"]["spec"]


def test_the_memory_of_redis_follows_from_what_it_may_hold() -> None:
    rendered = render({"redis": {"maxMemoryMiB": 4096, "resources": {"limits": {"cpu": "2"}}}})
    assert container(pod_of(rendered, "redis"))["resources"] == {
        "requests": {"cpu": "1", "memory": "6144Mi"},
        "limits": {"cpu": "2", "memory": "6144Mi"},
    }


def test_priority_classes_put_the_front_before_the_pools() -> None:
    rendered = render({"priorityClasses": {"create": True, "value": 5000}})
    classes = {one["metadata"]["name"]: one["value"] for one in rendered.all("PriorityClass")}
    values = {
        part: classes[pod_of(rendered, part)["priorityClassName"]] for part in ("gateway", "redis", "vision", "decode")
    }
    assert values == {"gateway": 5000, "redis": 5000, "vision": 4000, "decode": 4000}


def test_pods_of_the_gateway_are_spread_over_zones_and_nodes() -> None:
    constraints = pod_of(render(), "gateway")["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]


def test_vision_is_reached_by_a_headless_service_so_that_gateways_balance() -> None:
    assert render().get("Service", "vision")["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("part", ["gateway", "vision", "decode"])
def test_a_pod_waits_before_it_stops_and_has_time_to_drain(part: str) -> None:
    pod = pod_of(render(), part)
    (command, pause_s) = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(pause_s)


@pytest.mark.parametrize("part", ["vision", "decode"])
def test_an_upgrade_never_needs_more_gpus_and_without_gpus_is_without_a_gap(part: str) -> None:
    def rolling(values: dict[str, Any]) -> dict[str, int]:
        found: dict[str, int] = render(values).get("Deployment", part)["spec"]["strategy"]["rollingUpdate"]
        return found

    assert rolling({}) == {"maxUnavailable": 0, "maxSurge": 1}
    assert rolling({part: {"gpu": {"count": 2, "resource": "nvidia.com/gpu"}}}) == {"maxUnavailable": 1, "maxSurge": 0}


# -- autoscaling


def _triggers(rendered: Rendered, part: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one["metadata"] for one in rendered.get("ScaledObject", part)["spec"]["triggers"]}


@pytest.mark.parametrize("part", ["vision", "decode"])
@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_an_autoscaler_owns_the_number_of_pods(part: str, kind: str) -> None:
    assert "replicas" in render().get("Deployment", part)["spec"]
    assert "replicas" not in render({part: {"autoscaling": {"kind": kind}}}).get("Deployment", part)["spec"]


def test_each_pool_scales_on_its_own_backlog() -> None:
    rendered = render({"vision": KEDA, "decode": KEDA})
    vision, decode = _triggers(rendered, "vision"), _triggers(rendered, "decode")
    assert "nvila_vision_backlog_seconds" in vision["backlog"]["query"]
    assert 'app_kubernetes_io_component="vision"' in vision["backlog"]["query"]
    assert "nvila_decode_backlog_seconds" in decode["backlog"]["query"]
    assert float(vision["backlog"]["threshold"]) == 2


def test_a_pod_with_more_gpus_is_worth_more_towers() -> None:
    values = {"autoscaling": {"kind": "keda", "targetBusy": 0.5}, "gpu": {"count": 4}}
    assert float(_triggers(render({"vision": values}), "vision")["busy"]["threshold"]) == 2.0


@pytest.mark.parametrize("part", ["vision", "decode"])
def test_missing_metrics_lead_to_the_fallback_and_not_to_an_empty_pool(part: str) -> None:
    rendered = render({part: {"autoscaling": {"kind": "keda", "fallbackReplicas": 5}}})
    spec = rendered.get("ScaledObject", part)["spec"]
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 5}
    for trigger in spec["triggers"]:
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert "vector(0)" not in trigger["metadata"]["query"]
        assert trigger["metricType"] == "AverageValue"  # the only kind that KEDA has a fallback for


@pytest.mark.parametrize("part", ["vision", "decode"])
def test_shrinking_looks_back_longer_than_growing(part: str) -> None:
    for kind in ("keda", "hpa"):
        rendered = render({part: {"autoscaling": {"kind": kind}}})
        if kind == "keda":
            behavior = rendered.get("ScaledObject", part)["spec"]["advanced"]["horizontalPodAutoscalerConfig"][
                "behavior"
            ]
        else:
            behavior = rendered.get("HorizontalPodAutoscaler", part)["spec"]["behavior"]
        assert (
            behavior["scaleDown"]["stabilizationWindowSeconds"]
            >= 300
            > behavior["scaleUp"]["stabilizationWindowSeconds"]
        )
        assert all(policy["value"] <= 25 for policy in behavior["scaleDown"]["policies"])


def test_scale_to_zero_is_off_by_default() -> None:
    assert render({"vision": KEDA}).get("ScaledObject", "vision")["spec"]["minReplicaCount"] == 1


def test_an_empty_pool_is_woken_by_a_request_that_the_gateway_holds_for_long_enough() -> None:
    sleepy = {"kind": "keda", "scaleToZero": {"enabled": True, "wakeSeconds": 200, "idleSeconds": 900}}
    rendered = render({"vision": {"autoscaling": sleepy}})
    spec = rendered.get("ScaledObject", "vision")["spec"]
    assert (spec["minReplicaCount"], spec["cooldownPeriod"]) == (0, 900)
    wake = _triggers(rendered, "vision")["wake"]
    assert "nvila_requests_in_flight" in wake["query"]
    assert 'component="gateway"' in wake["query"]
    gateway = container(pod_of(rendered, "gateway"))
    assert environment(gateway)["NVILA_GATEWAY_RECOVERY_S"] == "200"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/health/live"


def test_lost_metrics_of_a_pool_that_may_sleep_are_not_taken_for_an_empty_pool() -> None:
    sleepy = {"autoscaling": {"kind": "keda", "scaleToZero": {"enabled": True}}}
    rendered = render({"vision": sleepy, "monitoring": {"rules": True}})
    triggers = _triggers(rendered, "vision")
    for name in ("backlog", "busy"):
        assert re.search(
            r" or \(vector\(0\) unless on\(\) \(up\{.*\} == 0 and max_over_time\(up\{.*\}\[1h\]\) == 1\)\)$",
            triggers[name]["query"],
        )
    (rule,) = rendered.all("PrometheusRule")
    alerts = {one["alert"]: one["expr"] for group in rule["spec"]["groups"] for one in group["rules"]}
    assert alerts["NvilaVisionMissing"].startswith("max(up{")


# -- Ray


def test_both_ways_of_upgrading_are_told_to_kuberay() -> None:
    assert render({"decode": RAY}).get("RayService", "decode")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    stepwise = render({"decode": RAY | {"rayservice": INCREMENTAL}}).get("RayService", "decode")["spec"][
        "upgradeStrategy"
    ]
    assert stepwise["type"] == "NewClusterWithIncrementalUpgrade"
    assert stepwise["clusterUpgradeOptions"]["gatewayClassName"] == "istio"


def test_traffic_goes_to_workers_only() -> None:
    rendered = render({"decode": RAY})
    assert rendered.get("Service", "decode")["spec"]["selector"]["ray.io/node-type"] == "worker"
    assert (
        rendered.get("PodDisruptionBudget", "decode")["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "worker"
    )


def test_replicas_of_a_ray_cluster_are_counted_once() -> None:
    monitors = {"monitoring": {"monitors": True}}
    ray = render(monitors | {"decode": RAY}).get("PodMonitor", "decode")["spec"]
    assert ray["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    plain = render(monitors).get("PodMonitor", "decode")["spec"]
    assert "ray.io/node-type" not in plain["selector"]["matchLabels"]


# -- monitoring


def test_prometheus_has_a_key_for_the_gateway_unless_none_is_asked_for() -> None:
    monitors = {"monitoring": {"monitors": True}}
    (endpoint,) = render(monitors).get("ServiceMonitor", "gateway")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "nvila-gateway-keys", "key": "operator-key"}
    (endpoint,) = render(monitors | {"gateway": {"auth": {"mode": "none"}}}).get("ServiceMonitor", "gateway")["spec"][
        "endpoints"
    ]
    assert "authorization" not in endpoint


def test_monitors_scrape_ports_that_pods_have_and_keep_the_labels_that_queries_use() -> None:
    rendered = render({"monitoring": {"monitors": True}, "tracing": {"collector": {"enabled": True}}})
    for part in ("vision", "decode", "collector"):
        spec = rendered.get("PodMonitor", part)["spec"]
        (endpoint,) = spec["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in container(pod_of(rendered, part))["ports"]}
        assert spec["podTargetLabels"] == ["app.kubernetes.io/instance", "app.kubernetes.io/component"]


@pytest.mark.parametrize(("named", "claim"), [("", "nvila-gateway"), ("shared", "shared")])
def test_the_room_of_the_claim_is_watched_by_its_own_name(named: str, claim: str) -> None:
    def watched(persistence: dict[str, Any]) -> list[str]:
        values = {"monitoring": {"rules": True}, "gateway": {"data": {"persistence": persistence}}}
        (rule,) = render(values).get("PrometheusRule", "alerts")["spec"]["groups"]
        return [one["expr"] for one in rule["rules"] if one["alert"] == "NvilaStorageFull"]

    chosen = f'{{namespace="apps",persistentvolumeclaim="{claim}"}}'
    (expr,) = watched({"enabled": True, "existingClaim": named})
    assert expr.split() == [
        f"min(kubelet_volume_stats_available_bytes{chosen}",
        "/",
        f"kubelet_volume_stats_capacity_bytes{chosen})",
        "<",
        "0.1",
    ]
    assert watched({"enabled": False}) == []


# -- tracing


def test_spans_go_nowhere_by_default_to_our_collector_or_to_another() -> None:
    def endpoint(values: dict[str, Any]) -> str | None:
        return environment(container(pod_of(render(values), "vision"))).get("OTEL_EXPORTER_OTLP_ENDPOINT")

    collector = {"collector": {"enabled": True}}
    assert endpoint({}) is None
    assert endpoint({"tracing": collector}) == "http://nvila-collector.apps.svc.cluster.local:4317"
    assert endpoint({"tracing": collector | {"endpoint": "https://elsewhere:4318"}}) == "https://elsewhere:4318"


def test_the_collectors_pipeline_uses_every_exporter() -> None:
    exporters = {"otlp": {"endpoint": "a:4317"}, "debug": {}}
    text = render({"tracing": {"collector": {"enabled": True, "exporters": exporters}}}).get("ConfigMap", "collector")
    config = yaml.safe_load(text["data"]["collector.yaml"])
    assert config["exporters"] == exporters
    assert config["service"]["pipelines"]["traces"]["exporters"] == sorted(exporters)


def test_content_is_recorded_only_when_asked_for() -> None:
    on = {"tracing": {"collector": {"enabled": True}, "captureContent": True}}
    name = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
    assert environment(container(pod_of(render(on), "gateway")))[name] == "true"
    assert name not in environment(container(pod_of(render({"tracing": {"collector": {"enabled": True}}}), "gateway")))


# -- the model


def _prepare(values: dict[str, Any]) -> list[str]:
    pod = pod_of(render({"model": values}), "vision")
    found = [one for one in pod.get("initContainers", []) if one["name"] == "prepare-model"]
    return found[0]["args"] if found else []


def test_weights_come_from_where_the_values_say() -> None:
    hub = {"source": "hub", "hub": {"repo": "ours/nvila", "revision": "abc"}, "sha256": "0" * 64}
    assert _prepare({}) == ["random", "/models/random-tiny"]
    assert _prepare(hub) == ["hub", "/models/nvila", "--repo=ours/nvila", "--revision=abc", f"--sha256={'0' * 64}"]
    assert _prepare({"source": "objectStore", "objectStore": {"path": ":s3:b/m"}}) == ["objectStore", "/models/m"]
    assert _prepare({"source": "existingClaim", "existingClaim": {"name": "weights"}}) == []


@pytest.mark.parametrize("source", ["random", "hub", "objectStore", "existingClaim"])
def test_both_pools_read_the_same_folder_which_is_mounted_read_only(source: str) -> None:
    values = {"source": source, "hub": {"repo": "ours/nvila"}, "objectStore": {"path": ":s3:b/nvila"},
              "existingClaim": {"name": "claim", "subPath": "checkpoints/nvila"}}  # fmt: skip
    rendered = render({"model": values})
    for part in ("vision", "decode"):
        one = container(pod_of(rendered, part))
        folder = environment(one)[f"NVILA_{part.upper()}_MODEL"]
        (mount,) = [mount for mount in one["volumeMounts"] if mount["name"] == "model"]
        assert folder.startswith(mount["mountPath"])
        assert mount["readOnly"] is True


# -- what helm says


def _notes(*sets: str) -> str:
    return run("install", "nvila", str(CHART), "--dry-run=client", *[part for one in sets for part in ("--set", one)])


def test_notes_print_the_command_for_the_first_answer() -> None:
    notes = _notes().split("NOTES:")[1]
    assert "curl" in notes
    assert "/v1/chat/completions" in notes
    assert "helm test nvila" in notes
    assert "words mean nothing" in notes


def test_notes_say_what_is_unsafe_or_needs_a_hand() -> None:
    external = ("redis.enabled=false", "redis.external.host=h", "redis.auth.existingSecret=s")
    notes = _notes("gateway.auth.mode=none", "gateway.ingress.enabled=true", "gateway.replicas=3", *external)
    notes = notes.split("NOTES:")[1]
    for said in ("everybody who can reach", "no TLS", "known to the pod", "ACL SETUSER gateway"):
        assert said in notes


def test_notes_give_users_of_an_external_redis_the_rights_that_the_programs_need() -> None:
    external = ("redis.enabled=false", "redis.external.host=h", "redis.auth.existingSecret=s")
    told = _notes(*external, "redis.external.cluster=true").splitlines()
    (gateway,) = [line for line in told if "ACL SETUSER gateway" in line]
    assert gateway.endswith(CLUSTER_RULES)
    assert "+asking" not in _notes(*external)


def test_notes_name_whom_the_certificate_must_be_for() -> None:
    told = [line.strip() for line in _notes("tls.enabled=true", "tls.existingSecret=s").splitlines()]
    assert {f"nvila-{part}.default.svc.cluster.local" for part in ("vision", "decode")} <= set(told)


def test_extra_objects_may_use_values_of_the_release() -> None:
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-mine"}}
    assert "nvila-mine" in {one["metadata"]["name"] for one in render({"extraObjects": [extra]})}
