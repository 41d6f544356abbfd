"""The gateway's settings: what stops the process, and what it says then."""

from __future__ import annotations

import ast
import inspect
import os

import pytest

from nvila.gateway import settings as module
from nvila.gateway.settings import GatewaySettings

KEYS = {"NVILA_GATEWAY_API_KEYS": "key-number-one, key-number-two:blue"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("NVILA_GATEWAY_"):
            monkeypatch.delenv(name)


def _load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> GatewaySettings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return GatewaySettings.load()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(
        monkeypatch, **KEYS, NVILA_GATEWAY_FETCH_ALLOW="10.0.0.0/8, media:9000", NVILA_GATEWAY_FETCH_PORTS="80,81"
    )
    assert [key.get_secret_value() for key in settings.api_keys] == ["key-number-one", "key-number-two:blue"]
    assert settings.fetch_allow == ("10.0.0.0/8", "media:9000")
    assert settings.fetch_ports == {80, 81}
    assert "key-number" not in repr(settings)


def test_without_keys_it_does_not_start_unless_told_that_everybody_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="NVILA_GATEWAY_API_KEYS is empty"):
        _load(monkeypatch)
    assert _load(monkeypatch, NVILA_GATEWAY_AUTH="none").api_keys == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "tcp://10.0.0.1:80"),
        ("HTTP_PORT", "65536"),
        ("API_KEYS", "secret1"),
        ("API_KEYS", "key-number-one:Bad_Tenant"),
        ("API_KEYS", "key-number-one:../x"),
        ("AUTH", "maybe"),
        ("MAX_CONCURRENCY", "0"),
        ("REQUEST_TIMEOUT_S", "nan"),
        ("REQUEST_TIMEOUT_S", "inf"),
        ("REQUEST_TIMEOUT_S", "-1"),
        ("REQUEST_TIMEOUT_S", "7200"),
        ("DEFAULT_ANSWER_TOKENS", "1000000"),
        ("FETCH_ALLOW", "10.0.0.1/8"),
        ("FETCH_PORTS", "http"),
        ("SHARED_MEMORY_PREFIX", "../x"),
        ("LOG_LEVEL", "loud"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("VISION_URL", "http://vision"),
        ("DECODE_TARGET", "decode"),
        ("DOCS", "perhaps"),
    ],
)
def test_a_malformed_value_stops_the_process_and_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        _load(monkeypatch, **{**KEYS, f"NVILA_GATEWAY_{name}": value})
    assert f"NVILA_GATEWAY_{name}" in str(caught.value)
    assert "secret1" not in str(caught.value)


def test_every_setting_is_explained_where_it_is_declared() -> None:
    (cls,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef))
    explained = {
        before.target.id
        for before, after in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert set(GatewaySettings.model_fields) == explained


def test_no_name_is_one_that_kubernetes_sets_for_a_service_called_nvila_gateway() -> None:
    assert not [
        name for name in GatewaySettings.model_fields if name == "port" or name.startswith(("port_", "service_"))
    ]
