"""The workers of recordings: what is started when they are wanted, what they share with the gateway, whom they ask."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from nvila.recordings.settings import RecordingsSettings
from tests.charts.helm import HelmError, container, environment, pod_of, render

DATABASE = {"database": {"existingSecret": "db"}}
SHARED = {"gateway": {"data": {"persistence": {"enabled": True}}}}
WANTED: dict[str, Any] = {"recordings": {"enabled": True, **DATABASE}, **SHARED}


def wanted(**more: Any) -> dict[str, Any]:
    return {**WANTED, "recordings": {**WANTED["recordings"], **more}}


def components(rendered: Any) -> set[str]:
    return {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in rendered}


def test_nothing_of_them_is_there_unless_they_are_wanted() -> None:
    assert "recordings" not in components(render())
    told = environment(container(pod_of(render(), "gateway")))
    assert {name: value for name, value in told.items() if "RECORDINGS" in name} == {
        "NVILA_GATEWAY_RECORDINGS": "false"
    }


@pytest.mark.parametrize("kind", ["Deployment", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"])
def test_all_of_them_is_there_when_they_are_wanted(kind: str) -> None:
    assert render(WANTED).find(kind, "recordings") is not None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (wanted(podDisruptionBudget={"enabled": False}), "PodDisruptionBudget"),
        ({**WANTED, "networkPolicy": {"enabled": False}}, "NetworkPolicy"),
        (WANTED, "PodMonitor"),
    ],
)
def test_a_switch_leaves_its_object_out(values: dict[str, Any], kind: str) -> None:
    assert render(values).find(kind, "recordings") is None


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"recordings": {"enabled": True}, **SHARED}, "recordings.database.existingSecret"),
        ({"recordings": {"enabled": True, **DATABASE}}, "gateway.data.persistence.enabled"),
    ],
)
def test_what_they_cannot_do_without_is_asked_for(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(HelmError, match=re.escape(advice)):
        render(values)


def test_gateway_and_workers_have_one_database_one_cold_store_and_one_folder() -> None:
    rendered = render(wanted(coldUrl="s3://b/p", coldSecret="store"))
    gateway, worker = (container(pod_of(rendered, part)) for part in ("gateway", "recordings"))
    ours, theirs = environment(gateway), environment(worker)

    assert ours["NVILA_GATEWAY_RECORDINGS"] == "true"
    assert ours["NVILA_GATEWAY_RECORDINGS_DATABASE_URL"] == theirs["NVILA_RECORDINGS_DATABASE_URL"] == "db/url"
    assert ours["NVILA_GATEWAY_RECORDINGS_COLD_URL"] == theirs["NVILA_RECORDINGS_COLD_URL"] == "s3://b/p"
    assert ours["NVILA_GATEWAY_DATA_DIR"] == theirs["NVILA_RECORDINGS_DATA_DIR"]
    for told in (ours, theirs):
        assert not [name for name in told if name.endswith("RECORDINGS_DIR")], "both the data folder's"
    for program in (gateway, worker):
        (mounted,) = [one["mountPath"] for one in program["volumeMounts"] if one["name"] == "data"]
        assert mounted == ours["NVILA_GATEWAY_DATA_DIR"]
    assert gateway["envFrom"] == worker["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert gateway["image"] == worker["image"]
    volumes = [
        one for part in ("gateway", "recordings") for one in pod_of(rendered, part)["volumes"] if one["name"] == "data"
    ]
    assert volumes[0] == volumes[1] == {"name": "data", "persistentVolumeClaim": {"claimName": "nvila-gateway"}}


def test_gateway_and_workers_seal_secrets_with_the_same_keys() -> None:
    plain, sealed = render(WANTED), render(wanted(secretKeys={"existingSecret": "keys-of-ours"}))
    for part, name in (
        ("gateway", "NVILA_GATEWAY_RECORDINGS_SECRET_KEYS"),
        ("recordings", "NVILA_RECORDINGS_SECRET_KEYS"),
    ):
        assert name not in environment(container(pod_of(plain, part)))
        assert environment(container(pod_of(sealed, part)))[name] == "keys-of-ours/keys"


def test_no_store_needs_no_credentials() -> None:
    for part in ("gateway", "recordings"):
        one = container(pod_of(render(WANTED), part))
        assert "envFrom" not in one
        assert not [name for name in environment(one) if name.endswith("COLD_URL")]


def test_command_port_and_probes_are_the_programs_own() -> None:
    worker = container(pod_of(render(WANTED), "recordings"))

    assert worker["command"][:2] == ["python", "-m"]
    assert importlib.util.find_spec(worker["command"][2]) is not None
    (port,) = worker["ports"]
    assert port == {"name": "http", "containerPort": RecordingsSettings.model_fields["http_port"].default}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert worker[probe]["httpGet"] == {"path": "/health/live", "port": "http"}


def test_a_pod_has_time_to_give_its_jobs_back() -> None:
    pod = pod_of(render(wanted(drainSeconds=40)), "recordings")

    assert environment(container(pod))["NVILA_RECORDINGS_DRAIN_S"] == "40"
    assert pod["terminationGracePeriodSeconds"] == 60


def test_they_use_the_gateways_role_at_the_cache() -> None:
    told = environment(container(pod_of(render(WANTED), "recordings")))

    assert told["NVILA_RECORDINGS_REDIS_URL"].startswith("redis://gateway:$(REDIS_PASSWORD)@")
    assert told["REDIS_PASSWORD"] == "nvila-redis/gateway-password"


def test_they_reach_what_they_need_and_nobody_calls_them_but_for_metrics() -> None:
    rendered = render({**wanted(settings={"camera_ports": [554]}), "tracing": {"collector": {"enabled": True}}})
    policy = rendered.get("NetworkPolicy", "recordings")["spec"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": 8082}]
    out = {one["port"] for rule in policy["egress"] for one in rule["ports"]}
    assert out == {53, 6379, 4317, 4318, 8001, 9000, 5432, 80, 443, 8080, 8443, 554}
    for part in ("vision", "decode", "redis", "collector"):
        peers = [peer for rule in rendered.get("NetworkPolicy", part)["spec"]["ingress"] for peer in rule["from"]]
        assert "recordings" in {
            peer["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
            for peer in peers
            if "podSelector" in peer
        }, part
    gateway = rendered.get("NetworkPolicy", "gateway")["spec"]["egress"]
    assert 5432 in {one["port"] for rule in gateway for one in rule["ports"]}


def test_monitors_scrape_their_port() -> None:
    rendered = render({**WANTED, "monitoring": {"monitors": True}})
    (endpoint,) = rendered.get("PodMonitor", "recordings")["spec"]["podMetricsEndpoints"]

    assert endpoint["port"] in {port["name"] for port in container(pod_of(rendered, "recordings"))["ports"]}
