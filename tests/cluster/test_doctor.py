"""The doctor names each fault of a cluster, and what mends it."""

from __future__ import annotations

import time

import pytest

from nvila.cli import cluster_doctor
from nvila.cli.cluster_doctor import CHECKS
from tests.cluster import made
from tests.cluster.conftest import Run
from tests.cluster.kube_server import Json, State
from tests.cluster.made import NAMESPACE


def test_a_cluster_that_is_ready_for_nvila_has_nothing_to_mend(nvila: Run) -> None:
    outcome = nvila(made.empty(), "doctor", "--json")

    assert outcome.code == 0
    assert {one["level"] for one in outcome.json["findings"]} == {"ok", "note"}
    assert {one["check"] for one in outcome.json["findings"]} >= CHECKS.keys() - {"policies"}
    assert outcome.finding("not installed")["mend"] == f"helm install nvila charts/nvila -n {NAMESPACE}"


def test_a_healthy_release_has_nothing_to_mend(nvila: Run) -> None:
    outcome = nvila(made.installed(), "doctor", "--json")

    assert outcome.code == 0
    assert {one["level"] for one in outcome.json["findings"]} == {"ok"}
    assert outcome.finding("vision: 1 of 1 ready")


def test_findings_are_readable_lines_with_the_mend_below(nvila: Run) -> None:
    state = made.empty()
    state.missing_groups = {"ray.io"}
    outcome = nvila(state, "doctor")

    lines = outcome.out.splitlines()
    place = next(number for number, line in enumerate(lines) if "KubeRay is not installed" in line)
    assert lines[place + 1].strip().startswith("→ helm install kuberay-operator")
    assert lines[-1] == "0 to mend, 1 to know, 0 could not be looked at"


@pytest.mark.parametrize(
    ("group", "resource", "mend"),
    [
        ("ray.io", "rayservices", "helm install kuberay-operator"),
        ("keda.sh", "scaledobjects", "helm install keda "),
        ("monitoring.coreos.com", "podmonitors", "helm install monitoring kube-prometheus-stack"),
        ("gateway.networking.k8s.io", "httproutes", "kubectl apply -f https://github.com/kubernetes-sigs/gateway-api"),
    ],
)
def test_a_missing_resource_definition_is_named_with_its_installation(
    nvila: Run, group: str, resource: str, mend: str
) -> None:
    state = made.empty()
    state.missing_groups = {group}
    outcome = nvila(state, "doctor", "--json")

    assert outcome.code == 0
    found = outcome.finding(f"no {resource}.{group}")
    assert found["level"] == "warn"
    assert found["mend"].startswith(mend)


def test_a_lacking_right_is_named_and_the_other_checks_go_on(nvila: Run) -> None:
    state = made.empty()
    state.forbidden = {("list", "nodes"), ("list", "resourcequotas")}
    outcome = nvila(state, "doctor", "--json")

    assert outcome.code == 0
    nodes = outcome.finding("list nodes")
    assert nodes["level"] == "unknown"
    assert 'apiGroups: [""], resources: ["nodes"], verbs: ["list"]' in nodes["what"]
    assert nodes["mend"] == "kubectl create clusterrole nvila-operator --verb=list --resource=nodes"
    quotas = outcome.finding("list resourcequotas")
    assert quotas["mend"] == f"kubectl create role nvila-operator --verb=list --resource=resourcequotas -n {NAMESPACE}"
    assert outcome.finding("standard; default standard")


def test_rights_that_helm_lacks_are_named_before_it_fails(nvila: Run) -> None:
    state = made.empty()
    state.denied_creates = {"secrets", "statefulsets"}
    found = nvila(state, "doctor", "--json").finding("may not create")

    assert "statefulsets.apps, secrets" in found["what"]
    assert "rolebinding" in found["mend"]


def test_an_expired_token_ends_the_examination_with_its_own_exit_status(nvila: Run) -> None:
    outcome = nvila(made.empty(), "doctor", "--json", token="old")

    assert outcome.code == 4
    (found,) = outcome.json["findings"]
    assert "refuses the credentials of context test" in found["what"]
    assert "log in again" in found["mend"]


def test_a_slow_watch_is_named(nvila: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_doctor, "WATCH_S", 1.0)
    state = made.installed()
    state.watch_delay_s = 30.0
    began_s = time.monotonic()
    outcome = nvila(state, "doctor", "--json")

    found = outcome.finding("a watch of pods says nothing")
    assert found["level"] == "warn"
    assert "NO_PROXY" in found["mend"]
    assert outcome.finding("vision: 1 of 1 ready")
    assert time.monotonic() - began_s < 20


def test_the_right_to_watch_is_named_where_it_lacks(nvila: Run) -> None:
    state = made.empty()
    state.forbidden = {("watch", "pods")}

    assert "--verb=watch --resource=pods" in nvila(state, "doctor", "--json").finding("watch pods")["mend"]


def test_a_server_that_is_down_is_named(nvila: Run) -> None:
    outcome = nvila(None, "doctor", "--json")

    assert outcome.code == 7
    (found,) = outcome.json["findings"]
    assert "nothing answers at http://127.0.0.1:9" in found["what"]
    assert "is the cluster up" in found["mend"]


def test_an_old_cluster_is_refused(nvila: Run) -> None:
    state = made.empty()
    state.version = {"major": "1", "minor": "26", "gitVersion": "v1.26.1"}

    assert "1.29 or newer is needed" in nvila(state, "doctor", "--json").finding("v1.26.1")["what"]


def test_no_gpu_nodes_is_a_fault_only_where_gpus_are_wanted(nvila: Run) -> None:
    state = made.empty()
    state.objects["/api/v1/nodes"] = {}
    state.add(made.node("cpu-1", {}))

    wanted = nvila(state, "doctor", "--json")
    assert wanted.code == 7
    assert "laptop-values.yaml" in wanted.finding("none of 1 nodes offers a GPU")["mend"]
    assert nvila(state, "doctor", "--json", "--cpu").code == 0


def test_cards_without_a_device_plugin_are_told_from_no_cards(nvila: Run) -> None:
    state = made.empty()
    state.objects["/api/v1/nodes"] = {}
    state.add(made.node("gpu-1", {}, {"feature.node.kubernetes.io/pci-10de.present": "true"}))
    found = nvila(state, "doctor", "--json").finding("NVIDIA cards")

    assert found["level"] == "fail"
    assert found["mend"].startswith("helm install gpu-operator")


def test_gpus_slices_drivers_and_taints_are_told(nvila: Run) -> None:
    state = made.empty()
    old = {"nvidia.com/cuda.driver-version.major": "525"}
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    state.add(made.node("gpu-3", {"nvidia.com/gpu": "4"}, old, taints=[taint]))
    outcome = nvila(state, "doctor", "--json")

    assert "12 × nvidia.com/gpu, 2 × nvidia.com/mig-3g.40gb" in outcome.finding("3 of 4 nodes offer")["what"]
    assert outcome.finding("gpu-3 has driver 525; 535 or newer is needed")["level"] == "fail"
    assert outcome.finding("tainted")["mend"].endswith(
        "[{key: nvidia.com/gpu, operator: Equal, value: present, effect: NoSchedule}]"
    )


def test_storage_without_a_default_is_told(nvila: Run) -> None:
    state = made.empty()
    state.add(made.storage_class("standard"))

    assert "kubectl annotate storageclass standard" in nvila(state, "doctor", "--json").finding("no default")["mend"]


def test_a_used_up_quota_is_a_fault(nvila: Run) -> None:
    state = made.empty()
    state.add(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "team", "namespace": NAMESPACE},
            "status": {
                "hard": {"requests.nvidia.com/gpu": "8", "requests.memory": "2Ti", "pods": "100"},
                "used": {"requests.nvidia.com/gpu": "8", "requests.memory": "1900Gi", "pods": "3"},
            },
        }
    )
    outcome = nvila(state, "doctor", "--json")

    assert outcome.finding("8 of 8 requests.nvidia.com/gpu")["level"] == "fail"
    assert outcome.finding("1900Gi of 2Ti")["level"] == "warn"


def _deny_all() -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "deny-all", "namespace": NAMESPACE},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
    }


def test_a_default_deny_policy_is_told_before_the_installation_and_fine_after_it(nvila: Run) -> None:
    before, after = made.empty(), made.installed()
    before.add(_deny_all())
    after.add(_deny_all())

    assert nvila(before, "doctor", "--json").finding("deny-all denies all ingress and egress")["level"] == "warn"
    assert nvila(after, "doctor", "--json").finding("deny-all")["level"] == "ok"


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        ("failed to authorize: 401 Unauthorized", "images.pullSecrets"),
        ("manifest unknown", "correct the tag or digest"),
        ("dial tcp: i/o timeout", "images.registry"),
    ],
)
def test_an_image_that_cannot_be_pulled_is_named_with_its_cause(nvila: Run, message: str, mend: str) -> None:
    state = made.installed()
    made.break_pod(state, "vision", waiting={"reason": "ImagePullBackOff", "message": message})
    outcome = nvila(state, "doctor", "--json")

    assert outcome.code == 7
    assert mend in outcome.finding("docker.io/nvila/vision:0.1.0-gpu cannot be pulled")["mend"]


def _oom(state: State) -> None:
    made.break_pod(state, "vision", last={"reason": "OOMKilled", "exitCode": 137})


def _redis_oom(state: State) -> None:
    made.break_pod(state, "redis", last={"reason": "OOMKilled", "exitCode": 137})


def _crash(state: State) -> None:
    made.break_pod(state, "gateway", last={"reason": "Error", "exitCode": 1})


def _no_secret(state: State) -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hub-token" not found'}
    made.break_pod(state, "vision", waiting=waiting)


def _no_room(state: State) -> None:
    made.unschedulable(state, "vision", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")


def _no_metrics(state: State) -> None:
    scaled = state.get(f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects", "nvila-vision")
    state.put({**scaled, "status": {"conditions": [{"type": "Fallback", "status": "True"}]}})


@pytest.mark.parametrize(
    ("fault", "said", "mend"),
    [
        (_oom, "ended 4 times, last with OOMKilled (137)", "raise vision.resources.limits.memory"),
        (_redis_oom, "ended 4 times, last with OOMKilled (137)", "raise redis.maxMemoryMiB"),
        (_crash, "ended 4 times, last with Error (1)", "kubectl logs -n apps -l app.kubernetes.io/component=gateway"),
        (_no_secret, 'secret "hub-token" not found', "kubectl get secret,configmap -n apps"),
        (_no_room, "Insufficient nvidia.com/gpu", "free or add nodes with nvidia.com/gpu"),
        (_no_metrics, "metrics are missing: it holds the fallback", "monitoring.prometheusUrl"),
    ],
)
def test_why_a_pool_is_not_ready_is_told_with_its_mend(nvila: Run, fault: object, said: str, mend: str) -> None:
    state = made.installed()
    assert callable(fault)
    fault(state)

    assert mend in nvila(state, "doctor", "--json").finding(said)["mend"]


def test_workers_of_recordings_that_end_again_are_told_with_where_they_say_why(nvila: Run) -> None:
    state = made.installed()
    made.break_pod(state, "recordings", last={"reason": "Error", "exitCode": 1})

    found = nvila(state, "doctor", "--json").finding("recordings: 1 of 2 ready: recordings ended 4 times")
    assert "-l app.kubernetes.io/component=recordings" in found["mend"]


def test_an_operator_that_does_not_run_is_noticed(nvila: Run) -> None:
    state = made.installed()
    service = dict(state.get(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices", "nvila-decode"))
    del service["status"]
    state.put(service)

    assert "kuberay-operator" in nvila(state, "doctor", "--json").finding("KubeRay has not looked")["mend"]


def test_a_namespace_that_does_not_exist_is_told(nvila: Run) -> None:
    outcome = nvila(made.empty(), "doctor", "--json", "-n", "elsewhere")

    assert outcome.finding("no namespace elsewhere")["mend"] == "kubectl create namespace elsewhere"
