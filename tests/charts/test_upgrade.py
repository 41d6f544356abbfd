"""An upgrade from the previous version of the chart, packed in tests/data/charts when it was current."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import kube
from tests.charts.helm import CHART, PROFILES, Object, run

(PREVIOUS,) = (Path(__file__).parents[1] / "data" / "charts").glob("nvila-*.tgz")


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(PREVIOUS) as packed:
        packed.extractall(folder, filter="data")
    return folder / "nvila"


def _objects(chart: Path, values: Path, *more: str) -> dict[tuple[str, str], Object]:
    text = run("template", "nvila", str(chart), "--namespace", "apps", "--values", str(values), *more)
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text) if one}


def _unchangeable(one: Object) -> dict[str, Any]:
    """What an API server refuses to change, or what would lose data or passwords."""
    spec = one.get("spec", {})
    if one["kind"] == "Deployment":
        return {"selector": spec["selector"]}
    if one["kind"] == "StatefulSet":
        named = ("selector", "serviceName", "volumeClaimTemplates", "podManagementPolicy")
        return {name: spec.get(name) for name in named}
    if one["kind"] == "PersistentVolumeClaim":
        return {name: value for name, value in spec.items() if name != "resources"}
    if one["kind"] == "Service":
        return {"clusterIP": spec.get("clusterIP")}
    if one["kind"] == "Secret":
        return {"type": one["type"], "keys": sorted(one["data"])}
    return {"value": one["value"]} if one["kind"] == "PriorityClass" else {}


@pytest.mark.parametrize("profile", PROFILES)
def test_values_of_the_previous_version_render_and_change_nothing_that_cannot_change(
    previous: Path, profile: str
) -> None:
    values = previous / "ci" / PROFILES[profile].name
    before, after = _objects(previous, values), _objects(CHART, values, "--is-upgrade")
    assert [problem for one in after.values() for problem in kube.problems(one, kube.VERSIONS[1])] == []
    kept = {"PersistentVolumeClaim", "Secret", "StatefulSet", "Deployment", "Service"}
    for key, one in before.items():
        if key[0] in kept:
            assert key in after, f"{key} would be deleted"
        if key in after:
            assert _unchangeable(after[key]) == _unchangeable(one), key


def test_the_chart_is_newer_than_the_previous_one(previous: Path) -> None:
    def version(chart: Path) -> tuple[int, ...]:
        told = yaml.safe_load((chart / "Chart.yaml").read_text())["version"]
        return tuple(int(part) for part in told.split("."))

    assert version(CHART) > version(previous)
