"""Says what a Kubernetes API server would refuse, as far as schemas go: strict, for several versions.

Built-in kinds by the schemas in the package kubernetes-validate. Custom resources by their definitions' own schemas in
tests/data/crds (KEDA 2, the Prometheus operator, KubeRay 1), closed as the API server's field validation closes them;
pod templates and services inside them by Kubernetes' schemas. No server is asked: what only it knows (quotas, webhooks,
whether an image exists) stays unknown.
"""

from __future__ import annotations

import functools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = ("1.29", "1.33", "1.37")
"""The oldest that the chart allows, one in the middle, the newest known."""

_SCHEMAS = Path(str(files("kubernetes_validate"))) / "kubernetes-json-schema"
_CRDS = Path(__file__).parents[1] / "data" / "crds"
_REFERENCE = "x-kubernetes-ref"

_GATEWAY_API = {"HTTPRoute", "GRPCRoute"}
"""Their schemas are in no package; tests look at what the chart writes into them."""


def problems(found: dict[str, Any], version: str) -> list[str]:
    """Each names the object, the place and what is wrong with it; empty when it would be accepted."""
    if found["kind"] in _GATEWAY_API and found["apiVersion"] == "gateway.networking.k8s.io/v1":
        return []
    name = f"{found['kind']} {found['metadata']['name']} ({version})"
    validator = _validator(found["apiVersion"], found["kind"], version)
    return [
        f"{name}: {'.'.join(map(str, error.path))}: {error.message[:300]}" for error in validator.iter_errors(found)
    ]


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator:
    custom = _custom(api_version, kind)
    definitions = Resource.from_contents(json.loads((_folder(version) / "_definitions.json").read_text()))
    if custom is not None:
        schema = custom
    else:
        api = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
        schema = json.loads((_folder(version) / f"{kind.lower()}-{api}.json").read_text())
    return Draft202012Validator(schema, registry=definitions @ Registry())


def _folder(version: str) -> Path:
    return _SCHEMAS / f"v{version}.0-local-strict"


def _custom(api_version: str, kind: str) -> dict[str, Any] | None:
    path = _CRDS / f"{kind.lower()}.json"
    if not path.exists():
        return None
    definition = json.loads(path.read_text())
    assert api_version == f"{definition['group']}/{definition['version']}", f"{kind}: {api_version}"
    schema: dict[str, Any] = _closed(definition["schema"])
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    return schema


def _closed(schema: Any) -> Any:
    """A structural schema as JSON Schema: unknown fields are refused unless it says otherwise."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if _REFERENCE in schema:
        return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{schema[_REFERENCE]}"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {word: _closed(value) for word, value in schema.items() if word != "properties"}
    if "properties" in schema:
        made["properties"] = {name: _closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made
