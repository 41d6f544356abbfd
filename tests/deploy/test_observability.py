"""Prometheus and Grafana of the compose layer: the chart's alerts and dashboards, on names that the programs have."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from nvila.recordings.types import JobState
from nvila.telemetry import names
from tests.charts.helm import render
from tests.deploy.files import OBSERVABILITY, ROOT, compose

FOLDER = ROOT / "deploy/observability"
DASHBOARDS = sorted((ROOT / "charts/nvila/files/dashboards").glob("*.json"))
HEAD = (
    "# The chart's alerts for Prometheus of the compose layer. Made by `python -m tests.deploy.test_observability`.\n"
)
OWN = re.compile(r"\bnvila_\w+")
MENTIONED = {"nvila_stage_seconds"}
"""Named in a sentence, without a histogram's suffix."""
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def _alerts() -> dict[str, Any]:
    """As the chart has them for a release `nvila` in a namespace `compose`, which is what the scrapes are labelled."""
    (rule,) = render({"monitoring": {"rules": True}}, namespace="compose").all("PrometheusRule")
    return {"groups": rule["spec"]["groups"]}


def test_alerts_are_the_charts() -> None:
    assert yaml.safe_load((FOLDER / "alerts.yml").read_text()) == _alerts(), f"renew them: python -m {__name__}"


def test_scrapes_carry_the_labels_that_alerts_and_dashboards_choose_by() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    text = json.dumps(_alerts())
    for job in config["scrape_configs"]:
        (target,) = job["static_configs"]
        labels = target["labels"]
        assert labels["app_kubernetes_io_component"] == job["job_name"]
        for name in ("namespace", "app_kubernetes_io_instance"):
            assert f'{name}=\\"{labels[name]}\\"' in text


def test_every_own_metric_of_alerts_and_dashboards_exists() -> None:
    known = {metric.name + suffix for metric in names.ALL_METRICS for suffix in SUFFIXES[metric.kind]}
    for path in (FOLDER / "alerts.yml", *DASHBOARDS):
        used = set(OWN.findall(path.read_text()))
        assert used, path.name
        assert used - known <= MENTIONED, path.name


def test_what_can_go_wrong_with_recordings_is_alerted_and_drawn() -> None:
    rules = {rule["alert"]: rule["expr"] for group in _alerts()["groups"] for rule in group["rules"]}
    drawn = (ROOT / "charts/nvila/files/dashboards/path.json").read_text()
    for alert, metric, told in (
        ("NvilaRecordingsDatabaseDown", names.RECORDINGS_DATABASE_UP, ""),
        ("NvilaJobsWait", names.JOBS_OLDEST_SECONDS, ""),
        ("NvilaJobsFail", names.JOBS, f'state="{JobState.FAILED}"'),
        ("NvilaIngestLag", names.INGEST_LAG_SECONDS, ""),
        ("NvilaFramesDropped", names.RECORDED_FRAMES, 'fate="dropped"'),
        ("NvilaCamerasAway", names.CAPTURES, 'state="away"'),
    ):
        assert f"{metric.name}{{" in rules[alert], alert
        assert told in rules[alert], alert
        assert 'app_kubernetes_io_component="recordings"' in rules[alert], alert
        assert f"{metric.name}{{" in drawn, metric.name


def test_grafana_finds_its_source_and_every_dashboard() -> None:
    grafana = compose(OBSERVABILITY)["services"]["grafana"]
    (source,) = yaml.safe_load((FOLDER / "grafana-datasources.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "grafana-dashboards.yml").read_text())["providers"]
    mounted = {volume.split(":")[0].rpartition("/")[2]: volume.split(":")[1] for volume in grafana["volumes"]}

    assert source["url"] == "http://prometheus:9090"
    for path in DASHBOARDS:
        assert mounted[path.name] == f"{provider['options']['path']}/{path.name}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_have_an_own_id_and_a_title_on_every_panel(path: Any) -> None:
    board = json.loads(path.read_text())

    assert board["uid"].startswith("nvila")
    assert all(panel["title"] for panel in board["panels"])


def renew() -> None:
    (FOLDER / "alerts.yml").write_text(HEAD + yaml.safe_dump(_alerts(), sort_keys=False, width=120))


if __name__ == "__main__":
    renew()
