from __future__ import annotations

from nvila.decode.exposition import Reports, engine_page, merge
from nvila.telemetry import names
from nvila.telemetry.metrics import Metrics


def page(requests: int) -> str:
    metrics = Metrics()
    metrics.add(names.DECODE_REQUESTS, requests, outcome="stop")
    metrics.set(names.DECODE_PENDING_TOKENS, requests)
    metrics.observe(names.DECODE_FIRST_TOKEN_SECONDS, 0.3)
    return metrics.render().decode()


def test_every_sample_says_which_replica_it_is_of() -> None:
    lines = merge({"one": page(2), "two": page(3)}).decode().splitlines()
    assert 'nvila_decode_requests_total{outcome="stop",replica="one"} 2.0' in lines
    assert 'nvila_decode_requests_total{outcome="stop",replica="two"} 3.0' in lines
    assert 'nvila_decode_pending_tokens{replica="two"} 3.0' in lines
    assert 'nvila_decode_first_token_seconds_bucket{le="0.5",replica="one"} 1.0' in lines
    assert lines.count("# TYPE nvila_decode_requests_total counter") == 1


def test_there_is_no_page_before_a_replica_has_reported() -> None:
    reports = Reports()
    assert reports.page() is None
    reports.take("one", page(1))
    assert b'replica="one"' in (reports.page() or b"")


def test_a_process_without_vllm_has_no_engine_metrics() -> None:
    assert b"nvila" not in engine_page()
