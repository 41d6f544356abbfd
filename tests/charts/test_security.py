"""Least of everything: users, capabilities, files, tokens, roles, network, secrets."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.cache.servers import Cluster, connect
from nvila.decode.settings import Settings as DecodeSettings
from nvila.gateway.settings import GatewaySettings
from tests.charts.helm import PROFILES, Rendered, container, environment, pod_of, render

FULL: dict[str, Any] = {
    "tracing": {"collector": {"enabled": True}},
    "decode": {"mode": "rayservice", "autoscaling": {"kind": "ray"}},
    "model": {"source": "objectStore", "objectStore": {"path": ":s3:b/m", "existingSecret": "store"}},
}


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "everything"])
def test_every_pod_meets_the_restricted_pod_security_standard(values: dict[str, Any]) -> None:
    for name, pod in render(values).pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume], name
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            context = one["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name


def test_no_pod_has_a_token_but_the_ray_head_that_asks_for_pods() -> None:
    with_token = [name for name, pod in render(FULL).pods() if pod["automountServiceAccountToken"]]
    assert with_token == ["RayService nvila-decode head"]
    assert not [
        name for name, pod in render({"decode": {"mode": "rayservice"}}).pods() if pod["automountServiceAccountToken"]
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_chart_grants_nothing(profile: str) -> None:
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & {
        one["kind"] for one in render(profile=profile)
    }


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "everything"])
def test_service_variables_of_other_pods_stay_out(values: dict[str, Any]) -> None:
    assert all(pod["enableServiceLinks"] is False for _, pod in render(values).pods())


def test_every_container_says_how_much_it_needs() -> None:
    for name, pod in render(FULL).pods():
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            assert one["resources"]["requests"], f"{name} {one['name']}"
            assert "memory" in one["resources"]["limits"], f"{name} {one['name']}"


def test_secrets_are_named_and_never_written_into_pods() -> None:
    rendered = render(profile="locked-down")
    assert not rendered.all("Secret")
    for name, pod in rendered.pods():
        for one in pod["containers"]:
            for entry in one.get("env", []):
                if entry["name"] in ("API_KEYS", "OPERATOR_KEY", "REDIS_PASSWORD", "API_KEY"):
                    assert "secretKeyRef" in entry["valueFrom"], name


def test_each_role_is_given_its_own_password_only() -> None:
    for part in ("gateway", "vision", "decode"):
        told = environment(container(pod_of(render(), part)))
        assert told["REDIS_PASSWORD"] == f"nvila-redis/{part}-password"
        assert told[f"NVILA_{part.upper()}_REDIS_URL"].startswith(f"redis://{part}:$(REDIS_PASSWORD)@")


def test_generated_secrets_differ_from_each_other() -> None:
    values = [value for one in render().all("Secret") for value in one["data"].values()]
    assert len(values) == len(set(values)) == 6


def test_ray_asks_for_a_token_unless_told_otherwise() -> None:
    def mode(values: dict[str, Any]) -> str:
        spec = render({"decode": {"mode": "rayservice", "rayservice": values}}).get("RayService", "decode")["spec"]
        found: str = spec["rayClusterConfig"]["authOptions"]["mode"]
        return found

    assert mode({}) == "token"
    assert mode({"auth": "disabled"}) == "disabled"


def test_redis_over_tls_is_verified_with_the_given_authority() -> None:
    rendered = render({"redis": {"tls": {"enabled": True, "existingSecret": "certificates"}}})
    for part in ("gateway", "vision", "decode"):
        pod = pod_of(rendered, part)
        url = environment(container(pod))[f"NVILA_{part.upper()}_REDIS_URL"]
        assert url.startswith("rediss://")
        assert url.endswith("?ssl_ca_certs=/etc/nvila/redis-ca/ca.crt")
        (mount,) = [one for one in container(pod)["volumeMounts"] if one["mountPath"] == "/etc/nvila/redis-ca"]
        (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
        assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert "port 0\ntls-port 6379" in rendered.get("ConfigMap", "redis")["data"]["redis.conf"]


@pytest.mark.parametrize("mode", ["deployment", "rayservice"])
def test_programs_call_each_other_over_tls_only_when_told_to(mode: str) -> None:
    rendered = render(
        {
            "tls": {"enabled": True, "existingSecret": "internal"},
            "decode": {"mode": mode},
            "recordings": {"enabled": True, "database": {"existingSecret": "db"}},
            "gateway": {"data": {"persistence": {"enabled": True}}},
        }
    )
    programs = ("gateway", "recordings", "vision", "decode")
    pods = [(name, pod) for name, pod in rendered.pods() if any(f"nvila-{part}" in name for part in programs)]
    assert len(pods) == len(programs) + (mode == "rayservice")
    for name, pod in pods:
        (folder,) = [one["mountPath"] for one in container(pod)["volumeMounts"] if one["name"] == "tls"]
        assert {"name": "tls", "secret": {"secretName": "internal"}} in pod["volumes"], name
        told = {key: value for key, value in environment(container(pod)).items() if key.endswith("_TLS_DIR")}
        assert list(told.values()) == [folder] or container(pod)["args"] == ["--tls-folder", folder], name
    port = int(environment(container(pods[-1][1])).get("NVILA_DECODE_TLS_PORT", 9443))
    assert port == DecodeSettings.model_fields["tls_port"].default
    for part in ("gateway", "recordings"):
        told = environment(container(pod_of(rendered, part)))
        assert told[f"NVILA_{part.upper()}_DECODE_TARGET"].endswith(f":{port}")
    (served,) = rendered.get("Service", "decode")["spec"]["ports"]
    assert (served["port"], served["appProtocol"]) == (port, "https")
    callers = {"gateway", "recordings"} | ({"decode"} if mode == "rayservice" else set())
    assert _callers(rendered, "decode", port) == callers
    assert _callers(rendered, "decode", 9000) == callers - {"gateway", "recordings"}


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("is_cluster", [False, True])
def test_the_programs_can_read_the_address_of_an_external_redis(has_tls: bool, is_cluster: bool) -> None:
    external = {"host": "redis.example.com", "port": 6380, "cluster": is_cluster}
    redis = {"enabled": False, "external": external, "auth": {"existingSecret": "s"}}
    rendered = render({"redis": redis | {"tls": {"enabled": has_tls, "existingSecret": "ca"}}})
    for part in ("gateway", "vision", "decode"):
        url = environment(container(pod_of(rendered, part)))[f"NVILA_{part.upper()}_REDIS_URL"]
        servers = connect(url, timeout_s=1)
        assert isinstance(servers, Cluster) is is_cluster
        assert url.split("://")[0] == f"redis{'s' if has_tls else ''}{'+cluster' if is_cluster else ''}"
    url = environment(container(pod_of(rendered, "gateway")))["NVILA_GATEWAY_REDIS_URL"]
    assert GatewaySettings(auth="none", redis_url=url).redis_url == url


# -- network


def _callers(rendered: Rendered, part: str, port: int) -> set[str] | None:
    """Components of the release that may call a port; None: everybody."""
    found: set[str] = set()
    for rule in rendered.get("NetworkPolicy", part)["spec"]["ingress"]:
        if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
            continue
        if "from" not in rule:
            return None
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                return None
            found.add(peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"])
    return found


@pytest.mark.parametrize(
    ("part", "port", "callers"),
    [
        ("vision", 8001, {"gateway"}),
        ("vision", 8000, set()),
        ("decode", 9000, {"gateway"}),
        ("redis", 6379, {"gateway", "vision", "decode"}),
        ("collector", 4317, {"gateway", "vision", "decode"}),
        ("test", 8080, set()),
        ("gateway", 8080, None),
    ],
)
def test_a_port_is_reached_by_those_who_need_it(part: str, port: int, callers: set[str] | None) -> None:
    rendered = render({"tracing": {"collector": {"enabled": True}}})
    assert _callers(rendered, part, port) == callers


def test_ray_nodes_reach_each_other_and_kuberay_the_head() -> None:
    rendered = render({"decode": {"mode": "rayservice"}})
    assert _callers(rendered, "decode", 6379) == {"decode"}
    assert _callers(rendered, "decode", 8265) is None
    assert _callers(rendered, "decode", 9000) == {"gateway", "decode"}


def test_every_component_that_makes_pods_has_a_policy_for_both_directions() -> None:
    rendered = render(FULL)
    for part in ("gateway", "vision", "redis", "decode", "collector", "test"):
        assert rendered.get("NetworkPolicy", part)["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_redis_calls_nobody_and_vision_only_what_it_needs() -> None:
    rendered = render()
    assert rendered.get("NetworkPolicy", "redis")["spec"]["egress"] == []
    ports = [one["port"] for rule in rendered.get("NetworkPolicy", "vision")["spec"]["egress"] for one in rule["ports"]]
    assert sorted(set(ports)) == [53, 6379]


def test_the_gateway_fetches_from_public_addresses_only_and_only_on_its_ports() -> None:
    rendered = render({"gateway": {"settings": {"fetch_ports": [443]}}})
    outside = [
        rule for rule in rendered.get("NetworkPolicy", "gateway")["spec"]["egress"]
        if any("ipBlock" in peer for peer in rule.get("to", []))
    ]  # fmt: skip
    (rule,) = outside
    assert [one["port"] for one in rule["ports"]] == [443]
    (peer,) = rule["to"]
    assert {"10.0.0.0/8", "169.254.0.0/16", "127.0.0.0/8"} <= set(peer["ipBlock"]["except"])


def test_a_mirror_of_the_hub_is_reached_on_its_port() -> None:
    hub = {"repo": "own/weights", "endpoint": "https://hub.example.com:8443/api"}
    policy = render({"model": {"source": "hub", "hub": hub}}).get("NetworkPolicy", "decode")
    assert 8443 in {one["port"] for rule in policy["spec"]["egress"] for one in rule["ports"]}


def test_external_services_are_allowed_on_their_ports() -> None:
    policy = render(profile="large").get("NetworkPolicy", "vision")
    ports = {one["port"] for rule in policy["spec"]["egress"] for one in rule["ports"]}
    assert {6380, 4317, 4318} <= ports


def test_a_closed_gateway_still_lets_the_test_ask() -> None:
    policy = render(profile="locked-down").get("NetworkPolicy", "gateway")
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "podSelector" in peer]
    assert "test" in {peer["podSelector"]["matchLabels"].get("app.kubernetes.io/component") for peer in peers}
