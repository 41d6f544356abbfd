"""The chart starts exactly the programs that are here: their commands, ports, paths, variables and metrics."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.decode.settings import Settings as DecodeSettings
from nvila.gateway.middleware import OPEN_PATHS
from nvila.gateway.settings import GatewaySettings
from nvila.recordings.settings import RecordingsSettings
from nvila.telemetry import names
from nvila.vision.settings import Settings as VisionSettings
from tests.charts.helm import CHART, PROFILES, ROOT, Rendered, container, environment, pod_of, render

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 declares fields in a way that pydantic deprecates
    from ray.serve.schema import ServeDeploySchema

    from nvila.decode import app as decode_app

SETTINGS = {
    "GATEWAY": GatewaySettings,
    "VISION": VisionSettings,
    "DECODE": DecodeSettings,
    "RECORDINGS": RecordingsSettings,
}
IMAGES = {"gateway": "gateway", "vision": "vision", "decode": "decode"}


@pytest.mark.parametrize("profile", ["", *PROFILES])
def test_every_variable_is_a_field_of_its_program_and_its_value_is_accepted(profile: str) -> None:
    for name, pod in render(profile=profile).pods():
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            for program, settings in SETTINGS.items():
                prefix = f"NVILA_{program}_"
                given = {key: value for key, value in environment(one).items() if key.startswith(prefix)}
                fields = {key.removeprefix(prefix).lower(): value for key, value in given.items()}
                assert set(fields) <= set(settings.model_fields), name
                if fields:
                    _check(settings, fields)


def _check(settings: type[Any], fields: dict[str, str]) -> None:
    """As the program would read them, with what Kubernetes fills in."""
    filled = {name: value.replace("$(REDIS_PASSWORD)", "secret").replace("$(API_KEYS)", "a-key-of-a-client")
              .replace("$(OPERATOR_KEY)", "a-key-of-an-operator") for name, value in fields.items()}  # fmt: skip
    settings(**filled)


def test_no_variable_is_set_twice() -> None:
    for name, pod in render(profile="two-pools").pods():
        for one in pod["containers"]:
            variables = [entry["name"] for entry in one.get("env", [])]
            assert len(variables) == len(set(variables)), name


@pytest.mark.parametrize("component", IMAGES)
def test_commands_are_those_of_the_images_and_their_modules_exist(component: str) -> None:
    command = container(pod_of(render(), component))["command"]
    dockerfile = (ROOT / "deploy" / "images" / f"{IMAGES[component]}.Dockerfile").read_text()
    assert yaml.safe_load(re.findall(r"^CMD (.*)$", dockerfile, re.M)[-1]) == command
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2]) is not None


@pytest.mark.parametrize("component", IMAGES)
def test_ports_are_those_that_the_images_expose(component: str) -> None:
    dockerfile = (ROOT / "deploy" / "images" / f"{IMAGES[component]}.Dockerfile").read_text()
    (exposed,) = re.findall(r"^EXPOSE (.*)$", dockerfile, re.M)
    ports = {port["containerPort"] for port in container(pod_of(render(), component))["ports"]}
    assert ports == {int(port) for port in exposed.split()}


def test_gateway_ports_and_probes_are_its_own() -> None:
    gateway = container(pod_of(render(), "gateway"))
    ports = {port["name"]: port["containerPort"] for port in gateway["ports"]}
    fields = GatewaySettings.model_fields
    assert ports == {"http": fields["http_port"].default, "grpc": fields["grpc_port"].default}
    probes = [gateway[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["/health/live", "/health/ready", "/health/live"]
    assert set(probes) <= OPEN_PATHS


def test_vision_ports_are_the_defaults_of_its_command() -> None:
    source = (ROOT / "services/nvila/vision/serve.py").read_text()
    defaults = dict(re.findall(r'"--(http|grpc|metrics)-port", type=int, default=(\d+)', source))
    ports = {port["name"]: str(port["containerPort"]) for port in container(pod_of(render(), "vision"))["ports"]}
    assert ports == defaults


def test_vision_is_probed_where_triton_answers() -> None:
    vision = container(pod_of(render(), "vision"))
    paths = {probe: vision[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths["startupProbe"]["path"] == paths["readinessProbe"]["path"] == "/v2/health/ready"
    assert paths["livenessProbe"]["path"] == "/v2/health/live"
    assert {one["port"] for one in paths.values()} == {"http"}


def test_decode_ports_are_the_defaults_of_its_settings() -> None:
    ports = {port["name"]: port["containerPort"] for port in container(pod_of(render(), "decode"))["ports"]}
    fields = DecodeSettings.model_fields
    assert ports == {"http": fields["http_port"].default, "grpc": fields["grpc_port"].default}


def test_the_gateway_is_told_where_the_others_listen() -> None:
    rendered = render(namespace="apps")
    told = environment(container(pod_of(rendered, "gateway")))
    for variable, component in (("VISION_URL", "vision"), ("DECODE_TARGET", "decode")):
        service = rendered.get("Service", component)
        host, port = told[f"NVILA_GATEWAY_{variable}"].removeprefix("dns:///").split(":")
        assert host == f"{service['metadata']['name']}.apps.svc.cluster.local"
        (served,) = service["spec"]["ports"]
        assert served["port"] == int(port)
        targets = {one["name"]: one["containerPort"] for one in container(pod_of(rendered, component))["ports"]}
        assert targets[served["targetPort"]] == int(port)


def test_shared_memory_holds_what_the_programs_ask_of_it() -> None:
    rendered = render(
        {"gateway": {"frameMemoryMiB": 300}, "vision": {"pendingMiB": 500}, "decode": {"objectStoreMiB": 90}}
    )
    for component, variable, spare in (
        ("gateway", "NVILA_GATEWAY_FRAME_MEMORY_BYTES", 0),
        ("vision", "NVILA_VISION_MAX_PENDING_BYTES", 64 << 20),  # vision/checks.py asks for so much more
        ("decode", "NVILA_DECODE_OBJECT_STORE_BYTES", 0),
    ):
        pod = pod_of(rendered, component)
        (volume,) = [one["emptyDir"] for one in pod["volumes"] if one["name"] == "shared-memory"]
        assert volume["medium"] == "Memory"
        size = int(volume["sizeLimit"].removesuffix("Mi")) << 20
        assert size > int(environment(container(pod))[variable]) + spare
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(pod)["volumeMounts"]


def test_triton_is_not_process_one_so_that_its_guard_can_end_it() -> None:
    assert pod_of(render(), "vision")["shareProcessNamespace"] is True


# -- Ray


def _serve_config(rendered: Rendered) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(
        yaml.safe_load(rendered.get("RayService", "decode")["spec"]["serveConfigV2"])
    )


@pytest.mark.parametrize("kind", ["none", "ray"])
def test_ray_accepts_what_serve_is_told_and_finds_our_applications(kind: str) -> None:
    config = _serve_config(render({"decode": {"mode": "rayservice", "autoscaling": {"kind": kind}}}))
    assert {one.name for one in config.applications} == {decode_app.APPLICATION, decode_app.METRICS_APPLICATION}
    for one in config.applications:
        module, _, function = one.import_path.partition(":")
        assert module == decode_app.__name__
        assert callable(getattr(decode_app, function))
    assert config.grpc_options.grpc_servicer_functions == [decode_app.SERVICER]
    assert config.grpc_options.port == DecodeSettings.model_fields["grpc_port"].default
    assert config.http_options.port == DecodeSettings.model_fields["http_port"].default


def test_rays_autoscaling_is_that_of_the_values_and_names_our_deployment() -> None:
    auto = {"kind": "ray", "minReplicas": 2, "maxReplicas": 5, "upStabilizationSeconds": 7}
    rendered = render({"decode": {"mode": "rayservice", "autoscaling": auto}})
    application = next(one for one in _serve_config(rendered).applications if one.name == decode_app.APPLICATION)
    (deployment,) = application.deployments
    assert deployment.name == decode_app.Replica.__name__
    scaling = deployment.autoscaling_config
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["upscale_delay_s"]) == (2, 5, 7)
    cluster = rendered.get("RayService", "decode")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 5)
    told = environment(container(group["template"]["spec"]))
    assert (told["NVILA_DECODE_MIN_REPLICAS"], told["NVILA_DECODE_MAX_REPLICAS"]) == ("2", "5")


def test_a_worker_offers_ray_what_one_replica_asks_for() -> None:
    rendered = render({"decode": {"mode": "rayservice", "gpu": {"count": 2, "resource": "nvidia.com/mig-3g.40gb"}}})
    (group,) = rendered.get("RayService", "decode")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    worker = container(group["template"]["spec"])
    assert group["rayStartParams"]["num-gpus"] == environment(worker)["NVILA_DECODE_REPLICA_GPUS"] == "2"
    assert float(group["rayStartParams"]["num-cpus"]) == DecodeSettings.model_fields["replica_cpus"].default
    assert worker["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 2


def test_head_and_workers_are_told_the_same() -> None:
    cluster = render(profile="two-pools").get("RayService", "decode")["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]]
    head, worker = (environment(container(pod)) for pod in pods)
    assert head == worker


def test_the_rayversion_is_that_of_the_lock() -> None:
    (locked,) = re.findall(r"^ray(?:\[.*\])?==(.*)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert (
        render({"decode": {"mode": "rayservice"}}).get("RayService", "decode")["spec"]["rayClusterConfig"]["rayVersion"]
        == locked
    )


# -- metrics


def _metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nvila_\w+|nv_\w+|vllm:\w+)", text))


def _known_metrics() -> set[str]:
    known = set()
    for metric in names.ALL_METRICS:
        known |= {metric.name}
        if metric.kind == "histogram":
            known |= {f"{metric.name}_{end}" for end in ("bucket", "sum", "count")}
    # Triton's and vLLM's, as they are known to dashboards.
    known |= {"nv_inference_request_success", "nv_inference_request_failure", "nv_inference_pending_request_count",
              "nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}  # fmt: skip
    source = Path(str(importlib.util.find_spec("vllm").submodule_search_locations[0])) / "v1/metrics/loggers.py"  # type: ignore[union-attr,index]
    for name in re.findall(r'"(vllm:\w+)"', source.read_text()):
        known |= {name, f"{name}_total", f"{name}_bucket"}
    return known


def test_dashboards_use_only_metrics_that_exist() -> None:
    for path in (CHART / "files" / "dashboards").glob("*.json"):
        expressions = re.findall(r'"expr": "(.*)"', path.read_text())
        assert expressions
        assert _metric_names(" ".join(expressions)) <= _known_metrics(), path.name


def test_alerts_and_triggers_use_only_metrics_that_exist() -> None:
    values = {
        "monitoring": {"rules": True},
        "vision": {"autoscaling": {"kind": "keda"}},
        "decode": {"autoscaling": {"kind": "keda"}},
    }
    rendered = render(values)
    (group,) = rendered.get("PrometheusRule", "alerts")["spec"]["groups"]
    used = [rule["expr"] for rule in group["rules"]]
    used += [
        trigger["metadata"]["query"] for one in rendered.all("ScaledObject") for trigger in one["spec"]["triggers"]
    ]
    assert _metric_names(" ".join(used)) <= _known_metrics()


def test_labels_in_alerts_and_dashboards_are_labels_of_their_metrics() -> None:
    of_all = {"le", "namespace", "app_kubernetes_io_instance", "app_kubernetes_io_component"}
    labels = {metric.name: {*metric.labels, *of_all}
              for metric in names.ALL_METRICS}  # fmt: skip
    (group,) = render(profile="two-pools").get("PrometheusRule", "alerts")["spec"]["groups"]
    text = " ".join(rule["expr"] for rule in group["rules"])
    text += " ".join(path.read_text().replace('\\"', '"') for path in (CHART / "files/dashboards").glob("*.json"))
    found = re.findall(r"\b(nvila_\w+?)(?:_bucket)?\{([^}]*)\}", text)
    assert found
    for name, matchers in found:
        assert set(re.findall(r"(\w+)(?:=~|!=|=)\"", matchers)) <= labels[name], name
