"""What a stack is made of: ports, keys, files, and the programs' own settings."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from nvila.cli import ports, stack
from nvila.cli.lifecycle import clear_leftovers
from nvila.cli.ports import HOST, choose_ports
from nvila.cli.processes import Identity
from nvila.cli.stack import StackConfig, configure
from nvila.cli.state import PartPhase, PartState, Phase, StackFolder, StackState
from nvila.errors import InvalidRequest

MODEL = Path("/models/nvila-lite-8b")


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    made = StackFolder(tmp_path / "one")
    made.make()
    return made


def test_ports_are_all_different_and_free() -> None:
    chosen = list(vars(choose_ports()).values())

    assert len(set(chosen)) == len(chosen)
    for port in chosen:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))


def test_a_base_port_fixes_all_of_them_in_order() -> None:
    base = next(port for port in range(21_000, 32_000, 16) if all(ports._is_free(port + n) for n in range(9)))

    assert list(vars(choose_ports(base_port=base)).values()) == list(range(base, base + 9))


def test_a_port_in_use_is_refused_by_its_number() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"{port}: the port is in use"):
            choose_ports(port=port)
        with pytest.raises(InvalidRequest, match=f"port {port} is in use"):
            choose_ports(base_port=port)


@pytest.mark.parametrize("asked", [{"port": 0}, {"port": 65_536}, {"base_port": -1}, {"base_port": 65_529}])
def test_a_number_that_is_no_port_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=r"must be from 1 to 65\d\d\d"):
        choose_ports(**asked)


@pytest.mark.parametrize("name", ["", "models", "triton", "-x", "A", "../up", "a" * 32, "a b"])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="stack name"):
        configure(name=name, model=MODEL)


@pytest.mark.parametrize("key", ["", "short", "with:tenant", "two-keys,at-once", "with a blank", "k" * 257])
def test_a_key_that_the_gateway_would_not_take_whole_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="8 to 256 printable characters"):
        configure(name="one", model=MODEL, api_key=key)


def test_further_keys_come_from_the_gateways_own_variable(folder: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_GATEWAY_API_KEYS", "key-of-another:acme")
    config = configure(name="one", model=MODEL, api_key="nvila-given-key")

    environment = stack.parts(config, folder)[3].command().environment

    assert environment["NVILA_GATEWAY_API_KEYS"] == "nvila-given-key,key-of-another:acme"


def test_each_stack_has_its_own_key_password_id_and_shared_memory() -> None:
    one, two = configure(name="a", model=MODEL), configure(name="a", model=MODEL)

    for field in ("stack_id", "api_key", "cache_password"):
        assert getattr(one, field) != getattr(two, field)
    prefixes = {
        stack.shared_memory_prefix(config, part)
        for config in (one, two)
        for part in ("vision", "gateway", "recordings")
    }
    assert len(prefixes) == 6


def test_a_configuration_is_read_back_as_it_was_written_and_only_its_owner_may_look(folder: StackFolder) -> None:
    config = configure(name="one", model=MODEL, api_key="nvila-given-key")

    config.write(folder)

    assert StackConfig.read(folder) == config
    assert stat.S_IMODE(folder.config.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_state_is_read_back_as_it_was_written(folder: StackFolder) -> None:
    me = Identity.of(os.getpid())
    assert me is not None
    state = StackState(
        name="one",
        stack_id="one-1",
        supervisor=me,
        phase=Phase.READY,
        parts={"cache": PartState(phase=PartPhase.RESTARTING, process=me, restarts=2, reason="it ended", port=7)},
        shared_memory=("nv-12345678",),
        scratch=("/tmp/nvila-12345678",),
    )

    folder.write(state)

    assert folder.read() == state


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "one"}', '{"parts": {"x": 3}}'])
def test_a_state_that_cannot_be_understood_is_no_state(folder: StackFolder, content: str) -> None:
    (folder.path / "state.json").write_text(content)

    assert folder.read() is None
    assert not clear_leftovers(folder)


def test_what_the_environment_says_reaches_the_programs_that_read_it(folder: StackFolder) -> None:
    """Names are checked against the settings classes themselves: a renamed field fails here, not at a start."""
    from nvila.decode.settings import Settings as DecodeSettings
    from nvila.gateway.settings import GatewaySettings
    from nvila.recordings.settings import RecordingsSettings
    from nvila.vision.settings import Settings as VisionSettings

    fields = {
        "NVILA_GATEWAY_": GatewaySettings.model_fields,
        "NVILA_VISION_": VisionSettings.model_fields,
        "NVILA_DECODE_": DecodeSettings.model_fields,
        "NVILA_RECORDINGS_": RecordingsSettings.model_fields,
    }
    config = configure(name="one", model=MODEL)
    for part in stack.parts(config, folder):
        folder.run(part.name).mkdir(parents=True)
        environment = part.command().environment
        for name in environment:
            if name.startswith("NVILA_"):
                prefix = f"NVILA_{part.name.upper()}_"
                assert name.removeprefix(prefix).lower() in fields[prefix], name
    assert stack.redis_url(config) in stack.parts(config, folder)[3].command().environment.values()


def test_no_secret_is_on_a_command_line(folder: StackFolder) -> None:
    config = configure(name="one", model=MODEL)
    for part in stack.parts(config, folder):
        folder.run(part.name).mkdir(parents=True)
        line = " ".join(part.command().argv)
        assert config.api_key not in line
        assert config.cache_password not in line
