"""What `nvila status` prints for people: results on stdout, all of them to a file, what fits to a narrow terminal."""

from __future__ import annotations

import pytest

from nvila.cli import status
from nvila.cli.ports import Ports
from nvila.cli.processes import Identity
from nvila.cli.stack import StackConfig
from nvila.cli.state import StackState

VERSION = "Ray 2.60.0, vLLM 0.32.0"


def _print() -> None:
    ports = Ports(
        gateway=1, gateway_grpc=2, cache=3, vision_http=4, vision_grpc=5, vision_metrics=6,
        decode_grpc=7, decode_http=8, recordings=9,
    )  # fmt: skip
    config = StackConfig(name="s", stack_id="i", model="/m", ports=ports, api_key="k", cache_password="p")
    part = status.PartStatus(
        name="decode", pid=1234567, port=45678, health="not ready", version=VERSION, memory_bytes=3 << 30,
        processes=9, restarts=2, uptime_s=5000, reason="",
    )  # fmt: skip
    status._print(config, StackState(name="s", stack_id="i", supervisor=Identity(pid=1, started="1")), [part], "tiny")


def test_to_a_file_goes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    _print()
    said = capsys.readouterr()
    assert said.err == ""
    for word in ("decode", "not ready", "1234567", "45678", "3.0 GiB", "2", "83 min", VERSION):
        assert word in said.out


def test_a_narrow_terminal_shows_whole_words_of_what_matters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    _print()
    said = capsys.readouterr().out
    for word in ("decode", "not ready", "1234567", "45678", "3.0 GiB"):
        assert word in said
    assert "…" not in said
    assert "vLLM" not in said
