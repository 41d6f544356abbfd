"""values.yaml is the manual: complete, mirrored by schema and README; a misspelt key fails before a cluster sees it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.charts.helm import CHART, ROOT, HelmError, render

PUBLISHED = "Efficient-Large-Model/NVILA-8B"
STEPWISE = "NewClusterWithIncrementalUpgrade"


@pytest.fixture(scope="module")
def document() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_document", ROOT / "deploy" / "charts" / "document.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_schema_and_readme_are_those_of_the_values(document: ModuleType) -> None:
    text = (CHART / "values.yaml").read_text()
    assert json.loads((CHART / "values.schema.json").read_text()) == document.schema(text), "run make charts"
    assert (CHART / "README.md").read_text() == document.readme(text), "run make charts"


def test_the_readme_says_what_is_made_of_every_part() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    parts = {name for name, section in values.items() if isinstance(section, dict) and "resources" in section}
    told = set(re.findall(r"^\| (\w+) \|", (CHART / "README.md").read_text(), re.MULTILINE))
    assert parts <= told


def test_every_key_is_explained_in_a_sentence(document: ModuleType) -> None:
    for key in document.keys((CHART / "values.yaml").read_text()):
        if not isinstance(key.default, dict) or not key.default:
            assert re.search(r"[.`]$", key.doc), key.path


def test_every_section_is_closed(document: ModuleType) -> None:
    def look(schema: dict[str, Any], path: str) -> None:
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
            for name, below in schema["properties"].items():
                look(below, f"{path}.{name}")

    look(document.schema((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize(
    "values",
    [
        {"gatway": {}},
        {"gateway": {"replica": 2}},
        {"gateway": {"settings": {"max_concurency": 3}}},
        {"gateway": {"settings": {"vision_url": "somewhere:1"}}},
        {"gateway": {"settings": {"max_frames": 0}}},
        {"vision": {"settings": {"dtype": "int4"}}},
        {"vision": {"gpu": {"resource": "gpu"}}},
        {"vision": {"autoscaling": {"kind": "KEDA"}}},
        {"decode": {"mode": "ray"}},
        {"decode": {"autoscaling": {"minReplicas": 0}}},
        {"model": {"acceptLicense": "yes"}},
        {"model": {"sha256": "abc"}},
        {"redis": {"maxMemoryPolicy": "lru"}},
        {"requestTimeoutSeconds": "10m"},
        {"tracing": {"protocol": "http"}},
        {"tracing": {"endpoint": "collector:4317"}},
        {"gateway": {"image": {"digest": "abc"}}},
        {"images": {"registry": "registry.example.com/"}},
        {"clusterDomain": ""},
        {"decode": {"rayservice": {"gcs": {"redisAddress": "ray-state.example.com"}}}},
    ],
)
def test_a_mistake_is_refused_by_the_schema(values: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match="schema"):
        render(values)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"fullnameOverride": "7-questions"}, "set fullnameOverride"),
        ({"fullnameOverride": "Video_Answers"}, "set fullnameOverride"),
        ({"model": {"source": "hub"}}, "model.hub.repo"),
        ({"model": {"source": "hub", "hub": {"repo": PUBLISHED}}}, "model.acceptLicense=CC-BY-NC-4.0"),
        ({"model": {"source": "objectStore"}}, "model.objectStore.path"),
        ({"model": {"source": "existingClaim"}}, "model.existingClaim.name"),
        ({"redis": {"enabled": False}}, "redis.external.host"),
        ({"redis": {"enabled": False, "external": {"host": "r"}}}, "redis.auth.existingSecret"),
        ({"redis": {"resources": {"limits": {"memory": "9Gi"}}}}, "follows from redis.maxMemoryMiB"),
        ({"redis": {"resources": {"requests": {"memory": "9Gi"}}}}, "follows from redis.maxMemoryMiB"),
        ({"redis": {"tls": {"enabled": True}}}, "redis.tls.existingSecret"),
        ({"tls": {"enabled": True}}, "tls.existingSecret, with ca.crt"),
        ({"gateway": {"service": {"httpPort": 80, "grpcPort": 80}}}, "are both 80"),
        ({"gateway": {"autoscaling": {"minReplicas": 11}}}, "gateway.autoscaling.minReplicas is 11"),
        ({"redis": {"external": {"cluster": True, "database": 2}}}, "database 0 only"),
        ({"decode": {"autoscaling": {"kind": "ray"}}}, "decode.mode=rayservice"),
        ({"decode": {"mode": "rayservice", "autoscaling": {"kind": "keda"}}}, "set it to ray"),
        ({"decode": {"mode": "rayservice", "rayservice": {"upgradeStrategy": STEPWISE}}}, "gatewayClassName"),
        ({"vision": {"autoscaling": {"minReplicas": 9}}}, "more than maxReplicas"),
        ({"gateway": {"route": {"enabled": True}}}, "gateway.route.parentRefs"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_what_to_do(values: dict[str, Any], advice: str) -> None:
    with pytest.raises(HelmError, match=re.escape(advice)):
        render(values)


def test_own_weights_from_the_hub_need_no_licence() -> None:
    assert render({"model": {"source": "hub", "hub": {"repo": "our-company/our-nvila"}}}).all("Deployment")
