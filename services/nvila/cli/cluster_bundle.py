"""`nvila cluster bundle`: one archive with what somebody needs who is to help, and no secret.

Secrets are never read, but for Helm's record of the release, of which only the user's values and the chart's version
are kept. Everything that is written passes through `Redactor`: values under telling names, and whatever looks like a
credential, wherever it stands; what was found under a telling name is taken out of logs, too.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import tarfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nvila.cli import cluster_doctor, cluster_release
from nvila.cli.cluster_api import Cluster, Json
from nvila.errors import NvilaError

LOG_LINES = 500
LOG_BYTES = 2 << 20
"""Of each container."""
MASK = "[redacted]"

_TELLING = re.compile(
    r"(passw(or)?d|passphrase|secret|token|api[-_]?keys?|access[-_]?key|private[-_]?key|credential|authorization|cookie"
    r"|session|signature|dsn|connection[-_]?string|\bacl\b|^auth$|[-_]key$)",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(existingSecret|secretName|tlsSecret|secretKeyRef|pullSecrets|automountServiceAccountToken|token_?dtype|_tokens$"
    r"|tokens_|max_tokens|topologyKey|serviceAccountToken|token_wait_s|secrets?$|^tokens?_?(s|total)$)"
)
"""Names that tell of a credential without holding it, or only sound like one."""
_SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}(\.[\w-]*)?"),  # JSON web tokens
    re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"),  # user:password@ of an address
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{6,}"),
    re.compile(r"(?i)(?<=basic )[\w+/=-]{8,}"),
    re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\b(hf|sk|ghp|gho|xoxb|glpat)[-_][\w-]{8,}"),
    re.compile(
        r"(?i)(?<![\w-])((?:[\w-]*(?:password|passwd|secret|api[-_]?key|access[-_]?key|credential|auth[-_]?token))"
        r"[\"']?\s*[=:]\s*[\"']?)([^\s\"',;&]{3,})"
    ),
    re.compile(
        r"(?i)([?&](?:x-amz-signature|x-amz-credential|x-amz-security-token|sig|signature|token|key)=)([^&\s\"']+)"
    ),
)
_OBJECT_SHAPES = 7
"""So many of them look for a credential's own form, the rest for an assignment to a telling name."""


class Redactor:
    """Remembers what it took out under a telling name and takes the same words out of everything after it."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def learn(self, value: Any) -> None:
        """Look through an object for secrets before anything is written."""
        self.clean(value)

    def clean(self, value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            if "name" in value and "value" in value and isinstance(value["value"], str):  # a variable or a header
                return {**value, "value": self.clean(value["value"], str(value["name"]))}
            return {key: self.clean(below, str(key)) for key, below in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(one, name) for one in value]
        if not isinstance(value, str) or not value:
            return value
        if _TELLING.search(name) and not _HARMLESS.search(name):
            if len(value) >= 8:
                self._known.add(value)
            return MASK
        return self.text(value)

    def text(self, text: str, *, is_free: bool = True) -> str:
        """`is_free`: written by people or programs, so that `password=…` tells; not in a dump of cleaned objects."""
        for known in sorted(self._known, key=len, reverse=True):
            text = text.replace(known, MASK)
        for shape in _SHAPES if is_free else _SHAPES[:_OBJECT_SHAPES]:
            text = shape.sub(lambda found: (found[1] if shape.groups == 2 else "") + MASK, text)  # noqa: B023 used at once
        return text


_OBJECTS = (
    ("/apis/apps/v1", "deployments"),
    ("/apis/apps/v1", "statefulsets"),
    ("/apis/apps/v1", "replicasets"),
    ("/api/v1", "pods"),
    ("/api/v1", "services"),
    ("/api/v1", "configmaps"),
    ("/api/v1", "persistentvolumeclaims"),
    ("/apis/autoscaling/v2", "horizontalpodautoscalers"),
    ("/apis/policy/v1", "poddisruptionbudgets"),
    ("/apis/networking.k8s.io/v1", "networkpolicies"),
    ("/apis/networking.k8s.io/v1", "ingresses"),
)
_CUSTOM = (
    ("ray.io", "v1", "rayservices"),
    ("ray.io", "v1", "rayclusters"),
    ("keda.sh", "v1alpha1", "scaledobjects"),
    ("monitoring.coreos.com", "v1", "servicemonitors"),
    ("monitoring.coreos.com", "v1", "podmonitors"),
    ("gateway.networking.k8s.io", "v1", "httproutes"),
)


def write(
    cluster: Cluster, intent: cluster_doctor.Intent, path: Path, version: str, say: Callable[[str], None]
) -> Json:
    """Collect what may be read, write it to `path` (tar.gz), return what it holds and what could not be had."""
    collected: dict[str, Any] = {}
    failures: list[str] = []

    def collect(name: str, how: Callable[[], Any]) -> Any:
        say(name)
        try:
            collected[name] = how()
        except NvilaError as error:
            failures.append(f"{name}: {error.message}")
        return collected.get(name)

    where = f"/namespaces/{cluster.namespace}"
    chosen = cluster_release.selector(intent.release)
    collect("doctor.json", lambda: [vars(finding) for finding in cluster_doctor.examine(cluster, intent)])
    collect("versions.json", lambda: {"nvila": version, "server": cluster.version(), "apis": cluster.get("/apis")})
    collect("values.yaml", lambda: _values(cluster, intent.release))
    for base, resource in _OBJECTS:
        collect(f"objects/{resource}.json", partial(_listed, cluster, f"{base}{where}/{resource}", chosen))
    for group, level, resource in _CUSTOM:
        if resource in cluster.resources(group):
            collect(
                f"objects/{resource}.json",
                partial(_listed, cluster, f"/apis/{group}/{level}{where}/{resource}", chosen),
            )
    collect("objects/nodes.json", lambda: _nodes(cluster))
    collect("events.json", partial(_listed, cluster, f"/api/v1{where}/events"))
    collect("secrets.json", lambda: _names_of_secrets(collected.get("objects/pods.json") or []))
    for pod in collected.get("objects/pods.json") or []:
        for name, is_before in _log_sources(pod):
            file = f"logs/{pod['metadata']['name']}/{name}{'.previous' if is_before else ''}.log"
            collect(file, partial(_log, cluster, pod, name, is_before))
    return _archive(path, collected, failures)


def _archive(path: Path, collected: Mapping[str, Any], failures: list[str]) -> Json:
    redactor = Redactor()
    for value in collected.values():
        redactor.learn(value)
    if failures:
        collected = {**collected, "not-collected.txt": "\n".join(failures) + "\n"}
    folder = path.name.removesuffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        for name, value in collected.items():
            clean = redactor.clean(value)
            if isinstance(clean, str):
                text = clean
            else:
                text = yaml.safe_dump(clean, sort_keys=False) if name.endswith(".yaml") else json.dumps(clean, indent=1)
            data = redactor.text(text, is_free=False).encode()
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
    path.chmod(0o600)
    return {"file": str(path), "bytes": path.stat().st_size, "holds": sorted(collected), "not_collected": failures}


def _listed(cluster: Cluster, path: str, chosen: str = "") -> list[Json]:
    return _bare(cluster.objects(path, chosen))


def _bare(objects: list[Json]) -> list[Json]:
    """Without what only the server needs, and without the copy of the whole object that kubectl keeps."""
    for one in objects:
        metadata = one.get("metadata") or {}
        metadata.pop("managedFields", None)
        (metadata.get("annotations") or {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
    return objects


def _nodes(cluster: Cluster) -> list[Json]:
    kept = []
    for node in cluster.objects("/api/v1/nodes"):
        status = node.get("status") or {}
        kept.append(
            {
                "name": node["metadata"]["name"],
                "labels": node["metadata"].get("labels"),
                "taints": (node.get("spec") or {}).get("taints"),
                "allocatable": status.get("allocatable"),
                "nodeInfo": status.get("nodeInfo"),
                "conditions": status.get("conditions"),
            }
        )
    return kept


def _values(cluster: Cluster, release: str) -> Json:
    """The values that the user gave, from Helm's record of the newest revision."""
    records = cluster.objects(f"/api/v1/namespaces/{cluster.namespace}/secrets", f"owner=helm,name={release}")
    if not records:
        return {"note": f"Helm keeps no record of {release} here"}
    newest = max(records, key=lambda one: int(cluster_release.label(one, "version") or 0))
    packed = base64.b64decode(base64.b64decode(newest["data"]["release"]))
    record = json.loads(gzip.decompress(packed))
    chart = (record.get("chart") or {}).get("metadata") or {}
    return {
        "chart": {"version": chart.get("version"), "appVersion": chart.get("appVersion")},
        "revision": record.get("version"),
        "status": (record.get("info") or {}).get("status"),
        "values": record.get("config") or {},
    }


def _names_of_secrets(pods: list[Json]) -> list[str]:
    """Secrets that pods refer to: their names."""
    return sorted(set(re.findall(r'"secretKeyRef": \{[^{}]*"name": "([^"]+)"', json.dumps(pods))))


def _log_sources(pod: Json) -> list[tuple[str, bool]]:
    """(container, whether its last life) of all that ever ran."""
    sources = []
    for status in cluster_release.containers(pod):
        if "waiting" not in (status.get("state") or {}) or status.get("restartCount"):
            sources.append((status["name"], False))
        if status.get("restartCount"):
            sources.append((status["name"], True))
    return sources


def _log(cluster: Cluster, pod: Json, container: str, is_before: bool) -> str:
    return cluster.text(
        f"/api/v1/namespaces/{cluster.namespace}/pods/{pod['metadata']['name']}/log",
        container=container,
        previous=str(is_before).lower(),
        tailLines=LOG_LINES,
        limitBytes=LOG_BYTES,
        timestamps="true",
    )
