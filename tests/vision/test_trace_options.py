"""What Triton is told about its own traces, from the same variables as every other process."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.vision.triton import TritonInstall, command


def trace_options(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> set[str]:
    for name in ("OTLP_ENDPOINT", "OTLP_TRACES_ENDPOINT", "OTLP_PROTOCOL", "OTLP_TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_{name}", raising=False)
    for name in ("SDK_DISABLED", "TRACES_SAMPLER", "TRACES_SAMPLER_ARG"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    install = TritonInstall(Path("tritonserver"), Path("backends"), ())
    made = command(install, http_port=1, grpc_port=2, metrics_port=3, shm_prefix="nvtest-")
    return {option.removeprefix("--trace-config=") for option in made.argv if option.startswith("--trace-config=")}


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, "http://collector:4318/v1/traces"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:9/", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://collector:9/v1/traces",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:9/here",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            "http://collector:9/here",
        ),
    ],
)
def test_spans_go_where_ours_go_but_over_http(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str
) -> None:
    assert f"opentelemetry,url={url}" in trace_options(monkeypatch, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:5555"},  # gRPC on a port that tells nothing of HTTP's
    ],
)
def test_without_a_place_for_spans_there_are_no_traces(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    assert trace_options(monkeypatch, environment) == set()


@pytest.mark.parametrize(
    ("sampler", "ratio", "rate"),
    [
        (None, None, 1),
        ("parentbased_always_on", None, 1),
        ("parentbased_traceidratio", "1", 1),
        ("parentbased_traceidratio", "0.5", 0),
        ("traceidratio", "0.999", 0),
        ("always_off", None, 0),
    ],
)
def test_every_call_is_traced_only_where_every_trace_is_sampled(
    monkeypatch: pytest.MonkeyPatch, sampler: str | None, ratio: str | None, rate: int
) -> None:
    variables = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": ratio}
    environment = {name: value for name, value in variables.items() if value is not None}
    options = trace_options(monkeypatch, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", **environment})
    assert f"rate={rate}" in options
