"""Renders the chart with the real Helm, once for each set of values."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "nvila"
PROFILES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}

Object = dict[str, Any]


class HelmError(Exception):
    """What Helm said."""


@functools.cache
def program() -> str:
    found = subprocess.run(
        [ROOT / "deploy/charts/helm.sh", sys.executable], check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    return found.stdout.strip()


def run(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run([program(), *arguments], input=stdin, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


@dataclass(frozen=True)
class Rendered:
    """The objects of one release."""

    objects: tuple[Object, ...]

    def __iter__(self) -> Iterator[Object]:
        return iter(self.objects)

    def all(self, kind: str) -> list[Object]:
        return [found for found in self if found["kind"] == kind]

    def find(self, kind: str, component: str) -> Object | None:
        found = [one for one in self.all(kind) if one["metadata"]["labels"]["app.kubernetes.io/component"] == component]
        assert len(found) < 2, f"{len(found)} objects {kind} of {component}"
        return found[0] if found else None

    def get(self, kind: str, component: str) -> Object:
        found = self.find(kind, component)
        assert found is not None, f"no {kind} of {component}"
        return found

    def pods(self) -> list[tuple[str, Object]]:
        """(what it is, pod spec) of everything that makes pods."""
        found = []
        for one in self:
            name = f"{one['kind']} {one['metadata']['name']}"
            if one["kind"] in ("Deployment", "StatefulSet"):
                found.append((name, one["spec"]["template"]["spec"]))
            elif one["kind"] == "Pod":
                found.append((name, one["spec"]))
            elif one["kind"] == "RayService":
                cluster = one["spec"]["rayClusterConfig"]
                found.append((f"{name} head", cluster["headGroupSpec"]["template"]["spec"]))
                found += [(f"{name} worker", group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]
        return found


def render(
    values: Mapping[str, Any] | None = None, *, profile: str = "", release: str = "nvila", namespace: str = "apps"
) -> Rendered:
    """The release's objects with these values over those of the profile. `HelmError` when Helm refuses."""
    return _render(json.dumps(values or {}, sort_keys=True), profile, release, namespace)


@functools.cache
def _render(values: str, profile: str, release: str, namespace: str) -> Rendered:
    files = ["--values", str(PROFILES[profile])] if profile else []
    text = run("template", release, str(CHART), "--namespace", namespace, *files, "--values", "-", stdin=values)
    return Rendered(tuple(found for found in yaml.safe_load_all(text) if found))


def container(pod: Object, name: str = "") -> Object:
    found: Object = next(one for one in pod["containers"] if name in ("", one["name"]))
    return found


def environment(container: Object) -> dict[str, str]:
    """Names and values; a reference to a secret as `secret/key`."""
    found = {}
    for one in container.get("env", []):
        secret = one.get("valueFrom", {}).get("secretKeyRef")
        found[one["name"]] = f"{secret['name']}/{secret['key']}" if secret else one.get("value", "")
    return found


def pod_of(rendered: Rendered, component: str) -> Object:
    kind = "StatefulSet" if component == "redis" else "Deployment"
    pod: Object = rendered.get(kind, component)["spec"]["template"]["spec"]
    return pod
