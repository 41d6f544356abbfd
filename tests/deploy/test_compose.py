"""The compose files name services, ports, files and environment variables that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nvila.decode.settings import Settings as DecodeSettings
from nvila.gateway.settings import GatewaySettings
from nvila.recordings.settings import RecordingsSettings
from nvila.vision.settings import Settings as VisionSettings
from tests.deploy.files import (
    IMAGES,
    LAPTOP,
    LAYERS,
    OBSERVABILITY,
    ROOT,
    VARIABLE,
    Dockerfile,
    compose,
    env_file,
    services,
)

FIELDS = {
    "gateway": GatewaySettings.model_fields,
    "recordings": RecordingsSettings.model_fields,
    "vision": VisionSettings.model_fields,
    "decode": DecodeSettings.model_fields,
}

PROGRAMS = (*IMAGES, "recordings")
"""Recordings run from the gateway's image."""


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.name)
def test_every_nvila_variable_is_a_field_of_its_programs_settings(path: Path) -> None:
    for name, service in compose(path)["services"].items():
        for variable in service.get("environment", {}):
            if variable.startswith("NVILA_"):
                prefix = f"NVILA_{name.upper()}_"
                assert variable.startswith(prefix), f"{name} does not read {variable}"
                assert variable.removeprefix(prefix).lower() in FIELDS[name], variable


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.name)
def test_every_variable_is_in_the_env_file_or_must_be_given(path: Path) -> None:
    must_be_given = {"API_KEYS", "METRICS_KEY"}
    used = {found[1] for found in VARIABLE.finditer(path.read_text())}

    assert used <= env_file().keys() | must_be_given


def test_what_the_env_file_says_is_used() -> None:
    used = {found[1] for path in LAYERS for found in VARIABLE.finditer(path.read_text())}

    assert used >= env_file().keys()


def test_ports_of_this_machine_and_versions_stand_in_the_env_file_only() -> None:
    for path in LAYERS:
        content = yaml.safe_load(path.read_text())
        for service in content["services"].values():
            assert service.get("image", "${x}").count("${") == 1
            for port in service.get("ports", []):
                assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+_PORT\}:\d+", port), port


def test_the_version_is_the_packages() -> None:
    assert f'version = "{env_file()["NVILA_VERSION"]}"' in (ROOT / "pyproject.toml").read_text()


def test_services_call_each_other_by_names_and_ports_that_exist() -> None:
    all_services = services(*LAYERS)
    ports = {name: Dockerfile.read(name).ports() for name in IMAGES} | {
        "recordings": [RecordingsSettings.model_fields["http_port"].default],
        "cache": [6379],
        "collector": [4317, 4318],
        "jaeger": [4317],
        "prometheus": [9090],
    }
    texts = [path.read_text() for path in (*LAYERS, *(ROOT / "deploy/observability").glob("*.yml"))]
    called = {found for text in texts for found in re.findall(r"\b([a-z]+):(\d{4,5})\b", text)}
    called = {(name, port) for name, port in called if name in all_services}

    assert {"vision", "decode", "cache", "gateway", "collector", "jaeger"} <= {name for name, _ in called}
    for name, port in called:
        assert int(port) in ports[name], f"{name}:{port}"


def test_published_ports_are_those_that_the_program_listens_on() -> None:
    gateway = services(LAPTOP)["gateway"]

    assert [int(port.split(":")[-1]) for port in gateway["ports"]] == Dockerfile.read("gateway").ports()


def test_gateway_and_workers_keep_recordings_at_one_place() -> None:
    written = yaml.safe_load(LAPTOP.read_text())["services"]  # before the shell's values come in
    gateway, workers = (written[name]["environment"] for name in ("gateway", "recordings"))

    for name in ("DATABASE_URL", "COLD_URL"):
        told = gateway[f"NVILA_GATEWAY_RECORDINGS_{name}"]
        assert told == workers[f"NVILA_RECORDINGS_{name}"] == f"${{RECORDINGS_{name}}}"
        assert env_file()[f"RECORDINGS_{name}"] == ""
    folders = [name for name in (*gateway, *workers) if name.endswith(("DATA_DIR", "RECORDINGS_DIR"))]
    assert folders == [], "both the data volume's"
    credentials = {name: value for name, value in gateway.items() if name.startswith("AWS_")}
    assert credentials == {name: value for name, value in workers.items() if name.startswith("AWS_")} != {}
    assert set(credentials.values()) == {None}, "the shell's own, or none"


def test_an_empty_address_means_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_RECORDINGS_DATABASE_URL", "")
    monkeypatch.setenv("NVILA_GATEWAY_RECORDINGS_DATABASE_URL", "")
    monkeypatch.setenv("NVILA_GATEWAY_API_KEYS", "key-number-one")

    assert RecordingsSettings().database() == "sqlite:////var/lib/nvila/recordings.db"
    assert not GatewaySettings().recordings_database_url


def test_the_workers_of_recordings_share_the_gateways_image_data_and_memory() -> None:
    gateway, workers = services(LAPTOP)["gateway"], services(LAPTOP)["recordings"]

    for what in ("image", "volumes", "ipc"):
        assert workers[what] == gateway[what]
    python, option, module = workers["command"]
    assert (python, option, module) == ("python", "-m", "nvila.recordings.app")
    port = RecordingsSettings.model_fields["http_port"].default
    assert f"http://127.0.0.1:{port}/health/ready" in workers["healthcheck"]["test"][-1]


def test_health_gates_the_order_of_start() -> None:
    laptop = services(LAPTOP)
    assert {name: set(laptop[name]["depends_on"]) for name in PROGRAMS} == {
        "gateway": {"cache", "vision", "decode"},
        "recordings": {"cache", "vision", "decode"},
        "vision": {"model", "cache"},
        "decode": {"model", "cache"},
    }
    for name in PROGRAMS:
        for needed, how in laptop[name]["depends_on"].items():
            if needed == "model":
                assert how["condition"] == "service_completed_successfully"
            else:
                assert how["condition"] == "service_healthy"
                assert "healthcheck" in laptop[needed] or needed in IMAGES


def test_only_the_gateway_can_be_reached_and_only_who_fetches_can_reach_out() -> None:
    laptop = services(LAPTOP)

    assert compose(LAPTOP)["networks"]["path"]["internal"] is True
    assert [name for name, service in laptop.items() if service.get("ports")] == ["gateway"]
    assert [name for name, service in laptop.items() if "outside" in service["networks"]] == ["gateway", "recordings"]


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.name)
def test_files_that_are_mounted_or_built_exist(path: Path) -> None:
    for service in compose(path)["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).is_file(), source
        build = service.get("build", {})
        if "dockerfile" in build:
            assert (ROOT / build["dockerfile"]).is_file()


def test_build_arguments_are_those_of_the_dockerfile() -> None:
    built = {name: service["build"]["dockerfile"] for name, service in services(LAPTOP).items() if "build" in service}
    for path in LAYERS:
        for name, service in compose(path)["services"].items():
            for argument in service.get("build", {}).get("args", {}):
                assert argument in Dockerfile.read(Path(built[name]).stem).arguments(), argument


def test_the_layers_add_to_services_that_exist_or_bring_their_image() -> None:
    laptop = services(LAPTOP)
    for path in LAYERS[1:]:
        for name, service in compose(path)["services"].items():
            assert name in laptop or "image" in service, name


def test_prometheus_asks_every_program_where_it_answers() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())["scrape_configs"]

    assert {job["job_name"] for job in jobs} == set(PROGRAMS)
    (gateway,) = [job for job in jobs if job["job_name"] == "gateway"]
    target = services(OBSERVABILITY)["prometheus"]["configs"][0]["target"]
    assert gateway["authorization"]["credentials_file"] == target


def test_the_collector_takes_both_forms_of_otlp() -> None:
    collector = yaml.safe_load((ROOT / "deploy/observability/collector.yml").read_text())

    assert set(collector["receivers"]["otlp"]["protocols"]) == {"grpc", "http"}
    (pipeline,) = collector["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= collector[kind].keys()


def test_the_cache_is_bounded_and_evicts_what_expires() -> None:
    command = services(LAPTOP)["cache"]["command"]

    assert command[command.index("--maxmemory-policy") + 1] == "volatile-lru"
    assert command[command.index("--maxmemory") + 1]
