"""Status, wait, scale and bundle against a server that speaks the Kubernetes API, also when it fails."""

from __future__ import annotations

import json
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from nvila.cli import cluster_api, cluster_scale, cluster_wait
from nvila.cli.cluster_bundle import MASK, Redactor
from nvila.cli.cluster_scale import Wish
from nvila.cli.main import main
from tests.cluster import made
from tests.cluster.conftest import Run
from tests.cluster.kube_server import State, kubeconfig, serve
from tests.cluster.made import NAMESPACE

APPS = f"/apis/apps/v1/namespaces/{NAMESPACE}"
SCALED = f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects"
RAY = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices"

# -- status


def test_status_tells_pools_ranges_versions_and_what_they_do(nvila: Run) -> None:
    state = made.installed()
    state.pages = {"nvila-vision-0:8002": made.VISION_PAGE, "nvila-decode-worker-0:8100": made.DECODE_PAGE}
    outcome = nvila(state, "status", "--json")
    pools = outcome.json["pools"]

    assert outcome.code == 0
    assert list(pools) == ["gateway", "recordings", "vision", "redis", "decode", "collector"]
    assert (pools["vision"]["ready"], pools["vision"]["scaled_by"], pools["vision"]["range"]) == (1, "keda", [1, 8])
    assert pools["vision"]["version"] == "docker.io/nvila/vision:0.1.0-gpu"
    assert pools["vision"]["gpus"] == {"nvidia.com/gpu": 1}
    assert pools["vision"]["live"]["backlog_s"] == 1.5
    assert pools["vision"]["live"]["cache_written_bytes"] == 2.5e9
    assert (pools["decode"]["kind"], pools["decode"]["range"]) == ("RayService", [1, 6])
    assert (pools["decode"]["live"]["backlog_s"], pools["decode"]["live"]["running"]) == (0.75, 17)
    assert "its metrics need a key" in pools["gateway"]["live"]["untold"][0]


def test_status_is_a_table_for_people(nvila: Run) -> None:
    state = made.installed()
    state.pages = {"nvila-vision-0:8002": made.VISION_PAGE}
    out = nvila(state, "status").out

    line = next(line for line in out.splitlines() if line.startswith("vision"))
    assert line.split() == ["vision", "1/1", "keda", "1–8", "1.5", "s", "640", "tiles", "vision:0.1.0-gpu"]


def test_a_pool_that_is_not_ready_shows_in_the_exit_status(nvila: Run) -> None:
    assert nvila(made.installed(ready=False), "status").code == 7


def test_a_release_that_is_not_there_is_not_found(nvila: Run) -> None:
    outcome = nvila(made.empty(), "status")

    assert outcome.code == 5
    assert outcome.err.count("\n") == 1
    assert "helm install nvila" in outcome.err


def test_status_without_the_right_to_read_metrics_says_which_right(nvila: Run) -> None:
    state = made.installed()
    state.forbidden = {("get", "pods/proxy")}
    outcome = nvila(state, "status")

    assert outcome.code == 4
    assert 'resources: ["pods/proxy"], verbs: ["get"]' in outcome.err


def test_workers_of_recordings_are_a_pool_that_is_shown_waited_for_and_scaled(nvila: Run) -> None:
    state = made.installed()
    made.break_pod(state, "recordings", last={"reason": "Error", "exitCode": 1})
    status, wait = nvila(state, "status", "--json"), nvila(state, "wait", "--timeout", "1")

    assert status.code == 7
    assert (status.json["pools"]["recordings"]["ready"], status.json["pools"]["recordings"]["desired"]) == (1, 2)
    assert "recordings 1 of 2 (recordings ended 4 times" in wait.err
    assert nvila(state, "scale", "recordings=4").out == "recordings: Deployment nvila-recordings 2 → 4\n"


def test_workers_of_recordings_take_one_number_since_nothing_scales_them(nvila: Run) -> None:
    outcome = nvila(made.installed(), "scale", "recordings=2..4")

    assert outcome.code == 3
    assert outcome.err.strip().endswith("so it takes one number")


def test_a_cluster_without_kuberay_and_keda_has_plain_pools(nvila: Run) -> None:
    state = made.installed("laptop")
    state.missing_groups = {"ray.io", "keda.sh"}
    pools = nvila(state, "status", "--json").json["pools"]

    assert (pools["decode"]["kind"], pools["decode"]["scaled_by"]) == ("Deployment", None)


# -- errors, each in one line that names the mend


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"token": "another"}, 4, "log in again"),
        ({"forbidden": {("list", "pods")}}, 4, 'apiGroups: [""], resources: ["pods"], verbs: ["list"]'),
        ({"forbidden": {("list", "scaledobjects")}}, 4, 'apiGroups: ["keda.sh"], resources: ["scaledobjects"]'),
    ],
)
def test_a_refusal_names_the_right_or_the_login(nvila: Run, change: dict[str, object], code: int, said: str) -> None:
    state = made.installed()
    for name, value in change.items():
        setattr(state, name, value)
    outcome = nvila(state, "status")

    assert outcome.code == code
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_server_that_is_down_is_unavailable(nvila: Run) -> None:
    outcome = nvila(None, "status")

    assert outcome.code == 7
    assert "nothing answers at http://127.0.0.1:9" in outcome.err


def test_errors_are_json_where_json_is_asked_for(nvila: Run) -> None:
    assert nvila(None, "status", "--json").json["error"]["code"] == "unavailable"


def test_a_silent_server_costs_a_bounded_wait(nvila: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_api, "READ_S", 0.3)
    state = made.installed()
    state.delay_s = 2.0
    outcome = nvila(state, "status")

    assert outcome.code == 8
    assert "did not answer" in outcome.err


def test_a_certificate_that_the_kubeconfig_does_not_know_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files],
        check=True,
        capture_output=True,
    )
    with serve(made.installed(), (certificate, key)) as address:
        unknown = kubeconfig(tmp_path / "a", address)
        known = kubeconfig(tmp_path / "b", address, **{"certificate-authority": str(certificate)})
        codes = [main(["cluster", "status", "--kubeconfig", str(path)]) for path in (unknown, known)]

    assert codes == [7, 0]
    assert "certificate-authority-data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kubeconfig", "/does/not/exist"), "name one with --kubeconfig or KUBECONFIG"),
        (("--context", "production"), "no context 'production' in the kubeconfig; it has test"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_told(nvila: Run, words: tuple[str, str], said: str) -> None:
    outcome = nvila(made.empty(), "status", *words)

    assert outcome.code == 3
    assert said in outcome.err


def test_long_lists_come_in_pages_and_begin_anew_when_a_page_is_too_old(nvila: Run) -> None:
    state = made.installed()
    state.page_size, state.gone_pages = 2, 1

    assert list(nvila(state, "status", "--json").json["pools"]) == [
        "gateway",
        "recordings",
        "vision",
        "redis",
        "decode",
        "collector",
    ]


# -- wait


def _later(seconds: float, action: object, *arguments: object) -> threading.Thread:
    assert callable(action)
    thread = threading.Timer(seconds, action, arguments)
    thread.start()
    return thread


def _all_ready(state: State) -> None:
    for one in list(state.objects[f"/api/v1/namespaces/{NAMESPACE}/pods"].values()):
        made.make_ready(state, one)
    service = dict(state.get(RAY, "nvila-decode"))
    state.put({**service, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})


def test_wait_returns_soon_after_the_last_pool_is_ready_and_said_what_was_missing(nvila: Run) -> None:
    state = made.installed(ready=False)
    thread = _later(1.0, _all_ready, state)
    began_s = time.monotonic()
    outcome = nvila(state, "wait", "--timeout", "30")
    thread.join()

    assert outcome.code == 0
    assert time.monotonic() - began_s < cluster_wait.LOOK_S  # an event ended the wait, not the next look
    assert "vision 0/1" in outcome.err
    assert "nvila is ready after" in outcome.out


def test_wait_that_runs_out_says_what_is_missing(nvila: Run) -> None:
    state = made.installed()
    made.unschedulable(state, "vision", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    outcome = nvila(state, "wait", "--timeout", "1")

    assert outcome.code == 8
    assert "not ready after 1 s: vision 0 of 1 (cannot be placed" in outcome.err


def test_wait_lists_again_when_its_version_is_too_old(nvila: Run) -> None:
    state = made.installed(ready=False)
    state.gone_watches = 2
    thread = _later(3.0, _all_ready, state)
    outcome = nvila(state, "wait", "--timeout", "30")
    thread.join()

    assert outcome.code == 0
    assert state.gone_watches == 0


def test_wait_does_not_trust_a_watch_that_says_nothing(nvila: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_wait, "LOOK_S", 1.0)
    state = made.installed(ready=False)
    state.watch_delay_s = 60.0
    thread = _later(0.5, _all_ready, state)
    began_s = time.monotonic()
    outcome = nvila(state, "wait", "--timeout", "30")
    thread.join()

    assert outcome.code == 0
    assert time.monotonic() - began_s < 20


def test_wait_for_a_release_that_does_not_exist_yet(nvila: Run) -> None:
    outcome = nvila(made.empty(), "wait", "--timeout", "1")

    assert outcome.code == 8
    assert "nothing of release nvila is in namespace apps" in outcome.err


# -- scale


def test_scale_gives_an_autoscaler_its_range_and_ray_both_of_its_numbers(nvila: Run) -> None:
    state = made.installed()
    outcome = nvila(state, "scale", "vision=4", "decode=2..5")

    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "vision: ScaledObject nvila-vision 1..8 → 4",
        "decode: RayService nvila-decode 1..6 → 2..5",
    ]
    spec = state.get(SCALED, "nvila-vision")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (4, 4)
    service = state.get(RAY, "nvila-decode")["spec"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 5)
    applications = {one["name"]: one for one in yaml.safe_load(service["serveConfigV2"])["applications"]}
    (deployment,) = applications["decode"]["deployments"]
    assert deployment["autoscaling_config"]["min_replicas"] == 2
    assert deployment["autoscaling_config"]["max_replicas"] == 5
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == 16
    assert "deployments" not in applications["decode-metrics"]


def test_scale_sets_the_replicas_of_a_plain_pool(nvila: Run) -> None:
    state = made.installed("laptop")
    outcome = nvila(state, "scale", "vision=3", "--json")

    assert outcome.json["changes"] == [
        {"component": "vision", "object": "Deployment nvila-vision", "before": "1", "after": "3"}
    ]
    assert state.patches == [
        (f"{APPS}/deployments/nvila-vision/scale", "application/merge-patch+json", {"spec": {"replicas": 3}})
    ]


@pytest.mark.parametrize(
    ("profile", "words", "code", "said"),
    [
        ("two-pools", ["vision"], 3, "say vision=4"),
        ("two-pools", ["vision=many"], 3, "say vision=4"),
        ("two-pools", ["vision=4..2"], 3, "must go up"),
        ("two-pools", ["redis=2"], 3, "redis cannot be scaled; gateway, recordings, vision, decode can"),
        ("two-pools", ["vision=1", "vision=2"], 3, "named once"),
        ("two-pools", ["decode=0"], 3, "at least 1"),
        ("laptop", ["vision=2..4"], 3, "no autoscaler holds this pool"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_changes(
    nvila: Run, profile: str, words: list[str], code: int, said: str
) -> None:
    state = made.installed(profile)
    outcome = nvila(state, "scale", *words)

    assert outcome.code == code
    assert said in outcome.err
    assert state.patches == []


def test_a_right_that_scaling_lacks_is_named(nvila: Run) -> None:
    state = made.installed()
    state.forbidden = {("patch", "scaledobjects")}
    outcome = nvila(state, "scale", "vision=4")

    assert outcome.code == 4
    assert '{apiGroups: ["keda.sh"], resources: ["scaledobjects"], verbs: ["patch"]}' in outcome.err


def test_a_fixed_number_of_replicas_replaces_rays_and_a_range_keeps_its_other_numbers() -> None:
    text = yaml.safe_dump({"applications": [{"name": "decode", "import_path": "nvila.decode.app:application"}]})

    fixed = yaml.safe_load(cluster_scale.serve_config(text, Wish("decode", 3, 3)))
    assert fixed["applications"][0]["deployments"] == [{"name": "Replica", "num_replicas": 3}]
    ranged = yaml.safe_load(cluster_scale.serve_config(yaml.safe_dump(fixed), Wish("decode", 1, 3)))
    assert ranged["applications"][0]["deployments"] == [
        {"name": "Replica", "autoscaling_config": {"min_replicas": 1, "initial_replicas": 1, "max_replicas": 3}}
    ]


# -- bundle

SECRETS = (
    "value-password-1",
    "hf_abcdefgh12345678",
    "env-secret-value-2",
    "redis-pass-3",
    "log-bearer-token-4",
    "AKIAABCDEFGHIJKLMNOP",
    "config-map-pass-5",
    "annotation-secret-6",
    "manifest-password-1",
    "MIIEvQIBADANBg",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    "signed-part-7",
)


def _with_secrets() -> State:
    state = made.installed()
    state.add(
        made.helm_record(
            {
                "gateway": {"extraEnv": [{"name": "UPSTREAM_PASSWORD", "value": "value-password-1"}]},
                "decode": {"settings": {"token_dtype": "int8"}},
                "redis": {"auth": {"existingSecret": "redis-passwords"}},
                "objectStore": {"accessKey": "hf_abcdefgh12345678"},
            }
        )
    )
    one = made.of_component(state, "gateway")
    one["spec"]["containers"][0]["env"] += [
        {"name": "NVILA_GATEWAY_API_KEYS", "value": "env-secret-value-2"},
        {"name": "NVILA_GATEWAY_REDIS_URL", "value": "redis://gateway:redis-pass-3@redis:6379/0"},
    ]
    one["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": "annotation-secret-6",
        "note": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    }
    one["status"]["containerStatuses"][0]["restartCount"] = 1
    state.put(one)
    state.add(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "x", "namespace": NAMESPACE, "labels": one["metadata"]["labels"]},
            "data": {
                "app.conf": "password=config-map-pass-5\ntimeout=3\n",
                "key.pem": "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----",
            },
        }
    )
    name = one["metadata"]["name"]
    state.logs[(name, "gateway", False)] = (
        "asked with Authorization: Bearer log-bearer-token-4\n"
        "GET https://store/a?X-Amz-Credential=AKIAABCDEFGHIJKLMNOP&X-Amz-Signature=signed-part-7\n"
        "started with value-password-1 and 7 workers\n"
    )
    state.logs[(name, "gateway", True)] = "died of env-secret-value-2\n"
    return state


def _read(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.split("/", 1)[1]: archive.extractfile(member).read().decode()  # type: ignore[union-attr]  # files only
            for member in archive.getmembers()
        }


def test_a_bundle_holds_evidence_and_no_secret(nvila: Run, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    outcome = nvila(_with_secrets(), "bundle", "-o", str(path), "--json")
    files = _read(path)

    assert outcome.code == 0
    assert outcome.json["not_collected"] == []
    assert files.keys() >= {
        "doctor.json",
        "versions.json",
        "values.yaml",
        "objects/pods.json",
        "objects/rayservices.json",
        "objects/scaledobjects.json",
        "objects/nodes.json",
        "events.json",
    }
    everything = "\n".join(files.values())
    assert [secret for secret in SECRETS if secret in everything] == []
    assert path.stat().st_mode & 0o077 == 0


def test_a_bundle_keeps_what_helps(nvila: Run, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    nvila(_with_secrets(), "bundle", "-o", str(path))
    files = _read(path)

    values = yaml.safe_load(files["values.yaml"])
    assert values["values"]["decode"]["settings"]["token_dtype"] == "int8"
    assert values["values"]["redis"]["auth"]["existingSecret"] == "redis-passwords"
    assert values["chart"]["version"] == "0.1.0"
    log = next(text for name, text in files.items() if name.startswith("logs/nvila-gateway") and "previous" not in name)
    assert f"started with {MASK} and 7 workers" in log
    assert any(name.endswith("gateway.previous.log") for name in files)
    assert "redis:6379/0" in files["objects/pods.json"]
    assert "hub-token" in json.loads(files["secrets.json"])
    assert all(one["level"] == "ok" for one in json.loads(files["doctor.json"]))


def test_a_bundle_is_made_of_what_may_be_read(nvila: Run, tmp_path: Path) -> None:
    state = _with_secrets()
    state.forbidden = {("list", "secrets"), ("list", "nodes"), ("get", "pods/log")}
    path = tmp_path / "bundle.tar.gz"
    outcome = nvila(state, "bundle", "-o", str(path), "--json")

    assert outcome.code == 0
    missing = "\n".join(outcome.json["not_collected"])
    assert "values.yaml: not allowed: list secrets" in missing
    assert "objects/nodes.json: not allowed: list nodes" in missing
    assert "get pods/log" in missing
    assert "objects/pods.json" in _read(path)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"max_tokens": 512, "token_dtype": "int8"}, {"max_tokens": 512, "token_dtype": "int8"}),
        ({"password": "abc"}, {"password": MASK}),
        ({"apiKeys": ["one-key-1", "two-key-2"]}, {"apiKeys": [MASK, MASK]}),
        ({"secretKeyRef": {"name": "n", "key": "k-1"}}, {"secretKeyRef": {"name": "n", "key": "k-1"}}),
        ({"name": "HF_TOKEN", "value": "x"}, {"name": "HF_TOKEN", "value": MASK}),
        ("https://user:pw@host/x", f"https://{MASK}@host/x"),
        ("nvila_decode_tokens_total 3", "nvila_decode_tokens_total 3"),
        ({"image": "docker.io/nvila/vision:1"}, {"image": "docker.io/nvila/vision:1"}),
    ],
)
def test_redaction_masks_credentials_and_leaves_the_rest(given: object, kept: object) -> None:
    assert Redactor().clean(given) == kept
